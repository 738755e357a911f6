"""Tokens that are new to the model: trained by themselves or with the embeddings, saved, merged and loaded again."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from adapter_building import adapted, train
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import duallora
from duallora import DualLoraConfig
from duallora.errors import ConfigError

NEW = 67  # the first one beyond the model's own
Q = {"target_modules": ["q_proj", "down_proj"]}


@pytest.fixture
def base(llama, tmp_path):
    """A model from the disk with one more token, whose embedding is ``row``."""

    def build(tied: bool, row: float = 0.1) -> LlamaForCausalLM:
        folder = tmp_path / f"base-{tied}"
        if not folder.exists():
            llama(num_hidden_layers=1, tie_word_embeddings=tied).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        model.resize_token_embeddings(NEW + 1, mean_resizing=False)
        with torch.no_grad():
            for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
                embeddings.weight[NEW] = torch.linspace(-row, row, 36)
        return model

    return build


@pytest.fixture
def with_new(ids) -> torch.Tensor:
    return torch.cat([ids, torch.full((len(ids), 1), NEW), ids], 1)


def tied_in(model) -> bool:
    return model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


@pytest.mark.filterwarnings("ignore:.*Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({"trainable_token_indices": [NEW]}, True),
        ({"trainable_token_indices": {"embed_tokens": [NEW], "lm_head": [NEW]}}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),  # tied: test_ties.py
        ({}, True),
    ],
    ids=lambda value: next(iter(value), "resized") if isinstance(value, dict) else "tied" if value else "apart",
)
def test_a_new_token_outlives_training_saving_and_merging(base, with_new, options, tied, tmp_path):
    start = base(tied)
    rows = start.get_input_embeddings().weight.detach().clone()
    model = adapted(start, **Q, **options)
    train(model, with_new)
    y = model.eval()(with_new).logits
    if "trainable_token_indices" in options:
        trained = model.get_input_embeddings().weight.detach()
        assert not torch.equal(trained[NEW], rows[NEW])
        assert torch.equal(trained[:NEW], rows[:NEW])
    assert duallora.gate(model) == 0.75
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base(tied, row=0.0), tmp_path / "adapter").eval()
    assert torch.equal(again(with_new).logits, y)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merging a Dual LoRA adapter whose gate is not open")
        merged = again.merge_and_unload()
    assert torch.equal(merged(with_new).logits, y)
    assert tied_in(merged) is tied
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(plain(with_new).logits, y)
    assert plain.config.vocab_size == NEW + 1


def test_an_embedding_is_adapted_or_has_trained_tokens_not_both(base):
    for target, tied in (("embed_tokens", False), ("lm_head", True)):
        with pytest.raises(ConfigError, match=rf"{target}' has the weight whose tokens \[67\] are trained"):
            adapted(base(tied), target_modules=[target], trainable_token_indices=[NEW])
    model = adapted(base(tied=False), target_modules=["lm_head"], trainable_token_indices=[NEW])
    assert isinstance(model.peft_config["default"], DualLoraConfig)

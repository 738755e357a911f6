"""Tied weights: merging one side leaves the other, unmerging ties them again, a merged model says that they came apart."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from adapter_building import layers, train
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import duallora
from duallora import DualLoraConfig

SIDES = [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]]


def adapted(base: torch.nn.Module, ids: torch.Tensor, targets: list[str], **options) -> peft.PeftModel:
    torch.manual_seed(7)
    config = {"r1": 4, "r2": 3, "alpha": 10, "warmup_steps": 2, "target_modules": targets, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, DualLoraConfig(**{**config, **options}))
    train(model, ids, steps=2)
    return model.eval()


def weights(model: peft.PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
    base = model.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    return tuple(getattr(module, "base_layer", module).weight for module in ends)


@pytest.mark.parametrize("targets", SIDES, ids=str)
def test_merging_a_side_leaves_the_other_and_unmerging_ties_them_again(llama, ids, targets):
    model = adapted(llama(tie_word_embeddings=True), ids, targets)
    want, before = model(ids).logits, weights(model)[0].clone()
    assert weights(model)[0] is weights(model)[1]
    for _ in range(2):
        model.merge_adapter()
        for weight, name in zip(weights(model), ("embed_tokens", "lm_head"), strict=True):
            assert torch.equal(weight, before) == (name not in targets)
        assert torch.equal(model(ids).logits, want)
        model.unmerge_adapter()
        assert weights(model)[0] is weights(model)[1]
        assert torch.equal(weights(model)[0], before)
        assert torch.equal(model(ids).logits, want)


def test_the_sides_come_back_in_any_order_and_cast(llama, ids):
    """One side unmerged while the other is still merged must find W0; so must both after a cast."""
    model = adapted(llama(tie_word_embeddings=True), ids, SIDES[2])
    before = weights(model)[0].clone()
    embedding, *_, head = layers(model)
    for first, second in ((embedding, head), (head, embedding)):
        first.merge()
        model.base_model._find_shared_weights()  # as any merge_adapter in between would
        second.merge()
        first.unmerge()
        assert torch.equal(first.get_base_layer().weight, before)
        assert not torch.equal(second.get_base_layer().weight, before)
        second.unmerge()
        assert weights(model)[0] is weights(model)[1]
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert weights(model)[0] is weights(model)[1]
    assert torch.equal(weights(model)[0], before.bfloat16())


def test_a_side_adapted_later_is_merged_alone_too(llama, ids):
    """By the layers' own merge, which no model has looked at the weights for."""
    model = adapted(llama(tie_word_embeddings=True), ids, ["q_proj"])
    model.add_adapter("later", DualLoraConfig(r=3, warmup_steps=0, init_std=0.3, target_modules=["embed_tokens"]))
    model.base_model.set_adapter(["later"])
    want = model.eval()(ids).logits
    for layer in layers(model):
        layer.merge()
    assert torch.equal(model(ids).logits, want)


def test_a_copied_merged_model_ties_its_own_weights_again(llama, ids):
    model = adapted(llama(tie_word_embeddings=True), ids, SIDES[2])
    model.merge_adapter()
    clone = copy.deepcopy(model)
    clone.unmerge_adapter()
    assert weights(clone)[0] is weights(clone)[1]
    model.unmerge_adapter()
    assert weights(clone)[0] is not weights(model)[0]


@pytest.mark.parametrize(("targets", "merged_before"), zip(SIDES, (False, True, True), strict=True), ids=str)
def test_the_merged_model_reloads_as_the_adapter_computed(llama, ids, tmp_path, targets, merged_before):
    model = adapted(llama(tie_word_embeddings=True), ids, targets)
    want = model(ids).logits
    if merged_before:
        model.merge_adapter()
    with pytest.warns(
        UserWarning, match=r"model\.embed_tokens and lm_head shared one weight.*tie_word_embeddings = F"
    ) as caught:
        merged = model.merge_and_unload()
    assert not any("no longer tied after merging" in str(w.message) for w in caught)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, want)


@pytest.mark.parametrize("targets", [["q_proj"], SIDES[0]], ids=str)
def test_nothing_is_untied_where_nothing_was_merged_into_it(llama, ids, targets):
    model = adapted(llama(tie_word_embeddings=True), ids, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = model.merge_and_unload() if targets == ["q_proj"] else model.unload()
    assert base.config.tie_word_embeddings
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("targets", SIDES, ids=str)
def test_adapters_of_tied_weights_save_and_reload(llama, ids, tmp_path, targets):
    model = adapted(llama(tie_word_embeddings=True), ids, targets)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(again(ids).logits, model(ids).logits)
        # PEFT saves embeddings that are targets; its loading without copies puts each side's in a tensor of its own.
        assert torch.equal(*weights(again)) if low else weights(again)[0] is weights(again)[1]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("targets", [SIDES[0], r".*(embed_tokens|q_proj)", r".*(embed.*|head)"], ids=str)
def test_merged_embeddings_are_saved_without_what_is_merged(llama, ids, tmp_path, targets):
    """PEFT saves the weights of embeddings that are targets as they are: W0 + dW would get dW again when loaded."""
    model = adapted(llama(tie_word_embeddings=True), ids, targets)
    want = model(ids).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    model.merge_adapter()
    if not hasattr(BaseTuner, "_get_adapter_state_dict"):
        with pytest.raises(duallora.errors.ConfigError, match=r"embed_tokens .*dW twice.*unmerge_adapter\(\) and save"):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    again = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert torch.equal(model(ids).logits, want)
    reloaded = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
    assert torch.equal(reloaded(ids).logits, want)


def test_other_merged_layers_do_not_keep_the_adapter_from_being_saved(llama, ids, tmp_path):
    model = adapted(llama(), ids, ["q_proj"])
    want = model(ids).logits
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(llama(), tmp_path)(ids).logits, want)

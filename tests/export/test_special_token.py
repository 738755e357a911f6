"""A special token that is new to the model, from the recipe of a run to the merged model and to what engines take."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from duallora.config.load import load_recipe
from duallora.errors import ConfigError
from duallora.export import check, convert, merge
from duallora.store import adapters
from duallora.train import adapter, run

MARK = "<|sum|>"


@pytest.fixture(scope="module")
def trained(tiny_causal_folder, tmp_path_factory):
    """(the base with one more token, a run that trained its embedding)."""
    place = tmp_path_factory.mktemp("marked")
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_causal_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for part in (model, tokenizer):
        part.save_pretrained(str(place / "base"))
    rows = [{"prompt": f"{MARK}{a}, {a + 1} is", "completion": f" {2 * a + 1}"} for a in range(26)]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.train(recipe(place, [tokenizer.convert_tokens_to_ids(MARK)]), console=Console(file=io.StringIO()))
    return place / "base", place / "run"


def recipe(place, tokens):
    settings = {
        "adapter.r": 3,
        "adapter.warmup_steps": 2,
        "adapter.trainable_token_indices": tokens,
        "data.max_length": 64,
    }
    settings |= {"train.max_steps": 4, "train.batch_size": 4, "train.learning_rate": 1e-2, "train.report_to": "[]"}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return load_recipe(None, overrides, model=str(place / "base"), data=str(place / "sums.jsonl"), output=place / "run")


def test_its_embedding_alone_is_trained_and_merged(trained, tmp_path):
    base, folder = trained
    model, tokenizer = adapters.load_adapter(folder, "generate")
    new = tokenizer.convert_tokens_to_ids(MARK)
    row = tokenizer(f"{MARK}7, 8 is", return_tensors="pt", return_token_type_ids=False)
    assert row["input_ids"].flatten().tolist().count(new) == 1
    with torch.no_grad():
        y = model(**row).logits
    old = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    plain = AutoModelForCausalLM.from_pretrained(merge.merge(folder, tmp_path / "merged")["output"]).eval()
    assert torch.equal(plain(**row).logits, y)
    rows = (plain.get_input_embeddings().weight != old).any(1).nonzero().flatten().tolist()
    assert rows == [new]
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again(f"{MARK}7, 8 is")["input_ids"] == row["input_ids"].flatten().tolist()


def test_a_conversion_carries_it_for_peft_and_every_engine_refuses_it(trained, tmp_path):
    _, folder = trained
    model, tokenizer = adapters.load_adapter(folder, "generate")
    output = convert.convert(folder, tmp_path / "lora", rank=64)["output"]
    row = tokenizer(f"{MARK}7, 8 is", return_tensors="pt", return_token_type_ids=False)
    plain, _ = adapters.load_adapter(output, "generate")
    with torch.no_grad():
        torch.testing.assert_close(plain(**row).logits, model(**row).logits, rtol=0, atol=1e-4)
    with safe_open(f"{output}/adapter_model.safetensors", framework="pt") as file:
        assert sum("token_adapter" in name for name in file.keys()) == 1  # noqa: SIM118 (no iterator)
    for target in check.TARGETS:
        verdict = check.check(output, target=target, files_only=True)["targets"][target]
        assert any("trainable_token_indices" in reason for reason in verdict["reasons"])


def test_a_token_that_the_model_does_not_have_is_named(trained):
    base, _ = trained
    model = AutoModelForCausalLM.from_pretrained(base)
    wanted = recipe(base.parent, [5, model.config.vocab_size])
    with pytest.raises(
        ConfigError, match=rf"holds {model.config.vocab_size}, and the model has {model.config.vocab_size}"
    ):
        adapter.adapt(model, wanted, "generate", 1)

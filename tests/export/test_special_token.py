"""A special token that is new to the model, from the recipe of a run to the merged model and to what engines take."""

from __future__ import annotations

import pytest
import torch
from export.conftest import short_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from duallora.errors import ConfigError
from duallora.export import check, convert, merge
from duallora.store import adapters

MARK = "<|sum|>"

ROWS = [{"prompt": f"{MARK}{a}, {a + 1} is", "completion": f" {2 * a + 1}"} for a in range(26)]


@pytest.fixture(scope="module")
def base(tiny_causal_folder, tmp_path_factory):
    """The base with one more token."""
    folder = tmp_path_factory.mktemp("marked") / "base"
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_causal_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for part in (model, tokenizer):
        part.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def trained(base):
    """(a run that trained the new embedding, its number, a row with it, the logits there)."""
    new = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(MARK)
    folder = short_run(base, ROWS, base.parent / "run", "r=3", f"trainable_token_indices=[{new}]")
    model, tokenizer = adapters.load_adapter(folder, "generate")
    row = tokenizer(f"{MARK}7, 8 is", return_tensors="pt", return_token_type_ids=False)
    assert row["input_ids"].flatten().tolist().count(new) == 1
    with torch.no_grad():
        return folder, new, row, model(**row).logits


def test_its_embedding_alone_is_trained_and_merged(base, trained, tmp_path):
    folder, new, row, y = trained
    plain = AutoModelForCausalLM.from_pretrained(merge.merge(folder, tmp_path / "merged")["output"]).eval()
    assert torch.equal(plain(**row).logits, y)
    old = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    assert (plain.get_input_embeddings().weight != old).any(1).nonzero().flatten().tolist() == [new]
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again(f"{MARK}7, 8 is")["input_ids"] == row["input_ids"].flatten().tolist()


def test_a_conversion_carries_it_for_peft_and_every_engine_refuses_it(trained, tmp_path):
    folder, _, row, y = trained
    output = convert.convert(folder, tmp_path / "lora", rank=64)["output"]
    plain, _ = adapters.load_adapter(output, "generate")
    with torch.no_grad():
        torch.testing.assert_close(plain(**row).logits, y, rtol=0, atol=1e-4)
    told = check.check(output, files_only=True)["targets"]
    assert told.keys() == check.TARGETS.keys()
    for verdict in told.values():
        assert any("trainable_token_indices" in reason for reason in verdict["reasons"])


def test_a_token_that_the_model_does_not_have_is_named(base, tmp_path):
    size = len(AutoTokenizer.from_pretrained(base))
    with pytest.raises(ConfigError, match=rf"holds {size}, and the model has {size}"):
        short_run(base, ROWS, tmp_path / "run", f"trainable_token_indices=[5, {size}]")

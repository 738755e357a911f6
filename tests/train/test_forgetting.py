"""What a run forgets: the change of the loss on text that it does not train on, from the same rows before and after."""

from __future__ import annotations

import json

import peft
import pytest
import torch

from duallora import tasks
from duallora.errors import ConfigError
from duallora.store import adapters
from duallora.tasks.encode import IGNORE
from duallora.train import prepare, run


def text(tmp_path):
    path = tmp_path / "elsewhere.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"Say {n}:", "completion": f" it is {n * n}."}) + "\n" for n in range(9))
    )
    return path


def mean_loss(model, tokenizer, rows):
    """By hand, a row at a time: nats a trained token over all rows."""
    total = count = 0
    for row in rows:
        logits = model(input_ids=torch.tensor(row["input_ids"])[None]).logits[0, :-1].double().log_softmax(-1)
        for at, label in enumerate(row["labels"][1:]):
            if label != IGNORE:
                total, count = total - logits[at, label].item(), count + 1
    return total / count


def test_it_is_the_change_of_the_loss_and_the_base_model_s_is_the_start(make_recipe, console, tmp_path):
    recipe = make_recipe(f"eval.forgetting={text(tmp_path)}", "train.learning_rate=0.05", output=tmp_path / "run")
    found = run.train(recipe, console=console)["metrics"]["forgetting"]
    with torch.no_grad():
        model, tokenizer = adapters.load_adapter(tmp_path / "run", "generate")
        assert isinstance(model, peft.PeftModel)
        rows = prepare.elsewhere(recipe, prepare.read(recipe), tokenizer)
        assert len(rows) == 9
        after = mean_loss(model.eval(), tokenizer, rows)
        with model.disable_adapter():
            before = mean_loss(model, tokenizer, rows)
    assert found == pytest.approx(after - before, abs=1e-5)
    assert abs(found) > 1e-3


def test_a_resumed_run_compares_with_the_loss_before_its_first_step(resumes, tmp_path):
    whole, _, _ = resumes(f"eval.forgetting={text(tmp_path)}", "train.max_steps=4")
    assert whole["metrics"]["forgetting"] != 0


def test_text_of_another_kind_or_the_run_s_own_is_refused(make_recipe, console, moods, sums):
    for settings, message in (
        ({"settings": [f"eval.forgetting={moods}"]}, "expected text, or prompts and completions, and it is classification"),
        ({"settings": [f"eval.forgetting={sums}"]}, "is what the run trains on; name other text, or auto"),
        ({"settings": ["eval.forgetting=auto"], "kind": "classify"}, "expected a run that generates, and this one is to classify"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            run.train(make_recipe(*settings.pop("settings"), **settings), console=console)


def test_the_text_that_is_always_there_is_prose_no_row_of_which_is_in_two_splits():
    splits = tasks.load_data("builtin:reference").splits
    rows = [row.answer for split in splits.values() for row in split]
    assert len(rows) == len(set(rows)) > 300
    assert all(200 <= len(row) <= 800 and row[0] != " " for row in rows)
    assert min(len(split) for split in splits.values()) > 30

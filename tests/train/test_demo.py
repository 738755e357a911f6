"""The demonstration keeps its promises at any size: honest examples, the verbs' own functions, metrics that can be traced."""

import json
from dataclasses import replace

import pytest

from duallora.paper import demo
from duallora.paper.demo import FULL, QUICK, Plan, show
from duallora.store import adapters, record
from duallora.tasks import Example, Task, load_data
from duallora.train import evaluate, prepare, run


@pytest.fixture
def tiny(make_recipe, sums, monkeypatch):
    """A plan of a few steps on a task that has a test split."""
    recipe = make_recipe("train.max_steps=20", "train.save_steps=100")
    whole = load_data(str(sums), eval_fraction=0.5)
    task = replace(whole, splits={**whole.splits, "test": whole.splits["validation"]}, generation={"max_new_tokens": 8})
    monkeypatch.setattr(run.prepare, "load", lambda recipe, console: task)
    settings = ["train.max_steps=20", "train.learning_rate=1e-2", "data.max_length=64", "train.report_to=[]"]
    return Plan(
        title="a", story="b", model=recipe.model.name, data=str(sums), settings=(*settings, "eval.metrics=false"),
        held_out=7, metrics={"loss": ("loss", ".3f", ""), "bleu": ("BLEU", ".1f", " %")},
    )  # fmt: skip


def test_the_metrics_are_those_of_the_model_on_the_disk(tiny, console, tmp_path):
    result = show(tiny, tmp_path / "demo", console)
    assert result["max_logit_difference"] == 0.0
    assert result["after"]["loss"] < result["before"]["loss"]
    summary = record.read_json(tmp_path / "demo" / "demo.json")
    task = demo._held_out(prepare.load(None, None), 7)
    for source, values in ((result["run"], summary["metrics"]["after"]), (tiny.model, summary["metrics"]["before"])):
        scored = evaluate.evaluate(*adapters.load_adapter(source, "generate"), task, batch_size=32, max_length=64)
        assert values["loss"] == scored.metrics["loss"]
        assert values["bleu"] == scored.metrics["bleu"]
    assert set(summary["data"]) == {"train", "validation", "test"}
    assert {"commit", "versions", "threads", "device", "base", "recipe", "seconds"} <= set(summary)
    assert str(tmp_path) not in str(summary["recipe"]["output"])
    examples = json.loads((tmp_path / "demo" / "examples.json").read_text())
    assert len(examples) == 3
    said = console.file.getvalue()
    for promise in ("before", "after", "largest logit difference", "what to try next", "duallora train --data"):
        assert promise in said
    assert all(example["expected"].strip() in said for example in examples)


def test_a_second_demo_goes_beside_the_first(tmp_path):
    assert demo._free(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert demo._free(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo" / "run").mkdir()
    (tmp_path / "demo-2").mkdir()
    (tmp_path / "demo-2" / "run").mkdir()
    assert demo._free(tmp_path / "demo") == tmp_path / "demo-3"


@pytest.mark.parametrize(("length", "count"), [(1, 1), (7, 3), (665, 96), (96, 3), (5, 5)])
def test_examples_are_spread_over_the_whole_split(length, count):
    chosen = demo._spread(length, count)
    assert len(set(chosen)) == count
    assert min(chosen) >= 0
    assert max(chosen) < length
    assert max(b - a for a, b in zip([-1, *chosen], [*chosen, length], strict=True)) <= length / count + 1


def test_fewer_held_out_rows_than_asked_are_all_taken():
    rows = [Example(prompt="a", answer="b", references=("b",))] * 3
    task = Task(name="t", kind="generate", splits={"test": rows}, format="", metrics=lambda p, e: {}, main_metric="")
    assert len(demo._held_out(task, 96).splits["test"]) == 3


@pytest.mark.pretrained
def test_the_quick_demo_runs_on_the_real_model(pretrained_packages, console, tmp_path):
    few = ("train.max_steps=3", "train.batch_size=4", "data.limit=12", "data.eval_limit=4", "train.lr_warmup_steps=1")
    result = show(replace(QUICK, settings=(*QUICK.settings, *few), held_out=6), tmp_path / "demo", console)
    assert result["max_logit_difference"] == 0.0
    assert result["after"]["loss"] != result["before"]["loss"]
    assert "6 held-out functions" in console.file.getvalue()


def test_the_plans_resolve():
    """A renamed setting would otherwise show only when somebody runs the demo."""
    from duallora.config.load import load_recipe

    for plan in (FULL, QUICK):
        recipe = load_recipe(None, plan.settings, model=plan.model, data=plan.data)
        assert recipe.adapter.r == 8

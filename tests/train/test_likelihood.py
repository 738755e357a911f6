"""The likeliest option is what a loop by hand finds, however many options share a pass through the model."""

import json
from pathlib import Path

import pytest
import torch

from duallora.config.recipe import DataSection
from duallora.errors import ConfigError
from duallora.store import adapters
from duallora.store.models import load_model
from duallora.tasks import Example, Task, encode, encode_split, load_task
from duallora.train import evaluate, run

# One option begins with another, two differ in their last letter, one is long, one is not ASCII.
OPTIONS = ["yes", "yes please", "yet", "a much longer answer that costs many tokens", "né"]


def commonsense_folder(root, name, split, rows):
    folder = root / "commonsense" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.json").write_text(json.dumps(rows))
    return root


def exact(predictions, examples):
    hits = [guess == example.references[0] for guess, example in zip(predictions, examples, strict=True)]
    return {"accuracy": 100.0 * sum(hits) / len(hits), "parse_failure_rate": 0.0}


@pytest.fixture(scope="module")
def model(tiny_causal_folder):
    torch.manual_seed(3)
    model, tokenizer = load_model(str(tiny_causal_folder), "generate")
    with torch.no_grad():
        for weight in model.parameters():  # sharp enough that the options are far apart
            weight.mul_(4)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def task():
    prompts = ["Is it so?", "And " * 9 + "now?", "x", "Is it so? And yes", ""]
    rows = [
        Example(prompt=prompt + " ", answer=OPTIONS[number % 5], references=(OPTIONS[number % 5],))
        for number, prompt in enumerate(prompts)
    ]
    return Task(
        name="t", kind="generate", splits={"test": rows}, format="f", metrics=exact, main_metric="accuracy",
        options=lambda example: OPTIONS if len(example.prompt) > 3 else OPTIONS[:2],
    )  # fmt: skip


def by_hand(model, tokenizer, prompt, option):
    """log P(option | prompt): every row on its own, in float64."""
    (encoded,) = encode(Example(prompt=prompt, answer=option), tokenizer, max_length=512)
    ids, labels = encoded.input_ids[:-1], encoded.labels[:-1]  # without the end of text
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(scores[at - 1, label]) for at, label in enumerate(labels) if label != -100)


def test_the_likeliest_option_is_the_one_a_loop_by_hand_finds(model, task):
    """Its loss is that of the right answers."""
    result = evaluate.evaluate(*model, task, scoring="likelihood", batch_size=3)
    best, per_byte = [], []
    for example in task.splits["test"]:
        scored = {option: by_hand(*model, example.prompt, option) for option in task.options(example)}
        best.append(max(scored, key=scored.get))
        per_byte.append(max(scored, key=lambda option, s=scored: s[option] / len(option.encode())))
    assert result.predictions == best
    assert best != per_byte
    assert result.metrics["accuracy"] == exact(best, result.examples)["accuracy"]
    assert result.metrics["accuracy_norm"] == exact(per_byte, result.examples)["accuracy"]
    assert set(result.metrics) == {"accuracy", "accuracy_norm", "loss", "perplexity"}
    rows, _ = encode_split(task.splits["test"], model[1], "generate", max_length=512)
    assert result.metrics["loss"] == pytest.approx(evaluate.loss_on(*model, rows, "generate"), rel=1e-6)


def test_the_normed_figure_weighs_an_option_by_its_bytes_and_not_its_letters(model, monkeypatch):
    options = ["éééééé", "aaaaaaaa"]  # 12 bytes in 6 letters, 8 in 8
    task = Task(
        name="t", kind="generate", splits={"test": [Example(prompt="?", answer=options[0], references=options[:1])]},
        format="f", metrics=exact, main_metric="accuracy", options=lambda example: options,
    )  # fmt: skip
    scores = [-9.0, -9.0, -7.0]  # the right answer's, then each
    monkeypatch.setattr(evaluate, "log_likelihoods", lambda *a, **k: scores)
    result = evaluate.evaluate(*model, task, scoring="likelihood")
    assert result.predictions == [options[1]]
    assert (result.metrics["accuracy"], result.metrics["accuracy_norm"]) == (0.0, 100.0)


def test_rows_that_share_their_beginning_have_the_likelihoods_they_have_alone(model, task):
    """Nested rows, equal rows, and rows equal but for where the answer begins, in any order."""
    network, tokenizer = model
    texts = [
        ("a b", " c d"),
        ("a b", " c"),
        ("a", " b c d"),
        ("a b", " c e"),
        ("a b c", " d"),
        ("a b", " c d"),
        ("q", ""),
    ]
    for order in (texts, texts[::-1]):
        rows, _ = encode_split([Example(prompt=p, answer=a) for p, a in order], tokenizer, "generate", max_length=64)
        together = evaluate.log_likelihoods(network, tokenizer, rows)
        alone = [evaluate.log_likelihoods(network, tokenizer, [row])[0] for row in rows]
        assert together == pytest.approx(alone, rel=1e-5)
        assert len(evaluate._sharing(rows)) < len(rows)
        assert sorted(row for own in evaluate._sharing(rows).values() for row in own) == list(range(len(rows)))


def test_options_that_differ_in_their_last_token_cost_one_pass_with_the_right_answer(model, tmp_path):
    rows = [
        {"instruction": f"{text} Answer format: answer1/answer2/answer3/answer4", "input": "", "answer": "answer2",
         "output": "the correct answer is answer2"}
        for text in ("Q?", "A longer question?")
    ]  # fmt: skip
    network, tokenizer = model
    task = load_task("arc_easy", data_dir=commonsense_folder(tmp_path, "ARC-Easy", "test", rows))
    assert task.options(task.splits["test"][0]) == [f"the correct answer is answer{number}" for number in (1, 2, 3, 4)]
    seen = []
    handle = network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    try:
        result = evaluate.evaluate(network, tokenizer, task, scoring="likelihood")
    finally:
        handle.remove()
    assert sum(seen) == 2
    assert all(prediction in {"answer1", "answer2", "answer3", "answer4"} for prediction in result.predictions)


def test_a_method_that_must_know_where_the_prompt_ends_is_told(make_recipe, task):
    recipe = make_recipe(
        "adapter.method=loreft", "adapter.options={}", "adapter.warmup_steps=auto", "adapter.r1=null",
        "adapter.duallora_dropout=0", "adapter.alpha=null", "train.max_steps=2",
    )  # fmt: skip
    run.train(recipe, console=None)
    network, tokenizer = adapters.load_adapter(recipe.output, "generate")
    example = task.splits["test"][0]
    rows, _ = encode_split([example, Example(prompt="Is it", answer=" so? yes")], tokenizer, "generate", max_length=64)
    together = evaluate.log_likelihoods(network, tokenizer, rows)
    assert together == pytest.approx([evaluate.log_likelihoods(network, tokenizer, [row])[0] for row in rows], rel=1e-5)


def test_a_task_without_options_is_refused_before_any_model_is_loaded(make_recipe, monkeypatch):
    monkeypatch.setattr(run, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"scoring=likelihood: .* has no answer options"):
        run.train(make_recipe("eval.scoring=likelihood"))


def test_a_run_scores_its_test_rows_by_likelihood(make_recipe, tmp_path, monkeypatch):
    rows = [
        {"instruction": f"{number}? Answer format: true/false", "input": "", "answer": gold,
         "output": f"the correct answer is {gold}"}
        for number, gold in enumerate(["true", "false"] * 6)
    ]  # fmt: skip
    root = commonsense_folder(tmp_path / "data", "boolq", "train", rows)
    commonsense_folder(root, "boolq", "test", rows[:3])
    commonsense_folder(
        root, "piqa", "test", [{**rows[0], "answer": "solution1", "instruction": "Answer format: solution1/solution2"}]
    )
    monkeypatch.setenv("DUALLORA_DATA", str(root))
    recipe = make_recipe("eval.test=true", "eval.scoring=likelihood", "train.max_steps=2")
    recipe = recipe.model_copy(update={"data": DataSection(task="commonsense", max_length=256)})
    metrics = run.train(recipe)["metrics"]
    assert metrics["test"]["average"] == (metrics["test"]["accuracy_boolq"] + metrics["test"]["accuracy_piqa"]) / 2
    assert "average_norm" in metrics["test"]
    assert not any("parse" in name for name in metrics["test"])
    text = Path(recipe.output, "predictions.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["group"] for line in lines] == ["boolq", "piqa", "boolq", "boolq"]
    total = sum(line["log_likelihood"] for line in lines)
    assert -total / sum(line["tokens"] for line in lines) == pytest.approx(metrics["test"]["loss"], rel=1e-6)
    assert {line["prediction"] for line in lines} <= {"true", "false", "solution1", "solution2"}

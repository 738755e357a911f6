"""A run that has learned nothing says so, with the metrics and the remedy; one that has learned something does not."""

import json
import math
import random
from dataclasses import replace

import pytest

from duallora.store.run_folder import Log
from duallora.tasks import Example, Task
from duallora.train import chance, run
from duallora.train.evaluate import EvalResult

LABELS = ("billing", "login", "shipping", "bug", "cancel", "question")
CLASSES = Task(name="t", kind="classify", splits={}, format="", labels=LABELS, metrics=dict, main_metric="accuracy")
SCORES = replace(CLASSES, kind="regress", labels=(), main_metric="pearson")
TEXTS = replace(CLASSES, kind="generate", labels=(), main_metric="bleu")


def found(task, predictions, targets, loss, **more):
    if task.kind == "generate":
        examples = [Example(prompt="p", answer=text, references=(text,)) for text in targets]
    else:
        examples = [Example(texts=("x",), label=label) for label in targets]
    result = EvalResult({"loss": loss}, list(predictions), examples)
    return chance.of_result(task, "validation", result, **more)


def test_the_constant_answers_loss():
    """ln 6 for six classes alike; three of four and one of four by hand; the variance of 1, 2, 6 is 14/3."""
    assert chance.constant_loss("classify", list(range(6)) * 7) == pytest.approx(math.log(6))
    assert chance.constant_loss("classify", [1, 1, 0, 1]) == pytest.approx(
        -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    )
    assert chance.constant_loss("regress", [1, 2, 6]) == pytest.approx(14 / 3)
    assert chance.constant_loss("classify", [4] * 9) == chance.constant_loss("regress", [4.0] * 9) == 0


def test_one_class_at_ln_of_the_classes_is_chance():
    """What the runs at 2e-3 ended with: 16.7 of 100, a loss of ln 6, every ticket "login"."""
    one = found(CLASSES, [1] * 60, list(range(6)) * 10, 1.792)
    assert one.at_chance
    for words in ("accuracy 16.7 on 60 validation rows", "has 16.7", "loss 1.792", 'every prediction is "login"'):
        assert words in one.words
    said = chance.verdict([one]).record("lower it")
    assert said == {
        "rows": "validation", "loss": 1.792, "chance_loss": pytest.approx(math.log(6)),
        "message": f"at chance: {one.words}", "remedy": "lower it",
    }  # fmt: skip


def test_a_loss_above_the_entropy_is_no_chance_where_the_answers_are_right():
    """An overfitted classifier is sure of its few errors: accuracy 80 with a loss over ln 6. It has learned."""
    targets = list(range(6)) * 10
    right = [target if number % 5 else (target + 1) % 6 for number, target in enumerate(targets)]
    one = found(CLASSES, right, targets, 2.5)
    assert one.at_chance is False
    assert chance.verdict([chance.of_training("classify", 1.79, targets), one]) is None


@pytest.mark.parametrize(
    ("predictions", "targets", "loss"),
    [
        ([2] * 40, [2] * 40, 1.9),  # a test set of one class: always answering it is right
        ([0] * 40, [3] * 40, 1.9),
        ([1] * 4, [0, 1, 2, 3], 1.5),  # four rows
        ([1] * 100, [1] * 95 + [0] * 5, 0.15),  # the rare class is told apart (entropy .199), if not by its own name
        ([0, 1, 0, 1, 1, 0], [0, 1, 1, 0, 1, 0], 0.70),  # six rows, four right
        ([0] * 20 + [1] * 12 + [1] * 19 + [0] * 13, [0] * 32 + [1] * 32, 0.70),  # 39 of 64: 1.75 errors above a half
    ],
)
def test_rows_that_cannot_tell_are_no_evidence(predictions, targets, loss):
    assert found(CLASSES, predictions, targets, loss).at_chance is None


def test_training_tells_where_the_held_out_rows_cannot():
    """README's path holds out 15 rows of 300: the training loss is the evidence."""
    targets = list(range(6)) * 40
    few = found(CLASSES, [1] * 4, [0, 1, 2, 3], 1.79)
    stuck = chance.of_training("classify", 1.785, targets)
    assert chance.verdict([few, stuck]) is stuck
    assert "1.785" in stuck.words
    assert "1.792" in stuck.words
    assert chance.verdict([few, chance.of_training("classify", 1.5, targets)]) is None
    assert chance.of_training("classify", 0.0, [3] * 9) is None  # one class: nothing to learn
    assert chance.of_training("generate", 9.0, []) is None


def test_a_rare_class_shifts_what_chance_is():
    """95 to 5: a loss of .19 is the entropy, not a classifier's success; ln 2 has no part in it."""
    assert found(CLASSES, [1] * 200, [1] * 190 + [0] * 10, 0.199).at_chance
    assert chance.of_training("classify", 0.195, [1] * 190 + [0] * 10).at_chance


def test_regression_is_judged_by_its_correlation():
    """A constant, and noise, are chance; a good order on a wrong scale is not."""
    draw = random.Random(0)
    targets = [draw.uniform(0, 5) for _ in range(60)]
    spread = chance.constant_loss("regress", targets)
    assert found(SCORES, [2.5] * 60, targets, spread).at_chance
    noise = [2.5 + draw.gauss(0, 0.1) for _ in targets]
    assert found(SCORES, noise, targets, spread).at_chance
    assert "correlation" in found(SCORES, noise, targets, spread).words
    wrong_way = [-target for target in targets]
    assert found(SCORES, wrong_way, targets, 30.0).at_chance
    scaled = [0.1 * target + draw.gauss(0, 0.05) - 3 for target in targets]
    assert found(SCORES, scaled, targets, 30.0).at_chance is False
    assert found(SCORES, [2.5] * 60, targets, 0.5 * spread).at_chance is None
    assert found(SCORES, [1.0] * 30, [4.0] * 30, 9.0).at_chance is None  # equal targets


def test_a_generator_is_compared_with_itself_untrained():
    answers = [f"answer {number}" for number in range(30)]
    assert found(TEXTS, answers, answers, 1.0, before=2.0).at_chance is None
    assert found(TEXTS, answers, answers, 1.99, before=2.0).at_chance is None
    worse = found(TEXTS, answers, answers, 1.9999, before=2.0)
    assert worse.at_chance
    assert "was 2.000 before training" in worse.words
    assert found(TEXTS, answers, answers, 2.0).at_chance is None  # `eval` knows no earlier loss


def test_one_text_for_every_prompt_is_chance():
    same = found(TEXTS, ["I do not know"] * 30, [f"answer {number}" for number in range(30)], 1.0, before=2.0)
    assert same.at_chance
    assert "'I do not know'" in same.words
    assert found(TEXTS, ["yes"] * 30, ["yes"] * 30, 1.0, before=2.0).at_chance is None  # it is what was asked
    assert found(TEXTS, ["yes"] * 5, list("abcde"), 1.0, before=2.0).at_chance is None


@pytest.mark.parametrize("count", [24, 240])
@pytest.mark.parametrize("classes", [2, 6])
def test_how_often_it_errs(count, classes):
    """Of 400 guessers four in five are found; of those that are right in three of four rows, none is suspected."""
    draw = random.Random(count + classes)
    guessers = learners = 0
    for _ in range(400):
        targets = [number % classes for number in range(count)]
        guesses = [draw.randrange(classes) for _ in range(count)]
        guessers += bool(found(CLASSES, guesses, targets, math.log(classes)).at_chance)
        taught = [target if draw.random() < 0.5 else guess for target, guess in zip(targets, guesses, strict=True)]
        right = 100 * sum(map(int.__eq__, taught, targets)) / count
        if right >= 75:
            learners += bool(found(CLASSES, taught, targets, 1.2 * math.log(classes)).at_chance)
    assert guessers >= 310
    assert learners == 0


def test_the_last_steps_loss_is_weighed_by_steps(tmp_path):
    """Lines at 1, 4, 7, 8: the last 3 steps are the lines of 5 to 7 and 8."""
    path = tmp_path / "log.jsonl"
    lines = [{"step": step, "loss": loss, "gate": 1.0} for step, loss in ((1, 9.0), (4, 6.0), (7, 2.0), (8, 6.0))]
    path.write_text("\n".join(map(json.dumps, [*lines, {"step": 8, "eval_loss": 77.0}])))
    log = Log(path)
    assert log.last_loss(1) == 6.0
    assert log.last_loss(3) == log.last_loss(4) == pytest.approx((3 * 2.0 + 6.0) / 4)
    assert log.last_loss(100) == pytest.approx((9.0 + 3 * 6.0 + 3 * 2.0 + 6.0) / 8)
    assert Log(tmp_path / "none.jsonl").last_loss(10) is None


def test_a_run_says_it(make_recipe, console, tmp_path):
    """No step moves anything at a rate of 1e-12: the run is done, and its last words are a warning and the remedy."""
    still = make_recipe("train.learning_rate=1e-12", "eval.metrics=true", kind="classify", output=tmp_path / "still")
    result = run.train(still, console=console)
    assert result["status"] == "done"
    assert result["at_chance"]["message"].startswith("at chance: ")
    assert "train.learning_rate=3e-13 (now 1e-12)" in result["at_chance"]["remedy"]
    assert json.loads((tmp_path / "still" / "metrics.json").read_text())["at_chance"] == result["at_chance"]
    last = console.file.getvalue().splitlines()[-2:]
    assert last[0].startswith("warning  at chance: ")
    assert last[1].startswith("remedy   ")


def test_a_run_that_learns_does_not(make_recipe, console):
    settings = ("train.max_steps=60", "train.save_steps=100", "eval.metrics=true")
    result = run.train(make_recipe(*settings, kind="classify"), console=console)
    assert result["metrics"]["train_loss"] < 0.3
    assert result["at_chance"] is None
    assert "warning" not in console.file.getvalue()


def test_a_generator_that_does_not_move_says_it(make_recipe, console):
    result = run.train(make_recipe("train.learning_rate=1e-12", "adapter.warmup_steps=100000"), console=console)
    assert "before training" in result["at_chance"]["message"]

"""Whether a model knows more than one that ignores its input, told by its metrics on scored rows.

The rival is the best constant answer: the most frequent class, whose loss is the entropy of the class frequencies; the
mean target, whose loss is the variance; for a generator, the model before it was trained. Too few rows to tell are no
evidence of either.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from duallora.tasks import Example, Task, metrics
from duallora.train.evaluate import EvalResult

ABOUT = 0.95  # a loss of this share of the constant answer's, or more, is about that loss
UNMOVED = 0.999  # a generator's loss after training, over the one before, from which it has not moved down
ENOUGH = 20  # rows from which values near the constant answer's count
MISSED = 7  # rows of another answer, all of them answered alike: one chance in a hundred at even odds
LEARNED = 2.0  # standard errors above the constant answer from which something was learned
NOTHING = 1.0  # and below which nothing was, if the loss agrees; between the two it cannot be told
REMEDY = "if it was trained, train it again with a third of its train.learning_rate, or for more steps"


@dataclass(frozen=True)
class Finding:
    """What is known of one set of rows; ``at_chance`` None: they cannot tell.

    ``loss`` and ``chance_loss`` are in the task's own unit: nats per row or token, or squared error.
    """

    at_chance: bool | None
    rows: str
    loss: float
    chance_loss: float | None = None
    words: str = ""

    def record(self, remedy: str) -> dict[str, Any]:
        """As the field ``at_chance`` of metrics.json and of the JSON line has it."""
        fields = {key: value for key, value in asdict(self).items() if key not in ("at_chance", "words")}
        return {**fields, "message": f"at chance: {self.words}", "remedy": remedy}


def constant_loss(kind: str, targets: Sequence[float]) -> float:
    """The loss of the best constant answer: the entropy of the class frequencies in nats, or the targets' variance."""
    if kind == "regress":
        return float(np.var(np.asarray(targets, dtype=float)))
    return -math.fsum(n / len(targets) * math.log(n / len(targets)) for n in Counter(targets).values())


def of_training(kind: str, loss: float | None, targets: Sequence[float]) -> Finding | None:
    """Of a classifier's or regressor's training loss in its last steps; None where there is nothing to compare."""
    if kind == "generate" or loss is None or not (chance := constant_loss(kind, targets)):
        return None
    words = f"the training loss of the last steps is {loss:.3f}, and {_rival(kind)} has {chance:.3f}"
    return Finding(loss >= ABOUT * chance, "train", loss, chance, words)


def of_result(task: Task, rows: str, result: EvalResult, *, before: float | None = None) -> Finding:
    """Of what `evaluate` found on the split ``rows``; ``before`` is a generator's loss untrained."""
    loss = result.metrics["loss"]
    if task.loss_only:
        return of_losses(rows, loss, before)
    if task.kind == "generate":
        return _generated(rows, result.predictions, result.examples, loss, before)
    if task.kind == "classify":
        targets = [float(example.label or 0) for example in result.examples]
        return _classified(task.labels, rows, result.predictions, targets, loss)
    return _regressed(rows, result.predictions, result.examples, loss)


def of_losses(rows: str, loss: float, before: float | None) -> Finding:
    """Of a generator's loss after training beside the one before."""
    worse = before is not None and loss >= UNMOVED * before
    words = f"the {rows} loss is {loss:.3f} and was {before:.3f} before training" if worse else ""
    return Finding(worse or None, rows, loss, before, words)


def verdict(findings: Sequence[Finding]) -> Finding | None:
    """The finding that says "at chance", unless another shows that something was learned."""
    if any(one.at_chance is False and one.rows != "train" for one in findings):
        return None
    return next((one for one in findings if one.at_chance), None)


def _classified(
    labels: Sequence[str], rows: str, predictions: Sequence[int], targets: list[float], loss: float
) -> Finding:
    count, chance = len(targets), constant_loss("classify", targets)
    if not chance:  # one class: always answering it is right
        return Finding(None, rows, loss, chance)
    most, often = Counter(targets).most_common(1)[0]
    share = often / count
    hits = sum(guess == target for guess, target in zip(predictions, targets, strict=True)) / count
    above = (hits - share) / math.sqrt(share * (1 - share) / count)
    if above >= LEARNED:
        return Finding(False, rows, loss, chance)
    alike = len(set(predictions)) == 1 and sum(target != predictions[0] for target in targets) >= MISSED
    words = (
        f'accuracy {100 * hits:.1f} on {count:,} {rows} rows, where always answering "{labels[int(most)]}" has '
        f"{100 * share:.1f}; loss {loss:.3f}, where {_rival('classify')} has {chance:.3f}"
    )
    if len(set(predictions)) == 1:
        words += f'; every prediction is "{labels[int(predictions[0])]}"'
    told = loss >= ABOUT * chance and above < NOTHING and (count >= ENOUGH or alike)
    return Finding(told or None, rows, loss, chance, words)


def _regressed(rows: str, predictions: Sequence[float], examples: Sequence[Example], loss: float) -> Finding:
    count, chance = len(examples), constant_loss("regress", [float(example.label or 0) for example in examples])
    if not chance:
        return Finding(None, rows, loss, chance)
    found = metrics.get("pearson").value(predictions, examples)
    above = found / 100 * math.sqrt(count - 1)
    if above >= LEARNED:
        return Finding(False, rows, loss, chance)
    words = (
        f"correlation {found:.1f} with the targets of {count:,} {rows} rows; loss {loss:.3f}, where "
        f"{_rival('regress')} has {chance:.3f}"
    )
    told = loss >= ABOUT * chance and above < NOTHING and count >= ENOUGH
    return Finding(told or None, rows, loss, chance, words)


def _generated(
    rows: str, texts: Sequence[str], examples: Sequence[Example], loss: float, before: float | None
) -> Finding:
    missed = sum(
        text.strip() not in {one.strip() for one in example.references}
        for text, example in zip(texts, examples, strict=True)
    )
    if len(set(texts)) == 1 and missed >= MISSED and len({example.references for example in examples}) > 1:
        shown = texts[0] if len(texts[0]) <= 40 else texts[0][:37] + "..."
        words = f"all {len(texts):,} {rows} rows get one answer, {shown!r}; loss {loss:.3f}"
        return Finding(True, rows, loss, before, words)
    return of_losses(rows, loss, before)


def _rival(kind: str) -> str:
    return "knowing the class frequencies alone" if kind == "classify" else "always answering the mean"

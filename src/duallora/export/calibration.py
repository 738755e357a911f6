"""What a conversion sees of data: rows whose second moments it takes, and held-out rows on which it is measured."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from duallora.errors import ConfigError, DataError, NonFiniteError
from duallora.export import check
from duallora.store import adapters
from duallora.store.positions import check_room
from duallora.tasks import IGNORE, Example, encode_split
from duallora.tasks.task import Kind
from duallora.train import calibration, evaluate, score

ROWS = 64  # to calibrate on, if not told otherwise
HELD_OUT = 48  # to measure on
LOGITS = 1 << 28  # of the held-out rows' trained tokens, in float32: what is kept of the adapter to compare with
SEED = 0  # of the draw

Row = dict[str, Any]


class Data(NamedTuple):
    """Rows of one task, encoded by the adapter's own tokenizer."""

    rows: list[Row]
    """To calibrate on, shortest first."""
    held_out: list[Row]
    kind: Kind
    batch_size: int
    facts: dict[str, Any]
    """What the sidecar says of them."""

    def batches(self, model: Any, tokenizer: Any) -> list[dict[str, Tensor]]:
        """The rows as the model takes them, on its device."""
        return list(calibration.batches(self.rows, tokenizer, self.batch_size, model))

    def outputs(self, model: Any, tokenizer: Any) -> list[Tensor]:
        """Of each held-out row the logits [trained tokens, vocabulary], or [classes], float32 on the CPU."""
        how = {"batch_size": self.batch_size}
        if self.kind == "generate":
            return evaluate.trained_logits(model, tokenizer, self.held_out, **how)
        return list(evaluate.classify(model, tokenizer, self.held_out, **how))

    def measure(self, outputs: Sequence[Tensor], reference: Sequence[Tensor] | None = None) -> dict[str, float]:
        """``loss`` on the held-out rows, as a run has it, and how far ``outputs`` are from ``reference``.

        That is ``kl``, the mean of KL(reference || outputs) in nats per trained token (per row of a classifier), or where
        numbers are predicted their mean ``squared_difference``.
        """
        found: dict[str, float] = {"loss": self._loss(outputs)}
        if not math.isfinite(found["loss"]):
            raise NonFiniteError(
                f"the loss on the held-out rows is {found['loss']}: expected a finite number. Check the adapter with duallora "
                "check, or load it in float32"
            )
        if reference is None:
            return found
        pairs = list(zip(outputs, reference, strict=True))
        if self.kind == "regress":
            squares = [(a - b).double().square().mean() for a, b in pairs]
            return {**found, "squared_difference": float(torch.stack(squares).mean())}
        sizes = [len(torch.atleast_2d(one)) for one in outputs]
        far = sum(n * check.compare([a], [b])["kl"] for n, (a, b) in zip(sizes, pairs, strict=True))
        return {**found, "kl": far / sum(sizes)}

    def _loss(self, outputs: Sequence[Tensor]) -> float:
        if self.kind == "regress":
            pairs = zip(outputs, self.held_out, strict=True)
            return sum(float((one.squeeze() - row["labels"]).square()) for one, row in pairs) / len(outputs)
        labels = [_trained(row) if self.kind == "generate" else [row["labels"]] for row in self.held_out]
        both = zip(outputs, labels, strict=True)
        total = sum(float(F.cross_entropy(torch.atleast_2d(a), torch.tensor(b), reduction="sum")) for a, b in both)
        return total / sum(map(len, labels))


def load(
    source: str | Path,
    model: Any,
    tokenizer: Any,
    console: Console,
    *,
    data: str | None = None,
    rows: int = ROWS,
    data_dir: Path | None = None,
) -> Data:
    """``rows`` rows of ``data``, or of what the run of ``source`` was trained on, and `HELD_OUT` others.

    The rows are drawn from the training split, those held out are the first of the validation split; of data without
    splits both are drawn, and share none.

    Raises:
        ConfigError: there are no data, or they are of another kind than the adapter's or too long for the model.
        DataError: a file is missing or not as it should be, or holds too few rows.
    """
    try:
        chosen = score.choose(str(source), console, data=data, data_dir=data_dir)
    except (ConfigError, DataError) as error:
        remedy = "name other rows with --calibrate DATA, or use --no-calibrate"
        raise type(error)(f"no rows to calibrate on: {error}; {remedy}") from error
    if chosen.task.kind != (kind := adapters.adapter_kind(source)):
        raise ConfigError(
            f"{chosen.task.source or chosen.task.name} holds {score.KINDS[chosen.task.kind]}, and {source} was trained for "
            f"{score.KINDS[kind]}: calibrate on rows of its own kind, or use --no-calibrate"
        )
    if rows < 1:
        raise ConfigError(f"calibration_rows={rows}: expected at least 1")
    splits = chosen.task.splits
    first = "train" if "train" in splits else chosen.split
    second = next((name for name in ("validation", "test") if name in splits and name != first), first)
    examples = list(splits[first])
    order = random.Random(f"{SEED} calibration").sample(range(len(examples)), len(examples))
    shown = [examples[place] for place in order[:rows]]
    held = list(splits[second][:HELD_OUT]) if second != first else [examples[at] for at in order[rows:][:HELD_OUT]]
    if not held:
        raise DataError(
            f"{chosen.task.source or chosen.task.name} has {len(examples)} rows: expected more than the {rows} to calibrate "
            "on, to measure on the others; ask for fewer with --calibration-rows"
        )
    encoded = [_encoded(part, tokenizer, chosen) for part in (shown, held)]
    for part in encoded:
        check_room(model, tokenizer, row=evaluate.longest(part))
    ours, theirs = sorted(encoded[0], key=lambda row: len(row["input_ids"])), encoded[1]
    if chosen.task.kind == "generate":
        theirs = _within(theirs, LOGITS // model.get_input_embeddings().weight.shape[0])
    facts = {
        "task": chosen.task.name,
        "data": {name: chosen.task.fingerprint(name) for name in dict.fromkeys((first, second))},
        "split": first,
        "rows": len(ours),
        "tokens": sum(len(row["input_ids"]) for row in ours),
        "held_out_split": second,
        "held_out_rows": len(theirs),
    }
    return Data(ours, theirs, chosen.task.kind, chosen.settings.batch_size, facts)


def _encoded(examples: Sequence[Example], tokenizer: Any, chosen: score.Chosen) -> list[Row]:
    return encode_split(examples, tokenizer, chosen.task.kind, max_length=chosen.max_length)[0]


def _trained(row: Mapping[str, Any]) -> list[int]:
    return [label for label in row["labels"][1:] if label != IGNORE]


def _within(rows: list[Row], tokens: int) -> list[Row]:
    """The first rows that hold so many trained tokens; at least one."""
    held, total = rows[:1], len(_trained(rows[0]))
    for row in rows[1:]:
        total += len(_trained(row))
        if total > tokens:
            break
        held.append(row)
    return held

"""What a start from data sees before training: rows of the run's own training split, and the run's own loss on them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

import duallora
from duallora.config.recipe import Recipe
from duallora.tasks import IGNORE, Collator

Row = TypeVar("Row", bound=Mapping[str, Any])

# adapter.init -> which halves of `init_from_gradient` it takes.
GRADIENT_STARTS: dict[str, dict[str, bool]] = {
    "gradient": {},
    "gradient-signs": {"magnitudes": False},
    "gradient-magnitudes": {"signs": False},
}


def draw_rows(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """``count`` of ``rows`` (all, if there are fewer) drawn by ``seed``, shortest first; training sees them all the same.

    Drawn, because the first rows of a file that is sorted by its labels say little about it.
    """
    drawn = random.Random(f"{seed} calibration").sample(range(len(rows)), min(count, len(rows)))
    return [rows[index] for index in sorted(drawn, key=lambda index: (len(rows[index]["input_ids"]), index))]


def batches(rows: Sequence[Mapping[str, Any]], tokenizer, batch_size: int, model: Any) -> Iterator[dict[str, Tensor]]:
    """``rows`` in their order, ``batch_size`` at a time, collated as for training, on the model's device."""
    collate, device = Collator(tokenizer), next(model.parameters()).device
    for first in range(0, len(rows), batch_size):
        yield {name: value.to(device) for name, value in collate(rows[first : first + batch_size]).items()}


def start_from_gradient(
    model: Any,
    recipe: Recipe,
    rows: Sequence[Mapping[str, Any]],
    tokenizer,
    loss: Callable[[Any, Tensor, Tensor], Tensor],
) -> int:
    """Starts the adapter as ``adapter.init`` says and returns how many rows it looked at.

    ``loss(outputs, labels, n)`` is the share of some rows in the run's mean loss over n of them, or over n trained tokens.
    The shares add up, so the start does not depend on how the rows are cut into batches.
    """
    options = recipe.train
    step = options.batch_size * options.gradient_accumulation_steps
    drawn = draw_rows(rows, recipe.adapter.init_batches * step, recipe.seed)
    # Checkpointing is off with dropout; where training needs it, one row at a time saves the memory instead.
    batch_size = 1 if options.gradient_checkpointing else options.batch_size
    labels = [row["labels"] for row in drawn]
    learned = sum(sum(label != IGNORE for label in own[1:]) if isinstance(own, list) else 1 for own in labels)

    def share(model: Any, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        return loss(model(**batch), labels, torch.tensor(learned, device=labels.device))

    given = batches(drawn, tokenizer, batch_size, model)
    duallora.init_from_gradient(model, given, share, **GRADIENT_STARTS[recipe.adapter.init])
    return len(drawn)

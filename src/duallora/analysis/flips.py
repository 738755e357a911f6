"""What training does to the two masks of dW: which entries Sign(D C) has turned over, which ReLU(B A) lets through.

open       share of entries with B A > 0
positive   share of entries with D C > 0
flipped    share of entries whose sign differs between two states
flipped_open   the same among the entries that are open in the later one: the others' signs reach no output
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from duallora.analysis.states import Adapter, State, direction, magnitude, module, row_blocks, short
from duallora.core.equation import Update

SHARES = ("open", "positive", "flipped", "flipped_open", "flipped_since_last")
Row = dict[str, Any]


def masks(update: Update) -> tuple[Tensor, Tensor]:
    """(B A > 0, D C > 0) of one state of a layer, [out, in] each."""
    blocks = [(magnitude(block) > 0, direction(block) > 0) for block in row_blocks(update)]
    return torch.cat([opened for opened, _ in blocks]), torch.cat([positive for _, positive in blocks])


def flips(before: Tensor, positive: Tensor, opened: Tensor) -> dict[str, float]:
    """``flipped`` and ``flipped_open`` between two states' D C > 0; ``opened`` is the later one's B A > 0."""
    turned = before ^ positive
    return {"flipped": _share(turned), "flipped_open": _share(turned[opened])}


def _share(mask: Tensor) -> float:
    """NaN of no entries."""
    return int(mask.sum()) / mask.numel() if mask.numel() else float("nan")


def course(states: Sequence[State]) -> list[Row]:
    """One row a layer and state: its masks, and what has flipped since the first state and since the one before."""
    rows: list[Row] = []
    adapters = [Adapter(state) for state in states]
    for layer in adapters[0].layers() if adapters else ():
        signs: list[Tensor] = []  # of the first state and of the one before
        for adapter in adapters:
            opened, positive = masks(adapter.update(layer))
            row: Row = {"step": adapter.state.step, "layer": short(layer), "module": module(layer)}
            row |= {"entries": positive.numel(), "open": _share(opened), "positive": _share(positive)}
            if signs:
                row |= flips(signs[0], positive, opened)
                row["flipped_since_last"] = _share(signs[-1] ^ positive)
            signs = [*signs[:1], positive]
            rows.append(row)
    return rows


def overall(rows: Sequence[Row]) -> list[Row]:
    """One row a state: the shares over all layers, each weighing as many entries as it has."""
    found = []
    for step in sorted({row["step"] for row in rows}):
        of = [row for row in rows if row["step"] == step]
        summary: Row = {"step": step, "entries": sum(row["entries"] for row in of)}
        for name in SHARES:
            told = [row for row in of if row.get(name, float("nan")) == row.get(name)]
            # An open entry is what flipped_open counts, so that is what it is averaged over.
            weights = [row["entries"] * (row["open"] if name == "flipped_open" else 1) for row in told]
            if sum(weights):
                summary[name] = sum(w * row[name] for w, row in zip(weights, told, strict=True)) / sum(weights)
        found.append(summary)
    return found

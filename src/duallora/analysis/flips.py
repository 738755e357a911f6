"""What training does to the two masks of dW: which entries Sign(D C) has turned over, which ReLU(B A) lets through.

open       share of entries with B A > 0
positive   share of entries with D C > 0
flipped    share of entries whose sign differs between two states
flipped_open   the same among the entries that are open in the later one: the others' signs reach no output
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from duallora.analysis.states import Adapter, State, direction, magnitude, module, row_blocks, short
from duallora.core.equation import Update

Row = dict[str, Any]


def masks(update: Update) -> dict[str, float]:
    """``open`` and ``positive`` of one state of a layer."""
    opened = positive = 0
    for block in row_blocks(update):
        opened += int((magnitude(block) > 0).sum())
        positive += int((direction(block) > 0).sum())
    entries = update.shape[0] * update.shape[1]
    return {"open": opened / entries, "positive": positive / entries}


def flips(before: Update, after: Update) -> dict[str, float]:
    """``flipped`` and ``flipped_open`` between two states of a layer (the latter NaN where nothing is open)."""
    flipped = opened = both = 0
    for first, second in zip(row_blocks(before), row_blocks(after), strict=True):
        turned = (direction(first) > 0) != (direction(second) > 0)
        active = magnitude(second) > 0
        flipped += int(turned.sum())
        opened += int(active.sum())
        both += int((turned & active).sum())
    entries = after.shape[0] * after.shape[1]
    return {"flipped": flipped / entries, "flipped_open": both / opened if opened else float("nan")}


def course(states: Sequence[State]) -> list[Row]:
    """One row a layer and state: its masks, and what has flipped since the first state and since the one before."""
    rows: list[Row] = []
    adapters = [Adapter(state) for state in states]
    for layer in adapters[0].layers() if adapters else ():
        first = before = None
        for adapter in adapters:
            update = adapter.update(layer)
            out, into = update.shape
            row: Row = {
                "step": adapter.state.step,
                "layer": short(layer),
                "module": module(layer),
                "entries": out * into,
            }
            row |= masks(update)
            if first is not None and before is not None:
                row |= flips(first, update)
                row["flipped_since_last"] = row["flipped"] if before is first else flips(before, update)["flipped"]
            first, before = first or update, update
            rows.append(row)
    return rows


FIGURES = ("open", "positive", "flipped", "flipped_open", "flipped_since_last")


def overall(rows: Sequence[Row]) -> list[Row]:
    """One row a state: the figures over all layers, each weighing as many entries as it has."""
    found = []
    for step in sorted({row["step"] for row in rows}):
        of = [row for row in rows if row["step"] == step]
        summary: Row = {"step": step, "entries": sum(row["entries"] for row in of)}
        for name in FIGURES:
            told = [row for row in of if row.get(name, float("nan")) == row.get(name)]
            # An open entry is what flipped_open counts, so that is what it is averaged over.
            weights = [row["entries"] * (row["open"] if name == "flipped_open" else 1) for row in told]
            if sum(weights):
                summary[name] = sum(w * row[name] for w, row in zip(weights, told, strict=True)) / sum(weights)
        found.append(summary)
    return found

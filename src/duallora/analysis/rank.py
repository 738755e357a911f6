"""How many dimensions an update has (the paper's Figure 3): rank and effective rank of ReLU(B A), Sign(D C) and dW.

From the factors, in float64: the rank of merged minus base weights in a low precision is that of the rounding. Rank
counts singular values above s_max max(out, in) eps; effective rank is exp of the entropy of s / sum(s) (Roy and
Vetterli, EUSIPCO 2007), which tells a spectrum that is flat from one that has a tail.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from duallora.analysis.states import Adapter, State, direction, magnitude, module, short

Row = dict[str, Any]


def spectrum(X: Tensor) -> Tensor:
    """The singular values of X, falling, in float64."""
    return torch.linalg.svdvals(X.double())


def rank(S: Tensor, shape: tuple[int, ...]) -> int:
    """How many singular values ``S`` of a matrix of this ``shape`` are above rounding (numpy's and torch's tolerance)."""
    tolerance = S.max() * max(shape) * torch.finfo(torch.float64).eps
    return int(S.gt(tolerance).sum())


def effective_rank(S: Tensor) -> float:
    """exp(-sum p log p) with p = S / sum(S), from 1 to len(S); 0 for a matrix of zeros."""
    p = S[S > 0] / S.sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def of_matrix(X: Tensor) -> dict[str, float]:
    """``rank`` and ``effective_rank`` of a matrix."""
    S = spectrum(X)
    return {"rank": rank(S, tuple(X.shape)), "effective_rank": effective_rank(S)}


def table(state: State) -> list[Row]:
    """One row a layer and matrix of a state: magnitude, direction and dW of Dual LoRA; dW of LoRA."""
    adapter = Adapter(state)
    rows: list[Row] = []
    for layer in adapter.layers():
        update = adapter.update(layer)
        named = {"magnitude": magnitude(update), "direction": direction(update), "dW": update.delta()}
        rows += [_row(state, layer, name, X) for name, X in named.items()]
    rows += [_row(state, layer, "dW", adapter.low_rank(layer)) for layer in adapter.low_rank_layers()]
    return rows


def _row(state: State, layer: str, matrix: str, X: Tensor) -> Row:
    where = {"step": state.step, "layer": short(layer), "module": module(layer), "matrix": matrix}
    return {**where, "out": X.shape[0], "in": X.shape[1], **of_matrix(X)}

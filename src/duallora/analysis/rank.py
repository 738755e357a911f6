"""How many dimensions an update has (the paper's Figure 3): rank and effective rank of ReLU(B A), Sign(D C) and dW.

From the factors, in float64: the rank of merged minus base weights in a low precision is that of the rounding, which a model that was
trained as a whole (`of_change`) cannot be spared. Rank
counts singular values above s_max max(out, in) eps, with float64's eps and, as ``rank_float32``, with float32's; effective rank is exp of the entropy of s / sum(s) (Roy and
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


def effective_rank(S: Tensor) -> float:
    """exp(-sum p log p) with p = S / sum(S), from 1 to len(S); 0 for a matrix of zeros."""
    p = S[S > 0] / S.sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def of_matrix(X: Tensor, terms: float = 0.0) -> dict[str, float]:
    """``rank``, ``rank_float32`` and ``effective_rank`` of a matrix; the tolerance is numpy's and torch's, with ``terms`` in s_max's place where
    that is larger: the size of what was summed into X, of which the rounding is left where it cancels.
    """
    S = spectrum(X)
    least = max(float(S.max()), terms) * max(X.shape)
    above = S[S.gt(least * torch.finfo(torch.float64).eps)]
    single = int(S.gt(least * torch.finfo(torch.float32).eps).sum())
    return {"rank": len(above), "rank_float32": single, "effective_rank": effective_rank(above)}


def of_change(W0: Tensor, W: Tensor) -> dict[str, float]:
    """Of W - W0, above the rounding of the coarser type of the two: `rank` and `rank_float32` are one number."""
    S = spectrum(W.double() - W0.double())
    eps = max(torch.finfo(X.dtype).eps for X in (W0, W))
    above = S[S.gt(max(float(S.max()), float(spectrum(W0).max())) * max(W.shape) * eps)]
    return {"rank": len(above), "rank_float32": len(above), "effective_rank": effective_rank(above)}


def table(state: State) -> list[Row]:
    """One row a layer and matrix of a state: magnitude, direction and dW of Dual LoRA; dW of LoRA and of a whole model, which loads its base.

    Raises:
        ConfigError: the base of a whole model is missing or another.
    """
    if state.whole:
        from duallora.analysis.dynamics import whole_layers  # loads PEFT

        return [_row(state, name, "dW", W, of_change(W0, W)) for _, name, W0, W in whole_layers([state])]
    adapter = Adapter(state)
    rows: list[Row] = []
    for layer in adapter.layers():
        update = adapter.update(layer)
        named = {"magnitude": magnitude(update), "direction": direction(update), "dW": update.delta()}
        rows += [_row(state, layer, name, X, of_matrix(X)) for name, X in named.items()]
    for layer in adapter.low_rank_layers():
        B, A = adapter.low_rank(layer)
        # At the start of PiSSA and its like the two halves of this product cancel (methods/starts.py).
        rows.append(_row(state, layer, "dW", B @ A, of_matrix(B @ A, float(B.norm() * A.norm()))))
    return rows


def _row(state: State, layer: str, matrix: str, X: Tensor, ranks: dict[str, float]) -> Row:
    where = {"step": state.step, "layer": short(layer), "module": module(layer), "matrix": matrix}
    return {**where, "out": X.shape[0], "in": X.shape[1], **ranks}

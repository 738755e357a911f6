"""The plain form: build W' with the equation and let autograd write the backward. The oracle of the backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from duallora.core.equation import Update


def apply_weight(x: Tensor, W: Tensor, b: Tensor | None, fan_in_fan_out: bool) -> Tensor:
    """The base layer's own product, so that merged and unmerged layers run the same instructions.

    W [out, in] as ``nn.Linear`` computes it, or [in, out] as transformers' ``Conv1D`` does.
    """
    if not fan_in_fan_out:
        return F.linear(x, W, b)
    rows = x.reshape(-1, x.size(-1))
    y = rows @ W if b is None else torch.addmm(b, rows, W)
    return y.view(*x.shape[:-1], W.size(1))


def build_weight(
    W: Tensor | None,
    update: Update,
    *,
    fan_in_fan_out: bool,
    dtype: torch.dtype,
    m: Tensor | None = None,
    minus_base: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What :func:`duallora.ops.recompute.build_weight` gives, differentiable in the factors and in m."""
    total = update.delta()
    base = None if W is None else (W.T if fan_in_fan_out else W)
    if base is not None:
        total = total + base
    norm = None
    if m is not None:
        # The norm is a constant for the gradient (DoRA, section 4.3).
        norm = torch.linalg.vector_norm(total.detach(), dim=1).clamp(min=torch.finfo(total.dtype).tiny)
        total = total * (m / norm)[:, None]
    if minus_base and base is not None:
        total = total - base
    return (total.T if fan_in_fan_out else total).to(dtype), norm


def dual_linear(
    x: Tensor, W: Tensor | None, b: Tensor | None, update: Update, m: Tensor | None, form: str, fan_in_fan_out: bool
) -> Tensor:
    """:func:`duallora.dual_linear` by autograd; it keeps [out, in] tensors for the backward."""
    if form == "merged" and W is not None:
        weight, _ = build_weight(W, update, fan_in_fan_out=fan_in_fan_out, dtype=W.dtype, m=m)
        return apply_weight(x, weight, b, fan_in_fan_out)
    delta, _ = build_weight(
        None if m is None else W, update, fan_in_fan_out=fan_in_fan_out, dtype=x.dtype, m=m, minus_base=True
    )
    y = apply_weight(x, delta, None, fan_in_fan_out)
    return y if form == "delta" or W is None else apply_weight(x, W, b, fan_in_fan_out) + y

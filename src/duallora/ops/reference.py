"""The plain form: build W' with :func:`dual_delta` and let autograd write the backward. The oracle of the backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from duallora.core.equation import add_update, dual_delta


def apply_weight(x: Tensor, W: Tensor, b: Tensor | None, fan_in_fan_out: bool) -> Tensor:
    """The base layer's own product, so that merged and unmerged layers run the same instructions.

    W [out, in] as ``nn.Linear`` computes it, or [in, out] as transformers' ``Conv1D`` does.
    """
    if not fan_in_fan_out:
        return F.linear(x, W, b)
    rows = x.view(-1, x.size(-1))
    y = rows @ W if b is None else torch.addmm(b, rows, W)
    return y.view(*x.shape[:-1], W.size(1))


def build_weight(W, A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial, fan_in_fan_out) -> Tensor:
    dW = dual_delta(
        A, B, C, D, scaling,
        magnitude=magnitude, direction=direction, ste_clip=ste_clip, fixed_sign=fixed_sign, initial=initial,
    )  # fmt: skip
    if fan_in_fan_out:
        dW = dW.T
    return dW if W is None else add_update(W, dW)


def dual_linear(
    x, W, b, A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial, fan_in_fan_out
) -> Tensor:
    weight = build_weight(W, A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial, fan_in_fan_out)
    if W is None:
        weight = weight.to(x.dtype)
    return apply_weight(x, weight, b, fan_in_fan_out)

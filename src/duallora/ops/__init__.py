"""One linear layer with a Dual LoRA update: y = x (W0 + dW)^T + b, behind interchangeable backends.

``reference`` lets autograd write the backward and keeps [out, in] tensors for it; ``recompute`` keeps x and the
factors only and rebuilds the rest. Both have the signature of :func:`dual_linear` and the same ``build_weight``,
which is also what merging writes: a merged layer computes the very bits of an unmerged one.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from duallora.ops import recompute, reference

BACKENDS: dict[str, ModuleType] = {"reference": reference, "recompute": recompute}


def backend_module(name: str) -> ModuleType:
    """The module behind a backend name. "auto" is ``recompute``: LoRA's memory, and no slower than autograd.

    Raises:
        ValueError: no such backend here.
    """
    if name == "auto":
        return recompute
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not available: choose one of {', '.join(['auto', *BACKENDS])}.")
    return BACKENDS[name]


def dual_linear(
    x: Tensor,
    W: Tensor | None,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    scaling: float | Tensor,
    *,
    magnitude: str = "relu",
    direction: str = "ste",
    ste_clip: str = "chain",
    fixed_sign: Tensor | None = None,
    initial: Sequence[Tensor] = (),
    fan_in_fan_out: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y = x (W + dW)^T + b, with dW as :func:`duallora.dual_delta` defines it. Differentiable in x, b and the factors.

    Args:
        x: [..., in]. Under autocast it is cast as ``F.linear`` would; otherwise it must have the dtype of W.
        W: [out, in], or [in, out] with ``fan_in_fan_out`` (transformers' Conv1D). None: y = x dW^T alone.
        b: [out] or None.
        A, B, C, D, scaling and the options: as in :func:`duallora.dual_delta`.
        backend: "auto", "reference" or "recompute".

    Returns:
        y [..., out], in the dtype of x (autocast's under autocast).

    Raises:
        ValueError: unknown backend.
    """
    return backend_module(backend).dual_linear(
        x, W, b, A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial, fan_in_fan_out
    )


@torch.no_grad()
def build_weight(
    W: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    scaling: float | Tensor,
    *,
    magnitude: str = "relu",
    direction: str = "ste",
    ste_clip: str = "chain",
    fixed_sign: Tensor | None = None,
    initial: Sequence[Tensor] = (),
    fan_in_fan_out: bool = False,
    backend: str = "auto",
) -> Tensor:
    """W' = W + dW in the dtype and layout of W: the weight :func:`dual_linear` multiplies by, bit for bit."""
    return backend_module(backend).build_weight(
        W, A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial, fan_in_fan_out
    )


__all__ = ["BACKENDS", "backend_module", "build_weight", "dual_linear"]

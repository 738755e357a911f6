"""One linear layer with a Dual LoRA update: y = x (W0 + dW)^T + b, behind interchangeable backends.

``reference`` lets autograd write the backward and keeps [out, in] tensors for it; ``recompute`` keeps x and the
factors only and rebuilds the rest. Both have the signature of :func:`dual_linear` and the same ``build_weight``,
which is also what merging writes: a merged layer computes the very bits of an unmerged one.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from duallora.core.equation import check_arguments
from duallora.ops import recompute, reference

BACKENDS: dict[str, ModuleType] = {"reference": reference, "recompute": recompute}


def backend_module(name: str) -> ModuleType:
    """The module behind a backend name. "auto" is ``recompute``: LoRA's memory, at some cost in time (docs/results.md).

    Raises:
        ValueError: no such backend here.
    """
    if name == "auto":
        return recompute
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not available: choose one of {', '.join(['auto', *BACKENDS])}.")
    return BACKENDS[name]


def _check_weight(W: Tensor | None, A: Tensor, B: Tensor, fan_in_fan_out: bool) -> None:
    expected = (A.shape[1], B.shape[0]) if fan_in_fan_out else (B.shape[0], A.shape[1])
    if W is not None and tuple(W.shape) != expected:
        raise ValueError(f"W is {tuple(W.shape)}, but A {tuple(A.shape)} and B {tuple(B.shape)} make {expected}.")


@functools.cache
def _warn_of_float16() -> None:
    warnings.warn(
        "Training in float16: under loss scaling the straight-through clip sees gradients thousands of times too large "
        "and saturates, which distorts the direction group. Use bfloat16, or ste_clip='none'.",
        stacklevel=4,
    )


def keep_off_the_fast_path(parent: nn.Module, layer: nn.Module) -> None:
    """Make a ``nn.TransformerEncoderLayer`` that holds ``layer`` call it.

    In eval mode torch's fused path reads ``layer.weight`` instead, and would silently compute the base model; a hook
    anywhere below the encoder layer disqualifies that path.
    """
    if isinstance(parent, nn.TransformerEncoderLayer):
        layer.register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, args: Any) -> None:
    return None


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
        ValueError: an unknown option or backend, or shapes or dtypes that do not fit together.
    """
    check_arguments(A, B, C, D, magnitude, direction, ste_clip, fixed_sign)
    _check_weight(W, A, B, fan_in_fan_out)
    clips = direction == "ste" and ste_clip != "none"
    if x.dtype == torch.float16 and clips and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _warn_of_float16()
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
    check_arguments(A, B, C, D, magnitude, direction, ste_clip, fixed_sign)
    _check_weight(W, A, B, fan_in_fan_out)
    return backend_module(backend).build_weight(
        W, A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial, fan_in_fan_out
    )


__all__ = ["BACKENDS", "backend_module", "build_weight", "dual_linear", "keep_off_the_fast_path"]

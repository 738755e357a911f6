"""One linear layer with a Dual LoRA update: y = x (W0 + dW)^T + b, behind interchangeable backends.

``reference`` lets autograd write the backward and keeps [out, in] tensors for it; the others keep x and the factors
only and rebuild the rest. :func:`build_weight` is what the merged forward multiplies by and what merging writes: a
merged layer computes the very bits of an unmerged one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duallora.core.equation import Update
from duallora.ops.autograd import How, product, weight
from duallora.ops.backends import BACKENDS, check_backend, check_backend_name

FORMS = ("merged", "added", "delta")


def _check(
    W: Tensor | None, update: Update, m: Tensor | None, form: str, fan_in_fan_out: bool, gradient_tokens: float
) -> None:
    update.check()
    expected = update.weight_shape(fan_in_fan_out)
    if W is not None and tuple(W.shape) != expected:
        factors = f"A {tuple(update.A.shape)} and B {tuple(update.B.shape)}"
        raise ValueError(f"W is {tuple(W.shape)}, but {factors} make {expected}.")
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown: choose one of {', '.join(FORMS)}.")
    if m is not None and W is None:
        raise ValueError("m scales the rows of W + dW, but W is None: give the base weight.")
    if m is not None and tuple(m.shape) != update.shape[:1]:
        raise ValueError(f"m is {tuple(m.shape)}, but the layer has {update.shape[0]} output features: one each.")
    if not 0 < gradient_tokens <= 1:
        raise ValueError(f"gradient_tokens={gradient_tokens!r}: expected a share of the tokens in (0, 1].")


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
    m: Tensor | None = None,
    fan_in_fan_out: bool = False,
    form: str = "merged",
    gradient_tokens: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """y = x (W + dW)^T + b, with dW as :func:`duallora.dual_delta` defines it. Differentiable in x, b, m and the factors.

    Args:
        x: [..., in]. Under autocast it is cast as ``F.linear`` would; otherwise it must have the dtype of W.
        W: [out, in], or [in, out] with ``fan_in_fan_out`` (transformers' Conv1D). None: y = x dW^T alone.
        b: [out] or None.
        A, B, C, D, scaling and the options: as in :func:`duallora.dual_delta`.
        m: [out], DoRA's magnitude: W + dW is replaced by m (W + dW) / |W + dW|, norms of output rows, a constant in
            the backward (arXiv 2402.09353, section 4.3). Needs W.
        form: "merged": one product with the sum, rounded to the dtype of x; "added": x W^T + b + x dW^T, a product
            more and no rounding of the sum; "delta": x dW^T (with m: x (W' - W)^T) alone.
        gradient_tokens: experimental, for CPUs: share of the tokens, in (0, 1], that form the factors' gradient: the heaviest, and a
            weighted sample of the others (arXiv 2305.15265), which leaves the gradient unbiased; drawn from torch's generator in the backward. 1: exact.
        backend: "auto" (the fastest here), "cpu", "triton", "recompute" or "reference".

    Returns:
        y [..., out], in the dtype of x (autocast's under autocast).

    Raises:
        ValueError: an unknown option, or shapes or dtypes that do not fit together.
        RuntimeError: a backend asked for by name cannot run here.
    """
    update = Update(A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial)
    check_backend_name(backend)
    _check(W, update, m, form, fan_in_fan_out, gradient_tokens)
    form = "delta" if W is None else form
    return product(x, W, b, m, update, How(form, fan_in_fan_out, backend, gradient_tokens))


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
    m: Tensor | None = None,
    fan_in_fan_out: bool = False,
    backend: str = "auto",
) -> Tensor:
    """W' in the dtype and layout of W: the weight :func:`dual_linear` multiplies by, bit for bit."""
    update = Update(A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial)
    check_backend_name(backend)
    _check(W, update, m, "merged", fan_in_fan_out, 1.0)
    return weight(W, m, update, How("merged", fan_in_fan_out, backend), W.dtype)


__all__ = ["BACKENDS", "FORMS", "build_weight", "check_backend", "dual_linear"]

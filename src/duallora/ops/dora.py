"""DoRA (arXiv 2402.09353) of one linear layer without ever forming an [out, in] tensor.

    y = c (y0 - b + s x A^T B^T) + b,   y0 = x W0^T + b,   c = m / norm,   norm_i = |w_i + s b_i A|
    norm_i^2 = |w_i|^2 + 2 s w_i . (b_i A) + s^2 |b_i A|^2 = |w_i|^2 + b_i . (2 s A w_i + s^2 (A A^T) b_i)

w_i is row i of W0 [out, in], b_i of B [out, r]; A [r, in]; m, norm and c [out]. A W0^T is [r, out] and A A^T is [r, r].
The norm is a constant of the backward pass (section 4.3). docs/dora.md derives the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 18  # of a 16-bit W0 widened at a time: 1 MB, within a core's cache
_CANCELLED = 0.05  # norm^2 below this share of its terms has lost digits: 1e-7 / 0.05 is still under 1e-5
_TINY = 1e-20  # a magnitude below it counts as it, so that y keeps what the gradient of m needs


def is_eager() -> bool:
    """No compiler or function transform is looking on: memory has an address, and may be overwritten."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _columns(Wt: Tensor) -> int:
    """How many columns of W0^T [in, out] are widened at a time. A GPU wants few launches, a compiler a small graph."""
    if not is_eager():
        return Wt.shape[1]
    return max(1, (_BLOCK_ELEMENTS if Wt.is_cpu else 64 * _BLOCK_ELEMENTS) // Wt.shape[0])


def row_squares(Wt: Tensor) -> Tensor:
    """|w_i|^2 [out] in float32 at least. Summed in float64: done once, and long float32 sums lose a digit."""
    if not is_eager() or Wt.device.type == "mps":  # which has no float64
        return torch.linalg.vector_norm(Wt, dim=0, dtype=wide(Wt.dtype)).square()
    parts = [torch.linalg.vector_norm(some, dim=0, dtype=torch.float64) for some in Wt.split(_columns(Wt), dim=1)]
    return torch.cat(parts).square().to(wide(Wt.dtype))


def row_norms(Wt: Tensor, A: Tensor, B: Tensor, s: float, squares: Tensor) -> Tensor:
    """|w_i + s b_i A| [out] from W0^T [in, out], A [r, in], B [out, r] and |w_i|^2 [out]."""
    dtype = torch.promote_types(squares.dtype, A.dtype)
    A, B = A.to(dtype), B.to(dtype)
    if Wt.dtype == A.dtype:
        AWt = A @ Wt  # [r, out]
    else:
        AWt = torch.cat([A @ some.to(A.dtype) for some in Wt.split(_columns(Wt), dim=1)], dim=1)
    AAt = A @ A.T
    cross = torch.addmm(AWt.T, B, AAt, beta=2 * s, alpha=s * s)
    squared = squares + (cross * B).sum(1)
    # What the terms amount to without their signs; where they cancel, only digits above epsilon times it are left.
    terms = squares + B.square().sum(1) * (s * s * torch.linalg.matrix_norm(AAt))
    if is_eager() and squared.is_cpu:  # elsewhere looking would make the host wait
        rows = (squared < _CANCELLED * terms).nonzero().view(-1)
        for some in rows.split(_columns(Wt)) if len(rows) else ():
            delta = torch.mm(A.T, B[some].T)
            squared[some] = torch.linalg.vector_norm(Wt[:, some].to(A.dtype).add_(delta, alpha=s), dim=0).square()
    else:
        squared = torch.maximum(squared, terms * torch.finfo(terms.dtype).eps)
    return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()


def dora(
    y0: Tensor, x: Tensor, A: Tensor, B: Tensor, c: Tensor, s: float, bias: Tensor | None, result: Tensor | None = None
) -> Tensor:
    """y = c (y0 - b + s x A^T B^T) + b by torch operators; with ``result``, result + that - y0 (under dropout).

    c enters the low-rank product through B, so that autograd keeps y0 and nothing else of size [.., out].
    """
    u = F.linear(x, A)
    scaled = ((s * c).unsqueeze(1) * B).to(u.dtype)  # [out, r]
    shift = None if bias is None else ((1 - c) * bias).to(u.dtype)
    low_rank = F.linear(u, scaled, shift)
    return torch.addcmul(low_rank, y0, c) if result is None else torch.addcmul(result + low_rank, y0, c - 1)


def dora_over(y0: Tensor, x: Tensor, A: Tensor, B: Tensor, m: Tensor, norm: Tensor, s: float, Wt: Tensor) -> Tensor:
    """The same without bias, written over y0 = x Wt [.., out]; of size [.., out], y itself is all that is kept.

    y0, x, A and B must have one dtype (not float16) and y0 be contiguous, with no other user; Wt is W0^T [in, out].
    """
    if not Wt.requires_grad:
        y0 = y0.detach()  # then both halves of dx are one sum, formed in place
    return _Scale.apply(_AddLowRank.apply(y0, x, A, B, m, norm, Wt, s), m, norm)


class _AddLowRank(torch.autograd.Function):
    """z = y0 + s (x A^T) B^T, written over y0 [.., out]. First half of y = c z, see `_Scale`."""

    @staticmethod
    def forward(
        ctx: Any, y0: Tensor, x: Tensor, A: Tensor, B: Tensor, m: Tensor, norm: Tensor, Wt: Tensor, s: float
    ) -> Tensor:
        u = x.reshape(-1, x.shape[-1]) @ A.T
        z = y0.detach()
        z.view(-1, z.shape[-1]).addmm_(u, B.T, alpha=s)
        ctx.save_for_backward(x, u, A, B, m, norm, Wt)
        ctx.s, ctx.y_is_lost = s, False
        return z

    @staticmethod
    def backward(ctx: Any, dZ: Tensor) -> tuple[Tensor | None, ...]:
        x, u, A, B, m, norm, Wt = ctx.saved_tensors
        s, x2, dm = ctx.s, x.reshape(-1, x.shape[-1]), None
        if torch.is_grad_enabled():  # differentiated twice
            u = x2 @ A.T
        if ctx.y_is_lost:  # then this is dL/dy, and z is computed once more
            dY = dZ.reshape(-1, dZ.shape[-1])
            z = torch.addmm(x2 @ Wt, u, B.T, alpha=s)
            dm = (dY * z).sum(0, dtype=norm.dtype) / norm
            dZ = (dZ * (m / norm)).to(dZ.dtype)
        dZ2 = dZ.reshape(-1, dZ.shape[-1])
        dx = dA = dB = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            du = (dZ2 @ B) * s
            dA = du.T @ x2 if ctx.needs_input_grad[2] else None
        if ctx.needs_input_grad[3]:
            dB = (u.T @ dZ2).T * s
        if ctx.needs_input_grad[1]:
            through_base = not ctx.needs_input_grad[0]
            dx = (dZ2 @ Wt.T).addmm_(du, A) if through_base else du @ A
            dx = dx.view(x.shape)
        return (dZ if ctx.needs_input_grad[0] else None), dx, dA, dB, dm, None, None, None


class _Scale(torch.autograd.Function):
    """y = c z with c = m / norm, written over z [.., out]. Second half of y = c z.

    dm = sum_tokens dY z / norm = sum_tokens dY y / m, so y itself is kept, which most often its next user keeps too.
    If the model then writes over y (an in-place activation, say), `_AddLowRank` computes dm from x instead.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, m: Tensor, norm: Tensor) -> Tensor:
        y = z.detach()
        y.mul_(_off_zero(m) / norm)
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, m, norm)
        ctx.version = None if y.is_inference() else y._version
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        try:
            y, m, norm = ctx.saved_tensors
            lost = y is not None and y._version > ctx.version  # how it shows where checkpointing hands y back
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            lost = True
        if lost:
            ctx.next_functions[0][0].y_is_lost = True
            return dY, None, None
        m = _off_zero(m)
        if y is None:
            return (dY * (m / norm)).to(dY.dtype), None, None
        product = dY * y
        dm = product.reshape(-1, product.shape[-1]).sum(0, dtype=norm.dtype) / m
        if torch.is_grad_enabled():  # differentiated twice
            return (dY * (m / norm)).to(dY.dtype), dm, None
        return torch.mul(dY, m / norm, out=product), dm, None


def _off_zero(m: Tensor) -> Tensor:
    return torch.where(m.abs() < _TINY, _TINY, m)

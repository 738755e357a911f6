"""The lean form: saves x and the factors, rebuilds W' in the backward, and never keeps an [out, in] tensor.

    forward    W' = W0 + dW                y = x W'^T + b
    backward   dx = dY W'                  db = sum_t dY_t
               G  = dY^T x   [out, in]     dA, dB, dC, dD from G by dual_delta_backward

Both passes go through W' in blocks of output rows small enough for the cache, calling the one formula on each
block: B and D are cut by rows, A and C are shared. They are registered with torch.library as opaque operators, so
``torch.compile(fullgraph=True)`` takes them as they are. Second derivatives are not provided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from duallora.core.equation import add_update, dual_delta, dual_delta_backward
from duallora.ops.reference import apply_weight

# Elements of [out, in] in a CPU block, 512 kB in float32: the fastest of 2^15 to 2^22 on one thread (LOG.md).
BLOCK_ELEMENTS = 1 << 17


def _row_blocks(out_features: int, in_features: int, device: torch.device, direction: str) -> Iterator[slice]:
    # DoReFa's scale is a mean over all of D C, and a GPU wants few launches: one block.
    rows = out_features
    if device.type == "cpu" and direction != "dorefa":
        rows = max(1, BLOCK_ELEMENTS // max(1, in_features))
    for start in range(0, out_features, rows):
        yield slice(start, min(start + rows, out_features))


def _cut(factors: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """(A, B, C, D) restricted to output rows."""
    return [factor[rows] if i % 2 else factor for i, factor in enumerate(factors)]


def _empty_weight(W: Tensor | None, A: Tensor, B: Tensor, fan_in_fan_out: bool) -> tuple[Tensor, Tensor]:
    """(W' to fill, the same seen as [out, in]); float32 at least where there is no W."""
    if W is not None:
        weight = torch.empty_like(W)
        return weight, weight.T if fan_in_fan_out else weight
    by_rows = A.new_empty(B.shape[0], A.shape[1], dtype=torch.promote_types(A.dtype, torch.float32))
    return by_rows.T if fan_in_fan_out else by_rows, by_rows


def _write(by_rows: Tensor, W: Tensor | None, rows: slice, dW: Tensor, fan_in_fan_out: bool) -> None:
    if W is None:
        by_rows[rows] = dW
    else:
        by_rows[rows] = add_update(W[:, rows].T if fan_in_fan_out else W[rows], dW)


def build_weight(W, A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial, fan_in_fan_out) -> Tensor:
    weight, by_rows = _empty_weight(W, A, B, fan_in_fan_out)
    for rows in _row_blocks(B.shape[0], A.shape[1], A.device, direction):
        dW = dual_delta(
            A, B[rows], C, None if D is None else D[rows], scaling,
            magnitude=magnitude, direction=direction, ste_clip=ste_clip,
            fixed_sign=None if fixed_sign is None else fixed_sign[rows], initial=_cut(initial, rows),
        )  # fmt: skip
        _write(by_rows, W, rows, dW, fan_in_fan_out)
    return weight


@torch.library.custom_op("duallora::dual_linear", mutates_args=())
def _forward(
    x: Tensor,
    W: Tensor | None,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    scaling: Tensor,
    magnitude: str,
    direction: str,
    ste_clip: str,
    fixed_sign: Tensor | None,
    initial: Sequence[Tensor],
    fan_in_fan_out: bool,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # eager mode runs this body under the caller's autocast
        weight = build_weight(
            W, A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial, fan_in_fan_out
        )
        b = None if b is None else b.to(x.dtype)
        return apply_weight(x, weight.to(x.dtype), b, fan_in_fan_out)


@_forward.register_fake
def _(x, W, b, A, B, *_options):
    return x.new_empty(*x.shape[:-1], B.shape[0])


@torch.library.custom_op("duallora::dual_linear_backward", mutates_args=())
def _backward(
    dY: Tensor,
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    scaling: Tensor,
    magnitude: str,
    direction: str,
    ste_clip: str,
    fixed_sign: Tensor | None,
    initial: Sequence[Tensor],
    fan_in_fan_out: bool,
    need_dx: bool,
    need_dW: bool,
    need_factors: bool,
) -> list[Tensor]:
    """[dx, dW, dA, dB, dC, dD]; what is not needed, or does not exist, is an empty tensor."""
    result = [x.new_empty(0) for _ in range(6)]
    with torch.autocast(x.device.type, enabled=False):
        dY2, x2 = dY.reshape(-1, dY.shape[-1]), x.reshape(-1, x.shape[-1])
        weight = None
        if need_dW or need_factors:
            G = dY2.T @ x2  # [out, in], in the caller's dtype; read once below, never kept
            if need_dW and W is not None:
                result[1] = (G.T if fan_in_fan_out else G).to(W.dtype).clone(memory_format=torch.contiguous_format)
            if need_factors:
                weight, *result[2:] = _weight_and_factor_gradients(
                    G, W, A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial, fan_in_fan_out
                )
        if need_dx:
            if weight is None:
                weight = build_weight(
                    W, A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial, fan_in_fan_out
                )
            weight = weight.to(dY.dtype)
            result[0] = (dY2 @ (weight.T if fan_in_fan_out else weight)).view(x.shape)
    return result


def _weight_and_factor_gradients(
    G, W, A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial, fan_in_fan_out
) -> list[Tensor]:
    """[W', dA, dB, dC, dD], in one pass over G [out, in] and W."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    weight, by_rows = _empty_weight(W, A, B, fan_in_fan_out)
    dA, dB = A.new_zeros(A.shape, dtype=dtype), B.new_empty(B.shape, dtype=dtype)
    dC, dD = A.new_empty(0), A.new_empty(0)
    if C is not None and D is not None:
        dC, dD = C.new_zeros(C.shape, dtype=dtype), D.new_empty(D.shape, dtype=dtype)
    for rows in _row_blocks(B.shape[0], A.shape[1], A.device, direction):
        dW, gA, gB, gC, gD = dual_delta_backward(
            G[rows], A, B[rows], C, None if D is None else D[rows], scaling,
            magnitude=magnitude, direction=direction, ste_clip=ste_clip,
            fixed_sign=None if fixed_sign is None else fixed_sign[rows],
        )  # fmt: skip
        if initial:
            A0, B0, C0, D0 = _cut(initial, rows)
            dW -= dual_delta(A0, B0, C0, D0, scaling, magnitude=magnitude, direction=direction)
        _write(by_rows, W, rows, dW, fan_in_fan_out)
        dA += gA
        dB[rows] = gB
        if gC is not None:
            dC += gC
            dD[rows] = gD
    factors = zip((dA, dB, dC, dD), (A, B, C, D), strict=True)
    return [weight, *(g if factor is None else g.to(factor.dtype) for g, factor in factors)]


@_backward.register_fake
def _(dY, x, W, A, B, C, D, *options):
    need_dx, need_dW, need_factors = options[-3:]
    factors = [A, B, C, D]
    return [
        x.new_empty(x.shape) if need_dx else x.new_empty(0),  # contiguous, whatever the strides of x
        W.new_empty(W.shape) if need_dW and W is not None else x.new_empty(0),
        *(x.new_empty(0) if f is None or not need_factors else f.new_empty(f.shape) for f in factors),
    ]


def _setup_context(ctx, inputs, output) -> None:
    x, W, _b, A, B, C, D, scaling, *options, fixed_sign, initial, fan_in_fan_out = inputs
    ctx.save_for_backward(x, W, A, B, C, D, scaling, fixed_sign, *initial)
    ctx.options, ctx.fan_in_fan_out = options, fan_in_fan_out


def _autograd(ctx, dY: Tensor):
    x, W, A, B, C, D, scaling, fixed_sign, *initial = ctx.saved_tensors
    need_x, need_W, need_b, *need_factors = ctx.needs_input_grad[:7]
    dx, dW, *factors = _backward(
        dY, x, W, A, B, C, D, scaling, *ctx.options, fixed_sign, initial, ctx.fan_in_fan_out,
        need_x, need_W, any(need_factors),
    )  # fmt: skip
    db = dY.reshape(-1, dY.shape[-1]).sum(0) if need_b else None
    gradients = [g if needed else None for g, needed in zip(factors, need_factors, strict=True)]
    rest = (None,) * 5, [None] * len(initial), None  # scaling and options, initial, fan_in_fan_out
    return dx if need_x else None, dW if need_W else None, db, *gradients, *rest[0], *rest[1:]


_forward.register_autograd(_autograd, setup_context=_setup_context)


def dual_linear(
    x, W, b, A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial, fan_in_fan_out
) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # autocast leaves float64 alone
        x = x.to(torch.get_autocast_dtype(device))
    elif W is not None and x.dtype != W.dtype:
        raise ValueError(f"x is {x.dtype} but the base weight is {W.dtype}: cast x, or run under torch.autocast.")
    if not isinstance(scaling, Tensor):
        scaling = torch.tensor(scaling, dtype=torch.float32, device=x.device)
    return _forward(
        x, W, b, A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, list(initial), fan_in_fan_out
    )

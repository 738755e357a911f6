"""The two passes of Dual LoRA on a GPU, as Triton kernels for CUDA and ROCm.

    build       W' = W0 + dW                            reads W0, writes W'
    gradients   dA, dB, dC, dD and W' from G = dL/dW'   reads G and W0 once, writes W'

    P = B A    Q = D C    M = s magnitude(P)    S = direction(Q)    dW = M . S              [out, in]
    U = G . S . magnitude'(P)    dA = s B^T U    dB = s U A^T        so that U is +-G, exact in the dtype of G
    V = clip(G . M)              dC = D^T V      dD = V C^T          clip: core.equation.clip_direction_gradient
    DoRA (arXiv 2402.09353): W' = c (W0 + dW), c = m / norm [out]; c G takes the place of G; dm = G . (W0 + dW) / norm

P and Q are float32 products, or their signs would not be those of the other backends: on NVIDIA as three products of
TF32 halves (error about 2^-22 of the sum of magnitudes), on AMD by float32 matrix instructions. The gradient products
take bfloat16 operands where G is bfloat16. A program sums over its own tiles and writes float32 partial sums, which
are added in a fixed order: no atomics, the same bits every run. The launch code never waits for the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from duallora.core.equation import Update

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
K = 16  # ranks at a time: the depth of a matrix instruction, and the least that ``tl.dot`` takes
MAX_RANK = 128


@triton.jit
def _row_factor(factor, row0, rank0, out, R: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, K] of B or D [out, R], zero outside."""
    row, rank = row0 + tl.arange(0, ROWS)[:, None], rank0 + tl.arange(0, K)[None, :]
    return tl.load(factor + row * R + rank, mask=(row < out) & (rank < R), other=0.0).to(tl.float32)


@triton.jit
def _column_factor(factor, rank0, column0, inn, R: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """[K, COLUMNS] of A or C [R, in], zero outside."""
    rank, column = rank0 + tl.arange(0, K)[:, None], column0 + tl.arange(0, COLUMNS)[None, :]
    return tl.load(factor + rank * inn + column, mask=(rank < R) & (column < inn), other=0.0).to(tl.float32)


@triton.jit
def _at(matrix, row0, column0, row, column, strides):
    """Pointers to a tile: 64 bits to its corner, 32 within."""
    corner = matrix + row0.to(tl.int64) * strides[0] + column0.to(tl.int64) * strides[1]
    return corner + row[:, None] * strides[0] + column[None, :] * strides[1]


@triton.jit
def _halves(x):
    """x = high + low; a TF32 instruction reads 11 bits of each: all of high, and of low all but the last two."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _product(left, right, PRECISION: tl.constexpr):
    """left @ right; "split" is float32 from TF32 instructions, smallest terms first."""
    if PRECISION == "split":
        high, low = _halves(left)
        right_high, right_low = _halves(right)
        small = tl.dot(low, right_high, input_precision="tf32")
        small = tl.dot(high, right_low, small, input_precision="tf32")
        return tl.dot(high, right_high, small, input_precision="tf32")
    else:
        return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def _product_of(
    rows, columns, row0, column0, out, inn,
    R: tl.constexpr, K: tl.constexpr, PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of B A or D C, K ranks at a time."""
    total = _product(
        _row_factor(rows, row0, 0, out, R, K, ROWS), _column_factor(columns, 0, column0, inn, R, K, COLUMNS), PRODUCT
    )
    for rank0 in range(K, R, K):
        left = _row_factor(rows, row0, rank0, out, R, K, ROWS)
        total += _product(left, _column_factor(columns, rank0, column0, inn, R, K, COLUMNS), PRODUCT)
    return total


@triton.jit
def _magnitude(P, KIND: tl.constexpr):
    """(value, derivative), 0 at P = 0 but for the derivative of "identity"; NaN stays NaN."""
    if KIND == "relu":
        value = tl.maximum(P, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return value, tl.where(P > 0, 1.0, value)
    elif KIND == "abs":
        return tl.abs(P), tl.where(P > 0, 1.0, tl.where(P < 0, -1.0, P))
    else:
        return P, tl.full(P.shape, 1.0, tl.float32)


@triton.jit
def _direction(Q, KIND: tl.constexpr):
    if KIND == "ste":
        return tl.fma(Q, 0.0, tl.where(Q > 0, 1.0, -1.0))  # Sign(0) = -1; NaN stays NaN
    elif KIND == "unit-tanh":
        return _tanh(Q)
    else:
        return Q


@triton.jit
def _tanh(x):
    """By the sigmoid, and by the series to x^3 where that would cancel."""
    return tl.where(tl.abs(x) < 0.03, x - x * x * x / 3, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def _delta(
    factors, s, row0, column0, out, inn, R1: tl.constexpr, R2: tl.constexpr, K: tl.constexpr,
    MAGNITUDE: tl.constexpr, DIRECTION: tl.constexpr,
    PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of dW."""
    A, B, C, D = factors
    P = _product_of(B, A, row0, column0, out, inn, R1, K, PRODUCT, ROWS, COLUMNS)
    value, _slope = _magnitude(P, MAGNITUDE)
    Q = _product_of(D, C, row0, column0, out, inn, R2, K, PRODUCT, ROWS, COLUMNS)
    return s * value * _direction(Q, DIRECTION)


@triton.jit
def _clamp(x):
    return tl.clamp(x, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _build(
    W, G, factors, initial, scaling, ratio, weight, squares, dm, out, inn, w_strides, g_strides, v_strides,
    R1: tl.constexpr, R2: tl.constexpr, K: tl.constexpr,
    MAGNITUDE: tl.constexpr, DIRECTION: tl.constexpr, MINUS_BASE: tl.constexpr,
    PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of ratio (W0 + dW) [- W0] into ``weight``, or of its squares into ``squares``; of G . (W0 + dW) into ``dm``.

    ``squares`` and ``dm`` [panels, out] are summed over the columns of the tile.
    """
    column0, row0 = tl.program_id(0) * COLUMNS, tl.program_id(1) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = row < out - row0
    mask = inside[:, None] & (column < inn - column0)[None, :]
    s = tl.load(scaling)
    total = _delta(factors, s, row0, column0, out, inn, R1, R2, K, MAGNITUDE, DIRECTION, PRODUCT, ROWS, COLUMNS)
    if initial is not None:
        total -= _delta(initial, s, row0, column0, out, inn, R1, R2, K, MAGNITUDE, DIRECTION, PRODUCT, ROWS, COLUMNS)
    if W is not None:
        base = tl.load(_at(W, row0, column0, row, column, w_strides), mask=mask, other=0.0).to(tl.float32)
        total += base
    if squares is not None:
        tl.store(squares + tl.program_id(0) * out + row0 + row, tl.sum(total * total, axis=1), mask=inside)
    if dm is not None:
        g = tl.load(_at(G, row0, column0, row, column, g_strides), mask=mask, other=0.0).to(tl.float32)
        tl.store(dm + tl.program_id(0) * out + row0 + row, tl.sum(g * total, axis=1), mask=inside)
    if weight is not None:
        if ratio is not None:
            total *= tl.load(ratio + row0 + row, mask=inside, other=0.0)[:, None]
        if MINUS_BASE:
            total -= base
        tl.store(_at(weight, row0, column0, row, column, v_strides), total, mask=mask)


@triton.jit
def _add_rows(matrix, part, row, inside, rank, again, R: tl.constexpr):
    """Add [ROWS, K] to what the panels before left in those rows of [out, R]; ``again``: whether there were any."""
    at = matrix + row[:, None] * R + rank[None, :]
    mask = inside[:, None] & (rank < R)[None, :]
    tl.store(at, part + tl.load(at, mask=mask & again, other=0.0), mask=mask)


@triton.jit
def _store_columns(matrix, sums, column, inn, rank, R: tl.constexpr):
    """Write [COLUMNS, K] into those columns of [R, in]."""
    mask = (column < inn)[:, None] & (rank < R)[None, :]
    tl.store(matrix + rank[None, :] * inn + column[:, None], sums, mask=mask)


@triton.jit
def _gradients(
    G, W, factors, scaling, ratio, weight, dA, dB, dC, dD,
    out, inn, stripe, panels, g_strides, w_strides, v_strides,
    R1: tl.constexpr, R2: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr,
    MAGNITUDE: tl.constexpr, DIRECTION: tl.constexpr, CLIP: tl.constexpr,
    PRODUCT: tl.constexpr, GRADIENT: tl.constexpr, OPERAND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """The tiles of ``stripe`` rows and ``panels`` panels of columns: down a panel for K ranks, for the next K, then on
    to the next panel.

    dA, dC [stripes, R, in] are summed in registers down a panel, dB, dD [groups, out, R] in memory from one panel to
    the next. Each pair lies in one buffer, [stripes, R1 in + R2 in] and [groups, out R1 + out R2].
    """
    row, column, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, K)
    group, slot = tl.program_id(0), tl.program_id(1)
    first = slot * stripe
    steps = tl.cdiv(tl.minimum(stripe, out - first), ROWS)
    s = tl.load(scaling)
    A, B, C, D = factors
    for job in range(0, CHUNKS * tl.minimum(panels, tl.cdiv(inn, COLUMNS) - group * panels)):
        panel, chunk = job // CHUNKS, job % CHUNKS
        column0, rank0 = (group * panels + panel) * COLUMNS, chunk * K
        at, rank = column0 + column, rank0 + k
        A_tile = _column_factor(A, rank0, column0, inn, R1, K, COLUMNS)
        C_tile = _column_factor(C, rank0, column0, inn, R2, K, COLUMNS)
        sum_A = tl.zeros([COLUMNS, K], tl.float32)
        sum_C = tl.zeros([COLUMNS, K], tl.float32)
        for step in tl.range(0, steps, disable_licm=not HOIST):
            row0 = first + step * ROWS
            inside = row < out - row0
            mask = inside[:, None] & (at < inn)[None, :]
            g = tl.load(_at(G, row0, column0, row, column, g_strides), mask=mask, other=0.0).to(tl.float32)
            B_tile = _row_factor(B, row0, rank0, out, R1, K, ROWS)
            D_tile = _row_factor(D, row0, rank0, out, R2, K, ROWS)
            if CHUNKS == 1:
                P = _product(B_tile, A_tile, PRODUCT)
                Q = _product(D_tile, C_tile, PRODUCT)
            else:
                P = _product_of(B, A, row0, column0, out, inn, R1, K, PRODUCT, ROWS, COLUMNS)
                Q = _product_of(D, C, row0, column0, out, inn, R2, K, PRODUCT, ROWS, COLUMNS)
            value, slope = _magnitude(P, MAGNITUDE)
            S = _direction(Q, DIRECTION)
            M = s * value
            U = g * (S * slope)
            if weight is not None:
                total = M * S
                if W is not None:
                    total += tl.load(_at(W, row0, column0, row, column, w_strides), mask=mask, other=0.0).to(tl.float32)
                tl.store(_at(weight, row0, column0, row, column, v_strides), total, mask=mask)
            if ratio is not None:
                c = tl.load(ratio + row0 + row, mask=inside, other=0.0)
                g *= c[:, None]
            if CLIP == "chain":
                V = _clamp(g * M)
            elif CLIP == "update":
                V = _clamp(g) * M
            else:
                V = g * M
            if DIRECTION == "unit-tanh":
                V *= 1 - S * S
            elif CLIP == "unit-window":
                T = _tanh(Q)
                V *= 1 - T * T
            U, V = U.to(OPERAND), V.to(OPERAND)
            part_B = _product(U, tl.trans(A_tile.to(OPERAND)), GRADIENT) * s
            part_D = _product(V, tl.trans(C_tile.to(OPERAND)), GRADIENT)
            if ratio is not None:
                B_tile *= c[:, None]
            sum_A += _product(tl.trans(U), B_tile.to(OPERAND), GRADIENT)
            sum_C += _product(tl.trans(V), D_tile.to(OPERAND), GRADIENT)
            _add_rows(dB + group * out * (R1 + R2), part_B, row0 + row, inside, rank, panel > 0, R1)
            _add_rows(dD + group * out * (R1 + R2), part_D, row0 + row, inside, rank, panel > 0, R2)
        _store_columns(dA + slot * (R1 + R2) * inn, sum_A * s, at, inn, rank, R1)
        _store_columns(dC + slot * (R1 + R2) * inn, sum_C, at, inn, rank, R2)
        tl.debug_barrier()  # the sums in memory are read for the next panel, by whichever thread


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int
    stages: int = 1
    hoist: bool = True  # what does not depend on the row out of the loop over rows: fewer instructions, more registers
    programs: int = 1024  # of the gradient pass, about: fewer leave the device idle at the end, more write more sums


# Those of sm_90 by the clock of an H100 (benchmarks/tiles.py), the others by what the compilers report: no spills, then
# instructions per element. tests/ops/test_triton.py compiles them all.
BUILD = Tile(32, 128, 4)
BUILD_HEAVY = Tile(32, 64, 4)  # more than K ranks, or ``initial``


class Gradients(NamedTuple):
    """Tiles of the gradient pass."""

    plain: Tile
    wide: Tile  # more than K ranks
    uneven: Tile  # out or in no multiple of 16: loads of single elements, and masks for each


_CDNA = Gradients(Tile(64, 32, 4), Tile(64, 32, 4), Tile(64, 32, 4))

# [architecture][dtype of G]
GRADIENTS: dict[str, dict[torch.dtype, Gradients]] = {
    "sm_80": {
        torch.bfloat16: Gradients(Tile(64, 32, 4, stages=2), Tile(64, 32, 8, hoist=False), Tile(32, 32, 4)),
        torch.float16: Gradients(Tile(64, 32, 4), Tile(32, 32, 2), Tile(32, 32, 4)),
        torch.float32: Gradients(Tile(32, 16, 2), Tile(32, 16, 2), Tile(32, 16, 2, hoist=False)),
    },
    "sm_90": {
        torch.bfloat16: Gradients(Tile(64, 64, 4, hoist=False, programs=512), Tile(128, 64, 8), Tile(32, 32, 4)),
        torch.float16: Gradients(
            Tile(64, 64, 4, hoist=False, programs=512), Tile(64, 64, 4, hoist=False), Tile(32, 32, 4)
        ),
        torch.float32: Gradients(
            Tile(64, 32, 4, hoist=False), Tile(64, 32, 4, hoist=False), Tile(32, 16, 2, hoist=False)
        ),
    },
    "gfx90a": dict.fromkeys(DTYPES, _CDNA),
    "gfx942": dict.fromkeys(DTYPES, _CDNA),
}


@functools.cache
def _architecture(device: torch.device) -> str | None:
    """The row of ``GRADIENTS`` for a device, None where the kernels do not run."""
    if device.type != "cuda":
        return "sm_90" if triton.knobs.runtime.interpret else None
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return {"gfx90a": "gfx90a", "gfx942": "gfx942", "gfx950": "gfx942"}.get(name)
    major, _minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return None
    return "sm_90" if major in (9, 10) else "sm_80"  # 12, the consumers' Blackwell, has the matrix instructions of 8


def supports(update: Update, dtype: torch.dtype) -> bool:
    """Whether both passes can do ``update`` for weights of ``dtype``: relu, abs or identity with ste, tanh or identity."""
    known = update.magnitude in ("relu", "abs", "identity") and update.direction in (
        "ste",
        "identity",
        "tanh",
        "unit-tanh",
    )
    if not known or dtype not in DTYPES:
        return False
    factors = [f for f in (*update[:4], *update.initial) if f is not None]
    fits = _ranks(update)[2] <= MAX_RANK and all(f.dtype in DTYPES for f in factors)
    return fits and _architecture(update.A.device) is not None


def _strides(matrix: Tensor | None, fan_in_fan_out: bool) -> tuple[int, int]:
    """(along out, along in)"""
    if matrix is None:
        return 0, 0
    return (matrix.stride(1), matrix.stride(0)) if fan_in_fan_out else (matrix.stride(0), matrix.stride(1))


def _padded(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(A, B, C, D), contiguous, with zeros up to a multiple of K ranks: a row of B or D is then 64 bytes, aligned."""
    pads = [-factors[0].shape[0] % K, -factors[2].shape[0] % K]
    return tuple(
        F.pad(factor, (0, pads[i // 2]) if i % 2 else (0, 0, 0, pads[i // 2])).contiguous()
        if pads[i // 2]
        else factor.contiguous()
        for i, factor in enumerate(factors)
    )


def _arguments(update: Update, tile: Tile) -> dict[str, Any]:
    """What both kernels take."""
    A, B, C, D = update[:4]
    assert C is not None
    assert D is not None
    factors = _padded((A, B, C, D))
    architecture = _architecture(A.device)
    assert architecture is not None
    return {
        "factors": factors,
        "scaling": update.scaling_tensor().to(A.device, torch.float32),
        "out": B.shape[0], "inn": A.shape[1],
        "R1": factors[0].shape[0], "R2": factors[2].shape[0], "K": K,
        "MAGNITUDE": update.magnitude, "DIRECTION": update.direction,
        "PRODUCT": "split" if architecture.startswith("sm") else "ieee",
        "ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages,
        "enable_fp_fusion": False,  # dW - dW(0) is exactly 0 at the start only if both round alike
    }  # fmt: skip


def _ranks(update: Update) -> tuple[int, int, int]:
    """(r1, r2, the larger)"""
    r1, r2 = update.A.shape[0], 0 if update.C is None else update.C.shape[0]
    return r1, r2, max(r1, r2)


def _float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv, a function of the language, takes ten times as long on the host


def _sum(parts: Tensor) -> Tensor:
    return parts.sum(0) if parts.shape[0] > 1 else parts[0]


def _launch_build(
    W: Tensor | None,
    update: Update,
    weight: Tensor | None,
    fan_in_fan_out: bool,
    *,
    ratio: Tensor | None = None,
    squares: bool = False,
    G: Tensor | None = None,
    minus_base: bool = False,
) -> Tensor | None:
    """Fill ``weight``, if given. Returns [out], over the rows: the sums of squares, or of G . (W0 + dW)."""
    out, inn = update.shape
    tile = BUILD_HEAVY if update.initial or _ranks(update)[2] > K else BUILD
    grid = _cdiv(inn, tile.columns), _cdiv(out, tile.rows)
    parts = _float32(update.A, grid[0], out) if squares or G is not None else None
    _build[grid](
        **_arguments(update, tile), W=W, G=G, ratio=ratio, weight=weight,
        initial=_padded(update.initial) if update.initial else None,
        squares=parts if squares else None, dm=None if squares else parts,
        w_strides=_strides(W, fan_in_fan_out), g_strides=_strides(G, fan_in_fan_out),
        v_strides=_strides(weight, fan_in_fan_out), MINUS_BASE=minus_base and W is not None,
    )  # fmt: skip
    return None if parts is None else _sum(parts)


@torch.no_grad()
def build_weight(
    W: Tensor | None,
    update: Update,
    *,
    fan_in_fan_out: bool,
    dtype: torch.dtype,
    m: Tensor | None = None,
    minus_base: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(W', norm): see :mod:`duallora.ops.recompute`, whose contract this follows; W of any strides."""
    if m is None and minus_base:
        W, minus_base = None, False
    weight, norm, ratio = update.A.new_empty(update.weight_shape(fan_in_fan_out), dtype=dtype), None, None
    with torch.cuda.device_of(weight):
        if m is not None:
            squares = _launch_build(W, update, None, fan_in_fan_out, squares=True)
            assert squares is not None
            norm = squares.sqrt_().clamp_min_(torch.finfo(torch.float32).tiny)
            ratio = m.to(torch.float32) / norm
        _launch_build(W, update, weight, fan_in_fan_out, ratio=ratio, minus_base=minus_base)
    return weight, norm


@torch.no_grad()
def weight_and_gradients(
    G: Tensor,
    W: Tensor | None,
    update: Update,
    *,
    fan_in_fan_out: bool,
    dtype: torch.dtype,
    m: Tensor | None = None,
    norm: Tensor | None = None,
    minus_base: bool = False,
) -> list[Tensor]:
    """[W', dA, dB, dC, dD, dm]: see :mod:`duallora.ops.recompute`; G and W of any strides.

    The gradient pass writes W' too where its registers allow: ranks up to K, no ``initial``, no ``m``. Elsewhere the
    build pass does, and with ``m`` reads G once more for dm (empty without ``m``).
    """
    if m is None and minus_base:
        W, minus_base = None, False
    (out, inn), (r1, r2, ranks) = update.shape, _ranks(update)
    architecture = _architecture(G.device)
    assert architecture is not None
    kind = G.dtype if G.dtype in DTYPES else torch.float32
    tiles_of = GRADIENTS[architecture][kind]
    tile = tiles_of.uneven if out % 16 or inn % 16 else tiles_of.wide if ranks > K else tiles_of.plain
    panels, rows = _cdiv(inn, tile.columns), _cdiv(out, tile.rows)
    tiles = max(1, panels * rows // tile.programs)  # of a program, about a square of them: fewest partial sums
    group = min(panels, math.isqrt(tiles))
    stripe = min(rows, tiles // group)
    groups, stripes = _cdiv(panels, group), _cdiv(rows, stripe)
    weight = update.A.new_empty(update.weight_shape(fan_in_fan_out), dtype=dtype)
    apart = ranks > K or bool(update.initial) or m is not None
    ratio = None if m is None or norm is None else m.to(torch.float32) / norm
    arguments = _arguments(update, tile)
    R1, R2 = arguments["R1"], arguments["R2"]
    down, across = _float32(G, stripes, (R1 + R2) * inn), _float32(G, groups, (R1 + R2) * out)
    precision = {torch.bfloat16: "ieee", torch.float16: "tf32", torch.float32: "split"}[kind]
    with torch.cuda.device_of(G):
        _gradients[groups, stripes](
            **arguments, dA=down, dC=down[:, R1 * inn :], dB=across, dD=across[:, R1 * out :],
            G=G, W=W, ratio=ratio, weight=None if apart else weight,
            stripe=stripe * tile.rows, panels=group,
            g_strides=_strides(G, fan_in_fan_out), w_strides=_strides(W, fan_in_fan_out),
            v_strides=_strides(weight, fan_in_fan_out), CHUNKS=_cdiv(ranks, K),
            CLIP=update.ste_clip if update.direction == "ste" else "none",
            GRADIENT=precision if arguments["PRODUCT"] == "split" else "ieee",
            OPERAND=tl.bfloat16 if kind == torch.bfloat16 else tl.float32, HOIST=tile.hoist,
        )  # fmt: skip
        dm = None
        if apart:
            dm = _launch_build(
                W, update, weight, fan_in_fan_out, ratio=ratio, G=None if m is None else G, minus_base=minus_base
            )
    dA, dC = _sum(down).split((R1 * inn, R2 * inn))
    dB, dD = _sum(across).split((R1 * out, R2 * out))
    dA, dB, dC, dD = dA.view(R1, inn), dB.view(out, R1), dC.view(R2, inn), dD.view(out, R2)
    if (r1, r2) != (R1, R2):
        dA, dB, dC, dD = dA[:r1], dB[:, :r1].contiguous(), dC[:r2], dD[:, :r2].contiguous()
    if dm is None or norm is None or ratio is None:
        return [weight, dA, dB, dC, dD, _float32(G, 0)]
    return [weight, dA, dB.mul_(ratio[:, None]), dC, dD, dm.div_(norm)]

"""Whether G need leave the product: ``python benchmarks/epilogue.py [-o FILE]``, on a GPU.

G = dY^T x [out, in] is written by one kernel and read by the next. Here one kernel makes a tile of G and reduces it into
W', dA, dB, dC and dD while it is in registers. Against it: the product by itself, and the product and the gradient pass
that the layers use, each replayed as a CUDA graph. It is what a layer would run if it won, and no layer runs it: on paper
it saves 4 bytes of traffic for each of 2 x tokens operations, and has to be within that of the library's own product.

Without a GPU (TRITON_INTERPRET=1) it only checks what the kernel computes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from duallora.bench.store import environment
from duallora.bench.timing import Subject, replayed
from duallora.core.equation import Update
from duallora.errors import IntegrityError
from duallora.ops import recompute
from duallora.ops import triton as kernels
from duallora.ops.triton import (
    _at,
    _clamp,
    _column_factor,
    _direction,
    _magnitude,
    _product,
    _row_factor,
    _store_columns,
)
from duallora.store import record

# rows, columns, tokens at a time, warps, stages: none spills on sm_90
TILES = ((128, 64, 64, 8, 3), (128, 64, 64, 8, 4), (64, 64, 64, 4, 4), (128, 64, 32, 8, 4))
GROUP = 8  # panels whose programs run side by side, so that they share what they read of x


@triton.jit
def _epilogue(
    dY, x, W, factors, scaling, weight, dA, dB, dC, dD, tokens, out, inn,
    R1: tl.constexpr, R2: tl.constexpr, K: tl.constexpr, MAGNITUDE: tl.constexpr, DIRECTION: tl.constexpr,
    CLIP: tl.constexpr, PRODUCT: tl.constexpr, OPERAND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of G and what follows from it, as ``duallora.ops.triton._gradients`` has it; R1 = R2 = K.

    dA, dC [slots, ., in] and dB, dD [panels, out, .] hold the sums of one tile each.
    """
    panels, slots = tl.cdiv(inn, COLUMNS), tl.cdiv(out, ROWS)
    block = tl.program_id(0) // (GROUP * slots)
    wide = tl.minimum(panels - block * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * slots)
    panel, slot = block * GROUP + within % wide, within // wide
    row0, column0 = slot * ROWS, panel * COLUMNS
    row, column, k, t = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, K), tl.arange(0, TOKENS)
    inside, at = row < out - row0, column0 + column
    g = tl.zeros([ROWS, COLUMNS], tl.float32)
    for token0 in range(0, tokens, TOKENS):
        here = (t < tokens - token0)[:, None]
        left = tl.load(_at(dY, token0 + 0 * row0, row0, t, row, (out, 1)), mask=here & inside[None, :], other=0.0)
        right = tl.load(
            _at(x, token0 + 0 * row0, column0, t, column, (inn, 1)), mask=here & (at < inn)[None, :], other=0.0
        )
        g = tl.dot(tl.trans(left), right, g, input_precision="ieee")
    A, B, C, D = factors
    s = tl.load(scaling)
    A_tile, C_tile = (
        _column_factor(A, 0, column0, inn, R1, K, COLUMNS),
        _column_factor(C, 0, column0, inn, R2, K, COLUMNS),
    )
    B_tile, D_tile = _row_factor(B, row0, 0, out, R1, K, ROWS), _row_factor(D, row0, 0, out, R2, K, ROWS)
    value, slope = _magnitude(_product(B_tile, A_tile, PRODUCT), MAGNITUDE)
    S = _direction(_product(D_tile, C_tile, PRODUCT), DIRECTION)
    M = s * value
    mask = inside[:, None] & (at < inn)[None, :]
    total = M * S + tl.load(_at(W, row0, column0, row, column, (inn, 1)), mask=mask, other=0.0).to(tl.float32)
    tl.store(_at(weight, row0, column0, row, column, (inn, 1)), total, mask=mask)
    U = (g * (S * slope)).to(OPERAND)
    if CLIP == "chain":
        V = _clamp(g * M).to(OPERAND)
    else:
        V = (g * M).to(OPERAND)
    part = tl.dot(U, tl.trans(A_tile.to(OPERAND)), input_precision="ieee") * s
    own = inside[:, None] & (k < R1)[None, :]
    tl.store(dB + panel * out * (R1 + R2) + (row0 + row)[:, None] * R1 + k[None, :], part, mask=own)
    part = tl.dot(V, tl.trans(C_tile.to(OPERAND)), input_precision="ieee")
    tl.store(dD + panel * out * (R1 + R2) + (row0 + row)[:, None] * R2 + k[None, :], part, mask=own)
    sums = tl.dot(tl.trans(U), B_tile.to(OPERAND), input_precision="ieee") * s
    _store_columns(dA + slot * (R1 + R2) * inn, sums, at, inn, k, R1)
    sums = tl.dot(tl.trans(V), D_tile.to(OPERAND), input_precision="ieee")
    _store_columns(dC + slot * (R1 + R2) * inn, sums, at, inn, k, R2)


@torch.no_grad()
def weight_and_gradients(dY: Tensor, x: Tensor, W: Tensor, update: Update, size: tuple[int, ...]) -> list[Tensor]:
    """[W', dA, dB, dC, dD] of ranks up to `duallora.ops.triton.K`, from dY [tokens, out] and x [tokens, in]."""
    rows, columns, tokens, warps, stages = size
    given = kernels._arguments(update, kernels.Tile(rows, columns, warps, stages))
    out, inn, R1, R2 = (given[name] for name in ("out", "inn", "R1", "R2"))
    slots, panels = triton.cdiv(out, rows), triton.cdiv(inn, columns)
    down, across = (
        x.new_empty(slots, (R1 + R2) * inn, dtype=torch.float32),
        x.new_empty(panels, (R1 + R2) * out, dtype=torch.float32),
    )
    weight = torch.empty_like(W)
    _epilogue[slots * panels,](
        dY, x, W, weight=weight, dA=down, dC=down[:, R1 * inn :], dB=across, dD=across[:, R1 * out :], tokens=len(x),
        CLIP=update.ste_clip, OPERAND=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32, TOKENS=tokens, GROUP=GROUP,
        **given,
    )  # fmt: skip
    dA, dC = down.sum(0).split((R1 * inn, R2 * inn))
    dB, dD = across.sum(0).split((R1 * out, R2 * out))
    r1, r2, _ = kernels._ranks(update)
    return [weight, dA.view(R1, inn)[:r1], dB.view(out, R1)[:, :r1], dC.view(R2, inn)[:r2], dD.view(out, R2)[:, :r2]]


def problem(width: int, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Update]:
    """dY, x, W and an update of rank 16 of which the clip cuts some: [width, width + 8], no multiple of a tile."""
    draw = torch.Generator().manual_seed(0)
    out, inn = width, width + 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device)

    update = Update(normal(16, inn), normal(out, 16), normal(16, inn), normal(out, 16), 0.1)
    return normal(tokens, out).to(dtype), normal(tokens, inn).to(dtype), normal(out, inn).to(dtype), update


def error(found: list[Tensor], dY: Tensor, x: Tensor, W: Tensor, update: Update) -> float:
    """The largest |found - exact| / |exact| of the five, exact in float64."""
    exact = Update(*(factor.double() for factor in update[:4] if factor is not None), *update[4:])
    wanted = recompute.weight_and_gradients(
        dY.double().T @ x.double(), W.double(), exact, fan_in_fan_out=False, dtype=torch.float64
    )
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/bench/gpu/epilogue.json"))
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, action="append")
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # of which the interpreter makes other products
    content: dict[str, Any] = {"kind": "epilogue", **environment(device), "cells": []}
    for tokens in chosen.tokens or (1024, 4096, 16384):
        dY, x, W, update = problem(chosen.width, tokens, dtype, device)
        cell: dict[str, Any] = {"tokens": tokens, "out": W.shape[0], "in": W.shape[1], "errors": {}, "absent": {}}
        subjects = {
            "product": Subject(lambda dY=dY, x=x: torch.mm(dY.t(), x)),
            "product and pass": Subject(
                lambda dY=dY, x=x, W=W, update=update: kernels.weight_and_gradients(
                    torch.mm(dY.t(), x), W, update, fan_in_fan_out=False, dtype=W.dtype
                )
            ),
        }
        for size in TILES:
            name = "epilogue " + "x".join(map(str, size))
            run = Subject(
                lambda dY=dY, x=x, W=W, update=update, size=size: weight_and_gradients(dY, x, W, update, size)
            )
            off = cell["errors"][name] = error(run.run(), dY, x, W, update)  # type: ignore[arg-type]
            if not off < (1e-2 if dtype == torch.bfloat16 else 1e-5):  # roundings of W' and of the operands
                raise IntegrityError(f"{name} is off by {off:.1e} at {tokens} tokens: no time of it is told")
            subjects[name] = run
        found, cell["absent"] = replayed(
            subjects, device, {"product": "product", "pass": "product and pass"}, rounds=15, seconds=10
        )
        cell["graphs"] = found
        content["cells"].append(cell)
        print(tokens, "tokens: errors", {name: f"{off:.1e}" for name, off in cell["errors"].items()})
        for name, figure in found.items():
            print(f"  {name}: {figure['median_s'] * 1e6:.0f} us")
        if device.type == "cuda":
            record.write_json(chosen.output, content)


if __name__ == "__main__":
    main()

"""Dual LoRA by hand: float64 Python loops over single entries, sharing nothing with the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _magnitude(name: str, p: float) -> tuple[float, float]:
    """(value, derivative)."""
    if name == "relu":
        return (p, 1.0) if p > 0 else (0.0, 0.0)
    if name == "abs":
        return abs(p), (p > 0) - (p < 0)
    if name == "sigmoid":
        v = 1 / (1 + math.exp(-p))
        return v, v * (1 - v)
    return p, 1.0


def _matmul(X: list[list[float]], Y: list[list[float]]) -> list[list[float]]:
    return [[sum(X[i][m] * Y[m][j] for m in range(len(Y))) for j in range(len(Y[0]))] for i in range(len(X))]


def _clip(v: float) -> float:
    return max(-1.0, min(1.0, v))


def _transpose(X: list[list[float]]) -> list[list[float]]:
    return [list(row) for row in zip(*X, strict=True)]


def delta(A, B, C, D, s, *, magnitude="relu", direction="ste", fixed_sign=None) -> list[list[float]]:
    """dW [out, in] entry by entry."""
    P = _matmul(B, A)
    Q = None if direction == "fixed" else _matmul(D, C)
    return [
        [s * _magnitude(magnitude, P[i][j])[0] * _direction(Q, i, j, direction, fixed_sign) for j in range(len(P[0]))]
        for i in range(len(P))
    ]


def _direction(Q, i: int, j: int, direction: str, fixed_sign) -> float:
    if direction == "fixed":
        return float(fixed_sign[i][j])
    q = Q[i][j]
    if direction == "identity":
        return q
    if direction in ("tanh", "unit-tanh"):
        return math.tanh(q / _rms(Q[i]) if direction == "tanh" else q)
    up_or_down = 1.0 if q > 0 else -1.0
    if direction == "xnor":
        return up_or_down * sum(abs(v) for v in Q[i]) / len(Q[i])
    if direction == "dorefa":
        return up_or_down * sum(abs(v) for row in Q for v in row) / (len(Q) * len(Q[0]))
    return up_or_down


def _rms(row: list[float]) -> float:
    return math.sqrt(sum(q * q for q in row) / len(row))


def _of_unit_row(row: list[float], upstream: list[float], kind: str) -> list[float]:
    """dL/dq of tanh(q / rms) from dL/dtanh; "window": as if the rms did not depend on q; "unit-...": it is 1."""
    rms, n, held = (1.0 if kind.startswith("unit") else _rms(row)), len(row), kind != "tanh"
    u = [g * (1 - math.tanh(q / rms) ** 2) for g, q in zip(upstream, row, strict=True)]
    along = 0.0 if held else sum(v * q for v, q in zip(u, row, strict=True))
    return [v / rms - along * q / (n * rms**3) for v, q in zip(u, row, strict=True)]


def delta_gradients(G, A, B, C, D, s, *, magnitude="relu", direction="ste", ste_clip="chain", fixed_sign=None):
    """(dA, dB, dC, dD) from G = dL/d(dW); dC and dD are None with fixed signs."""
    P = _matmul(B, A)
    Q = None if direction == "fixed" else _matmul(D, C)
    out, inn = len(P), len(P[0])
    dP = [[0.0] * inn for _ in range(out)]
    dQ = [[0.0] * inn for _ in range(out)]
    for i in range(out):
        for j in range(inn):
            value, slope = _magnitude(magnitude, P[i][j])
            dP[i][j] = G[i][j] * s * slope * _direction(Q, i, j, direction, fixed_sign)
            if direction == "ste" and ste_clip == "chain":
                dQ[i][j] = _clip(G[i][j] * s * value)
            elif direction == "ste" and ste_clip == "update":
                dQ[i][j] = _clip(G[i][j]) * s * value
            else:
                dQ[i][j] = G[i][j] * s * value
        kind = ste_clip if direction == "ste" else direction
        if kind in ("tanh", "window", "unit-tanh", "unit-window"):
            dQ[i] = _of_unit_row(Q[i], dQ[i], kind)
    dA, dB = _matmul(_transpose(B), dP), _matmul(dP, _transpose(A))
    if direction == "fixed":
        return dA, dB, None, None
    return dA, dB, _matmul(_transpose(D), dQ), _matmul(dQ, _transpose(C))


def dual_linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    factors: list[Tensor | None],
    s: float,
    dY: Tensor,
    *,
    initial=(),
    m=None,
    **options,
) -> tuple[Tensor, list[Tensor | None]]:
    """(y, [dx, db, dA, dB, dC, dD]) in float64 for x [n, in], W [out, in], dY [n, out]; with m [out] (DoRA, its norms
    constant in the backward) dm comes last."""
    lists = [None if f is None else f.double().tolist() for f in factors]
    fixed = options.get("fixed_sign")
    options = {**options, "fixed_sign": None if fixed is None else fixed.tolist()}
    without_clip = {k: v for k, v in options.items() if k != "ste_clip"}
    dW = delta(*lists, s, **without_clip)
    if initial:
        start = delta(*[f.double().tolist() for f in initial], s, **without_clip)
        dW = [[p - q for p, q in zip(row, row0, strict=True)] for row, row0 in zip(dW, start, strict=True)]
    weight = [[w + d for w, d in zip(r, rd, strict=True)] for r, rd in zip(W.double().tolist(), dW, strict=True)]
    norms = [math.sqrt(sum(v * v for v in row)) for row in weight]
    unscaled, scale = weight, [1.0] * len(weight)
    if m is not None:
        scale = [length / norm for length, norm in zip(m.double().tolist(), norms, strict=True)]
        weight = [[v * c for v in row] for row, c in zip(weight, scale, strict=True)]
    X, Y = x.double().tolist(), dY.double().tolist()
    y = _matmul(X, _transpose(weight))
    if b is not None:
        y = [[v + c for v, c in zip(row, b.double().tolist(), strict=True)] for row in y]
    G = _matmul(_transpose(Y), X)
    gradients = [_matmul(Y, weight), [sum(column) for column in zip(*Y, strict=True)]]
    scaled_G = [[g * c for g in row] for row, c in zip(G, scale, strict=True)]
    gradients += delta_gradients(scaled_G, *lists, s, **options)
    if m is not None:
        gradients.append(
            [
                sum(g * v for g, v in zip(g_row, row, strict=True)) / norm
                for g_row, row, norm in zip(G, unscaled, norms, strict=True)
            ]
        )
    as_tensor = [None if g is None else torch.tensor(g, dtype=torch.float64) for g in gradients]
    return torch.tensor(y, dtype=torch.float64), as_tensor

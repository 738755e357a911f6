"""W' and the factor gradients with torch operators, in blocks of output rows small enough for the cache.

The contract of every kernel backend (``cpu``, ``triton``) is that of this module:

    build_weight            W' = W0 + dW;  with m (DoRA): W' = m (W0 + dW) / |W0 + dW|, rows of length m
    weight_and_gradients    from G = dL/dW', in one pass over it: W' again, dA, dB, dC, dD, dm
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from duallora.core.equation import Update

# Elements of [out, in] in a CPU block, 512 kB in float32: the fastest of 2^15 to 2^22 on one thread (LOG.md).
BLOCK_ELEMENTS = 1 << 17


def supports(update: Update, dtype: torch.dtype) -> bool:
    """Everything."""
    return True


def _row_blocks(update: Update) -> Iterator[slice]:
    # DoReFa's scale is a mean over all of D C, and a GPU wants few launches: one block.
    out_features, in_features = update.shape
    rows = out_features
    if update.A.device.type == "cpu" and update.direction != "dorefa":
        rows = max(1, BLOCK_ELEMENTS // max(1, in_features))
    for start in range(0, out_features, rows):
        yield slice(start, min(start + rows, out_features))


def _empty(update: Update, fan_in_fan_out: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(W' to fill, the same seen as [out, in])."""
    weight = update.A.new_empty(update.weight_shape(fan_in_fan_out), dtype=dtype)
    return weight, weight.T if fan_in_fan_out else weight


def build_weight(
    W: Tensor | None,
    update: Update,
    *,
    fan_in_fan_out: bool,
    dtype: torch.dtype,
    m: Tensor | None = None,
    minus_base: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(W', norm), computed in float32 at least and rounded once.

    Args:
        W: W0 [out, in], or [in, out] with ``fan_in_fan_out``; None: 0.
        dtype: of W'.
        m: [out], DoRA's magnitude (arXiv 2402.09353, Eq. 5); None: rows keep their length.
        minus_base: W' - W0 instead of W'.

    Returns:
        W' in the layout of W, and with ``m`` the length [out] of each row of W0 + dW (at least the smallest normal
        number, so that an all-zero row stays zero).
    """
    weight, by_rows = _empty(update, fan_in_fan_out, dtype)
    base = None if W is None else (W.T if fan_in_fan_out else W)
    norm = None if m is None else m.new_empty(m.shape, dtype=update.dtype)
    for rows in _row_blocks(update):
        V = update.rows(rows).delta()
        if base is not None:
            V = V + base[rows]
        if m is not None and norm is not None:
            norm[rows] = torch.linalg.vector_norm(V, dim=1).clamp_(min=torch.finfo(V.dtype).tiny)
            V = V * (m[rows] / norm[rows])[:, None]
        by_rows[rows] = V - base[rows] if minus_base and base is not None else V
    return weight, norm


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
    """[W', dA, dB, dC, dD, dm]; gradients in float32 at least, empty where there is no such factor.

    Args:
        G: dL/dW' in the layout of W, any floating dtype; read once.
        m, norm: as :func:`build_weight` took and gave them. The norm is a constant (section 4.3 of the DoRA paper), so
            dL/d(dW)_i = (m/norm)_i G_i and dm_i = sum_j G_ij (W0 + dW)_ij / norm_i.
        The rest: as for :func:`build_weight`.
    """
    A, B, C, D = update[:4]
    wide = update.dtype
    weight, by_rows = _empty(update, fan_in_fan_out, dtype)
    base = None if W is None else (W.T if fan_in_fan_out else W)
    G = G.T if fan_in_fan_out else G
    dA, dB = A.new_zeros(A.shape, dtype=wide), B.new_empty(B.shape, dtype=wide)
    dC, dD = A.new_empty(0, dtype=wide), A.new_empty(0, dtype=wide)
    if C is not None and D is not None:
        dC, dD = C.new_zeros(C.shape, dtype=wide), D.new_empty(D.shape, dtype=wide)
    dm = A.new_empty(0 if m is None else m.numel(), dtype=wide)
    for rows in _row_blocks(update):
        g = G[rows].to(wide)
        scale = None if m is None or norm is None else (m[rows] / norm[rows])[:, None]
        V, gA, gB, gC, gD = update.rows(rows).backward(g if scale is None else g * scale)
        if base is not None:
            V = V + base[rows]
        if scale is not None and norm is not None:
            dm[rows] = (g * V).sum(1) / norm[rows]
            V = V * scale
        by_rows[rows] = V - base[rows] if minus_base and base is not None else V
        dA += gA
        dB[rows] = gB
        if gC is not None and gD is not None:
            dC += gC
            dD[rows] = gD
    return [weight, dA, dB, dC, dD, dm]

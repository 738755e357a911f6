"""Which tokens form G = dY^T x: G enters the factor gradients only, and tokens weigh very unequally in it.

Rows of dY that are exactly zero (padding, masked labels) add nothing and can be left out at no loss. Beyond that,
column-row sampling (Winner-Take-All, arXiv 2305.15265) keeps the heaviest tokens by p_t = |x_t| |dY_t| as they are and
draws the rest by p_t with weights that keep G unbiased.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Leave zero rows out from this share on: below it, gathering the others costs what the products save (LOG.md).
WORTH_DROPPING = 1 / 16
# Shares of the tokens at which a layer's sampling error is recorded.
FRACTIONS = (1 / 64, 1 / 32, 3 / 64, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)


def nonzero_rows(dY: Tensor) -> Tensor | None:
    """Indices of the rows of dY [n, out] that hold anything but zeros; None where leaving the others out does not pay.

    On an accelerator always None: the answer would make the host wait for the device.
    """
    if dY.device.type != "cpu":
        return None
    zero = (dY[:, :16] == 0).all(dim=1)  # rules most rows out after one cache line
    if int(zero.sum()) < WORTH_DROPPING * len(zero):
        return None
    candidates = zero.nonzero().squeeze(1)
    zero[candidates] = (dY[candidates] == 0).all(dim=1)
    keep = (~zero).nonzero().squeeze(1)
    return keep if len(keep) <= (1 - WORTH_DROPPING) * len(zero) else None


class Sample(NamedTuple):
    """m tokens: G is estimated by sum_j weight_j dY_(tokens_j) x_(tokens_j)^T."""

    tokens: Tensor  # [m] int64
    weight: Tensor  # [m] float32
    p: Tensor  # [n] float32: |x_t| |dY_t| of all tokens, descending


def _kept(p: Tensor, m: int) -> Tensor:
    """How many of the heaviest tokens (p sorted, descending) are kept as they are, [] int64 in [0, m).

    Drawing k = m - c from the rest, of total weight R_c, has variance (R_c^2 - |G_rest|^2) / k: c minimises R_c^2 / k.
    """
    kept = torch.arange(m, device=p.device)
    rest = p.sum() - torch.cat([p.new_zeros(1), p.cumsum(0)[: m - 1]])
    return (rest.clamp(min=0) ** 2 / (m - kept)).argmin()


def error_bounds(p: Tensor, tokens: int) -> Tensor:
    """Bound R_c^2 / k on E|estimate - G|^2 (see :func:`_kept`) if m were each of FRACTIONS of ``tokens``, [len(FRACTIONS)].

    p [n <= tokens], descending; 0 where m would hold every token of p.
    """
    rest = p.sum() - torch.cat([p.new_zeros(1), p.cumsum(0)[:-1]])
    m = (torch.tensor(FRACTIONS, device=p.device) * tokens).ceil()[:, None]
    k = m - torch.arange(len(p), device=p.device)
    bounds = torch.where(k > 0, rest.clamp(min=0) ** 2 / k.clamp(min=1), torch.inf).amin(dim=1)
    return bounds.where(m[:, 0] < len(p), p.new_zeros(()))


def sample(x: Tensor, dY: Tensor, m: int, seed: int) -> Sample:
    """Choose m of the n tokens of x [n, in] and dY [n, out] for an unbiased estimate of dY^T x.

    The draws are stratified: one in each of k equal slices of the remaining weight, which leaves the expectation as it
    is and the variance no larger than that of independent draws. The same seed gives the same choice.
    """
    p = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    p = p * torch.linalg.vector_norm(dY, dim=1, dtype=torch.float32)
    p, order = p.sort(descending=True)
    c = _kept(p, m)
    below = p.cumsum(0)
    position = torch.arange(m, device=p.device)
    kept_weight = torch.where(c > 0, below[(c - 1).clamp(min=0)], p.new_zeros(()))
    rest = (below[-1] - kept_weight).clamp(min=0)
    uniform = torch.rand(m, generator=torch.Generator().manual_seed(seed)).to(p.device)
    slice_ = (position - c + uniform) / (m - c)
    drawn = torch.searchsorted(below, kept_weight + slice_ * rest).clamp(max=len(p) - 1)
    drawn = torch.maximum(drawn, c)
    index = torch.where(position < c, position, drawn)
    weight = torch.where(position < c, p.new_ones(()), rest / ((m - c) * p[index]).clamp(min=torch.finfo(p.dtype).tiny))
    return Sample(order[index], weight, p)

"""Which tokens form G = dY^T x: G enters the factor gradients only, and tokens weigh very unequally in it.

Rows of dY that are exactly zero (padding, masked labels) add nothing and can be left out at no loss. Beyond that,
column-row sampling (Winner-Take-All, arXiv 2305.15265) keeps the heaviest tokens by p_t = |x_t| |dY_t| as they are and
draws the rest by p_t with weights that keep G unbiased.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Leave zero rows out from this share on: below it, gathering the others costs what the products save (LOG.md).
WORTH_DROPPING = 1 / 16
WORTH_LOOKING = 1 << 12  # elements of dY: of fewer the product takes less time than the look


def nonzero_rows(dY: Tensor) -> Tensor | None:
    """Indices of the rows of dY [n, out] that hold anything but zeros; None where leaving the others out does not pay.

    On an accelerator always None: the answer would make the host wait for the device.
    """
    if dY.numel() < WORTH_LOOKING or dY.device.type != "cpu":
        return None
    zero = (dY[:, :16] == 0).all(dim=1)  # rules most rows out after one cache line
    if int(zero.sum()) < WORTH_DROPPING * len(zero):
        return None
    candidates = zero.nonzero().squeeze(1)
    zero[candidates] = (dY[candidates] == 0).all(dim=1)
    keep = (~zero).nonzero().squeeze(1)
    return keep if len(keep) <= (1 - WORTH_DROPPING) * len(zero) else None


def token_weights(x: Tensor, dY: Tensor) -> Tensor:
    """p_t = |x_t| |dY_t| [n] float32, for x [n, in] and dY [n, out]."""
    x_norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    return x_norm * torch.linalg.vector_norm(dY, dim=1, dtype=torch.float32)


def sample(p: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Choose m of n tokens of weights p [n] so that sum_j w_j dY_(t_j) x_(t_j)^T estimates dY^T x without bias.

    The c heaviest are kept as they are (w = 1), the other k = m - c are drawn in proportion to p. That has the variance
    (R_c^2 - |G_rest|^2) / k, with R_c the weight of what is not kept: c minimizes R_c^2 / k. The draws are stratified,
    one in each of k equal slices of that weight, which changes no expectation and never adds variance. They come from
    torch's generator of the device and never wait for it, so a captured step draws anew in each replay.

    Returns:
        (t [m] int64, w [m] float32).
    """
    p, order = p.sort(descending=True)
    position = torch.arange(m, device=p.device)
    below = p.cumsum(0, dtype=torch.float64)
    above = (below[-1] - torch.cat([below.new_zeros(1), below[: m - 1]])).clamp(min=0)  # R_c for c = 0 .. m - 1
    c = (above**2 / (m - position)).argmin()
    rest, k = above.gather(0, c[None])[0], m - c  # above[c] would bring c to the host
    uniform = torch.rand(m, dtype=torch.float64, device=p.device)
    drawn = torch.searchsorted(below, below[-1] - rest + (position - c + uniform) / k * rest, right=True)
    drawn = drawn.clamp(max=len(p) - 1).maximum(c)
    chosen = torch.where(position < c, position, drawn)
    weight = torch.where(position < c, 1.0, rest / (k * p[chosen]).clamp(min=torch.finfo(p.dtype).tiny))
    return order[chosen], weight.to(torch.float32)

"""MoRA (arXiv 2405.12130): one square matrix of high rank between two fixed maps.

    y' = y + f_decomp(M f_comp(x))        M [rhat, rhat], rhat = floor(sqrt((out + in) r) + 0.5), 0 at the start

so M has about the parameters of LoRA at rank r, and rank up to rhat. No alpha. ``kind`` names the two maps:

* "truncation": x's first rhat entries; zeros after M's.
* "sharing" (the paper's Eq. 6, the authors' type 1, for large r): x in n = ceil(in / rhat) groups of rhat entries, the last one
  filled up from the beginning of x; f_comp adds the groups up, f_decomp repeats the whole result.
* "grouping" (type 2): rhat runs of neighbors in x (the first in mod rhat of them one longer), each added up; f_decomp repeats
  each entry for a run of neighbors in y. "grouping-sharing" (type 3) and "sharing-grouping" (type 4) take one map of each.
* "decoupling": M takes every group of "sharing" by itself, and f_decomp sets the n results side by side, repeating them if out is
  larger. "rotation" (Eq. 9, type 6, for small r; rhat made even) turns the groups by rotary positions with base 10000 first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from duallora.core.settings import RANKS
from duallora.errors import ConfigError
from duallora.methods import Method
from duallora.methods.rule import Rule, RuleConfig, attach

# kind -> how x is put together and how the result is taken apart
_ADDED = {
    "truncation": ("cut", "cut"),
    "sharing": ("turns", "turns"),
    "grouping": ("runs", "runs"),
    "grouping-sharing": ("runs", "turns"),
    "sharing-grouping": ("turns", "runs"),
}
KINDS = ("rotation", "decoupling", *_ADDED)


class MoRA(Rule):
    """f_decomp(M f_comp(x)); linear in x."""

    linear = True

    def __init__(self, config: RuleConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.kind = config.options.get("kind", "rotation")
        if self.kind not in KINDS:
            raise ConfigError(f"kind={self.kind!r}: expected one of {', '.join(KINDS)}.")
        size = int(math.sqrt((in_features + out_features) * config.r) + 0.5)
        if self.kind == "rotation":
            size = max(2, size // 2 * 2)
        self.size, self.groups = size, math.ceil(in_features / size)
        self.M = self.start(torch.zeros(size, size), config)

    def forward(self, h: Tensor, prompt: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out]."""
        filled = h[..., torch.arange(self.groups * self.size, device=h.device) % self.in_features]
        if self.kind not in _ADDED:
            groups = filled.unflatten(-1, (self.groups, self.size))  # [..., n, rhat]
            out = ((self._turned(groups) if self.kind == "rotation" else groups) @ self.M.T).flatten(-2)
            return out[..., torch.arange(self.out_features, device=h.device) % out.shape[-1]]
        compress, decompress = _ADDED[self.kind]
        x = filled if compress == "turns" else h
        places = self._places(compress, x.shape[-1], h.device)
        kept = x[..., : len(places)]
        x = torch.zeros(*h.shape[:-1], self.size, dtype=h.dtype, device=h.device).index_add(-1, places, kept)
        out = (x @ self.M.T)[..., self._places(decompress, self.out_features, h.device)]
        return F.pad(out, (0, self.out_features - out.shape[-1]))

    def _places(self, way: str, width: int, device: torch.device) -> Tensor:
        """To which of rhat places each of ``width`` entries belongs; "cut" has places for the first rhat of them alone."""
        if way == "runs":
            run, longer = divmod(width, self.size)
            lengths = torch.full((self.size,), run, device=device)
            lengths[:longer] += 1
            return torch.arange(self.size, device=device).repeat_interleave(lengths)
        places = torch.arange(width, device=device)
        return places[: self.size] if way == "cut" else places % self.size

    def _turned(self, groups: Tensor) -> Tensor:
        half = self.size // 2
        speed = 10000.0 ** (-torch.arange(half, device=groups.device) / half)
        angle = torch.arange(self.groups, device=groups.device)[:, None] * speed  # [n, rhat / 2]
        cos, sin = angle.cos().to(groups.dtype), angle.sin().to(groups.dtype)
        left, right = groups[..., :half], groups[..., half:]
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


MORA = Method(
    name="mora",
    title="MoRA",
    paper="2405.12130",
    equation="W0 x + f_decomp(M f_comp(x))",
    attach=attach,
    # r, kind: authors' README
    defaults={"r": RANKS["mora"], "dropout": 0.0, "target_modules": "all-linear", "kind": "rotation"},
    rule=MoRA,
)
METHODS = {"mora": MORA}

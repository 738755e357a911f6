"""MoRA (arXiv 2405.12130): one square matrix of high rank between two fixed maps.

    y' = y + f_decomp(M f_comp(x))        M [rhat, rhat], rhat = floor(sqrt((out + in) r) + 0.5), 0 at the start

so M has about the parameters of LoRA at rank r, and rank up to rhat. No alpha. x is cut into n = ceil(in / rhat) groups of
rhat entries, the last one filled up from the beginning of x.

``kind="sharing"`` (the paper's Eq. 6, the authors' type 1, for large r): f_comp adds the groups up, f_decomp repeats.
``kind="rotation"`` (Eq. 9, type 6, for small r; rhat made even): M takes every group, turned by rotary positions with
base 10000, and f_decomp sets the n results side by side, repeating them if out is larger.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from duallora.errors import ConfigError
from duallora.methods import Method
from duallora.methods.rule import Rule, RuleConfig, attach

KINDS = ("rotation", "sharing")


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
        entries = torch.arange(self.groups * self.size, device=h.device) % self.in_features
        groups = h[..., entries].unflatten(-1, (self.groups, self.size))  # [..., n, rhat]
        if self.kind == "sharing":
            out = groups.sum(-2) @ self.M.T
        else:
            out = (self._turned(groups) @ self.M.T).flatten(-2)
        return out[..., torch.arange(self.out_features, device=h.device) % out.shape[-1]]

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
    defaults={"r": 8, "dropout": 0.0, "target_modules": "all-linear", "kind": "rotation"},  # r, kind: authors' README
    rule=MoRA,
)
METHODS = {"mora": MORA}

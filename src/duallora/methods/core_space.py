"""FLoRA (Si et al., arXiv 2405.14739), for linear layers: a trained core between two trained bases.

    dW = s A G B^T        A [out, r], G [r, r], B [in, r]

G is 0 at the start, A and B Kaiming-normal with a = sqrt(3), s = 1: the defaults of the authors' code, which draws A and B
with fan_in = r. ``options={"scale": s, "r_in": ...}`` for another s, or another rank on the input side. The paper's
convolutions are left out. (Not Flora, the optimizer: see ``projected.py``.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from duallora.core.settings import RANKS
from duallora.errors import check_positive, check_rank
from duallora.methods import Method
from duallora.methods.rule import Rule, RuleConfig, attach


class CoreSpace(Rule):
    """s A G B^T x."""

    linear = True

    def __init__(self, config: RuleConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.scale = config.options.get("scale", 1.0)
        check_positive("scale", self.scale)
        r_in = config.options.get("r_in") or config.r
        check_rank("r_in", r_in)
        self.A = nn.Parameter(nn.init.kaiming_normal_(torch.empty(out_features, config.r), a=math.sqrt(3)))
        self.B = nn.Parameter(nn.init.kaiming_normal_(torch.empty(in_features, r_in), a=math.sqrt(3)))
        self.G = self.start(torch.zeros(config.r, r_in), config)

    def forward(self, h: Tensor, prompt: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.scale * (((h @ self.B) @ self.G.T) @ self.A.T)


FLORA_CORE = Method(
    name="flora-core",
    title="FLoRA (low-rank core)",
    paper="2405.14739",
    equation="W0 + s A G B^T",
    attach=attach,
    # r, scale: authors' code
    defaults={"r": RANKS["flora-core"], "dropout": 0.0, "target_modules": "all-linear", "scale": 1.0, "r_in": None},
    rule=CoreSpace,
)
METHODS = {"flora-core": FLORA_CORE}

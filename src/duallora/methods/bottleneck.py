"""Two bottleneck adapters of the paper's tables.

Adapter-P, parallel (He et al., arXiv 2110.04366; Table 1 is the "Parallel" of LLM-Adapters, arXiv 2304.01933):

    y' = y + s U tanh(D x)        D [r, in], U [out, r]

r = 256 on up_proj and down_proj, s = 1, no bias, D and U ~ N(0, 0.02^2) (``init="bert"``: LLM-Adapters' default, so the start
is not the base model; ``init="zero"`` starts with U = 0).

Adapter-L, in the residual stream after each block (Lin et al., arXiv 2004.03829, with the LoRA paper's count):

    y' = y + U relu(D LN(y) + b) + c        D [r, d], U [d, r], LN trained, y the block's output

U, b, c start at 0 and D ~ N(0, 0.02^2), so the start is the base model (ours). ``target_modules=["mlp"]`` puts it after the MLP
instead, where the residual is not yet added, as versions before this one did.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duallora.core.settings import RANKS
from duallora.errors import ConfigError, check_positive
from duallora.methods import Method
from duallora.methods.rule import Rule, RuleConfig, attach


class Parallel(Rule):
    """s U tanh(D x)."""

    def __init__(self, config: RuleConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.scale = config.options.get("scale", 1.0)
        check_positive("scale", self.scale)
        init = config.options.get("init", "bert")
        if init not in ("bert", "zero"):
            raise ConfigError(f"init={init!r}: expected 'bert' or 'zero'.")
        self.D = nn.Parameter(torch.empty(config.r, in_features).normal_(std=0.02))
        up = torch.empty(out_features, config.r)
        self.U = nn.Parameter(up.normal_(std=0.02)) if init == "bert" else self.start(up, config)

    def forward(self, h: Tensor, prompt: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.scale * (torch.tanh(h @ self.D.T) @ self.U.T)


class AfterBlock(Rule):
    """U relu(D LN(y) + b) + c."""

    any_module = True
    reads_output = True

    def __init__(self, config: RuleConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.gain, self.shift = nn.Parameter(torch.ones(out_features)), nn.Parameter(torch.zeros(out_features))
        self.D = nn.Parameter(torch.empty(config.r, out_features).normal_(std=0.02))
        self.b = nn.Parameter(torch.zeros(config.r))
        self.U = self.start(torch.empty(out_features, config.r), config)
        self.c = nn.Parameter(torch.zeros(out_features))

    def forward(self, h: Tensor, prompt: Tensor | None = None) -> Tensor:
        """[..., d] -> [..., d]."""
        normed = F.layer_norm(h, (self.out_features,), self.gain, self.shift)
        return F.relu(normed @ self.D.T + self.b) @ self.U.T + self.c


NO_MERGE = "it adds a nonlinear function of the activations, not a change of a weight. Keep it as an adapter."
ADAPTER_P = Method(
    name="adapter-p",
    title="Adapter-P",
    paper="2110.04366",
    equation="W0 x + s U tanh(D x)",
    attach=attach,
    defaults={
        "r": RANKS["adapter-p"], "dropout": 0.0, "target_modules": ["up_proj", "down_proj"], "scale": 1.0, "init": "bert",
    },  # LLM-Adapters
    no_merge=NO_MERGE,
    rule=Parallel,
)  # fmt: skip
ADAPTER_L = Method(
    name="adapter-l",
    title="Adapter-L",
    paper="2004.03829",
    equation="y + U relu(D LN(y) + b) + c, y = block(x)",
    attach=attach,
    defaults={"r": RANKS["adapter-l"], "dropout": 0.0, "target_modules": None},  # 224: LoRA's paper's count for GPT2-M
    no_merge=NO_MERGE,
    rule=AfterBlock,
)
METHODS = {"adapter-p": ADAPTER_P, "adapter-l": ADAPTER_L}

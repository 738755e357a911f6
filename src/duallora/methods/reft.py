"""LoReFT (arXiv 2404.03592): edits the residual stream at the prompt's first and last tokens, in an r-dimensional subspace.

    h' = h + R^T (W h + b - R h)        R [r, d] with orthonormal rows, W [r, d], b [r]

on the output of each decoder layer, at the first ``first`` and last ``last`` tokens of the prompt (7 and 7, r = 8, every layer:
the authors' commonsense command), each at most half of the prompt, so that the middle token of a short odd one is left alone, as
the authors' code does; so are the answer's tokens. The prompt is what ``attention_mask`` covers and
``labels`` mark with -100; while text is generated, what was there before the first new token.
R is the Gram-Schmidt basis of a trained matrix. W starts as torch's Linear, so the start is not the base model; with
``init="identity"`` W = R and b = 0, and it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duallora.core.settings import RANKS
from duallora.errors import ConfigError, check_steps
from duallora.methods import Method
from duallora.methods.rule import Rule, RuleConfig, attach


class LoReFT(Rule):
    """R^T (W h + b - R h) at the chosen tokens, 0 elsewhere."""

    any_module = True
    reads_output = True
    reads_prompt = True

    def __init__(self, config: RuleConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.first, self.last = config.options.get("first", 7), config.options.get("last", 7)
        check_steps("first", self.first)
        check_steps("last", self.last)
        init = config.options.get("init", "linear")
        if init not in ("linear", "identity"):
            raise ConfigError(f"init={init!r}: expected 'linear' or 'identity'.")
        if config.r > out_features:
            raise ConfigError(f"r={config.r}: expected at most the layer's width, {out_features}.")
        self.V = nn.Parameter(torch.randn(config.r, out_features))
        source = nn.Linear(out_features, config.r)
        self.W, self.b = nn.Parameter(source.weight.detach()), nn.Parameter(source.bias.detach())
        with torch.no_grad():
            R = self.basis()
            self.V.copy_(R)
            if init == "identity":
                self.W.copy_(R)
                self.b.zero_()

    def basis(self) -> Tensor:
        """R [r, d]: the rows of V made orthonormal one after the other."""
        V = self.V if self.V.dtype == torch.float64 else self.V.float()
        Q, S = torch.linalg.qr(V.T)
        # LAPACK's Q jumps where an entry changes its sign; with a positive diagonal it is unique, hence smooth.
        return (Q * torch.where(S.diagonal() < 0, -1, 1)).T

    def forward(self, h: Tensor, prompt: Tensor | None = None) -> Tensor:
        """[batch, length, d] -> [batch, length, d]."""
        R = self.basis().to(h.dtype)
        edit = (h @ self.W.T + self.b - h @ R.T) @ R
        if prompt is None:
            return edit
        number = prompt.cumsum(1)  # 1 for the prompt's first token
        length = prompt.sum(1, keepdim=True)
        first, last = ((length // 2).clamp(max=most) for most in (self.first, self.last))
        chosen = prompt & ((number <= first) | (number > length - last))
        return edit * chosen[..., None].to(edit.dtype)


LOREFT = Method(
    name="loreft",
    title="LoReFT",
    paper="2404.03592",
    equation="h + R^T (W h + b - R h)",
    attach=attach,
    defaults={"r": RANKS["loreft"], "dropout": 0.0, "target_modules": None, "first": 7, "last": 7, "init": "linear"},
    no_merge="it edits the activations of the prompt's tokens, not a weight. Keep it as an adapter.",
    rule=LoReFT,
)
METHODS = {"loreft": LOREFT}

"""Delta-LoRA (arXiv 2309.02411): LoRA whose steps also move the pretrained weight.

    W[t+1] = W[t] + lambda (alpha / r) (B[t+1] A[t+1] - B[t] A[t])  in the steps t > K, t from 0;    y = W x + (alpha / r) B A x

(the paper's Algorithm 1). The updates telescope, W[t] = W0 + lambda (alpha / r) (B[t] A[t] - B[K+1] A[K+1]), so W0 itself never
has to be touched: the layer is a function of A, B and a copy of both taken after K + 1 steps, and that is what is saved,
2 r (in + out) numbers instead of W. The gradients are those of the paper, as the moved part of W is a constant to them. A [r, in]
Kaiming-uniform, B = 0 (LoRA's). No dropout, as the paper demands. ``options={"lambda_": 2.0, "K": 500}`` are the values that
published settings quote; a run of K + 1 steps or fewer would be LoRA's, and is refused.
"""

# mypy: disable-error-code="assignment,operator,arg-type"
# (to mypy an attribute of a module is `Tensor | Module`, and PEFT's own types are loose)
from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from duallora.core.settings import RANKS
from duallora.errors import ConfigError, check_positive, check_steps
from duallora.methods import Method, MethodSpec
from duallora.methods.rule import Rule, RuleConfig, attach

_waiting: weakref.WeakSet[DeltaLoRA] = weakref.WeakSet()
_hooks: list[Any] = []


class DeltaLoRA(Rule):
    """(alpha / r) (B A + lambda const(B A - B_K A_K)) x, the second part after ``still`` steps."""

    linear = True

    def __init__(self, config: RuleConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.lambda_, K = config.options.get("lambda_", 2.0), config.options.get("K", 500)
        check_positive("lambda_", self.lambda_)
        check_steps("K", K)
        # Adapters of the first version moved W from step `start` on, without a copy where that was 0.
        self.still = config.options.get("start", K + 1)
        self.scaling = (config.alpha or 2 * config.r) / config.r
        self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(config.r, in_features), a=math.sqrt(5)))
        self.B = self.start(torch.empty(out_features, config.r), config)
        if self.still:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
            self.register_buffer("A_K", torch.zeros_like(self.A))
            self.register_buffer("B_K", torch.zeros_like(self.B))
            _watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.still:
            _watch(self)  # a copied or unpickled layer counts steps too

    def forward(self, h: Tensor, prompt: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out]."""
        moved = (h @ self.A.detach().T) @ self.B.detach().T
        factor: Any = self.lambda_
        if self.still:
            moved = moved - (h @ self.A_K.to(h.dtype).T) @ self.B_K.to(h.dtype).T
            factor = torch.where(self.step >= self.still, self.lambda_, 0.0).to(h.dtype)
        return self.scaling * ((h @ self.A.T) @ self.B.T + factor * moved)


def _watch(rule: DeltaLoRA) -> None:
    _waiting.add(rule)
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_optimizer_step))


def _after_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    with torch.no_grad():
        for rule in list(_waiting):
            if id(rule.A) not in owned or rule.A.grad is None:
                continue
            rule.step += 1
            if int(rule.step) == rule.still:
                rule.A_K.copy_(rule.A)
                rule.B_K.copy_(rule.B)


def check(spec: MethodSpec, recipe: Any, steps: int | None) -> None:
    """ConfigError where W would never move."""
    if steps is not None and steps <= spec.options["K"] + 1:
        raise ConfigError(
            f"K={spec.options['K']}: Delta-LoRA moves W in the steps after step K, and this run has {steps}: expected more steps "
            "(train.max_steps, train.epochs) or a lower K (adapter.options={K: 10})"
        )


DELTA_LORA = Method(
    name="delta-lora",
    title="Delta-LoRA",
    paper="2309.02411",
    equation="W[t+1] = W[t] + lambda (alpha/r) (B[t+1] A[t+1] - B[t] A[t])",
    attach=attach,
    defaults={
        "r": RANKS["delta-lora"], "alpha": lambda r: 2 * r, "target_modules": "all-linear", "lambda_": 2.0, "K": 500,
    },
    check=check,
    rule=DeltaLoRA,
)  # fmt: skip
METHODS = {"delta-lora": DELTA_LORA}

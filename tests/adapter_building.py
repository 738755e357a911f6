"""What the tests of adapters share: awkward ranks on every linear layer, and steps of training."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from torch import nn

import duallora
from duallora import DualLoraConfig
from duallora.tuner import DualLoraLayer

AWKWARD: dict[str, Any] = {
    "r1": 4,
    "r2": 3,
    "alpha": 10,
    "target_modules": "all-linear",
    "warmup_steps": 4,
    "task_type": "CAUSAL_LM",
}


def adapted(base: nn.Module, **options: Any) -> peft.PeftModel:
    torch.manual_seed(7)
    return peft.get_peft_model(base, DualLoraConfig(**{**AWKWARD, **options}))


def one_layer(base: nn.Module, **options: Any) -> tuple[peft.PeftModel, Any]:
    """A model of that one layer, and the adapted layer, at gate 3/4 with factors far from their start."""
    torch.manual_seed(7)
    ranks = {"r1": 4, "r2": 3, "alpha": 10, "warmup_steps": 4, "target_modules": ["0"]}
    start = {"init_std": 0.5, "direction_init_std": 0.02, "init_seed": 5}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*a larger rank adds")
        model = peft.get_peft_model(nn.Sequential(base), DualLoraConfig(**{**ranks, **start, **options}))
    duallora.advance_gate(model, 3)
    layer = model.base_model.model[0]
    if options.get("warmup") == "residual":
        for factor in factors(layer):
            factor.data.add_(0.1)
    return model, layer


def layers(model: nn.Module) -> list[DualLoraLayer]:
    return [module for module in model.modules() if isinstance(module, DualLoraLayer)]


def factors(layer: Any) -> list[nn.Parameter]:
    """A, B, C, D; A and B with fixed signs."""
    return [p["default"] for n in "ABCD" if "default" in (p := getattr(layer, f"duallora_{n}"))]


def train(model: nn.Module, ids: torch.Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

"""What the tests of adapters share: awkward ranks on every linear layer, and steps of training."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

from duallora import DualLoraConfig

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


def train(model: nn.Module, ids: torch.Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

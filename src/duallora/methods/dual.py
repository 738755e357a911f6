"""Dual LoRA (arXiv 2512.03402) with every ablation of its tables.

    dW = gate * alpha / sqrt(r1 r2) * ReLU(B A) . Sign(D C)

``options`` are the fields of ``DualLoraConfig``: ``magnitude``, ``direction``, ``ste_clip``, ``warmup``, ``use_dora``, ... (Setting 1:
magnitude="identity"; Setting 2: direction="identity"; Setting 3: direction="fixed"; Table 3: direction="xnor", "dorefa"; Table
6: magnitude="abs", "sigmoid"), and ``direction_lr_ratio``, the learning rate of C and D over that of A and B.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import get_peft_model
from torch import nn

from duallora.errors import ConfigError
from duallora.methods import Method, MethodSpec
from duallora.tuner import DualLoraConfig, param_groups


def attach(model: nn.Module, spec: MethodSpec, batches: Any = None) -> Any:
    """get_peft_model with a DualLoraConfig."""
    options = {k: v for k, v in spec.options.items() if k != "direction_lr_ratio"}
    unknown = sorted(options.keys() - {f.name for f in dataclasses.fields(DualLoraConfig)})
    if unknown:
        raise ConfigError(f"options {unknown}: expected fields of DualLoraConfig, or direction_lr_ratio.")
    fields = {"r": spec.r, "alpha": spec.alpha, "target_modules": spec.target_modules, "task_type": spec.task_type}
    config = DualLoraConfig(duallora_dropout=spec.dropout or 0.0, **fields, **options)  # type: ignore[arg-type]
    return get_peft_model(model, config)


def groups(model: nn.Module, spec: MethodSpec, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """C and D at ``direction_lr_ratio`` times the rate of everything else."""
    found = param_groups(model, lr, spec.options["direction_lr_ratio"])
    return [{**group, "weight_decay": weight_decay} for group in found]


DUAL = Method(
    name="duallora",
    title="Dual LoRA",
    paper="2512.03402",
    equation="W0 + gate alpha/sqrt(r1 r2) ReLU(B A) . Sign(D C)",
    attach=attach,
    defaults={
        "r": 16, "alpha": lambda r: 2 * r, "dropout": 0.0, "target_modules": "all-linear", "direction_lr_ratio": 1.0,
    },
    groups=groups,
)  # fmt: skip
METHODS = {"duallora": DUAL}

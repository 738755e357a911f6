"""What Tables 3, 5, 6 and Figures 2 and 3 vary: Dual LoRA alone, on LLaMA-7B under Table 1's settings.

At mini scale they share one setting too, MiniLM on two tasks of GLUE. `ablations` is ours: the choices that the paper
leaves open (warm-up, start values) and the sampled gradients of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from duallora.errors import ConfigError
from duallora.grid.study import Study
from duallora.recipes.table1 import TARGETS, commonsense
from duallora.recipes.variants import duallora

_MODEL = "llama-7b"
_MINI_TARGETS = ["query", "value"]


def study(scale: str, name: str, variants: Mapping[str, Mapping[str, Any]], reference: str) -> Study:
    """Variants of Dual LoRA under the table's name: label -> what each changes."""
    if scale == "paper":
        return commonsense(name, _MODEL, duallora(TARGETS, variants), reference)
    return mini(name, duallora(_MINI_TARGETS, variants), reference)


def mini(name: str, variants: Mapping[str, Mapping[str, Any]], reference: str) -> Study:
    """MiniLM on CoLA and STS-B under the settings of Table 2's mini scale; every value is ours."""
    base: dict[str, Any] = {
        "model.name": "builtin:minilm-l6",
        "data.max_length": 128,
        "train.max_steps": 300,
        "train.batch_size": 16,
        "train.lr_warmup_ratio": 0.06,
        "train.weight_decay": 0.0,
        "train.report_to": [],
        "eval.test": True,
    }
    tasks = {task: {"data.task": task, "data.holdout": 500} for task in ("cola", "stsb")}
    search = {"train.learning_rate": [1e-3, 3e-3, 1e-2]}
    return Study(name, base, tasks, variants, search=search, seeds=(0, 1, 2), reference=reference)


def ablations(scale: str) -> Study:
    """Both forms of the warm-up and none, start values of either group, and the share of tokens in the gradient."""
    if scale != "mini":
        raise ConfigError("ablations is a study of ours, at --scale mini alone")
    changes: dict[str, dict[str, Any]] = {
        "default": {},
        "residual": {"adapter.warmup": "residual"},
        "no-warmup": {"adapter.warmup": "none"},
        "init-std-0.05": {"adapter.init_std": 0.05, "adapter.direction_init_std": 0.05},
        "init-std-0.1": {"adapter.init_std": 0.1, "adapter.direction_init_std": 0.1},
        "direction-std-0.002": {"adapter.direction_init_std": 0.002},
        "direction-std-0.1": {"adapter.direction_init_std": 0.1},
        "tokens-0.5": {"adapter.gradient_tokens": 0.5},
        "tokens-0.25": {"adapter.gradient_tokens": 0.25},
    }
    variants = {label: {"adapter.r": 8, **own} for label, own in changes.items()}
    return mini("ablations", duallora(_MINI_TARGETS, variants), "default")

"""What Tables 3, 5, 6 and Figures 2 and 3 vary: Dual LoRA, on one LLaMA under Table 1's settings.

At mini scale they share one setting too: MiniLM on SST-2 and STS-B, those with many variants on STS-B alone, which tells
them apart better. `ablations` is ours: the choices that the paper leaves open (warm-up, start values) and the sampled
gradients of this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from duallora.grid.study import Study
from duallora.paper.table1 import TARGETS, commonsense
from duallora.paper.table2 import MINI_BASE, MINI_HEAD, MINI_TARGETS, MINI_TASKS
from duallora.paper.variants import PLAIN_START, duallora, methods

_MINI_TASKS = ("sst2", "stsb")


def study(
    scale: str,
    name: str,
    variants: Mapping[str, Mapping[str, Any]],
    reference: str,
    mini_tasks: Sequence[str] = _MINI_TASKS,
    model: str = "llama-7b",
    beside: Sequence[tuple[str, int]] = (),
) -> Study:
    """Variants of Dual LoRA under the table's name, label -> what each changes, and other methods ``beside`` them."""
    if scale == "paper":
        return commonsense(name, model, duallora(TARGETS, variants) | methods(beside, TARGETS), reference)
    return mini(name, variants, reference, mini_tasks, beside=beside)


def mini(
    name: str,
    variants: Mapping[str, Mapping[str, Any]],
    reference: str,
    mini_tasks: Sequence[str] = _MINI_TASKS,
    seeds: Sequence[int] = (0, 1, 2),
    beside: Sequence[tuple[str, int]] = (),
) -> Study:
    """MiniLM under the settings of Table 2's mini scale, without the losses on the way; the rates are ours."""
    own_start = {} if beside else PLAIN_START  # which other methods have no part in
    base = {**MINI_BASE, **own_start, "train.eval_steps": None}
    tasks = {task: MINI_TASKS[task] for task in mini_tasks}
    search = {"train.learning_rate": [1e-3, 3e-3, 1e-2]}
    dual = {**MINI_HEAD, **(PLAIN_START if beside else {})}
    changed = {label: {**dual, **own} for label, own in duallora(MINI_TARGETS, variants).items()}
    changed |= methods(beside, MINI_TARGETS, MINI_HEAD)
    return Study(name, base, tasks, changed, search=search, seeds=seeds, reference=reference)


def ablations(scale: str) -> Study:
    """Both forms of the warm-up and none, start values of either group, and the share of tokens in the gradient."""
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "residual": {"adapter.warmup": "residual"},
        "no-warmup": {"adapter.warmup": "none"},
        "init-std-0.05": {"adapter.init_std": 0.05, "adapter.direction_init_std": 0.05},
        "init-std-0.1": {"adapter.init_std": 0.1, "adapter.direction_init_std": 0.1},
        "magnitude-std-0.05": {"adapter.init_std": 0.05},
        "direction-std-0.0002": {"adapter.direction_init_std": 0.0002},
        "direction-std-0.002": {"adapter.direction_init_std": 0.002},
        "magnitude-std-0.05-direction-std-0.002": {"adapter.init_std": 0.05, "adapter.direction_init_std": 0.002},
        "direction-std-0.1": {"adapter.direction_init_std": 0.1},
        "tokens-0.5": {"adapter.gradient_tokens": 0.5},
        "tokens-0.25": {"adapter.gradient_tokens": 0.25},
    }
    return mini("ablations", {label: {"adapter.r": 8, **own} for label, own in changes.items()}, "plain", ["stsb"])

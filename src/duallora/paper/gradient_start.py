"""Ours, not the paper's: does a start from the gradient pay, against the data-driven starts of LoRA?

Three studies: the starts on SST-2 and STS-B with MiniLM and on E2E with SmolLM2, and what the gradient's start consists of
on STS-B. Everyone trains the same number of parameters (LoRA with r = 16, Dual LoRA with r1 = r2 = 8; on E2E half of that),
at the same scale of alpha / r = 2, and sees the same rows. The settings are those of Tables 2 and 4 and of `ablations` at
mini scale, so the rows without a start are theirs. Both starts of Dual LoRA stand there with the start values that
`ablations` favors, too, which were picked on STS-B. Every value is ours; short runs, because a start can only matter early.
"""

from __future__ import annotations

from typing import Any

from duallora.grid.study import Study
from duallora.paper import table4
from duallora.paper.ablations import mini
from duallora.paper.table2 import MINI_BASE, MINI_HEAD, MINI_TARGETS, MINI_TASKS
from duallora.paper.variants import PLAIN_START, Variant

_BATCHES = 4  # of calibration: adapter.init_batches' default
_FAVOURED: Variant = {"adapter.init_std": 0.05, "adapter.direction_init_std": 0.002}  # the best of `ablations`


def _starts(r: int, rows: int) -> dict[str, Variant]:
    """LoRA's own starts (methods/starts.py) and ours, r1 = r2 = ``r``; those from data look at ``rows`` rows, the same ones."""
    plain: Variant = {"adapter.method": "lora", "adapter.r": 2 * r}

    def lora(start: str, **options: Any) -> Variant:
        return {**plain, "adapter.options": {"init_lora_weights": start, **options}}

    return {
        "lora": plain,
        "lora-pissa": lora("pissa"),
        "lora-eva": lora("eva", calibration=rows, eva_config={"rho": 1.0}),  # 1: every layer keeps its rank
        "lora-corda": lora("corda", calibration=rows, corda_method="ipm"),  # its paper's choice for a task's metrics
        "lora-ga": lora("lora_ga", calibration=rows, lora_ga_config={"scale": "paper"}),
        "duallora": {"adapter.r": r, **PLAIN_START},
        "gradient": {"adapter.r": r, "adapter.init": "gradient", **PLAIN_START},
        "duallora-0.05-0.002": {"adapter.r": r, **_FAVOURED},
        "gradient-0.05-0.002": {"adapter.r": r, "adapter.init": "gradient", **_FAVOURED},
    }


_DUAL: Variant = {"adapter.r": 8}
_GRADIENT: Variant = {**_DUAL, "adapter.init": "gradient"}
_PARTS: dict[str, Variant] = {
    "duallora": _DUAL,
    "gradient": _GRADIENT,
    "gradient-signs": {**_DUAL, "adapter.init": "gradient-signs"},
    "gradient-magnitudes": {**_DUAL, "adapter.init": "gradient-magnitudes"},
    "gradient-batches1": {**_GRADIENT, "adapter.init_batches": 1},
    "gradient-batches16": {**_GRADIENT, "adapter.init_batches": 16},
    "gradient-r1-4": {**_GRADIENT, "adapter.r1": 4, "adapter.r2": 12},  # r1 + r2 = 16 as in Figure 2, alpha kept
    "gradient-r1-12": {**_GRADIENT, "adapter.r1": 12, "adapter.r2": 4},
    **{
        f"{name}-{label}": {**own, **change}
        for name, own in (("duallora", _DUAL), ("gradient", _GRADIENT))
        for label, change in (
            ("direction-lr0.3", {"train.direction_lr_ratio": 0.3}),
            ("direction-lr3", {"train.direction_lr_ratio": 3.0}),
            ("direction-std0.002", {"adapter.direction_init_std": 0.002}),
            ("direction-std0.1", {"adapter.direction_init_std": 0.1}),
        )
    },
}


def gradient_start(scale: str) -> tuple[Study, ...]:
    """The three studies."""
    return _glue(), _e2e(), mini("gradient-start-parts", _PARTS, "gradient", ["stsb"])


def _glue() -> Study:
    base = {**MINI_BASE, **MINI_HEAD, "adapter.target_modules": MINI_TARGETS}
    return Study(
        "gradient-start",
        base,
        {task: MINI_TASKS[task] for task in ("sst2", "stsb")},  # those that MiniLM learns
        _starts(8, rows=_BATCHES * MINI_BASE["train.batch_size"]),
        search={"train.learning_rate": [1e-3, 3e-3, 1e-2]},
        reference="gradient",
    )


def _e2e() -> Study:
    """Without PiSSA and CorDA: a cell takes four times as long as one of STS-B."""
    starts = _starts(4, rows=_BATCHES * table4.MINI_BASE["train.batch_size"])
    chosen = {label: own for label, own in starts.items() if label not in ("lora-pissa", "lora-corda")}
    return table4.mini("gradient-start-e2e", chosen, "gradient")

"""Ours, not the paper's: does a start from the gradient pay, against the data-driven starts of LoRA?

Two studies: on GLUE with MiniLM the starts and what the gradient's start consists of, on E2E with SmolLM2 the starts
alone. Everyone trains the same number of parameters, LoRA with r = 8 and Dual LoRA with r1 = r2 = 4, at the same scale
of alpha / r = 2, and sees the same rows. Every value is ours; short runs, because a start can only matter early.
"""

from __future__ import annotations

from typing import Any

from duallora.errors import ConfigError
from duallora.grid.study import Study
from duallora.recipes.table2 import MINI_BASE, MINI_HEAD, MINI_TARGETS, MINI_TASKS

Variant = dict[str, Any]

_SEARCH = {"train.learning_rate": [1e-3, 3e-3, 1e-2]}
_LORA: Variant = {"adapter.method": "lora", "adapter.r": 8, "adapter.alpha": 16}
_DUAL: Variant = {"adapter.r": 4, "adapter.alpha": 8}
_GRADIENT: Variant = {**_DUAL, "adapter.init": "gradient"}


def _starts(batch_size: int, batches: int) -> dict[str, Variant]:
    """LoRA's own starts (methods/starts.py) and ours; those from data look at as many rows, the same ones."""
    rows = batches * batch_size

    def lora(start: str, **options: Any) -> Variant:
        return {**_LORA, "adapter.options": {"init_lora_weights": start, **options}}

    return {
        "lora": _LORA,
        "lora-pissa": lora("pissa"),
        "lora-eva": lora("eva", calibration=rows, eva_config={"rho": 1.0}),  # 1: every layer keeps its rank
        "lora-corda": lora("corda", calibration=rows, corda_method="ipm"),  # its paper's choice for a task's figures
        "lora-ga": lora("lora_ga", calibration=rows, lora_ga_config={"scale": "paper"}),
        "duallora": _DUAL,
        "gradient": {**_GRADIENT, "adapter.init_batches": batches},
    }


_ABLATIONS: dict[str, Variant] = {
    "gradient-signs": {**_DUAL, "adapter.init": "gradient-signs"},
    "gradient-magnitudes": {**_DUAL, "adapter.init": "gradient-magnitudes"},
    "gradient-batches1": {**_GRADIENT, "adapter.init_batches": 1},
    "gradient-batches16": {**_GRADIENT, "adapter.init_batches": 16},
    "gradient-r1-2": {**_GRADIENT, "adapter.r1": 2, "adapter.r2": 6},  # r1 + r2 = 8 as in Figure 2, alpha kept
    "gradient-r1-6": {**_GRADIENT, "adapter.r1": 6, "adapter.r2": 2},
    **{
        f"{name}-{label}": {**own, **change}
        for name, own in (("duallora", _DUAL), ("gradient", _GRADIENT))
        for label, change in (
            ("direction-lr0.3", {"train.direction_lr_ratio": 0.3}),
            ("direction-lr3", {"train.direction_lr_ratio": 3.0}),
            ("direction-std0.1", {"adapter.direction_init_std": 0.1}),
        )
    },
}


def gradient_start(scale: str) -> tuple[Study, ...]:
    """The two studies, mini only.

    Raises:
        ConfigError: scale is "paper"; the paper has nothing of the kind.
    """
    if scale != "mini":
        raise ConfigError(f"gradient-start is ours, not the paper's: expected --scale mini, not {scale}")
    return _glue(), _e2e()


def _glue() -> Study:
    base = {
        **MINI_BASE,
        **MINI_HEAD,
        "adapter.target_modules": MINI_TARGETS,
        "train.eval_steps": 50,  # the curve: a start shows in the first steps or never
    }
    return Study(
        "gradient-start",
        base,
        {task: MINI_TASKS[task] for task in ("sst2", "stsb")},  # 150 steps; CoLA takes a thousand to be learnt at all
        {**_starts(batch_size=MINI_BASE["train.batch_size"], batches=4), **_ABLATIONS},
        search=_SEARCH,
        reference="duallora",
    )


def _e2e() -> Study:
    base = {
        "model.name": "builtin:smollm2-135m",
        "adapter.target_modules": ["q_proj", "v_proj"],
        "data.limit": 2000,
        "data.holdout": 200,
        "data.eval_limit": 64,
        "train.max_steps": 60,
        "train.batch_size": 4,
        "train.lr_warmup_ratio": 0.06,
        "train.eval_steps": 20,
        "train.report_to": [],
        "eval.before": False,
        "eval.metrics": False,  # the loss alone decides: 64 rows tell far more of it than of BLEU
        "eval.num_beams": 1,  # the task's ten beams would take ten times as long
        "eval.max_new_tokens": 48,
        "eval.test": True,
    }
    return Study(
        "gradient-start-e2e",
        base,
        {"e2e": {"data.task": "e2e"}},
        _starts(batch_size=4, batches=8),
        search=_SEARCH,
        metric="loss",
        reference="duallora",
    )

"""Ours, not the paper's: does a start from the gradient pay, against the data-driven starts of LoRA?

Two studies: on GLUE with MiniLM the starts and what the gradient's start consists of, on E2E with SmolLM2 the starts
alone. Everyone trains the same number of parameters, LoRA with r = 8 and Dual LoRA with r1 = r2 = 4, at the same scale
of alpha / r = 2, and sees the same rows. Every value is ours; short runs, because a start can only matter early.
"""

from __future__ import annotations

from typing import Any

from duallora.errors import ConfigError
from duallora.grid.study import Study

Variant = dict[str, Any]

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


def _base(model: str, targets: list[str], steps: int, batch_size: int) -> dict[str, Any]:
    return {
        "model.name": model,
        "adapter.target_modules": targets,
        "train.max_steps": steps,
        "train.batch_size": batch_size,
        "train.lr_warmup_ratio": 0.06,
        "train.eval_steps": steps // 3,  # the curve: a start shows in the first steps or never
        "train.report_to": [],
        "eval.before": False,
        "eval.test": True,
    }


def _glue() -> Study:
    base = {**_base("builtin:minilm-l6", ["query", "value"], steps=150, batch_size=16), "data.max_length": 128}
    return Study(
        "gradient-start",
        base,
        {name: {"data.task": name, "data.holdout": 500} for name in ("cola", "stsb")},
        {**_starts(batch_size=16, batches=4), **_ABLATIONS},
        search={"train.learning_rate": [1e-3, 3e-3, 1e-2]},
        reference="duallora",
    )


def _e2e() -> Study:
    base = {
        **_base("builtin:smollm2-135m", ["q_proj", "v_proj"], steps=60, batch_size=4),
        "data.limit": 2000,
        "data.holdout": 200,
        "data.eval_limit": 64,
        "eval.metrics": False,  # the loss alone decides: 64 rows tell far more of it than of BLEU
        "eval.num_beams": 1,  # the task's ten beams would take ten times as long
        "eval.max_new_tokens": 48,
    }
    return Study(
        "gradient-start-e2e",
        base,
        {"e2e": {"data.task": "e2e"}},
        _starts(batch_size=4, batches=8),
        search={"train.learning_rate": [1e-3, 3e-3, 1e-2]},
        metric="loss",
        reference="duallora",
    )

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

# LoRA's own starts in PEFT. EVA moves ranks between layers; rho = 1 keeps them, and so the parameters, as they are.
_STARTS: dict[str, Variant] = {
    "lora": _LORA,
    "lora-pissa": {**_LORA, "adapter.options": {"init_lora_weights": "pissa"}},
    "lora-eva": {**_LORA, "adapter.options": {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}}},
    "lora-ga": {**_LORA, "adapter.options": {"init_lora_weights": "lora_ga"}},
    "lora-corda": {**_LORA, "adapter.method": "corda"},
    "duallora": _DUAL,
    "gradient": _GRADIENT,
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
        "train.eval_steps": steps // 6,  # the curve: a start shows in the first steps or never
        "train.report_to": [],
        "eval.test": True,
    }


def _glue() -> Study:
    tasks = {name: {"data.task": name, "data.holdout": 500} for name in ("cola", "stsb")}
    base = {**_base("builtin:minilm-l6", ["query", "value"], steps=150, batch_size=16), "data.max_length": 128}
    return Study(
        "gradient-start",
        base,
        tasks,
        {**_STARTS, **_ABLATIONS},
        search={"train.learning_rate": [1e-3, 3e-3, 1e-2]},
        reference="duallora",
    )


def _e2e() -> Study:
    base = {
        **_base("builtin:smollm2-135m", ["q_proj", "v_proj"], steps=60, batch_size=4),
        "data.limit": 2000,
        "data.holdout": 200,
        "data.eval_limit": 100,
        "eval.num_beams": 1,  # the task's ten beams would take ten times as long
    }
    return Study(
        "gradient-start-e2e",
        base,
        {"e2e": {"data.task": "e2e"}},
        _STARTS,
        search={"train.learning_rate": [1e-3, 3e-3, 1e-2]},
        metric="loss",  # 100 rows tell far more of it than of BLEU
        reference="duallora",
    )

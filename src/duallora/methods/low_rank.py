"""LoRA and the relatives that PEFT holds.

* LoRA (arXiv 2106.09685): W0 + (alpha/r) B A, B = 0 at the start.
* LoRA+ (arXiv 2402.12354): LoRA with the learning rate of B ``lr_ratio`` times that of A; 16 is the paper's rule of thumb.
* DoRA (arXiv 2402.09353): m (W0 + (alpha/r) B A) / |W0 + (alpha/r) B A| by output row.
* HiRA (OpenReview TwJrTz9cRS): W0 + W0 . (B A), B = 0; no alpha. PEFT has it from 0.20 on.
* RandLoRA (arXiv 2502.00987): sum_j B_j L_j A_j G_j with fixed random bases B, A and trained diagonals L, G; alpha = 20 r (PEFT).
* VeRA (arXiv 2310.11454): diag(b) B diag(d) A, B and A random, fixed, shared by all layers; no alpha.
* CorDA (arXiv 2406.05223): LoRA with the start of that name (``starts.py``).

VeRA's and RandLoRA's random bases are saved with the adapter; with ``options={"save_projection": False}`` they are drawn again from
``projection_prng_key``, which torch does not promise to repeat in another version. LoRA, LoRA+ and DoRA take the starts of
``starts.py`` too (``options={"init_lora_weights": "pissa"}``).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, RandLoraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from duallora.core.settings import RANKS
from duallora.errors import ConfigError
from duallora.methods import Method, MethodSpec, starts


def _common(spec: MethodSpec, prefix: str, alpha: bool = True) -> dict[str, Any]:
    fields = {"r": spec.r, f"{prefix}_dropout": spec.dropout or 0.0, "target_modules": spec.target_modules}
    if alpha:
        fields[f"{prefix}_alpha"] = spec.alpha
    return {**fields, "task_type": spec.task_type, **spec.options}


def _without_exclusion(model: nn.Module, spec: MethodSpec) -> MethodSpec:
    """``exclude_modules`` for configs that lack it: "all-linear" becomes the list of what is left."""
    options = dict(spec.options)
    pattern = options.pop("exclude_modules", None)
    if pattern is None or spec.target_modules != "all-linear":
        return spec
    excluded = re.compile(pattern if isinstance(pattern, str) else rf"(.*\.)?({'|'.join(map(re.escape, pattern))})")
    linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    left = [n for n in linear if not excluded.fullmatch(n) and model.get_submodule(n) is not output]
    return replace(spec, target_modules=left, options=options)


def _lora_config(spec: MethodSpec) -> LoraConfig:
    fields = _common(spec, "lora")
    fields.pop("lr_ratio", None)  # the optimizer's
    return starts.config_of(fields)


def lora(model: nn.Module, spec: MethodSpec, batches: Any = None) -> Any:
    """LoRA; ``options`` are LoraConfig's fields and ``calibration``, the rows that a start from data looks at."""
    return starts.attach(model, _lora_config(spec), batches)


def resume_lora(model: nn.Module, spec: MethodSpec, folder: Path) -> Any:
    """:func:`lora` as it started in the run that left the checkpoint ``folder``."""
    return starts.resume(model, _lora_config(spec), folder)


def lora_plus_groups(model: Any, spec: MethodSpec, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The groups of PEFT's LoRA+ optimizer."""
    from peft.optimizers import create_loraplus_optimizer

    optimizer = create_loraplus_optimizer(
        model, torch.optim.SGD, lr=lr, loraplus_lr_ratio=spec.options["lr_ratio"], loraplus_weight_decay=weight_decay
    )
    return [{k: g[k] for k in ("params", "lr", "weight_decay")} for g in optimizer.param_groups if g["params"]]


def hira(model: nn.Module, spec: MethodSpec, batches: Any = None) -> Any:
    """HiRA, where PEFT has it."""
    if not hasattr(peft, "HiraConfig"):
        raise ConfigError(f"HiRA needs PEFT 0.20 or newer; here is {peft.__version__}: pip install -U peft")
    return get_peft_model(model, peft.HiraConfig(**_common(spec, "hira", alpha=False)))


def randlora(model: nn.Module, spec: MethodSpec, batches: Any = None) -> Any:
    """RandLoRA; a larger r means fewer parameters."""
    spec = _without_exclusion(model, spec)
    return get_peft_model(model, RandLoraConfig(**_common(spec, "randlora")))  # type: ignore[arg-type]


def vera(model: nn.Module, spec: MethodSpec, batches: Any = None) -> Any:
    """VeRA."""
    spec = _without_exclusion(model, spec)
    return get_peft_model(model, VeraConfig(**_common(spec, "vera", alpha=False)))  # type: ignore[arg-type]


# 2 r: DoRA's and LLM-Adapters'
_LORA = {"r": RANKS["lora"], "alpha": lambda r: 2 * r, "dropout": 0.0, "target_modules": "all-linear"}
_FILES: dict[str, Any] = {
    "save": starts.save, "resume": resume_lora, "restore": starts.restore, "calibration": starts.calibration,
    "check": starts.check,
}  # fmt: skip
LORA = Method("lora", "LoRA", "2106.09685", "W0 + (alpha/r) B A", lora, _LORA, **_FILES)
LORA_PLUS = Method(
    "lora+", "LoRA+", "2402.12354", "LoRA with lr(B) = lr_ratio lr(A)", lora, {**_LORA, "lr_ratio": 16.0},
    groups=lora_plus_groups, **_FILES,
)  # fmt: skip
DORA = Method(
    "dora", "DoRA", "2402.09353", "m (W0 + (alpha/r) B A) / |W0 + (alpha/r) B A|", lora, {**_LORA, "use_dora": True},
    **_FILES,
)  # fmt: skip
HIRA = Method(
    "hira", "HiRA", "OpenReview TwJrTz9cRS", "W0 + W0 . (B A)", hira,
    {"r": RANKS["hira"], "dropout": 0.0, "target_modules": "all-linear"},
)  # fmt: skip
RANDLORA = Method(
    "randlora", "RandLoRA", "2502.00987", "W0 + sum_j B_j L_j A_j G_j", randlora,
    {"r": RANKS["randlora"], "alpha": lambda r: 20 * r, "dropout": 0.0, "target_modules": "all-linear"},
)  # fmt: skip
VERA = Method(
    "vera", "VeRA", "2310.11454", "W0 + diag(b) B diag(d) A", vera,
    {"r": RANKS["vera"], "dropout": 0.0, "target_modules": "all-linear"},
)  # fmt: skip
CORDA = Method(
    "corda", "CorDA", "2406.05223", "LoRA from the SVD of W E[x x^T]", lora,
    {"r": RANKS["corda"], "alpha": lambda r: r, "dropout": 0.0, "target_modules": "all-linear", "init_lora_weights": "corda"},
    **_FILES,
)  # fmt: skip
METHODS = {m.name: m for m in (LORA, LORA_PLUS, DORA, HIRA, RANDLORA, VERA, CORDA)}

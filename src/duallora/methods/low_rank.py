"""LoRA and the relatives that PEFT holds.

* LoRA (arXiv 2106.09685): W0 + (alpha/r) B A, B = 0 at the start.
* LoRA+ (arXiv 2402.12354): LoRA with the learning rate of B ``lr_ratio`` times that of A; 16 is the paper's rule of thumb.
* DoRA (arXiv 2402.09353): m (W0 + (alpha/r) B A) / |W0 + (alpha/r) B A| by output row.
* HiRA (OpenReview TwJrTz9cRS): W0 + W0 . (B A), B = 0; no alpha. PEFT has it from 0.20 on.
* RandLoRA (arXiv 2502.00987): sum_j B_j L_j A_j G_j with fixed random bases B, A and trained diagonals L, G; alpha = 20 r (PEFT).
* VeRA (arXiv 2310.11454): diag(b) B diag(d) A, B and A random, fixed, shared by all layers; no alpha.
* CorDA (arXiv 2406.05223): LoRA that starts from the SVD of W C, C = E[x x^T] over ``batches``, and leaves W0 minus that start frozen.
  ``corda_method`` "kpm" (smallest components, knowledge kept) or "ipm" (largest).

VeRA's and RandLoRA's random bases are saved with the adapter; with ``options={"save_projection": False}`` they are drawn again from
``projection_prng_key``, which torch does not promise to repeat in another version. CorDA is saved as the LoRA of rank 2 r
that does the same on the untouched base model.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, RandLoraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from duallora.errors import ConfigError
from duallora.methods import Adapted, Method, MethodSpec


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


def lora(model: nn.Module, spec: MethodSpec, batches: Any = None) -> Any:
    """LoRA; ``options`` are LoraConfig's fields."""
    return get_peft_model(model, LoraConfig(**_common(spec, "lora")))  # type: ignore[arg-type]


def lora_plus(model: nn.Module, spec: MethodSpec, batches: Any = None) -> Any:
    """LoRA; the ratio is the optimizer's."""
    options = {k: v for k, v in spec.options.items() if k != "lr_ratio"}
    return lora(model, replace(spec, options=options))


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


def corda(model: nn.Module, spec: MethodSpec, batches: Any = None) -> Any:
    """CorDA, calibrated on ``batches``."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    try:
        from peft.tuners.lora.corda import preprocess_corda
    except ImportError as error:  # PEFT does not install what this file of its own needs
        raise ConfigError(f"PEFT's CorDA cannot be imported ({error}): pip install attrs") from error

    fields = _common(spec, "lora")
    settings = CordaConfig(corda_method=fields.pop("corda_method"))
    config = LoraConfig(**fields, init_lora_weights="corda", corda_config=settings)
    _maybe_include_all_linear_layers(config, model)  # PEFT does so only after the calibration

    @torch.no_grad()
    def run() -> None:
        for batch in batches:
            for row in _rows(batch):  # PEFT's hook reads one text per forward
                model(**row)

    training = model.training
    preprocess_corda(model.eval(), config, run_model=run)
    adapted = get_peft_model(model.train(training), config)  # type: ignore[arg-type]
    for module in model.modules():
        if hasattr(module, "eigens"):
            del module.eigens  # as large as the adapter
    first = {
        name: value.detach().cpu().clone()
        for name, value in peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }
    object.__setattr__(adapted, "_method_state", {"first": first})
    return adapted


def _rows(batch: Any) -> Any:
    """Each row of a batch as a batch of its own, without its padding; labels are left out."""
    tensors = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and v.ndim >= 1 and k != "labels"}
    mask = tensors.get("attention_mask")
    for i in range(len(next(iter(tensors.values())))):
        real = None if mask is None else mask[i].bool()
        yield {
            k: (v[i] if real is None or v[i].shape[:1] != real.shape else v[i][real])[None] for k, v in tensors.items()
        }


def save_corda(adapted: Adapted, folder: Path) -> None:
    """PEFT's conversion to a LoRA on the untouched base, for which it wants the adapter as it started."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as start:
        save_file(adapted.state["first"], Path(start) / "adapter_model.safetensors")
        adapted.model.save_pretrained(
            str(folder), save_embedding_layers=False, path_initial_model_for_weight_conversion=start
        )


_LORA = {
    "r": 16,
    "alpha": lambda r: 2 * r,
    "dropout": 0.0,
    "target_modules": "all-linear",
}  # 2 r: DoRA's and LLM-Adapters'
LORA = Method("lora", "LoRA", "2106.09685", "W0 + (alpha/r) B A", lora, _LORA)
LORA_PLUS = Method(
    "lora+", "LoRA+", "2402.12354", "LoRA with lr(B) = lr_ratio lr(A)", lora_plus, {**_LORA, "lr_ratio": 16.0},
    groups=lora_plus_groups,
)  # fmt: skip
DORA = Method(
    "dora", "DoRA", "2402.09353", "m (W0 + (alpha/r) B A) / |W0 + (alpha/r) B A|", lora, {**_LORA, "use_dora": True}
)
HIRA = Method(
    "hira", "HiRA", "OpenReview TwJrTz9cRS", "W0 + W0 . (B A)", hira,
    {"r": 32, "dropout": 0.0, "target_modules": "all-linear"},
)  # fmt: skip
RANDLORA = Method(
    "randlora", "RandLoRA", "2502.00987", "W0 + sum_j B_j L_j A_j G_j", randlora,
    {"r": 32, "alpha": lambda r: 20 * r, "dropout": 0.0, "target_modules": "all-linear"},
)  # fmt: skip
VERA = Method(
    "vera", "VeRA", "2310.11454", "W0 + diag(b) B diag(d) A", vera,
    {"r": 256, "dropout": 0.0, "target_modules": "all-linear"},
)  # fmt: skip
CORDA = Method(
    "corda", "CorDA", "2406.05223", "LoRA from the SVD of W E[x x^T]", corda,
    {"r": 16, "alpha": lambda r: r, "dropout": 0.0, "target_modules": "all-linear", "corda_method": "kpm"},
    save=save_corda, needs_batches=True,
)  # fmt: skip
METHODS = {m.name: m for m in (LORA, LORA_PLUS, DORA, HIRA, RANDLORA, VERA, CORDA)}

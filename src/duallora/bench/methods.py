"""The competitors, at equal numbers of trainable parameters.

Dual LoRA of rank r (both groups) trains 2r (out + in) parameters in a layer; so does LoRA of rank 2r, and DoRA and
HiRA with it (DoRA has a vector more). LoHa of rank r has the same number again; RandLoRA takes the nearest rank.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any, NamedTuple

import peft
import torch
from torch import nn

from duallora import DualLoraConfig, fast_dora, fast_peft

LORA, DORA, HIRA, LOHA = "peft lora", "peft dora", "peft hira", "peft loha"
FAST_HIRA, FAST_LOHA = "fast_peft of hira", "fast_peft of loha"
LORA_OWN = "peft lora, factors in the base's dtype"
EXACT, PLAIN, FAST_DORA, DUAL_DORA = "duallora", "plain autograd", "fast_dora", "duallora dora"
FLOOR = "three GEMMs"
Targets = list[str] | str


class Method(NamedTuple):
    """An adapter and what is done to the model that carries it.

    own_dtype: factors in the dtype of the base weights. PEFT's default over half-precision weights is float32 factors,
        at which its LoRA casts x [n, in] as well: dearer, but what users get.
    """

    config: peft.PeftConfig
    finish: Callable[[Any], Any] | None = None
    own_dtype: bool = False


def dual(rank: int, targets: Targets, **options: Any) -> Method:
    """Dual LoRA with its gate open."""
    return Method(DualLoraConfig(r=rank, target_modules=targets, init_weights=False, **options))


def methods(rank: int, targets: Targets, dtype: torch.dtype) -> dict[str, Method]:
    """What both the layer and the whole model compare; ``rank`` is Dual LoRA's."""

    def lora(**options: Any) -> peft.LoraConfig:
        return peft.LoraConfig(r=2 * rank, target_modules=targets, **options)

    found = {LORA: Method(lora())}
    if dtype != torch.float32:
        found[LORA_OWN] = Method(lora(), own_dtype=True)
    found[DORA] = Method(lora(use_dora=True))
    if hasattr(peft, "HiraConfig"):  # PEFT 0.20 and later
        found[HIRA] = Method(peft.HiraConfig(r=2 * rank, target_modules=targets))
    found[EXACT] = dual(rank, targets)
    found[PLAIN] = dual(rank, targets, backend="reference")
    for fraction in (0.25, 0.125):
        found[sampled(fraction)] = dual(rank, targets, gradient_tokens=fraction)
    found[DUAL_DORA] = dual(rank, targets, use_dora=True)
    found[FAST_DORA] = Method(lora(use_dora=True), finish=fast_dora)
    return found


def layer_methods(rank: int, targets: Targets, dtype: torch.dtype, width: int) -> dict[str, Method]:
    """`methods` and those that only the layer [width, width] compares."""
    found = methods(rank, targets, dtype)
    found["duallora recompute"] = dual(rank, targets, backend="recompute")
    found["duallora added"] = dual(rank, targets, forward="added")
    found[LOHA] = Method(peft.LoHaConfig(r=rank, target_modules=targets))
    found[FAST_LOHA] = Method(found[LOHA].config, finish=fast_peft)
    if HIRA in found:
        found[FAST_HIRA] = Method(found[HIRA].config, finish=fast_peft)
    nearest = randlora_rank(width, width, 4 * rank * width)
    found["peft randlora"] = Method(peft.RandLoraConfig(r=nearest, target_modules=targets))
    return found


def sampled(fraction: float) -> str:
    return f"duallora, gradient_tokens={fraction:g}"


def randlora_parameters(out: int, into: int, rank: int) -> int:
    """Trainable parameters of PEFT's RandLoRA in a layer [out, into]: n diagonal pairs, n = ceil(min(out, into) / r)."""
    pairs = ceil(min(out, into) / rank)
    return pairs * (rank + min(out, into))


def randlora_rank(out: int, into: int, wanted: int) -> int:
    """The rank whose number of parameters is nearest to ``wanted``."""
    return min(range(1, min(out, into) + 1), key=lambda rank: abs(randlora_parameters(out, into, rank) - wanted))


def adapt(model: Any, method: Method, *, seed: int = 0) -> peft.PeftModel:
    """The model with the adapter on it, every trained matrix drawn from N(0, 0.02^2) so that no product is trivial.

    Vectors (DoRA's magnitude) stay as the method sets them.
    """
    adapted = peft.get_peft_model(model, method.config, autocast_adapter_dtype=not method.own_dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(adapted):
        if parameter.ndim > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return adapted if method.finish is None else method.finish(adapted)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count(model: nn.Module) -> int:
    """Trained parameters."""
    return sum(parameter.numel() for parameter in trained(model))

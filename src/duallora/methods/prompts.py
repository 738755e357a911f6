"""Methods that add virtual tokens instead of changing the model: PEFT's own.

* Prefix tuning (arXiv 2101.00190): keys and values [P_k; K], [P_v; V] in every layer, P from an MLP while it is trained.
* P-tuning v2 (arXiv 2110.07602): the same without the MLP (PEFT's ``PromptEncoderConfig`` is P-tuning v1).
* Prompt tuning (arXiv 2104.08691): [P; E(x)], virtual tokens before the embedded input.

``options["num_virtual_tokens"]`` is 20 (ours; the papers tune it by task), the MLP's width the model's. The first two need a model that
takes past keys and values: DeBERTa-v2 and v3 do not. None can be merged.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from duallora.errors import ConfigError, IntegrityError, check_rank
from duallora.methods import Adapted, Method, MethodSpec

TRAINED = "trained.safetensors"  # of a checkpoint
NO_MERGE = "its virtual tokens are inputs, not weights. Keep it as an adapter."


def prefix(model: nn.Module, spec: MethodSpec, batches: Any = None) -> Any:
    """Prefix tuning, or with prefix_projection=False P-tuning v2."""
    _needs_cache(model, spec)
    options = dict(spec.options)
    _check_tokens(model, options["num_virtual_tokens"])
    if options["prefix_projection"] and "encoder_hidden_size" not in options:
        options["encoder_hidden_size"] = model.config.hidden_size  # type: ignore[union-attr, attr-defined]
    return get_peft_model(model, PrefixTuningConfig(task_type=spec.task_type, **options))  # type: ignore[arg-type]


def prompt(model: nn.Module, spec: MethodSpec, batches: Any = None) -> Any:
    """Prompt tuning."""
    _check_tokens(model, spec.options["num_virtual_tokens"])
    return get_peft_model(model, PromptTuningConfig(task_type=spec.task_type, **spec.options))  # type: ignore[arg-type]


def checkpoint_prefix(adapted: Adapted, folder: Path) -> None:
    """Every trained tensor under the model's own name: PEFT's file holds what the MLP gives, and not the MLP."""
    save_file({name: value.detach().cpu() for name, value in _trained(adapted).items()}, folder / TRAINED)


def restore_prefix(adapted: Adapted, folder: Path) -> None:
    """What :func:`checkpoint_prefix` wrote, into the model.

    Raises:
        IntegrityError: the tensors are another model's.
    """
    own, stored = _trained(adapted), load_file(folder / TRAINED)
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in stored.items()}:
        raise IntegrityError(f"{folder / TRAINED} does not hold the trained tensors of this model")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(stored[name])


def _trained(adapted: Adapted) -> dict[str, nn.Parameter]:
    return {name: value for name, value in adapted.model.named_parameters() if value.requires_grad}


def _check_tokens(model: nn.Module, number: Any) -> None:
    check_rank("num_virtual_tokens", number)
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if context and number >= context:
        raise ConfigError(
            f"num_virtual_tokens={number}: {type(model).__name__} has {context} positions, prompt and answer included: expected fewer"
        )


def _needs_cache(model: nn.Module, spec: MethodSpec) -> None:
    """ConfigError unless the model, or its trunk under a head, takes ``past_key_values``."""
    trunk = getattr(model, getattr(model, "base_model_prefix", ""), None)
    for part in (model, trunk):
        if part is not None and "past_key_values" in inspect.signature(part.forward).parameters:
            return
    raise ConfigError(
        f"{spec.name}: {type(model).__name__} takes no past_key_values, so no prefix can be set before its keys and values. "
        "Use method 'prompt', or a method that changes weights."
    )


PREFIX = Method(
    name="prefix",
    title="Prefix tuning",
    paper="2101.00190",
    equation="K, V <- [P_k; K], [P_v; V], P = MLP(E)",
    attach=prefix,
    defaults={"num_virtual_tokens": 20, "prefix_projection": True},
    no_merge=NO_MERGE,
    no_resume="PEFT saves what the MLP gives, not the MLP.",
    checkpoint=checkpoint_prefix,
    restore=restore_prefix,
)
P_TUNING_V2 = Method(
    name="p-tuning-v2",
    title="P-tuning v2",
    paper="2110.07602",
    equation="K, V <- [P_k; K], [P_v; V]",
    attach=prefix,
    defaults={"num_virtual_tokens": 20, "prefix_projection": False},
    no_merge=NO_MERGE,
)
PROMPT = Method(
    name="prompt",
    title="Prompt tuning",
    paper="2104.08691",
    equation="[P; E(x)]",
    attach=prompt,
    defaults={"num_virtual_tokens": 20},
    no_merge=NO_MERGE,
)
METHODS = {"prefix": PREFIX, "p-tuning-v2": P_TUNING_V2, "prompt": PROMPT}

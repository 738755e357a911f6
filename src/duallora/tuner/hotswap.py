"""Another adapter's weights in the place of one that is loaded: no new layers, and no new graph of a compiled model.

PEFT's ``hotswap_adapter`` takes LoRA alone. Factors of a lower rank are padded with zeros, which add nothing to B A and D C:

    A [r1, in] -> [rank, in]    B [out, r1] -> [out, rank]    scaling = alpha / sqrt(r1 r2) of the ranks before
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from duallora.core.equation import dual_scaling
from duallora.errors import ConfigError
from duallora.tuner.config import DualLoraConfig
from duallora.tuner.layer import DualLoraLayer

_RANK_SIDE = {"A": -2, "B": -1, "C": -2, "D": -1}

# What is fixed when a layer is made or compiled, beside its shapes.
_SAME = ("magnitude", "direction", "ste_clip", "use_dora", "init_weights", "bias", "duallora_dropout")


def prepare_hotswap(model: nn.Module, rank: int) -> nn.Module:
    """Make room for adapters of ranks up to ``rank``; call it before ``torch.compile``.

    Every adapter's factors are padded to it, and scales become tensors, so that :func:`hotswap` changes nothing that a
    graph was specialized for. The model computes what it did, to rounding.

    Raises:
        ConfigError: a layer has a higher rank, is merged, or has fixed signs, or there is no layer.
    """
    layers = _layers(model)
    for layer in layers.values():
        for adapter in layer.duallora_config:
            _check_layer(layer, adapter)
            found = max(layer.r1[adapter], layer.r2[adapter])
            if found > rank:
                raise ConfigError(
                    f"rank={rank}: adapter {adapter!r} has rank {found} in {layer.module_name}; give that of the largest "
                    "adapter that is to come."
                )
    for layer in layers.values():
        for adapter, scaling in layer.scaling.items():
            for letter, factor in zip("ABCD", layer._factors(adapter), strict=True):
                factor.data = _widened(factor.data, letter, rank)
            own = dual_scaling(layer.alpha[adapter], layer.r1[adapter], layer.r2[adapter])
            layer.scaling[adapter] = torch.tensor(float(scaling), device=layer.duallora_A[adapter].device)
            _set_ranks(layer, adapter, rank, rank, own)
    for adapter, config in _unwrapped(model).peft_config.items():
        _describe(config, layers, adapter)
    return model


def hotswap(model: nn.Module, folder: str, adapter_name: str = "default", **hub: Any) -> None:
    """Put the adapter saved in ``folder`` in the place of ``adapter_name``, in every layer and with its gate.

    A compiled model is not compiled anew where the ranks fit into what is there and the scales are equal, or after
    :func:`prepare_hotswap`. Saving gives the new adapter, at the ranks it has here. Tensors that are trained in full (a
    head, biases, new tokens) come along.

    Args:
        model: a PeftModel, compiled or not. It is left as it was where an error is raised.
        folder: of an adapter, or the hub's id of one. ``hub``: PEFT's ``revision``, ``token``, ``subfolder``...

    Raises:
        ConfigError: there is no such adapter here, it is merged, or the new one is of another method or form, adapts
            other layers, has other tensors beside its factors, or has a gate that is half open after another warm-up.
    """
    peft_model = _unwrapped(model)
    layers = {n: layer for n, layer in _layers(model).items() if adapter_name in layer.duallora_config}
    if not layers:
        raise ConfigError(f"there is no Dual LoRA adapter {adapter_name!r} to swap: load one first.")
    new: Any = PeftConfig.from_pretrained(folder, **hub)
    _check_forms(peft_model.peft_config[adapter_name], new, folder)
    state = load_peft_weights(folder, device="cpu", **hub)
    _leave_embeddings(state, layers, folder)
    here = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    others = tuple(f".{name}" for name in peft_model.peft_config if name != adapter_name)
    here = {key: value for key, value in here.items() if not key.endswith(others)}  # PEFT before 0.21 has theirs too
    if odd := sorted(state.keys() ^ here.keys()):
        raise ConfigError(
            f"{folder} and adapter {adapter_name!r} do not adapt the same layers: {odd[0]} is in one of the two "
            f"({len(odd)} tensors are); load it with load_adapter() instead."
        )
    scales = {name: _fit(name, layer, adapter_name, new, state, here) for name, layer in layers.items()}
    for key, value in state.items():
        if value.shape != here[key].shape and ".duallora_" not in key:
            raise ConfigError(
                f"{folder}: {key} is {list(value.shape)}, here {list(here[key].shape)}: expected the same."
            )
    with torch.no_grad():
        for name, layer in layers.items():  # wider than what is here: the parameters themselves grow
            for letter, factor in zip("ABCD", layer._factors(adapter_name), strict=True):
                new_rank = state[f"base_model.model.{name}.duallora_{letter}"].shape[_RANK_SIDE[letter]]
                factor.data = _widened(factor.data, letter, new_rank)
    set_peft_model_state_dict(peft_model, state, adapter_name=adapter_name)
    for name, layer in layers.items():
        A, C = layer.duallora_A[adapter_name], layer.duallora_C[adapter_name]
        _set_ranks(layer, adapter_name, A.shape[-2], C.shape[-2], scales[name])
        if float(layer.scaling[adapter_name]) != scales[name]:
            layer._scale(adapter_name, scales[name])
    _describe(peft_model.peft_config[adapter_name], layers, adapter_name)


def _unwrapped(model: nn.Module) -> Any:
    return getattr(model, "_orig_mod", model)


def _layers(model: nn.Module) -> dict[str, DualLoraLayer]:
    """By their names in the base model, as files have them."""
    found = {
        name.removeprefix("base_model.model."): module
        for name, module in _unwrapped(model).named_modules()
        if isinstance(module, DualLoraLayer)
    }
    if not found:
        raise ConfigError("the model has no Dual LoRA layer: load an adapter first.")
    return found


def _check_layer(layer: DualLoraLayer, adapter: str) -> None:
    if layer.merged:
        raise ConfigError(f"{layer.module_name}: adapter {layer.merged_adapters} is merged: unmerge first.")
    config = layer.duallora_config[adapter]
    if config.direction == "fixed" or config.warmup == "residual":
        raise ConfigError(
            f"adapter {adapter!r} has direction={config.direction!r}, warmup={config.warmup!r}: what is rebuilt from a seed "
            "cannot be swapped; load it beside with load_adapter()."
        )


def _check_forms(old: DualLoraConfig, new: Any, folder: str) -> None:
    if not isinstance(new, DualLoraConfig):
        raise ConfigError(f"{folder} is a {new.peft_type} adapter: expected Dual LoRA's.")
    for name in _SAME:
        if getattr(old, name) != getattr(new, name):
            raise ConfigError(
                f"{folder} has {name}={getattr(new, name)!r}, the adapter here {getattr(old, name)!r}: a swap needs the "
                "same; load it with load_adapter() instead."
            )
    if "residual" in (old.warmup, new.warmup):
        raise ConfigError(f"{folder}: warmup='residual' rebuilds dW(0) from a seed and cannot be swapped.")


def _leave_embeddings(state: dict[str, Tensor], layers: dict[str, DualLoraLayer], folder: str) -> None:
    """Take the frozen weights out of ``state`` that PEFT saves of adapted embeddings; ConfigError unless they are here."""
    for name, layer in layers.items():
        saved = state.pop(f"base_model.model.{name}.base_layer.weight", None)
        if saved is not None and not torch.equal(saved, (W := layer._base_weight().cpu()).to(saved.dtype)):
            raise ConfigError(
                f"{folder} holds another {name} {list(saved.shape)} than the base model here {list(W.shape)}: load it with "
                "PeftModel.from_pretrained on a base model of its own."
            )


def _fit(
    name: str,
    layer: DualLoraLayer,
    adapter: str,
    new: DualLoraConfig,
    state: dict[str, Tensor],
    here: dict[str, Tensor],
) -> float:
    """Bring the layer's tensors in ``state`` to the ranks, counter and dtype that it has here; its scaling."""
    _check_layer(layer, adapter)
    prefix, steps = f"base_model.model.{name}.duallora_", layer.duallora_config[adapter].ramp_steps
    A, C = state[f"{prefix}A"], state[f"{prefix}C"]
    key = get_pattern_key(list(new.alpha_pattern), layer.module_name)
    scaling = dual_scaling(new.alpha_pattern.get(key, new.alpha or 2 * new.r), A.shape[-2], C.shape[-2])
    t = float(state[f"{prefix}step"])
    is_open = t >= new.ramp_steps
    if not is_open and steps != new.ramp_steps:
        raise ConfigError(
            f"{name}: the gate of the new adapter stands at {t:.0f} of {new.ramp_steps} steps, and this one's warm-up has "
            f"{steps}: train it until its gate is open, or load it with load_adapter()."
        )
    state[f"{prefix}step"] = here[f"{prefix}step"].new_tensor(steps if is_open else t)
    for letter, side in _RANK_SIDE.items():
        key = f"{prefix}{letter}"
        value, ours = state[key], here[key]
        if value.shape[-3 - side] != ours.shape[-3 - side]:
            raise ConfigError(f"{key} is {list(value.shape)}, here {list(ours.shape)}: it is another base model's.")
        state[key] = _widened(value, letter, ours.shape[side])
    return scaling


def _widened(factor: Tensor, letter: str, rank: int) -> Tensor:
    """``factor``, with zeros after its rows (A, C) or columns (B, D) where it has fewer than ``rank``."""
    more = rank - factor.shape[_RANK_SIDE[letter]]
    return F.pad(factor, (0, 0, 0, more) if letter in "AC" else (0, more)) if more > 0 else factor


def _set_ranks(layer: DualLoraLayer, adapter: str, r1: int, r2: int, scaling: float) -> None:
    """What the padded layer says of itself: the alpha with which its scaling, before set_scale, follows from the ranks."""
    layer.r1[adapter], layer.r2[adapter] = r1, r2
    layer.alpha[adapter] = scaling * (r1 * r2) ** 0.5


def _describe(config: Any, layers: dict[str, DualLoraLayer], adapter: str) -> None:
    """Saved, the adapter is what it has become."""
    mine = {layer.module_name: layer for layer in layers.values() if adapter in layer.duallora_config}
    config.rank_pattern = {name: [layer.r1[adapter], layer.r2[adapter]] for name, layer in mine.items()}
    config.alpha_pattern = {name: layer.alpha[adapter] for name, layer in mine.items()}

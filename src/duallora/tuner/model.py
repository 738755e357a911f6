"""How Dual LoRA layers get into a model: PEFT's tuner contract."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from duallora.errors import ConfigError
from duallora.ops import keep_off_the_fast_path
from duallora.tuner import quantized
from duallora.tuner.config import DualLoraConfig
from duallora.tuner.layer import DualLoraLayer, Linear
from duallora.tuner.session import watch_forwards


def _with_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> Any:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


class DualLoraModel(BaseTuner):
    """Puts Dual LoRA (arXiv 2512.03402) into a model; made by ``peft.get_peft_model(model, DualLoraConfig(...))``.

    Raises:
        ValueError: no module matches ``target_modules`` (from PEFT), or a matched one is of an unsupported kind.
    """

    prefix: str = "duallora_"
    tuner_layer_cls = DualLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self._forward_hooks_of_base = watch_forwards(self.model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        with quantized.merge_losses(self.model) as losses:
            unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        quantized.warn_of(losses, stacklevel=4)
        for handle in self._forward_hooks_of_base:
            handle.remove()
        return unloaded

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's; where weights are quantised, one warning says what rounding W0 + dW to their grid loses."""
        with quantized.merge_losses(self.model) as losses:
            super().merge_adapter(*args, **kwargs)
        quantized.warn_of(losses)

    def _prepare_model(self, peft_config: DualLoraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        quantized.keep_exact(model)
        quantized.include_all_linear(peft_config, model)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if getattr(child, "base_layer", None) is new_module:  # taking the adapter off; PEFT's needs a weight attribute
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _create_and_replace(
        self,
        peft_config: DualLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        rank_key = get_pattern_key(peft_config.rank_pattern.keys(), current_key)
        alpha_key = get_pattern_key(peft_config.alpha_pattern.keys(), current_key)
        r1, r2 = peft_config.ranks(rank_key)
        arguments: dict[str, Any] = {
            "config": peft_config,
            "r1": r1,
            "r2": r2,
            "alpha": peft_config.alpha_pattern.get(alpha_key, peft_config.alpha),
            "module_name": current_key,
        }
        if isinstance(target, Linear):
            target.update_layer(adapter_name, **arguments)
            return
        base_layer = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        stored = quantized.storage(base_layer)
        if not isinstance(base_layer, (nn.Linear, Conv1D)) and not quantized.is_quantised_linear(base_layer):
            raise ConfigError(
                f"target module {current_key!r} is a {type(target).__name__}; Dual LoRA adapts torch.nn.Linear and "
                "transformers' Conv1D. Narrow target_modules, or name it in exclude_modules."
            )
        if stored is None and isinstance(base_layer, nn.Linear) and type(base_layer.weight) is not nn.Parameter:
            raise ConfigError(
                f"target module {current_key!r} has a weight of an unknown kind ({type(base_layer.weight).__name__}): "
                "load the base model unquantised, or quantise it with bitsandbytes, torchao or HQQ."
            )
        if stored is not None and stored.read is None and peft_config.use_dora:
            raise ConfigError(
                f"target module {current_key!r} is a {stored.name} layer, whose weight cannot be read; use_dora needs its "
                "row lengths. Set use_dora=False, or load the base model unquantised."
            )
        if isinstance(parent, nn.MultiheadAttention):
            raise ConfigError(
                f"target module {current_key!r} belongs to torch.nn.MultiheadAttention, which reads its weight without "
                f"calling it, so an adapter there would do nothing: add {target_name!r} to exclude_modules."
            )
        if peft_config.fan_in_fan_out and isinstance(base_layer, nn.Linear):
            warnings.warn(
                f"fan_in_fan_out=True has no effect on {current_key!r}: a torch.nn.Linear stores [out, in].",
                stacklevel=2,
            )
        new_module = Linear(target, adapter_name, **arguments)
        new_module.requantise = quantized.requantiser(self.model)
        keep_off_the_fast_path(parent, new_module)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # an additional adapter is not trainable until it is activated
        self._replace_module(parent, target_name, new_module, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands ``adapter_names`` (one name per row, "__base__" for none) down to the layers."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names cannot be passed in training mode: call model.eval() first.")
        layers = [module for module in self.modules() if isinstance(module, Linear)]
        known = {name for layer in layers for name in layer.duallora_config} | {"__base__"}
        unknown = sorted(set(adapter_names) - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams")
        if isinstance(beams, int) and beams > 1:  # generate repeats each row for its beams
            adapter_names = [name for name in adapter_names for _ in range(beams)]
        hook = partial(_with_adapter_names, adapter_names=adapter_names)
        wrapped = [m for m in self.modules() if isinstance(m, (Linear, AuxiliaryTrainingWrapper))]
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in wrapped]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def param_groups(model: nn.Module, lr: float, direction_lr_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Optimizer groups: C and D at ``lr * direction_lr_ratio``, every other trainable parameter at ``lr``.

    Raises:
        ConfigError: a rate is not > 0, or nothing is trainable.
    """
    if not lr > 0 or not direction_lr_ratio > 0:
        raise ConfigError(f"lr={lr!r}, direction_lr_ratio={direction_lr_ratio!r}: expected numbers > 0.")
    direction: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (direction if "duallora_C" in name or "duallora_D" in name else rest).append(parameter)
    if not direction and not rest:
        raise ConfigError("the model has no trainable parameter: add an adapter first.")
    groups = [{"params": rest, "lr": lr}, {"params": direction, "lr": lr * direction_lr_ratio}]
    return [group for group in groups if group["params"]]

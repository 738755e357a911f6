"""How Dual LoRA layers get into a model: PEFT's tuner contract."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import peft
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from duallora import ties
from duallora.core.gate import warn_never_trained
from duallora.errors import ConfigError
from duallora.tuner import experts, quantized
from duallora.tuner.config import DualLoraConfig
from duallora.tuner.conv import Conv
from duallora.tuner.embedding import Embedding
from duallora.tuner.experts import Experts
from duallora.tuner.layer import DualLoraLayer
from duallora.tuner.linear import Linear


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
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        with warnings.catch_warnings():
            if config.target_parameters:  # PEFT 0.21 looks for the patterns among modules alone
                warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.target_parameters:
            names = [layer.module_name for layer in self._layers() if adapter_name in layer.duallora_config]
            for key in {*config.rank_pattern, *config.alpha_pattern}:
                if not any(get_pattern_key([key], name) == key for name in names):
                    warnings.warn(f"{key!r} in rank_pattern or alpha_pattern matches no adapted layer.", stacklevel=2)
        if config.warmup_steps == "auto" and not config.inference_mode:
            _tell_trainers()
        self._adapt_everywhere()
        self._find_shared_weights()

    def _find_shared_weights(self) -> None:
        """Tell the layers whether their weight is another module's too."""
        users: Counter[int] = Counter()
        for module in self.model.modules():
            held = [p for p in module._parameters.values() if p is not None]
            users.update(id(parameter) for parameter in [*held, *getattr(module, "_tied_weight", ())])
        for layer in self._layers():
            layer.shares_weight = users[id(getattr(layer.get_base_layer(), layer.weight_name, None))] > 1

    def _adapt_everywhere(self) -> None:
        """A module that stands in several places of the model, be it in a list, is one layer in all of them."""
        layers: dict[nn.Module, DualLoraLayer] = {}
        for layer in self._layers():  # of layers around each other the outer one first
            inner = layer.base_layer  # may be a LoRA layer, which holds the base layer itself and is to go on doing so
            while isinstance(inner, DualLoraLayer):
                inner = inner.base_layer
            layers.setdefault(inner, layer)
        for module in list(self.model.modules()):
            if isinstance(module, DualLoraLayer):
                continue
            for name, child in module._modules.items():
                if child in layers:
                    module._modules[name] = layers[child]
        ties.put_in_containers(self.model, layers)

    @property
    def get_input_embeddings(self) -> Callable[[], nn.Module | None]:
        """The base model's, where it has one: a call gives None where transformers' raises, which PEFT calls on saving."""
        ask = self.model.get_input_embeddings

        def found() -> nn.Module | None:
            try:
                return ask()
            except NotImplementedError:
                return None

        return found

    def _layers(self) -> list[DualLoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, DualLoraLayer)]

    def _check_merge_allowed(self) -> None:
        # PEFT's warns that merging changes tied weights; here the merged layer gets a weight of its own.
        self._find_shared_weights()

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        if peft_config.modules_to_save:
            super()._check_tied_modules(model, peft_config)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        self._check_target_parameters(peft_config)
        if peft_config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND and not peft_config.target_parameters:
            _warn_of_experts(self.model)
        trained = peft_config.bias != "none" and not peft_config.inference_mode
        if trained and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ConfigError(
                f"PEFT {peft.__version__} does not save the biases of bias={peft_config.bias!r}, so they would be trained "
                "and lost: upgrade to peft >= 0.21, or set bias='none' and name the modules in modules_to_save."
            )
        if peft_config.target_modules is None and peft_config.target_parameters:
            peft_config.target_modules = set()
        return super()._prepare_adapter_config(peft_config, model_config)

    def _check_target_parameters(self, peft_config: Any) -> None:
        """Before anything is changed. A layer's name in a file tells which it is around, so all adapters have the same."""
        if not peft_config.target_parameters:
            return
        found = {f"{name}.{key}" for name, _, key in experts.targets(self.model, peft_config.target_parameters)}
        there = {layer.module_name for layer in self._layers() if isinstance(layer, Experts)}
        if there and found != there:
            raise ConfigError(
                f"target_parameters reaches {', '.join(sorted(found ^ there))} in one adapter of this model and not in "
                "another: give all of them the same target_parameters."
            )

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Replaces PEFT's, which knows LoRA's layer for parameters alone; returns the names of those adapted."""
        found = experts.targets(model, peft_config.target_parameters)
        for name, _, key in found:
            parent, _, target_name = name.rpartition(".")
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(
                    peft_config, adapter_name, model.get_submodule(name), target_name, model.get_submodule(parent),
                    current_key=f"{name}.{key}", parameter_name=key,
                )  # fmt: skip
        names = [f"{name}.{key}" for name, _, key in found]
        known = self.targeted_parameter_names  # where PEFT before 0.21 looks for them
        known += [name for name in names if name not in known]
        return names

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What is saved. PEFT 0.21 looks for the names of modules, which FSDP1 has changed, in a state dict that it has
        not: nothing would be found, and an empty adapter saved. The base weight of embeddings that are targets is saved
        with them, and without what is merged into it."""
        found = super()._get_adapter_state_dict(model, *args, **kwargs)
        state_dict: dict[str, Any] = kwargs["state_dict"]
        for name, layer in model.named_modules():
            key, before = f"{name}.base_layer.weight", getattr(layer, "_base_weight_before_merge", None)
            if key in state_dict and isinstance(before, Tensor):
                state_dict[key] = before.to(state_dict[key].dtype)
        if any("_fsdp_wrapped_module" in name for name, _ in model.named_modules()):
            found |= {key: value for key, value in state_dict.items() if f".{cls.prefix}" in key}
        return found

    def _before_merge(self, adapter_names: list[str] | None) -> None:
        """Before the first layer is merged: unloading that fails half way would have lost the adapter of some."""
        layers = self._layers()
        for layer in layers:
            if _merges(layer, adapter_names):
                quantized.require_writable(layer.get_base_layer(), layer.requantize)
        for adapter in self.active_adapters if adapter_names is None else adapter_names:
            warn_never_trained("Merging", layers, adapter, stacklevel=4)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        names = kwargs.get("adapter_names")
        layers = self._layers()
        merged = {layer for layer in layers if layer.merged or (merge and _merges(layer, names))}
        if merge:
            self._before_merge(names)
        before, after = dict(_tensors(self.model)), dict(_tensors(self.model, merged=merged))
        untying = ties.plan(self.model, before, after)
        with quantized.merge_losses(self.model) as losses, warnings.catch_warnings(), ties.flags_kept(self.model):
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            unload: Any = super()._unload_and_optionally_merge  # which says that it gives None
            for layer in layers:
                layer.unloading = True
            try:
                unloaded = unload(merge, *args, **kwargs)
            finally:
                for layer in layers:
                    layer.unloading = False
        for module in list(unloaded.modules()):  # of a layer that stands in several places PEFT unloads one
            for name, child in module._modules.items():
                if isinstance(child, DualLoraLayer):
                    module._modules[name] = child.get_base_layer()
        ties.put_in_containers(unloaded, {layer: layer.get_base_layer() for layer in layers})
        if untying:
            untying.apply(unloaded, stacklevel=3)
        quantized.warn_of(losses, stacklevel=4)
        return unloaded

    def merge_adapter(self, adapter_names: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        """PEFT's; where weights are quantized, one warning says what rounding W0 + dW to their grid loses."""
        self._before_merge(adapter_names)
        with quantized.merge_losses(self.model) as losses:
            super().merge_adapter(adapter_names, *args, **kwargs)
        quantized.warn_of(losses)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        quantized.keep_exact(model)
        quantized.include_all_linear(peft_config, model)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's wants a weight attribute of what takes an adapter's place (modules_to_save may have none), and moves an
        # 8-bit layer's factors, be they on meta.
        if not isinstance(new_module, DualLoraLayer) or getattr(child, "state", None) is not None:
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **_: Any,
    ) -> None:
        rank_key = get_pattern_key(list(peft_config.rank_pattern), current_key)
        alpha_key = get_pattern_key(list(peft_config.alpha_pattern), current_key)
        r1, r2 = peft_config.ranks(rank_key)
        arguments: dict[str, Any] = {
            "config": peft_config, "r1": r1, "r2": r2,
            "alpha": peft_config.alpha_pattern.get(alpha_key, peft_config.alpha), "module_name": current_key,
        }  # fmt: skip
        layer: Any = target
        while isinstance(layer, Experts) and layer.weight_name != parameter_name:
            layer = layer.base_layer
        if isinstance(layer, DualLoraLayer):
            layer.update_layer(adapter_name, **arguments)
            return
        base_layer: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        self._check_trained_tokens(peft_config, current_key, base_layer)
        new_module: DualLoraLayer
        if parameter_name is not None:
            new_module = Experts(target, adapter_name, parameter_name, **arguments)
        else:
            new_module = _layer_class(base_layer, current_key, peft_config)(target, adapter_name, **arguments)
        new_module.requantize = quantized.requantizer(self.model)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # an additional adapter is not trainable until it is activated
        self._replace_module(parent, target_name, new_module, target)

    def _check_trained_tokens(self, peft_config: Any, key: str, base_layer: Any) -> None:
        """PEFT's layer for single tokens reads the weight of what it wraps, and of what is tied to that: not W0 + dW."""
        tokens = peft_config.trainable_token_indices
        if tokens is None:
            return
        inputs = self.get_input_embeddings() if hasattr(self.model, "get_input_embeddings") else None
        weights = [
            module.weight
            for name, module in self.model.named_modules()
            if (name.endswith(tuple(tokens)) if isinstance(tokens, dict) else module is inputs)
        ]
        if any(weight is getattr(base_layer, "weight", None) for weight in weights):
            raise ConfigError(
                f"target module {key!r} has the weight whose tokens {tokens} are trained by trainable_token_indices: leave "
                "it out of target_modules, or adapt it and leave trainable_token_indices out."
            )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands ``adapter_names`` (one name per row, "__base__" for none) down to the layers."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first.")
        if any(layer.merged for layer in self._layers()):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        known = {name for layer in self._layers() for name in layer.duallora_config} | {"__base__"}
        unknown = sorted(set(adapter_names) - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams")
        if isinstance(beams, int) and beams > 1:  # generate repeats each row for its beams
            adapter_names = [name for name in adapter_names for _ in range(beams)]
        hook = partial(_with_adapter_names, adapter_names=adapter_names)
        wrapped = [m for m in self.modules() if isinstance(m, (DualLoraLayer, AuxiliaryTrainingWrapper))]
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in wrapped]
        for layer in self._layers():
            layer.mixed_batch = True
        try:
            yield
        finally:
            for layer in self._layers():
                layer.mixed_batch = False
            for handle in handles:
                handle.remove()

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply the dW of an adapter by ``scale`` in every layer: in the forward, in merging and in conversion.

        Not saved. With several active adapters (``model.base_model.set_adapter([...])``) the model computes
        W0 + sum of scale_i dW_i, and merging writes exactly that. With ``use_dora`` the rows of W0 + scale dW get their
        lengths m after, so what the adapter changes is not proportional to ``scale``.

        Raises:
            ConfigError: there is no such adapter, it is merged, or ``scale`` is not finite; nothing was changed.
        """
        if adapter_name not in self.peft_config:
            raise ConfigError(
                f"there is no adapter {adapter_name!r} to scale: this model has {', '.join(self.peft_config)}."
            )
        for layer in self._layers():
            layer.check_scale(adapter_name, scale)
        for layer in self._layers():
            layer.set_scale(adapter_name, scale)

    def add_weighted_adapter(self, adapters: Any = (), *_: Any, **__: Any) -> None:
        """LoRA's; not for Dual LoRA. Always raises ConfigError, which says what does the same."""
        raise ConfigError(
            f"add_weighted_adapter({list(adapters)}): a weighted sum of Dual LoRA updates is no Dual LoRA update (ReLU and "
            "Sign do not add), so it has no factors to make an adapter of. For the sum itself, exactly (without use_dora): "
            "model.set_scale(name, weight) for each, then model.base_model.set_adapter([names]), which merge_and_unload() "
            "writes as well. For one low-rank adapter, approximately: convert each to LoRA and combine those."
        )


def _layer_class(base: Any, key: str, config: DualLoraConfig) -> type[DualLoraLayer]:
    """Which of our layers can take the place of ``base``, the module ``key``; ConfigError where none can."""
    stored, problem = quantized.storage(base), ""
    found = next((kind for kind in (Embedding, Conv, Linear) if isinstance(base, kind.kinds)), None)
    if found is None and not quantized.is_quantized_linear(base):
        problem = (
            f"is a {type(base).__name__}; Dual LoRA adapts torch.nn.Linear, Embedding, Conv1d, Conv2d, Conv3d and "
            "transformers' Conv1D. Narrow target_modules, or name it in exclude_modules."
        )
    elif found is Embedding and base.max_norm is not None:
        problem = (
            f"has max_norm={base.max_norm}, which rewrites its weight in every forward, so that W0 + dW means nothing: "
            "set max_norm=None, or name it in exclude_modules."
        )
    elif found is Conv and not Conv.computes(base) and config.duallora_dropout > 0:
        problem = (
            f"is a {type(base).__name__} with a forward of its own, where duallora_dropout={config.duallora_dropout} "
            "cannot act on the dW path alone: set it to 0, or name it in exclude_modules."
        )
    elif stored is None and not isinstance(base, Conv1D) and type(base.weight) is not nn.Parameter:
        problem = (
            f"has a weight of an unknown kind ({type(base.weight).__name__}): load the base model unquantized, or "
            "quantize it with bitsandbytes, torchao or HQQ."
        )
    elif stored is not None and stored.read is None and config.use_dora:
        problem = (
            f"is a {stored.name} layer, whose weight cannot be read; use_dora needs its row lengths. Set use_dora=False, "
            "or load the base model unquantized."
        )
    if problem:
        raise ConfigError(f"target module {key!r} {problem}")
    if config.fan_in_fan_out and isinstance(base, nn.Linear):
        warnings.warn(
            f"fan_in_fan_out=True has no effect on {key!r}: a torch.nn.Linear stores [out, in].", stacklevel=3
        )
    return found or Linear


def _tell_trainers() -> None:
    """Has each transformers Trainer that is made from now on resolve warmup_steps="auto" when it begins to train."""
    try:
        from transformers import trainer
    except ImportError:  # without what it needs there are none
        return
    from duallora.tuner.watch import RampOfTheRun

    if RampOfTheRun not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(RampOfTheRun)  # type: ignore[arg-type]


def _warn_of_experts(model: nn.Module) -> None:
    """transformers 5 keeps the experts of a layer in one 3-d parameter, which is no module to target."""
    names = [
        f"{name}.{key}"
        for name, module in model.named_modules()
        if "expert" in (name.rpartition(".")[2] + type(module).__name__).lower()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]
    if names:
        warnings.warn(
            f"target_modules='all-linear' does not reach the experts of this model: {len(names)} fused parameters such as "
            f"{names[0]!r} stay as they are, and so does what they learned. Attention and other linear layers are adapted. Name them in "
            "target_parameters, such as ['experts.down_proj'], to adapt them too.",
            stacklevel=2,
        )


def _merges(layer: DualLoraLayer, adapter_names: list[str] | None) -> bool:
    return any(name in layer.duallora_A for name in (layer.active_adapters if adapter_names is None else adapter_names))


def _tensors(
    module: nn.Module, name: str = "", merged: Container[nn.Module] | None = None
) -> Iterator[tuple[str, Hashable]]:
    """Each tensor's name in the model without adapters, and what it is: there, or with those of ``merged`` merged."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        copies = getattr(module, "modules_to_save", {})
        active = [adapter for adapter in module.active_adapters if adapter in copies]
        module = module.original_module if merged is None or not active else copies[active[0]]
    layers: dict[str, DualLoraLayer] = {}
    while isinstance(module, DualLoraLayer):
        layers[module.weight_name] = module
        module = module.base_layer if isinstance(module, Experts) else module.get_base_layer()
    for _, key, tensor in ties.slots(module):
        identity, layer = id(tensor), layers.get(key)
        if layer and merged is None:
            identity = id(layer._tied_weight[0]) if layer._tied_weight else identity
        elif layer and layer in merged:  # type: ignore[operator]
            identity = id(layer)
        yield f"{name}{key}", identity
    for key, child in module._modules.items():
        if child is not None:
            yield from _tensors(child, f"{name}{key}.", merged)


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

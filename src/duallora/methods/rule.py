"""PEFT type DUALLORA_RULE: one tuner for every method whose layer is the base layer's output plus a rule.

    y = base_layer(x)        y' = y + rule(dropout(h))        h = x, or y where the rule reads the output

The rule holds the parameters and the formula. Targeting, saving, loading, several adapters and modules_to_save are
PEFT's; a rule that is linear in x is a change of the weight, dW = rule(I)^T, and can be merged.
"""

# mypy: disable-error-code="assignment,operator,override,return-value,attr-defined,union-attr,arg-type"
# (to mypy an attribute of a module is `Tensor | Module`, and PEFT's own types are loose)
from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from duallora import methods
from duallora.errors import ConfigError, check_positive, check_rank
from duallora.tuner.register import add_type

NAME = "DUALLORA_RULE"


@dataclass
class RuleConfig(PeftConfig):
    """Configuration of a rule: which one, its settings, and where it goes.

    Raises:
        ConfigError: a value out of range.
    """

    rule: str = field(default="", metadata={"help": "Name of the method, such as 'mora'."})
    r: int = field(default=8, metadata={"help": "Rank or width of the rule, >= 1."})
    alpha: float | None = field(default=None, metadata={"help": "Scale, where the rule has one."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on what the rule reads, in [0, 1)."})
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "The rule's further settings."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "As in PEFT's LoRA."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "As in PEFT's LoRA."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved in full."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer numbers; None = all."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    bias: str = field(default="none", metadata={"help": "Always 'none': no rule trains the base layer's bias."})
    init_weights: bool = field(default=True, metadata={"help": "False: random where the rule starts at 0 (for tests)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME)
        check_rank("r", self.r)
        if self.alpha is not None:
            check_positive("alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout!r}: expected a probability in [0, 1).")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)


class Rule(nn.Module):
    """What a method adds to a layer's output; one object per layer and adapter, with the trained parameters.

    A subclass makes them in ``__init__``, as its own attributes (PEFT's file format loses those of modules inside), and computes in ``forward(h, prompt)``: ``h`` [..., in] (or [..., out] with
    ``reads_output``) gives [..., out]. ``prompt`` [batch, length] marks the prompt's tokens for ``reads_prompt``.
    """

    linear = False  # in h = x: a change of the weight
    any_module = False  # not on linear layers alone
    reads_output = False
    reads_prompt = False

    def __init__(self, config: RuleConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def forward(self, h: Tensor, prompt: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def start(self, parameter: Tensor, config: RuleConfig) -> nn.Parameter:
        """A parameter that is 0 at the start, so that the rule changes nothing (random with init_weights=False)."""
        return nn.Parameter(parameter.zero_() if config.init_weights else parameter.normal_(std=0.1))


class Prompt:
    """Which tokens of the batch under way belong to the prompt; seen by a hook before the model's forward."""

    mask: Tensor | None = None

    def see(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        batch, length = tokens.shape[:2]
        cache, attended, labels = (kwargs.get(k) for k in ("past_key_values", "attention_mask", "labels"))
        if cache is not None and hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0:
            self.mask = torch.zeros(batch, length, dtype=torch.bool, device=tokens.device)  # an answer is growing
            return
        if attended is not None and attended.shape == (batch, length):
            mask = attended.bool()
        else:
            mask = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        if labels is not None and labels.shape == (batch, length):
            mask = mask & (labels == -100)
            if not mask.any(dim=1).all():
                raise ConfigError(
                    "this method edits the prompt's tokens, but the labels of a row train on all of its tokens: set the "
                    "prompt's labels to -100 (data.train_on=answer)."
                )
        self.mask = mask


class RuleLayer(nn.Module, BaseTunerLayer):
    """A base layer with one :class:`Rule` per adapter in ``duallora_rule_parts``."""

    adapter_layer_names = ("duallora_rule_parts",)
    other_param_names = ("duallora_rule_dropout",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RuleConfig, width: int | None, prompt: Prompt):
        super().__init__()
        self.base_layer = base_layer
        self.duallora_rule_parts = nn.ModuleDict({})
        self.duallora_rule_dropout = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters = []
        self._base_weight_before_merge: Tensor | None = None
        self.prompt = prompt
        base = self.get_base_layer()
        if isinstance(base, Conv1D):
            self.in_features, self.out_features = base.weight.shape
        elif isinstance(base, nn.Linear):
            self.in_features, self.out_features = base.in_features, base.out_features
        elif width is not None:
            self.in_features = self.out_features = width
        else:
            raise ConfigError(
                f"{type(base).__name__} is no linear layer and the model's config has no hidden_size, so the width of its "
                "output is unknown: give options={'width': ...}."
            )
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def __getattr__(self, name: str) -> Any:
        """What transformers asks of a decoder layer, such as its attention type, is the base layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, config: RuleConfig) -> None:
        """Add (or replace) one adapter."""
        rule_class = methods.get(config.rule).rule
        assert rule_class is not None
        self.duallora_rule_parts[adapter_name] = rule_class(config, self.in_features, self.out_features)
        self.duallora_rule_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's goes by base_layer.weight, which a whole decoder layer has not.
        base = self.get_base_layer()
        if device is None and getattr(base, "weight", None) is None:
            device = next((p.device for p in base.parameters() if not p.is_meta), None)
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output plus the active rules' additions, in its dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return result
        y = result[0] if isinstance(result, tuple) else result
        out = y
        for adapter in self.active_adapters:
            if adapter not in self.duallora_rule_parts or adapter in self.merged_adapters:
                continue
            rule = self.duallora_rule_parts[adapter]
            h = y if rule.reads_output else args[0]
            parameter = next(rule.parameters())
            if not torch.is_autocast_enabled(h.device.type):
                h = h.to(parameter.dtype)
            out = out + rule(self.duallora_rule_dropout[adapter](h), self.prompt.mask).to(y.dtype)
        return (out, *result[1:]) if isinstance(result, tuple) else out

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW of a linear rule in the layout of the base weight; float32 at least."""
        rule = self.duallora_rule_parts[adapter]
        if not rule.linear:
            raise ConfigError(
                f"adapter {adapter!r} ({type(rule).__name__}) is no change of the weight: do not merge it."
            )
        parameter = next(rule.parameters())
        identity = torch.eye(self.in_features, device=parameter.device, dtype=parameter.dtype)
        delta = rule(identity)
        return delta if isinstance(self.get_base_layer(), Conv1D) else delta.T

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W0 + dW into the base layer; W0 is kept, so that unmerging is exact.

        Raises:
            ConfigError: the rule is not linear, or the base weight is quantized.
            ValueError: safe_merge found a value that is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.duallora_rule_parts:
                continue
            base = self.get_base_layer()
            delta = self.get_delta_weight(adapter)
            if not isinstance(base, (nn.Linear, Conv1D)) or not base.weight.is_floating_point():
                raise ConfigError(f"{type(base).__name__} holds a quantized weight: merge into an unquantized base.")
            merged = (base.weight.to(delta.dtype) + delta).to(base.weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            if self._base_weight_before_merge is None:
                self._base_weight_before_merge = base.weight.data
            base.weight.data = merged
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        assert self._base_weight_before_merge is not None
        weight = self.get_base_layer().weight
        weight.data = self._base_weight_before_merge.to(weight.device, weight.dtype)
        self._base_weight_before_merge = None
        self.merged_adapters = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a change of the weight."""
        return bool(self.duallora_rule_parts[adapter_name].linear)

    def __repr__(self) -> str:
        return "duallora_rule." + super().__repr__()


class RuleModel(BaseTuner):
    """Puts a rule into a model; made by ``peft.get_peft_model(model, RuleConfig(...))``."""

    prefix: str = "duallora_rule_"
    tuner_layer_cls = RuleLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's, hooks included."""
        return self.model(*args, **kwargs)

    def _watch_prompts(self) -> Prompt:
        """What the layers learn the prompt's tokens from; one hook per model."""
        for hook in self.model._forward_pre_hooks.values():
            if isinstance(getattr(hook, "__self__", None), Prompt):
                return hook.__self__
        prompt = Prompt()
        self._prompt_hook = self.model.register_forward_pre_hook(prompt.see, with_kwargs=True)
        return prompt

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        if hasattr(self, "_prompt_hook"):
            self._prompt_hook.remove()
        return unloaded

    def _create_and_replace(
        self,
        peft_config: RuleConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        method = methods.get(peft_config.rule)
        if method.rule is None:
            raise ConfigError(f"rule={peft_config.rule!r} is no rule: it is applied by duallora.methods.apply alone.")
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if not isinstance(base, (nn.Linear, Conv1D)) and not method.rule.any_module:  # type: ignore[attr-defined]
            raise ConfigError(
                f"target module {current_key!r} is a {type(base).__name__}; {method.title} goes onto torch.nn.Linear and "
                "transformers' Conv1D. Narrow target_modules, or name it in exclude_modules."
            )
        prompt = self._watch_prompts() if method.rule.reads_prompt else None  # type: ignore[attr-defined]
        if isinstance(target, RuleLayer):
            target.prompt = prompt or target.prompt
            target.update_layer(adapter_name, peft_config)
            return
        config = getattr(self.model, "config", None)
        width = peft_config.options.get("width", getattr(config, "hidden_size", None))
        layer = RuleLayer(target, adapter_name, peft_config, width, prompt or Prompt())
        if isinstance(parent, nn.TransformerEncoderLayer):  # whose fused path would read W0; a hook keeps it off
            layer.register_forward_pre_hook(_nothing)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable until it is activated
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                "adapter_names: rules cannot give each row of a batch an adapter of its own; set_adapter one."
            )
        yield


def _nothing(module: nn.Module, args: Any) -> None:
    return None


def reads_labels(model: Any) -> bool:
    """Whether the model must see the labels to know which tokens are the prompt's, also where the caller wants no loss."""
    return any(
        isinstance(layer, RuleLayer) and any(rule.reads_prompt for rule in layer.duallora_rule_parts.values())
        for layer in model.modules()
    )


def attach(model: nn.Module, spec: methods.MethodSpec, batches: Any = None) -> Any:
    """``Method.attach`` of every method with a rule: options that RuleConfig has go there, the others to the rule.

    Without ``target_modules`` it goes onto every layer of the model's list of layers.
    """
    known = {"exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "init_weights"}
    options = {k: v for k, v in spec.options.items() if k not in known}
    methods.check_options(spec, {*known, "width"})
    config = RuleConfig(
        rule=spec.name,
        r=spec.r or 1,
        alpha=spec.alpha,
        dropout=spec.dropout or 0.0,
        target_modules=_layers(model, spec.name) if spec.target_modules is None else spec.target_modules,
        task_type=spec.task_type,
        options=options,
        **{k: v for k, v in spec.options.items() if k in known},
    )
    return get_peft_model(model, config)  # type: ignore[arg-type]


def _layers(model: nn.Module, name: str) -> str:
    """A regular expression for the members of the list with as many modules as the config has layers."""
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise ConfigError(
            f"{name}: {len(lists)} lists of {count} layers in {type(model).__name__}, expected 1: give target_modules, such as "
            r"'model\.layers\.\d+'."
        )
    return lists[0].replace(".", r"\.") + r"\.\d+"


def register() -> None:
    """Register the type with PEFT. Calling it again changes nothing."""
    add_type(NAME, RuleConfig, RuleModel)

"""The configuration of a Dual LoRA adapter."""

# ruff: noqa: RUF009  (setting() is a field())
from __future__ import annotations

import inspect
import warnings
from dataclasses import InitVar, dataclass, fields
from typing import Any

import peft
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.peft_types import PeftType

from duallora.core.gate import AUTO_STEPS, closed_gate_message, tracked_layers, warn_never_trained
from duallora.core.settings import Settings, check, explained, hints, setting
from duallora.errors import ConfigError


@dataclass
class DualLoraConfig(PeftConfig, Settings):
    """Configuration of Dual LoRA (arXiv 2512.03402): dW = gate * alpha/sqrt(r1 r2) * ReLU(B A) . Sign(D C).

    Trainable parameters of a layer [out, in]: (r1 + r2)(out + in), so r = 8 matches LoRA's r = 16.

    Raises:
        ConfigError (a ValueError): a value out of range, naming the field, the value and what is allowed.
    """

    fan_in_fan_out: bool = setting(
        False, "Weights are [in, out] (transformers' Conv1D); corrected by itself where known."
    )
    layers_pattern: list[str] | str | None = setting(
        None, "Name of the layer list, if layers_to_transform is given and it is not a usual one."
    )
    init_weights: bool = setting(True, "True: dW = 0 at the start; False: the gate starts open (for tests).")
    gradient_tokens_by: InitVar[str] = "uniform"  # in files of version 0.1

    def __post_init__(self, gradient_tokens_by: str) -> None:
        super().__post_init__()
        self.resolved: int | None = None  # what "auto" has become
        if gradient_tokens_by != "uniform":
            warnings.warn(
                f"gradient_tokens_by={gradient_tokens_by!r} is gone: every layer takes the same share, gradient_tokens="
                f"{self.gradient_tokens}.",
                stacklevel=3,
            )
        self.peft_type = PeftType("DUALLORA")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ConfigError("layers_pattern cannot be used when target_modules is a string: name the modules.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform: give the indices of the layers to adapt.")
        check(vars(self))
        if self.alpha is None:
            self.alpha = 2 * self.r

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json; warns if the adapter being saved has not opened its gate yet.

        Raises:
            ConfigError: PEFT (before 0.21) has just saved an embedding's weight with dW merged into it.
        """
        # Of the layers of all threads, those that this config made.
        mine = [
            (layer, adapter)
            for layer in tracked_layers()
            for adapter, config in list(getattr(layer, "duallora_config", {}).items())
            if config is self
        ]
        merged = sorted(
            str(layer.module_name)
            for layer in {layer for layer, _ in mine}
            if layer.merged_adapters and str(layer.module_name).rpartition(".")[2] in EMBEDDING_LAYER_NAMES
        )
        if merged and not hasattr(BaseTuner, "_get_adapter_state_dict"):
            raise ConfigError(
                f"PEFT {peft.__version__} has saved the whole weight of {' and '.join(merged)} with the adapter; merged as "
                "it is, it would hold dW twice when loaded: call unmerge_adapter() and save again, or upgrade to "
                "peft >= 0.21."
            )
        if self.warmup_steps == "auto" and any(
            not (step := layer.duallora_step[adapter]).is_meta and step > 0 for layer, adapter in mine
        ):
            self.warmup_steps = self.resolved = AUTO_STEPS  # which is what it has been trained with
        super().save_pretrained(save_directory, **kwargs)
        for adapter in sorted({adapter for _, adapter in mine}):
            layers = [layer for layer, name in mine if name == adapter]
            warn_never_trained("Saving", layers, adapter)
            steps = [step for layer in layers if not (step := layer.duallora_step[adapter]).is_meta]
            if steps and (message := closed_gate_message(int(max(steps)), self.ramp_steps)):
                warnings.warn(f"Saving a Dual LoRA adapter whose gate is not open: {message}", stacklevel=2)

    @property
    def ramp_steps(self) -> int:
        """Length of the ramp in optimizer steps; 0 without a ramp."""
        if self.warmup != "ramp":
            return 0
        return AUTO_STEPS if self.warmup_steps == "auto" else self.warmup_steps

    def ranks(self, pattern_key: str | None = None) -> tuple[int, int]:
        """(r1, r2) of a layer, ``pattern_key`` being its key in ``rank_pattern`` if it has one."""
        value = (self.rank_pattern or {}).get(pattern_key) if pattern_key is not None else None
        if value is None:
            return self.r1 or self.r, self.r2 or self.r
        first, second = value if isinstance(value, (list, tuple)) else (value, value)
        return first, second


# Of the fields themselves, so that help() and the page of the API say what is checked.
DualLoraConfig.__doc__ = (
    f"{inspect.cleandoc(DualLoraConfig.__doc__ or '')}\n\n{explained(fields(DualLoraConfig), hints())}"
)

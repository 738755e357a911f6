"""The configuration of a Dual LoRA adapter."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import peft
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.peft_types import PeftType

from duallora.core.equation import DIRECTIONS, MAGNITUDES, STE_CLIPS
from duallora.core.gate import closed_gate_message, never_trained, never_trained_message, tracked_layers
from duallora.core.init import DIRECTION_STD
from duallora.errors import ConfigError, check_positive, check_rank, check_steps, is_number
from duallora.ops import BACKENDS

_CHOICES = {
    "bias": ("none", "all", "duallora_only"),
    "warmup": ("ramp", "residual", "none"),
    "magnitude": MAGNITUDES,
    "direction": DIRECTIONS,
    "ste_clip": STE_CLIPS,
    "forward": ("auto", "merged", "added"),
    "backend": BACKENDS,
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class DualLoraConfig(PeftConfig):
    """Configuration of Dual LoRA (arXiv 2512.03402): dW = gate * alpha/sqrt(r1 r2) * ReLU(B A) . Sign(D C).

    Trainable parameters of a layer [out, in]: (r1 + r2)(out + in), so r = 8 matches LoRA's r = 16. What each field
    means stands with the field; ``dataclasses.fields(DualLoraConfig)`` carries it as ``metadata["help"]``.

    Raises:
        ConfigError (a ValueError): a value out of range, naming the field, the value and what is allowed.
    """

    r: int = field(default=16, metadata=_help("Rank of both groups, >= 1."))
    r1: int | None = field(default=None, metadata=_help("Rank of the magnitude group A, B; None = r."))
    r2: int | None = field(default=None, metadata=_help("Rank of the direction group C, D; None = r."))
    alpha: float | None = field(
        default=None, metadata=_help("Numerator of the scaling alpha/sqrt(r1 r2), > 0; None = 2 r.")
    )
    duallora_dropout: float = field(
        default=0.0,
        metadata=_help("Dropout on the input of the dW path, in [0, 1); 0 in the paper. Embeddings have none."),
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata=_help("Module names (suffixes), a regex, or 'all-linear'; None = PEFT's choice of LoRA targets."),
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata=_help("Module names (suffixes) or a regex to leave out.")
    )
    fan_in_fan_out: bool = field(
        default=False, metadata=_help("Weights are [in, out] (transformers' Conv1D); corrected by itself where known.")
    )
    bias: Literal["none", "all", "duallora_only"] = field(
        default="none", metadata=_help("Which biases are trained: 'none', 'all' or 'duallora_only'.")
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata=_help("Modules trained and saved in full, for example a new classifier.")
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata=_help("Indices of the layers to adapt; None = all.")
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata=_help("Name of the layer list, if layers_to_transform is given and it is not a usual one."),
    )
    rank_pattern: dict[str, Any] = field(
        default_factory=dict,
        metadata=_help("Layer name or regex -> r, or [r1, r2], in place of the ranks above."),
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata=_help("Layer name or regex -> alpha in place of the one above.")
    )
    init_weights: bool = field(
        default=True, metadata=_help("True: dW = 0 at the start; False: the gate starts open (for tests).")
    )
    init_std: float | None = field(
        default=None,
        metadata=_help(
            "Standard deviation of A and B at the start, > 0; None: by the layer's width and r1 (docs/method.md)."
        ),
    )
    direction_init_std: float = field(
        default=DIRECTION_STD,
        metadata=_help(
            "Standard deviation of C and D at the start, > 0; sets how easily signs flip, and where D C's size "
            "counts (direction xnor, dorefa, identity) that size."
        ),
    )
    init_seed: int | None = field(
        default=None, metadata=_help("Seed of the initial values, one stream per layer; None = torch's generator.")
    )
    warmup: Literal["ramp", "residual", "none"] = field(
        default="ramp",
        metadata=_help(
            "How dW = 0 at the start: 'ramp' multiplies dW by min(1, t/warmup_steps); 'residual' uses dW(t) - dW(0); "
            "'none' starts at dW(0)."
        ),
    )
    warmup_steps: int = field(
        default=100,
        metadata=_help("Optimizer steps until the ramp is open, >= 0; the paper's base recipe warms up for 100."),
    )
    magnitude: Literal["relu", "abs", "sigmoid", "identity"] = field(
        default="relu", metadata=_help("'relu'; 'abs', 'sigmoid' (Table 6); 'identity' (Setting 1).")
    )
    direction: Literal["ste", "xnor", "dorefa", "identity", "fixed"] = field(
        default="ste",
        metadata=_help("'ste'; 'xnor', 'dorefa' (Table 3); 'identity' (Setting 2); 'fixed' random signs (Setting 3)."),
    )
    ste_clip: Literal["chain", "update", "none"] = field(
        default="chain", metadata=_help("Where the straight-through gradient is clipped: Eq. 7, Eq. 12, nowhere.")
    )
    forward: Literal["auto", "merged", "added"] = field(
        default="auto",
        metadata=_help(
            "'merged': one product with W0 + dW, the bits of the merged model; 'added': dW has a product of its own "
            "(dropout, quantised, sharded or offloaded bases); 'auto': merged where it can be."
        ),
    )
    backend: Literal["auto", "reference", "recompute", "cpu", "triton"] = field(
        default="auto",
        metadata=_help(
            "'auto': the fastest here; 'cpu' (C++) and 'triton': the kernels; 'recompute': torch operators; 'reference': "
            "plain autograd, which keeps [out, in] tensors."
        ),
    )
    use_dora: bool = field(
        default=False,
        metadata=_help("W' = m (W0 + dW)/|W0 + dW| by output row, with m trained (DoRA, arXiv 2402.09353)."),
    )
    gradient_tokens: float = field(
        default=1.0,
        metadata=_help(
            "Experimental, for CPUs: share of the tokens, in (0, 1], that form the factors' gradient, the heaviest and an "
            "unbiased sample of the others. 1: exact. Less is noisier, and faster on a CPU alone. Linear layers only; the "
            "others are exact."
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("DUALLORA")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError("layers_to_transform cannot be used when target_modules is a string: name the modules.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ConfigError("layers_pattern cannot be used when target_modules is a string: name the modules.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform: give the indices of the layers to adapt.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")
        for name in ("r", "r1", "r2"):
            if getattr(self, name) is not None or name == "r":
                check_rank(name, getattr(self, name))
        if self.alpha is None:
            self.alpha = 2 * self.r
        check_positive("alpha", self.alpha)
        if self.init_std is not None:
            check_positive("init_std", self.init_std)
        check_positive("direction_init_std", self.direction_init_std)
        for key, alpha in (self.alpha_pattern or {}).items():
            check_positive(f"alpha_pattern[{key!r}]", alpha)
        for key in self.rank_pattern or {}:
            self.ranks(key)
        check_steps("warmup_steps", self.warmup_steps)
        if not is_number(self.duallora_dropout) or not 0 <= self.duallora_dropout < 1:
            raise ConfigError(f"duallora_dropout={self.duallora_dropout!r}: expected a probability in [0, 1).")
        if not is_number(self.gradient_tokens) or not 0 < self.gradient_tokens <= 1:
            raise ConfigError(f"gradient_tokens={self.gradient_tokens!r}: expected a share of the tokens in (0, 1].")
        if self.backend == "reference" and self.gradient_tokens < 1:
            raise ConfigError(
                f"backend='reference' is plain autograd, which cannot sample gradient_tokens={self.gradient_tokens}: use "
                "backend='auto'."
            )
        if self.forward == "merged" and self.duallora_dropout > 0:
            raise ConfigError(
                f"forward='merged' multiplies by W0 + dW at once, so duallora_dropout={self.duallora_dropout} cannot "
                "act on the dW path alone: set it to 0, or forward to 'auto'."
            )
        if self.warmup == "residual" and self.direction == "fixed":
            raise ConfigError("warmup='residual' is not defined for direction='fixed': use warmup='ramp'.")

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """What adapter_config.json holds, without a field of earlier versions that said nothing; PEFT names others."""
        if kwargs.get("gradient_tokens_by") == "uniform":
            del kwargs["gradient_tokens_by"]
        return super().check_kwargs(**kwargs)

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
        super().save_pretrained(save_directory, **kwargs)
        for adapter in sorted({adapter for _, adapter in mine}):
            layers = [layer for layer, name in mine if name == adapter]
            if message := never_trained_message(never_trained(layers, adapter)):
                warnings.warn(f"Saving a Dual LoRA adapter of which {message}", stacklevel=2)
            steps = [step for layer in layers if not (step := layer.duallora_step[adapter]).is_meta]
            if self.warmup == "ramp" and steps:
                message = closed_gate_message(int(max(steps)), self.warmup_steps)
                if message:
                    warnings.warn(f"Saving a Dual LoRA adapter whose gate is not open: {message}", stacklevel=2)

    def ranks(self, pattern_key: str | None = None) -> tuple[int, int]:
        """(r1, r2) of a layer, ``pattern_key`` being its key in ``rank_pattern`` if it has one."""
        value = (self.rank_pattern or {}).get(pattern_key) if pattern_key is not None else None
        if value is None:
            return self.r1 or self.r, self.r2 or self.r
        pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        if len(pair) != 2:
            raise ConfigError(f"rank_pattern[{pattern_key!r}]={value!r}: expected a rank, or [r1, r2].")
        for rank in pair:
            check_rank(f"rank_pattern[{pattern_key!r}]", rank)
        return pair

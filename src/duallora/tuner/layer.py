"""What every adapter layer is: a layer whose weight is W0 plus one update dW per active adapter."""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Iterator
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from duallora.core.equation import Update, add_update, dual_scaling
from duallora.core.gate import (
    Gate,
    Gated,
    closed_gate_message,
    gated,
    new_counter,
    track,
    track_copy,
    watch_forward,
)
from duallora.core.init import draw_factors, draw_signs, layer_seed, warn_of_rank
from duallora.errors import ConfigError, is_number
from duallora.ops import check_backend
from duallora.ops.autograd import How, weight
from duallora.ops.backends import pick
from duallora.ops.fold import Foldable
from duallora.ops.read import read_weight
from duallora.tuner import quantized
from duallora.tuner.buffers import Counters, Seeds
from duallora.tuner.config import DualLoraConfig

DEAD_CHECK_ELEMENTS = 4096  # above this size ReLU(B A) does not start all zero


def _rebuild_after_load(layer: DualLoraLayer, incompatible_keys: Any) -> None:
    layer.duallora_step.uncast({})
    for adapter in layer.duallora_seed.keys():  # noqa: SIM118 (BufferDict is no dict)
        layer.rebuild_from_seed(adapter)


def is_ordinary(W: Any) -> bool:
    """Whether a weight is a plain tensor of numbers, and here: not quantized, on meta, or a shard (DeepSpeed ZeRO-3)."""
    return type(W) in (nn.Parameter, Tensor) and W.is_floating_point() and not W.is_meta and not hasattr(W, "ds_id")


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody hooked a layer or patched its forward."""
    return "forward" not in vars(module) and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _put(weight: Tensor, value: Tensor) -> None:
    """Make ``value`` the content of ``weight``: on the CPU by handing over the memory, elsewhere by copying."""
    if weight.device.type == "cpu":
        weight.data = value.to(weight.dtype)  # the model may have been cast while merged
    else:
        weight.data.copy_(value)


class DualLoraLayer(Gated, Foldable, BaseTunerLayer, nn.Module):
    """What every Dual LoRA layer holds, per adapter: factors, gate counter, options.

    ``duallora_A`` [r1, in], ``duallora_B`` [out, r1], ``duallora_C`` [r2, in], ``duallora_D`` [out, r2] are trained
    (no C and D with ``direction="fixed"``), and with ``use_dora`` the lengths ``duallora_m`` [out]. ``duallora_step``
    counts optimizer steps; ``duallora_seed`` is the seed of what is rebuilt rather than saved: the initial factors
    (``warmup="residual"``), held in ``duallora_initial``, or the signs (``"fixed"``), in ``fixed_signs``.
    """

    adapter_layer_names = ("duallora_A", "duallora_B", "duallora_C", "duallora_D", "duallora_m")
    other_param_names = (
        "duallora_config", "r1", "r2", "alpha", "scaling", "duallora_dropout", "duallora_step", "duallora_seed",
        "duallora_initial", "fixed_signs",
    )  # fmt: skip

    kinds: tuple[type[nn.Module], ...]  # of base layers
    forwards: tuple[Any, ...]  # of them: what the layer computes itself
    weight_name = "weight"  # of the base layer's parameter that dW is added to
    matrices = 1  # [out, in] that it holds

    base_layer: Any  # of any library
    duallora_A: nn.ParameterDict
    duallora_B: nn.ParameterDict
    duallora_C: nn.ParameterDict
    duallora_D: nn.ParameterDict
    duallora_m: nn.ParameterDict
    in_features: int
    out_features: int

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.duallora_config: dict[str, DualLoraConfig] = {}
        self.r1: dict[str, int] = {}
        self.r2: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float | Tensor] = {}  # a tensor: prepared for swapping adapters
        self.duallora_dropout = nn.ModuleDict({})
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        self.duallora_step = Counters({}, persistent=True)
        self.duallora_seed = Seeds()
        self.duallora_initial = nn.ModuleDict({})
        self.fixed_signs: dict[str, Tensor] = {}  # no buffers: an average of integers is no sign
        self._disable_adapters = False
        self.merged_adapters = []
        self._base_weight_before_merge: Tensor | dict[str, Any] | None = None  # a dict: of a quantized base
        self.unloading = False  # what is merged now is merged for good: W0 need not be kept
        self.requantize: quantized.Requantize | None = None
        self.shares_weight = False  # with another module: found out by the model
        self.module_name = ""  # in the base model
        self.mixed_batch = False  # in a forward whose rows have adapters of their own
        self._folded = False
        self._tied_weight: list[nn.Parameter] = []  # a list, or it would be registered as a parameter of this layer
        base: Any = self.get_base_layer()
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self.out_features, self.in_features = self._sizes(base)
        self.register_load_state_dict_post_hook(_rebuild_after_load)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **kwargs)
        track(self)

    def _sizes(self, base: Any) -> tuple[int, int]:
        """(out, in) of the matrix that dW is added to."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for adapter in self.duallora_A:
            factors, counter = (f"{prefix}{name}.{adapter}" for name in ("duallora_A", "duallora_step"))
            steps = self.duallora_config[adapter].ramp_steps
            if steps and factors in state_dict and counter not in state_dict:
                warnings.warn(
                    f"The weights loaded for adapter {adapter!r} hold no step counter (duallora_step; it is a buffer, not "
                    f"a parameter), so its gate stays at step {int(self.duallora_step[adapter])} of {steps}. Save with "
                    "save_pretrained or state_dict(), or open it with duallora.advance_gate(model, steps).",
                    stacklevel=2,
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        track_copy(self)

    # -- building ------------------------------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, *, config: DualLoraConfig, r1: int, r2: int, alpha: float, module_name: str
    ) -> None:
        """Add (or replace) one adapter; ``module_name`` picks the layer's own stream of ``config.init_seed``."""
        check_backend(config.backend)
        self.module_name = module_name
        remedy = " Lower r, or set rank_pattern for this layer."
        warn_of_rank(max(r1, r2), self.out_features, self.in_features, f"{module_name}: ", remedy)
        fixed = config.direction == "fixed"
        self.duallora_config[adapter_name] = config
        self.r1[adapter_name], self.r2[adapter_name] = r1, (r1 if fixed else r2)
        self.alpha[adapter_name] = alpha
        self.scaling[adapter_name] = dual_scaling(alpha, r1, self.r2[adapter_name])
        dropout = config.duallora_dropout
        self.duallora_dropout[adapter_name] = nn.Dropout(p=dropout) if dropout > 0 else nn.Identity()
        # Opening the gate by its counter, not by the config, lets the saved weights alone decide.
        start = 0 if config.init_weights else config.ramp_steps
        self.duallora_step[adapter_name] = new_counter(start)
        seed = layer_seed(config.init_seed, module_name)
        factors = self._draw(adapter_name, seed)
        for name, factor in zip(self.adapter_layer_names, factors, strict=False):
            getattr(self, name)[adapter_name] = nn.Parameter(factor)
        if not fixed and self.in_features * self.out_features <= DEAD_CHECK_ELEMENTS and config.magnitude == "relu":
            A, B = factors[:2]
            if not (B @ A > 0).flatten(-2).any(-1).all():
                warnings.warn(
                    f"{module_name} [{self.out_features} x {self.in_features}]: ReLU(B A) is zero everywhere at the "
                    "start, so this layer cannot learn. Use a larger r1, or another init_seed.",
                    stacklevel=2,
                )
        if fixed or config.warmup == "residual":
            self.duallora_seed[adapter_name] = torch.tensor(seed, dtype=torch.int64)
        if config.use_dora:
            self.duallora_m[adapter_name] = nn.Parameter(self._base_lengths(adapter_name))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.rebuild_from_seed(adapter_name)
        self.set_adapter(self.active_adapters)

    def _base_lengths(self, adapter_name: str) -> Tensor:
        """|W0| [out] by output row, as the kernel computes it, so that m (W0 + 0) / |W0 + 0| = W0 at the start."""
        W = self._matrix(self._base_weight())
        if "meta" in (self.duallora_A[adapter_name].device.type, W.device.type):
            return torch.empty(self.out_features, device="meta")  # to be loaded
        A, B, C, D = (None if f is None else f.detach().to(W.device) for f in self._factors(adapter_name))
        assert A is not None
        assert B is not None
        fixed = self.duallora_config[adapter_name].direction == "fixed"
        return self._lengths(W, Update(A, B, A, B, 0.0) if fixed else Update(A, B, C, D, 0.0, "relu", "identity"))

    @torch.no_grad()
    def _lengths(self, W: Tensor, update: Update) -> Tensor:
        """|W + dW| [out] by output row."""
        ones, build = torch.ones(self.out_features, device=W.device), pick("auto", update, W.dtype).build_weight
        unit = update.unit()
        return build(W, unit, fan_in_fan_out=self.fan_in_fan_out, dtype=W.dtype, m=ones)[1]

    def _base_weight(self) -> Tensor:
        """W0, also while merged; of a quantized base dequantized, in float32."""
        base: Any = self.get_base_layer()
        before = self._base_weight_before_merge
        if isinstance(before, dict):
            return quantized.read_held(base, before)
        if before is not None:
            held = getattr(base, self.weight_name)
            return before.to(held.device, held.dtype)
        return getattr(base, self.weight_name) if quantized.storage(base) is None else quantized.read(base)

    def _matrix(self, W: Tensor) -> Tensor:
        """The base weight as the matrix [out, in] ([in, out] with ``fan_in_fan_out``) that dW is added to."""
        return W

    def _draw(self, adapter_name: str, seed: int) -> list[Tensor]:
        config = self.duallora_config[adapter_name]
        return draw_factors(
            seed, self.out_features, self.in_features, self.r1[adapter_name],
            None if config.direction == "fixed" else self.r2[adapter_name],
            init_std=config.init_std, direction_init_std=config.direction_init_std,
            init=config.init, on_bf16_grid=config.warmup == "residual",
        )  # fmt: skip

    def rebuild_from_seed(self, adapter_name: str) -> None:
        """Redraw what ``duallora_seed`` stands for. Called after the adapter is made and after weights are loaded."""
        device = self.duallora_A[adapter_name].device
        if adapter_name not in self.duallora_seed or device.type == "meta":
            return
        seed = self.duallora_seed.values_of[adapter_name]
        if self.duallora_config[adapter_name].direction == "fixed":
            self.fixed_signs[adapter_name] = draw_signs(seed, self.out_features, self.in_features).to(device)
            return
        tensors = dict(zip("ABCD", self._draw(adapter_name, seed), strict=True))
        held = BufferDict({name: tensor.to(device) for name, tensor in tensors.items()}, persistent=False)
        self.duallora_initial[adapter_name] = held

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT before 0.21 casts integers to the base weight's float dtype too: a seed would change, a bf16 counter stick.
        counters = [(d, d[adapter_name]) for d in (self.duallora_step, self.duallora_seed) if adapter_name in d]
        lengths = self.duallora_m[adapter_name].data if adapter_name in self.duallora_m else None
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if lengths is not None:  # rounded to the base weight's type, m would not start at |W0|
            self.duallora_m[adapter_name].data = lengths.to(self.duallora_m[adapter_name].device)
        for held, value in counters:
            held[adapter_name] = value.to(held[adapter_name].device)

    def __getattr__(self, name: str) -> Any:
        """What models read off their layers (``stride``, ``num_embeddings``) is the base layer's."""
        if name in (modules := self.__dict__.get("_modules", ())):
            return modules[name]  # before torch's own look-up: a forward asks for several
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name.startswith("__") or "base_layer" not in modules:
                raise
            return getattr(self.get_base_layer(), name)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> DualLoraLayer:
        self.fixed_signs = {adapter: fn(signs) for adapter, signs in self.fixed_signs.items()}
        for adapter, scaling in self.scaling.items():
            if isinstance(scaling, Tensor):
                self.scaling[adapter] = scaling.to(fn(scaling).device)
        return super()._apply(fn, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; a merged one leaves the base weight first, the other merged ones stay."""
        others = [name for name in self.merged_adapters if name != adapter_name]
        was_merged = adapter_name in self.merged_adapters
        if was_merged:
            self.unmerge()
        super().delete_adapter(adapter_name)
        if was_merged and others:
            self.merge(adapter_names=others)

    # -- the update ----------------------------------------------------------------------------------------------

    def gates(self, active_only: bool = False) -> Iterator[Gate]:
        """The gate of each adapter (see :mod:`duallora.core.gate`); frozen while merged."""
        for adapter in list(self.duallora_A):
            if active_only and adapter not in self.active_adapters:
                continue
            step, config = self.duallora_step._buffers.get(adapter), self.duallora_config.get(adapter)
            if step is None or config is None:  # another thread is adding or deleting it
                continue
            factors = [p for p in self._factors(adapter) if isinstance(p, Tensor)]
            yield Gate(adapter, step, config.ramp_steps, factors, adapter in self.merged_adapters, id(config))

    def _factors(self, adapter: str) -> list[Any]:
        """[A, B, C, D], parameters; C and D are None with fixed signs."""
        modules, found = self._modules, []
        for name in self.adapter_layer_names[:4]:
            held: Any = modules[name]
            # Past torch's look-up, which takes as long as all the rest; FSDP1 puts what it gathers elsewhere.
            factor = held._parameters.get(adapter)
            found.append(getattr(held, adapter, None) if factor is None else factor)
        return found

    def _update(self, adapter: str) -> Update:
        """dW of ``adapter`` at its present gate."""
        config = self.duallora_config[adapter]
        scaling: float | Tensor = self.scaling[adapter]
        if steps := config.ramp_steps:
            scaling = gated(self.scaling[adapter], self.duallora_step[adapter], steps)
            if not torch.compiler.is_compiling():
                watch_forward(self, adapter)
        signs, initial = None, ()
        if config.direction == "fixed":
            signs = self.fixed_signs[adapter]
        elif config.warmup == "residual" and config.init_weights:
            held: Any = self.duallora_initial[adapter]
            initial = tuple(held[name] for name in "ABCD")
        A, B, C, D = self._factors(adapter)
        return Update(A, B, C, D, scaling, config.magnitude, config.direction, config.ste_clip, signs, initial)

    def _build(
        self, adapter: str, W: Tensor | None, rows: Tensor | None, dtype: torch.dtype, minus_base: bool = False
    ) -> Tensor:
        """W' of one adapter (W' - W0 with ``minus_base``) in the layout of W, differentiable; of these rows alone."""
        update, m = self._update(adapter), self.duallora_m.get(adapter)
        backend = self.duallora_config[adapter].backend
        if rows is not None:
            update, m = update.rows(rows), None if m is None else m[rows]
            W = None if W is None else W[rows]
        return weight(W, m, update, How("delta" if minus_base else "merged", self.fan_in_fan_out, backend), dtype)

    def _delta(self, adapter: str, W: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """What ``adapter`` adds to W, in its layout, differentiable; float32 at least."""
        return self._build(
            adapter, W, rows, torch.promote_types(self.duallora_A[adapter].dtype, torch.float32), minus_base=True
        )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW of ``adapter`` at its present gate (W' - W0 with DoRA), in the layout of the base weight; float32 at least."""
        with torch.no_grad():
            if adapter not in self.duallora_m and quantized.storage(self.get_base_layer()) is not None:
                return self._delta(adapter, None)  # the weight may be one that cannot be read
            W = self._base_weight()
            return self._delta(adapter, self._matrix(W)).view(W.shape)

    @property
    def weight(self) -> Tensor:
        """The weight this layer computes with, for a parent that reads it: W0 + dW of the adapters that act, or W0.

        Of a base layer that is quantized, sharded or offloaded it is the stored one, without any dW.
        """
        return self._weight_to_read()

    def _weight_to_read(self) -> Tensor:
        base: Any = self.get_base_layer()
        W = base.qweight if hasattr(base, "qweight") else getattr(base, self.weight_name)  # PEFT's; GPTQ and its like
        adapters = self._acting()
        if not adapters or not is_ordinary(W):
            return W
        return read_weight(W, lambda: self._read(W, adapters))

    def _read(self, W: Tensor, adapters: list[str]) -> Tensor:
        """W0 + dW in the layout of the base weight, differentiable."""
        for adapter in adapters:
            if self._drops(adapter):
                raise ConfigError(
                    f"{self.module_name}: its parent reads this layer's weight instead of calling it, where "
                    f"duallora_dropout={self.duallora_config[adapter].duallora_dropout} cannot act: set it to 0, or name the "
                    "layer in exclude_modules."
                )
        if self.mixed_batch:
            raise ConfigError(
                f"{self.module_name}: its parent reads this layer's weight instead of calling it, so the rows of a batch "
                "cannot have adapters of their own: leave adapter_names out, or name the layer in exclude_modules."
            )
        if self.merged and any(adapter in self.duallora_m for adapter in adapters):
            # The lengths are those of W0, not of what is merged.
            W0 = self._matrix(self._base_weight())
            return add_update(W, *(self._delta(adapter, W0).view(W.shape) for adapter in adapters))
        return self._merged_weight(self._matrix(W), adapters).view(W.shape)

    # -- scale ---------------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply dW of ``adapter`` by ``scale`` instead of 1; not saved. Raises ConfigError while it is merged."""
        if adapter in self.scaling:
            self._scale(adapter, scale * dual_scaling(self.alpha[adapter], self.r1[adapter], self.r2[adapter]))

    def scale_layer(self, scale: float) -> None:
        """Multiply dW of the active adapters by ``scale``, on top of what they are multiplied by already."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self._scale(adapter, scale * float(self.scaling[adapter]))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo :meth:`scale_layer`: divide by ``scale``, or with None go back to the factor of 1."""
        for adapter in self.active_adapters:
            if adapter in self.scaling and scale is None:
                self.set_scale(adapter, 1.0)
            elif adapter in self.scaling:
                self._scale(adapter, float(self.scaling[adapter]) / scale)  # type: ignore[operator]

    def check_scale(self, adapter: str, scale: float) -> None:
        """Raise ConfigError unless dW of ``adapter`` can be multiplied by ``scale``."""
        if not is_number(scale):
            raise ConfigError(f"scale={scale!r} for adapter {adapter!r}: expected a finite number.")
        if adapter in self.merged_adapters:
            raise ConfigError(
                f"adapter {adapter!r} is merged, so a new scale would not act before it is merged again: call "
                "unmerge_adapter() first."
            )

    def _scale(self, adapter: str, scaling: float) -> None:
        self.check_scale(adapter, scaling)
        held = self.scaling[adapter]
        if isinstance(held, Tensor):
            held.fill_(scaling)
        else:
            self.scaling[adapter] = scaling

    # -- merging -------------------------------------------------------------------------------------------------

    def _merged_weight(self, W: Tensor, adapters: list[str], rows: Tensor | None = None) -> Tensor:
        """W0 + the sum of the adapters' updates: what the merged forward uses and what merging writes."""
        if len(adapters) == 1:
            return self._build(adapters[0], W, rows, W.dtype)
        base = W if rows is None else W[rows]
        return add_update(base, *(self._delta(adapter, W, rows) for adapter in adapters))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W0 + dW into the base layer. W0 itself is kept (from another device, a copy on the CPU): unmerge is exact.

        A quantized base rounds W0 + dW to its grid; a warning says how much of dW that costs.

        Args:
            safe_merge: refuse, leaving the base weight untouched, if anything is NaN or infinite.
            adapter_names: which adapters; None = the active ones.

        Raises:
            ValueError: safe_merge found a value that is not finite.
            ConfigError: the base weight is quantized in a way that only its own forward can read.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.duallora_A]
        if not names:
            return
        for adapter in names:
            message = closed_gate_message(int(self.duallora_step[adapter]), self.duallora_config[adapter].ramp_steps)
            if message:
                warnings.warn(f"Merging a Dual LoRA adapter whose gate is not open: {message}", stacklevel=2)
        self._merge(names, safe_merge)

    def _merge(self, names: list[str], safe_merge: bool = False) -> None:
        W = self._base_weight()
        merged = self._merged_weight(self._matrix(W), [*self.merged_adapters, *names]).view(W.shape)
        if safe_merge:
            for adapter in names:
                # Sign hides an infinite D C, so the factors are checked as well as the result.
                tensors = [merged, *(f for f in self._factors(adapter) if f is not None)]
                if not all(torch.isfinite(t).all() for t in tensors):
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        base: Any = self.get_base_layer()
        before, loss = self._base_weight_before_merge, None
        if quantized.storage(base) is not None:
            before = quantized.hold(base) if before is None and not self.unloading else before
            loss = quantized.write(base, merged, float(torch.linalg.vector_norm(merged - W)), self.requantize)
        else:
            held = getattr(base, self.weight_name)
            before = held.data.cpu() if before is None and not self.unloading else before
            if self.shares_weight and not self._tied_weight:  # the other layer keeps what both had
                self._tied_weight.append(held)
                held = nn.Parameter(torch.empty_like(held), requires_grad=held.requires_grad)
                setattr(base, self.weight_name, held)
            _put(held, merged)
        self._base_weight_before_merge = before
        self.merged_adapters = [*self.merged_adapters, *names]
        if loss is not None:
            quantized.report(self, loss)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit, whatever happened to the gate or the factors since."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.get_base_layer()
        before = self._base_weight_before_merge
        if before is None:
            raise ConfigError(
                "merge_and_unload() merged this layer for good: W0 was not kept. Load the base model again."
            )
        if isinstance(before, dict):
            quantized.put_back(base, before)
        elif self._tied_weight:
            own, tied = getattr(base, self.weight_name), self._tied_weight.pop()
            _put(tied, tied.data.to(own.device, own.dtype))  # in case the model was cast or moved while merged
            setattr(base, self.weight_name, tied)
        else:
            _put(getattr(base, self.weight_name), before)
        self._base_weight_before_merge = None
        self.merged_adapters = []

    def fold(self, shared: Container[int]) -> None:
        """Merge the active adapters where the forward computes with W0 + dW anyway."""
        names = self._acting()
        if self.merged or not names or not self._folds(names):
            return
        held = getattr(self.get_base_layer(), self.weight_name)
        if held.numel() == self.matrices * self.out_features * self.in_features:  # else a shard of it is here (FSDP)
            self.shares_weight = self.shares_weight or id(held) in shared
            self._merge(names)
            self._folded = True

    def _folds(self, adapters: list[str]) -> bool:
        """Whether the forward would use the very W0 + dW that merging writes."""
        return self._is_plain() and self._form(adapters) == "merged"

    def unfold(self) -> None:
        """Take out what :meth:`fold` merged."""
        if self._folded and self.merged:  # not if the adapter was switched off or deleted since
            self.unmerge()
        self._folded = False

    # -- the forward -------------------------------------------------------------------------------------------------

    @classmethod
    def computes(cls, base: nn.Module) -> bool:
        """Whether this layer can stand in for the forward of ``base``; a subclass may have one of its own."""
        return type(base).forward in cls.forwards

    def _is_resident(self) -> bool:
        """Whether the weight of the base layer is plain, and here."""
        base: Any = self._modules["base_layer"]
        return is_ordinary(base.weight) and "_hf_hook" not in vars(base)  # accelerate's offloading

    def _is_plain(self) -> bool:
        """Whether the base layer is one whose forward this layer can compute from a weight that is plain and resident."""
        base: Any = self._modules["base_layer"]
        return self.computes(base) and self._is_resident() and is_untouched(base)

    def _runs_base(self) -> bool:
        """Whether the base layer has a forward of its own to run on W0 + dW: Falcon's, or a router's of two outputs."""
        base = self.base_layer
        return isinstance(base, self.kinds) and not self.computes(base) and self._is_resident()

    def _run_base(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with W0 + dW."""
        W = self.base_layer.weight
        weight = self._merged_weight(self._matrix(W), adapters).view(W.shape)
        return torch.func.functional_call(self.base_layer, {"weight": weight}, args, kwargs)

    def _acting(self) -> list[str]:
        """The active adapters whose update the base weight does not hold yet."""
        if self._disable_adapters:
            return []
        merged, known = self.merged_adapters, self.duallora_config
        return [adapter for adapter in self.active_adapters if adapter in known and adapter not in merged]

    def _drops(self, adapter: str) -> bool:
        """Whether the update has an input of its own."""
        return self.training and isinstance(self.duallora_dropout[adapter], nn.Dropout)

    def _is_beside(self, adapter: str) -> bool:
        """Whether the update is added to the output: asked for, or DoRA's, whose lengths are not of what is merged."""
        return self.duallora_config[adapter].forward == "added" or (self.merged and adapter in self.duallora_m)

    def _all_in_weight(self, adapters: list[str]) -> bool:
        return not any(self._is_beside(adapter) or self._drops(adapter) for adapter in adapters)

    def _form(self, adapters: list[str]) -> str:
        """How to compute the output: "merged" or "added" on the base weight itself, or "apart" through the base layer.

        The first two need a base weight that is plain and resident, and no dropout.
        """
        plain = self._is_plain()
        if self.merged_adapters and any(self.duallora_config[adapter].use_dora for adapter in adapters):
            return "apart"  # DoRA's lengths are those of W0 + dW, not of what is merged
        form = "merged"
        for adapter in adapters:
            wanted = self.duallora_config[adapter].forward
            if wanted == "merged" and not (plain or self._runs_base()):
                base = self.base_layer
                raise ConfigError(
                    f"forward='merged' needs a plain resident weight, but the base layer is {type(base).__name__} "
                    f"with a {type(getattr(base, 'weight', None)).__name__}: set forward to 'auto' or 'added'."
                )
            if not plain or self._drops(adapter):
                return "apart"
            if wanted == "added":
                form = "added"
        return form

    def _add_by_row(self, x: Tensor, y: Tensor, adapter_names: list[str]) -> Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        y = y.clone()
        for adapter in set(adapter_names).intersection(self.duallora_A):
            rows = [i for i, name in enumerate(adapter_names) if name == adapter]
            if self._runs_base() and self._all_in_weight([adapter]):
                y[rows] = self._run_base([adapter], x[rows])
            else:
                y[rows] += self._added(x[rows], adapter).to(y.dtype)
        return y

    def _added(self, x: Tensor, adapter: str, y0: Tensor | None = None) -> Tensor:
        """What ``adapter`` adds to the output; y0 = base_layer(x) where it is known."""
        raise NotImplementedError

    def _through_base(self, x: Tensor, *args: Any, adapter_names: list[str] | None, **kwargs: Any) -> Any:
        """The output by way of the base layer's forward, wherever its weight is and whatever acts on it."""
        if self.merged and (self._disable_adapters or adapter_names is not None):
            self.unmerge()
        base, adapters = self.base_layer, self._acting()
        if adapter_names is not None:
            return self._add_by_row(x, base(x, *args, **kwargs), adapter_names)
        if adapters and self._runs_base() and self._all_in_weight(adapters):
            return self._run_base(adapters, x, *args, **kwargs)
        y = y0 = base(x, *args, **kwargs)
        if adapters and not isinstance(y, Tensor):
            raise ConfigError(
                f"{self.module_name} is a {type(base).__name__}, whose output is a {type(y).__name__}: Dual LoRA can "
                "only run it on W0 + dW, without dropout and forward='added'. Set these so, or name it in exclude_modules."
            )
        for adapter in adapters:
            y = y + self._added(x, adapter, y0)
        return y.to(y0.dtype) if adapters else y

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's conversion writes factors of linear layers only."""
        return False

    def __repr__(self) -> str:
        shown = "duallora." + super().__repr__()
        return re.sub(r"\n *\(duallora_\w+\): \w+\(\)(?=\n)", "", shown)  # groups that this adapter has not

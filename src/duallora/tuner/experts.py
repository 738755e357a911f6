"""Dual LoRA on fused experts: one dW for each expert of a mixture, whose weights a module holds in one 3-d parameter.

    W0 [experts, out, in], or [experts, in, out]    A [experts, r1, in]    B [experts, out, r1]    C and D alike

The module's own forward runs on W0 + dW, which is built per expert: of the experts a forward takes by themselves those alone
(transformers' ``experts_implementation="eager"``), all of them where it multiplies by the whole parameter ("grouped_mm").
A module with several such parameters has one layer around another, as PEFT's LoRA puts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from duallora.core.equation import Update, add_update
from duallora.core.init import layer_seed
from duallora.errors import ConfigError
from duallora.ops.autograd import How, weight
from duallora.ops.read import read_experts
from duallora.tuner.layer import DualLoraLayer, is_ordinary

# Stored [experts, in, out] or not, where the module does not say so itself in ``is_transposed``.
_TRANSPOSED = {
    "Llama4TextExperts": True, "GptOssExperts": True,  # the second: before transformers 5
    "GraniteMoeParallelExperts": False, "JetMoeParallelExperts": False,
}  # fmt: skip


def is_transposed(module: nn.Module) -> bool | None:
    """Whether ``module`` keeps its experts as [experts, in, out]; False: [experts, out, in]; None: nobody says."""
    return getattr(module, "is_transposed", _TRANSPOSED.get(type(module).__name__))


def fused(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, key) of each 3-d parameter of the base model's experts; ``name`` is that of the module there."""
    for name, module in model.named_modules():
        if isinstance(module, DualLoraLayer):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if len(getattr(parameter, "ds_shape", parameter.shape)) == 3 and is_transposed(module) is not None:
                yield name.replace(".base_layer", ""), module, key


def targets(model: nn.Module, wanted: list[str]) -> list[tuple[str, nn.Module, str]]:
    """Those of :func:`fused` that ``wanted`` names by their endings, such as ``"experts.down_proj"``.

    Raises:
        ConfigError: a name reaches nothing, or a parameter that cannot be adapted.
    """

    def names(full: str) -> set[str]:
        return {end for end in wanted if full == end or full.endswith(f".{end}")}

    known = list(fused(model))
    found = [(name, module, key) for name, module, key in known if names(f"{name}.{key}")]
    left = set(wanted) - {end for name, _, key in found for end in names(f"{name}.{key}")}
    for full, parameter in model.named_parameters():
        plain = full.replace(".base_layer", "")
        if left & names(plain):
            shape = list(getattr(parameter, "ds_shape", parameter.shape))
            raise ConfigError(
                f"target_parameters names {plain!r} {shape}, of unknown layout: expected the 3-d weight of experts whose "
                "module says is_transposed. Set it there (False: [experts, out, in], True: [experts, in, out]), or name a "
                "linear layer in target_modules."
            )
    if left:
        there = sorted({f"{name.rpartition('.')[2]}.{key}" for name, _, key in known})
        raise ConfigError(
            f"target_parameters={sorted(left)}: this model has no such parameter; expected endings of the names of fused "
            f"experts, here {', '.join(there) or 'there are none'}."
        )
    for name, module, key in found:
        if not is_ordinary(parameter := getattr(module, key)) and not parameter.is_meta:
            raise ConfigError(
                f"target_parameters: {name}.{key} is a {type(parameter).__name__} of {parameter.dtype}, expected a plain "
                "tensor of floats: load the base model unquantized and unsharded."
            )
    return found


class Experts(DualLoraLayer):
    """Dual LoRA on one 3-d parameter of a module of experts; no dropout, DoRA, fixed signs or rows of their own adapter.

    Each expert has its own stream of the seed, and its own gradient: the straight-through clip sees that of its W' alone.
    """

    kinds = ()
    forwards = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, weight_name: str, **kwargs: Any) -> None:
        self.weight_name = weight_name
        super().__init__(base_layer, adapter_name, **kwargs)

    def _sizes(self, base: Any) -> tuple[int, int]:
        W = getattr(base, self.weight_name)
        self.matrices, *sizes = getattr(W, "ds_shape", W.shape)
        self.fan_in_fan_out = bool(is_transposed(base))
        out, into = reversed(sizes) if self.fan_in_fan_out else sizes
        return out, into

    def _draw(self, adapter_name: str, seed: int) -> list[Tensor]:
        draws = [super(Experts, self)._draw(adapter_name, layer_seed(seed, str(e))) for e in range(self.matrices)]
        return [torch.stack(factors) for factors in zip(*draws, strict=True)]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's goes by base_layer.weight, which a module of experts need not have.
        W = getattr(self.get_base_layer(), self.weight_name)
        for name in self.adapter_layer_names[:4]:
            held = getattr(self, name)
            if not (factor := held[adapter_name]).is_meta:
                moved = factor.data.to(device or W.device, W.dtype if W.is_floating_point() else None)
                held[adapter_name] = nn.Parameter(moved, requires_grad=factor.requires_grad)
        for counters in (self.duallora_step, self.duallora_seed):
            if adapter_name in counters and not counters[adapter_name].is_meta:
                counters[adapter_name] = counters[adapter_name].to(device or W.device)

    def __getattr__(self, name: str) -> Any:
        """A parent that reads the parameter gets W0 + dW; the other parameters are the inner layer's."""
        if name == self.__dict__.get("weight_name"):
            return self._weight_to_read()
        inner = self.__dict__.get("_modules", {}).get("base_layer")
        if isinstance(inner, Experts) and name not in self._modules and name == inner.weight_name:
            return getattr(inner, name)
        return super().__getattr__(name)

    @property
    def weight(self) -> Tensor:
        """What the base layer calls so; raises AttributeError where it has none."""
        return self.__getattr__("weight")

    # -- the update ----------------------------------------------------------------------------------------------------

    def _parts(self, adapter: str) -> list[Update]:
        """The update of each expert; unbound at once, as a gradient of each by itself would be as large as all."""
        update = self._update(adapter)
        factors = zip(*(factor.unbind() for factor in update[:4]), strict=True)  # type: ignore[union-attr]
        initial = zip(*(factor.unbind() for factor in update.initial), strict=True)
        starts = list(initial) or [()] * self.matrices
        return [
            update._replace(A=A, B=B, C=C, D=D, initial=start)
            for (A, B, C, D), start in zip(factors, starts, strict=True)
        ]

    def _how(self, adapter: str, form: str) -> How:
        return How(form, self.fan_in_fan_out, self.duallora_config[adapter].backend)

    def _build(
        self, adapter: str, W: Tensor | None, rows: Tensor | None, dtype: torch.dtype, minus_base: bool = False
    ) -> Tensor:
        how = self._how(adapter, "delta" if minus_base else "merged")
        parts = self._parts(adapter)
        return torch.stack([weight(None if W is None else W[e], None, parts[e], how, dtype) for e in range(len(parts))])

    def _each(self, W: Tensor, adapters: list[str]) -> Callable[[int], Tensor]:
        """W0 + the sum of the adapters' updates, by expert."""
        parts = {adapter: self._parts(adapter) for adapter in adapters}
        if len(adapters) == 1:
            (adapter,) = adapters
            how = self._how(adapter, "merged")
            return lambda e: weight(W[e], None, parts[adapter][e], how, W.dtype)

        def total(e: int) -> Tensor:
            wide = {a: torch.promote_types(self.duallora_A[a].dtype, torch.float32) for a in adapters}
            return add_update(
                W[e], *(weight(None, None, parts[a][e], self._how(a, "delta"), wide[a]) for a in adapters)
            )

        return total

    def _merged_weight(self, W: Tensor, adapters: list[str], rows: Tensor | None = None) -> Tensor:
        each = self._each(W, adapters)
        return torch.stack([each(e) for e in range(self.matrices)])

    def singly(self) -> list[Expert]:
        """The experts, one by one."""
        return [Expert(self, e) for e in range(self.matrices)]

    # -- merging, and the forward --------------------------------------------------------------------------------------

    def _is_resident(self) -> bool:
        base = self.get_base_layer()
        return is_ordinary(getattr(base, self.weight_name)) and "_hf_hook" not in vars(base)

    def _folds(self, adapters: list[str]) -> bool:
        return self._is_resident()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT's, for layers around each other: the module of experts, with all of them merged."""
        layer: Any = self
        while isinstance(layer, Experts):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """What the module of experts computes with W0 + dW."""
        if adapter_names is not None:
            raise ConfigError(
                f"{self.module_name}: experts see tokens, not the rows of a batch, so these cannot have adapters of their "
                "own: leave adapter_names out and choose with set_adapter(), or train without target_parameters."
            )
        if self.merged and self._disable_adapters:
            self.unmerge()
        adapters = self._acting()
        if not adapters:
            return self.base_layer(*args, **kwargs)
        W = getattr(self.get_base_layer(), self.weight_name)
        if not self._is_resident():
            raise ConfigError(
                f"{self.module_name} is a {type(W).__name__} on {W.device}, expected a plain weight that is here: experts "
                "cannot be adapted while they are quantized, sharded or offloaded."
            )
        depth, inner = "", self.base_layer
        while isinstance(inner, Experts):
            depth, inner = f"{depth}base_layer.", inner.base_layer
        weights = {f"{depth}{self.weight_name}": read_experts(W, self._each(W, adapters))}
        return functional_call(self.base_layer, weights, args, kwargs)


class Expert:
    """One expert of a layer, with what :mod:`duallora.tuner.conversion` asks of a layer."""

    def __init__(self, layer: Experts, number: int) -> None:
        self.layer, self.number = layer, number
        # PEFT's LoRA takes what does not say that it is transposed (Llama 4) for [experts, out, in].
        self.fan_in_fan_out = bool(getattr(layer.get_base_layer(), "is_transposed", False))

    def get_base_layer(self) -> Any:
        return self.layer.get_base_layer()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW of this expert, as it is stored; float32 at least."""
        layer = self.layer
        part, A = layer._parts(adapter)[self.number], layer.duallora_A[adapter]
        with torch.no_grad():
            return weight(None, None, part, layer._how(adapter, "delta"), torch.promote_types(A.dtype, torch.float32))

    def __getattr__(self, name: str) -> Any:
        held = getattr(self.layer, name)
        return {a: f[self.number] for a, f in held.items()} if name.startswith("duallora_") else held

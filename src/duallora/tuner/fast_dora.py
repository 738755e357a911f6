"""PEFT's DoRA (arXiv 2402.09353), faster in place: ``fast_dora(peft_model)``.

PEFT keeps the adapters, their start, merging and saving; the forward of each layer goes to `duallora.ops.dora`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.pytorch_utils import Conv1D

from duallora.errors import ConfigError
from duallora.ops.dora import dora, dora_over, is_eager, row_norms, row_squares, wide
from duallora.tuner.layer import is_ordinary, is_untouched

_PROBE = 64  # elements of W0 that are compared to see a write that torch does not count


def fast_dora(peft_model: nn.Module) -> nn.Module:
    """Speed up every DoRA layer of a PEFT model in place; output, gradients and checkpoints stay PEFT's own.

    Layers of ``LoraConfig(use_dora=True)`` on ``nn.Linear`` and transformers' ``Conv1D`` are taken over, for every
    adapter they hold now or get later. Embeddings, convolutions and quantized layers stay with PEFT, and a warning
    counts them. Calling it again does no harm; it takes over DoRA layers added behind PEFT's back since, and forgets
    the kept row norms of W0.

    Args:
        peft_model: what ``get_peft_model`` or ``PeftModel.from_pretrained`` returned, or a transformers model with
            ``add_adapter``.

    Returns:
        The same object.

    Raises:
        ConfigError: it holds no LoRA adapter with ``use_dora=True``.
    """
    left: Counter[str] = Counter()
    taken = 0
    for module in peft_model.modules():
        if type(module) is lora.LoraModel:  # subclasses make modules of their own
            module._create_new_module = _create_new_module  # type: ignore[method-assign]  # layers of later adapters
        elif isinstance(module, lora.LoraLayer):
            mine = _take_over(module)
            has_dora = any(module.use_dora.values())
            taken += mine and has_dora
            left[type(module.get_base_layer()).__name__] += has_dora and not mine
    left = +left
    if not taken and not left:
        raise ConfigError(
            f"fast_dora found no DoRA layer in this {type(peft_model).__name__}; expected an adapter made with "
            "peft.LoraConfig(use_dora=True) that is not merged away. Call it after get_peft_model or from_pretrained."
        )
    if left:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(left.items()))
        warnings.warn(
            f"fast_dora left {sum(left.values())} of {taken + sum(left.values())} DoRA layers to PEFT's own code: "
            f"{kinds}. Only nn.Linear and Conv1D with plain floating-point weights are sped up.",
            stacklevel=2,
        )
    return peft_model


def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **options: Any) -> nn.Module:
    """PEFT's own, then taken over. A plain function: a model that carries it is copied and pickled as before."""
    module = lora.LoraModel._create_new_module(lora_config, adapter_name, target, **options)
    if isinstance(module, lora.LoraLayer):
        _take_over(module)
    return module


def _take_over(module: lora.LoraLayer) -> bool:
    """Whether the layer is one of ours; its DoRA variants are replaced, and those of later adapters will be."""
    weight = getattr(module.get_base_layer(), "weight", None)
    if type(module) is not lora.Linear or type(module.get_base_layer()) not in (nn.Linear, Conv1D):
        return False
    if weight is None or not weight.is_floating_point() or weight.element_size() < 2:  # 8-bit floats are quantized
        return False
    module.lora_variant = _Variants(module.lora_variant)
    return True


class _Variants(dict):
    """A layer's LoRA variants by adapter; PEFT's DoRA is replaced by ours as it comes in."""

    def __init__(self, variants: dict[str, Any]) -> None:
        super().__init__()
        for adapter, variant in variants.items():
            self[adapter] = variant

    def __setitem__(self, adapter: str, variant: Any) -> None:
        ours = type(variant) in (DoraLinearVariant, FastDoraVariant)
        super().__setitem__(adapter, FastDoraVariant() if ours else variant)


class FastDoraVariant(DoraLinearVariant):
    """PEFT's DoRA of one adapter in one layer with another forward; starting, merging and saving are inherited."""

    def __init__(self) -> None:
        self._squares: tuple[StorageWeakRef, tuple, Tensor | None, Tensor] | None = None

    def __reduce__(self) -> tuple[type[FastDoraVariant], tuple[()]]:
        return FastDoraVariant, ()  # a copied or unpickled layer computes its own

    def forward(  # type: ignore[override]  # PEFT's is static, called on the instance
        self, module: lora.Linear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The layer's output y [.., out] from x [.., in] (the dtype of the factors) and the base layer's result."""
        lora_A: Any = module.lora_A[active_adapter]
        lora_B: Any = module.lora_B[active_adapter]
        base: Any = module.get_base_layer()
        magnitude: Any = module.lora_magnitude_vector[active_adapter]
        if not (_is_plain(lora_A) and _is_plain(lora_B) and _is_resident(base, x)):
            # sharded, offloaded or hooked: their owner expects the modules to be called
            return DoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)
        A, B, m, bias, s = lora_A.weight, lora_B.weight, magnitude.weight, base.bias, module.scaling[active_adapter]
        Wt = base.weight if isinstance(base, Conv1D) else base.weight.T  # [in, out]
        # PEFT rounds the norm to the dtype of the factors. Where m started as that, c starts as exactly 1.
        norm = self._norm(module, active_adapter, Wt, A, B, s).to(x.dtype).to(wide(x.dtype))
        dropout = module.lora_dropout[active_adapter]
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            return dora(F.linear(x.to(Wt.dtype), Wt.T), x, A, B, m / norm, s, None, result)
        alone = sum(adapter in module.lora_A for adapter in module.active_adapters) == 1
        if alone and bias is None and _may_overwrite(base, x, result, A, B):
            return dora_over(result, x, A, B, m, norm, s, Wt)
        return dora(result, x, A, B, m / norm, s, bias)

    def _norm(self, module: lora.Linear, adapter: str, Wt: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        """|w_i + s b_i A| [out], float32 at least."""
        layer: Any = module.lora_magnitude_vector[adapter]
        name = f"fast-norm-{adapter}"
        # PEFT's own switch (DoraCaching, since 0.19) and store: forgotten when the layer goes to training.
        keep = getattr(peft_dora, "ENABLE_DORA_CACHING", False) and not layer.training
        if keep and (kept := layer._cache_get(name, None)) is not None:
            return kept
        with torch.no_grad(), torch.autocast(Wt.device.type, enabled=False):
            norm = row_norms(Wt, A, B, s, self._kept_squares(Wt, tuple(module.lora_A)))
        if keep:
            layer._cache_store(name, norm)
        return norm

    def _kept_squares(self, Wt: Tensor, adapters: tuple[str, ...]) -> Tensor:
        """|w_i|^2 [out] of W0^T [in, out], kept while that is the same memory, unwritten.

        The storage is known by a weak reference, since an address alone comes back after merge and unmerge or two
        ``.to()``. Writes through ``.data`` are not counted by torch: some of PEFT's ways to start another adapter do
        that, hence the adapters' names; on the CPU a spread sample of W0 is compared as well (elsewhere it would make
        the host wait).
        """
        if not is_eager() or Wt.is_inference():
            return row_squares(Wt)
        storage = Wt.untyped_storage()
        key = (Wt.data_ptr(), Wt._version, Wt.dtype, Wt.device, Wt.shape, Wt.stride(), adapters)
        probe = _sample(Wt) if Wt.is_cpu else None
        if self._squares is not None:
            known, old_key, old_probe, squares = self._squares
            same = known.cdata == storage._cdata and old_key == key
            if same and (probe is None or old_probe is None or torch.equal(probe, old_probe)):
                return squares
        squares = row_squares(Wt)
        self._squares = StorageWeakRef(storage), key, None if probe is None else probe.clone(), squares
        return squares


def _is_plain(linear: nn.Module) -> bool:
    """An ordinary linear layer that nobody wrapped, hooked or patched."""
    return type(linear) in (nn.Linear, Conv1D) and is_untouched(linear)


def _is_resident(base: Any, x: Tensor) -> bool:
    """W0 is an ordinary tensor beside x: not sharded, offloaded, quantized or a stand-in."""
    W = base.weight
    return is_ordinary(W) and W.ndim == 2 and W.numel() > 0 and W.device == x.device


def _may_overwrite(base: nn.Module, x: Tensor, result: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the base layer's result is ours alone and everything has one dtype with range enough for `dora_over`."""
    one_dtype = result.dtype == x.dtype == A.dtype == B.dtype and result.dtype != torch.float16
    return (
        one_dtype
        and is_eager()
        and _is_plain(base)
        and result.is_contiguous()
        and not torch.is_autocast_enabled(x.device.type)
    )


def _sample(Wt: Tensor) -> Tensor:
    """About `_PROBE` elements, a view where W0 has no gaps."""
    flat = Wt.T if Wt.T.is_contiguous() else Wt
    return flat.detach().reshape(-1)[:: max(1, Wt.numel() // _PROBE)] if flat.is_contiguous() else Wt.detach()[:1, :1]

"""PEFT's DoRA (arXiv 2402.09353), faster in place: ``fast_dora(peft_model)``.

    y = c (x W0^T + s x A^T B^T) + b,   c = m / norm,   norm_i = |w_i + s b_i A|
    norm_i^2 = |w_i|^2 + 2 s w_i . (b_i A) + s^2 |b_i A|^2 = |w_i|^2 + b_i . (2 s A w_i + s^2 (A A^T) b_i)

w_i is row i of W0 [out, in], b_i of B [out, r]; A [r, in], m and c [out]. The norm is a constant of the backward pass
(section 4.3). W0 A^T is [out, r] and A A^T is [r, r], so no [out, in] tensor is formed, neither forward nor backward.
docs/dora.md derives the gradients.
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

_BLOCK_ELEMENTS = 1 << 18  # of a 16-bit W0 widened at a time: 1 MB, within a core's cache
_PROBE = 64  # elements of W0 that are compared to see a write that torch does not count
_CANCELLED = 0.05  # norm^2 below this share of its terms has lost digits: 1e-7 / 0.05 is still under 1e-5
_TINY = 1e-20  # a magnitude below it counts as it, so that y keeps what the gradient of m needs


def fast_dora(peft_model: nn.Module) -> nn.Module:
    """Speed up every DoRA layer of a PEFT model in place; output, gradients and checkpoints stay PEFT's own.

    Layers of ``LoraConfig(use_dora=True)`` on ``nn.Linear`` and transformers' ``Conv1D`` are taken over, for every
    adapter they hold now or get later. Embeddings, convolutions and quantised layers stay with PEFT, and a warning
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
        if isinstance(module, lora.LoraModel):
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
    if weight is None or not weight.is_floating_point() or weight.element_size() < 2:  # 8-bit floats are quantised
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

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copied or unpickled layer computes its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._squares = None

    def forward(  # type: ignore[override]  # PEFT's is static, called on the instance
        self, module: lora.Linear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The layer's output y [.., out] from x [.., in] (the dtype of the factors) and the base layer's result."""
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        base, magnitude = module.get_base_layer(), module.lora_magnitude_vector[active_adapter]
        if not (_is_plain(lora_A) and _is_plain(lora_B) and _is_resident(base, x)):
            # sharded, offloaded or hooked: their owner expects the modules to be called
            return DoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)
        A, B, m, bias, s = lora_A.weight, lora_B.weight, magnitude.weight, base.bias, module.scaling[active_adapter]
        Wt = base.weight if isinstance(base, Conv1D) else base.weight.T  # [in, out]
        # PEFT rounds the norm to the dtype of the factors. Where m started as that, c starts as exactly 1.
        norm = self._norm(module, active_adapter, Wt, A, B, s).to(x.dtype).to(_wide(x.dtype))
        dropout = module.lora_dropout[active_adapter]
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            return _dora(F.linear(x.to(Wt.dtype), Wt.T), x, A, B, m / norm, s, None, result)
        alone = sum(adapter in module.lora_A for adapter in module.active_adapters) == 1
        if alone and bias is None and _may_overwrite(base, x, result, A, B):
            return _Scale.apply(_AddLowRank.apply(result, x, A, B, m, norm, Wt, s), m, norm)
        return _dora(result, x, A, B, m / norm, s, bias)

    def _norm(self, module: lora.Linear, adapter: str, Wt: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        """|w_i + s b_i A| [out], float32 at least."""
        layer, name = module.lora_magnitude_vector[adapter], f"fast-norm-{adapter}"
        # PEFT's own switch (DoraCaching, since 0.19) and store: forgotten when the layer goes to training.
        keep = getattr(peft_dora, "ENABLE_DORA_CACHING", False) and not layer.training
        if keep and (kept := layer._cache_get(name)) is not None:
            return kept
        with torch.no_grad(), torch.autocast(Wt.device.type, enabled=False):
            norm = _row_norms(Wt, A, B, s, self._row_squares(Wt, tuple(module.lora_A)))
        if keep:
            layer._cache_store(name, norm)
        return norm

    def _row_squares(self, Wt: Tensor, adapters: tuple[str, ...]) -> Tensor:
        """|w_i|^2 [out] of W0^T [in, out], kept while that is the same memory, unwritten.

        The storage is known by a weak reference, since an address alone comes back after merge and unmerge or two
        ``.to()``. Writes through ``.data`` are not counted by torch: some of PEFT's ways to start another adapter do
        that, hence the adapters' names; on the CPU a spread sample of W0 is compared as well (elsewhere it would make
        the host wait).
        """
        if not _is_eager() or Wt.is_inference():
            return _squares(Wt)
        storage = Wt.untyped_storage()
        key = (Wt.data_ptr(), Wt._version, Wt.dtype, Wt.device, Wt.shape, Wt.stride(), adapters)
        probe = _sample(Wt) if Wt.is_cpu else None
        if self._squares is not None:
            known, old_key, old_probe, squares = self._squares
            same = known.cdata == storage._cdata and old_key == key
            if same and (probe is None or torch.equal(probe, old_probe)):
                return squares
        squares = _squares(Wt)
        self._squares = StorageWeakRef(storage), key, None if probe is None else probe.clone(), squares
        return squares


def _is_plain(linear: nn.Module) -> bool:
    """An ordinary linear layer that nobody wrapped, hooked or patched."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear) in (nn.Linear, Conv1D) and not hooked and "forward" not in vars(linear)


def _is_resident(base: nn.Module, x: Tensor) -> bool:
    """W0 is an ordinary tensor beside x: not sharded, offloaded, quantised or a stand-in."""
    W = base.weight
    plain = type(W) in (Tensor, nn.Parameter) and W.ndim == 2 and W.numel() > 0
    return plain and W.device == x.device and not W.is_meta


def _is_eager() -> bool:
    """No compiler or function transform is looking on: memory has an address, and may be overwritten."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def _may_overwrite(base: nn.Module, x: Tensor, result: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the base layer's result is ours alone and everything has one dtype, wide enough in range for _TINY."""
    one_dtype = result.dtype == x.dtype == A.dtype == B.dtype and result.dtype != torch.float16
    return (
        one_dtype
        and _is_eager()
        and _is_plain(base)
        and result.is_contiguous()
        and not torch.is_autocast_enabled(x.device.type)
    )


def _sample(Wt: Tensor) -> Tensor:
    """About `_PROBE` elements, a view where W0 has no gaps."""
    flat = Wt.T if Wt.T.is_contiguous() else Wt
    return flat.detach().reshape(-1)[:: max(1, Wt.numel() // _PROBE)] if flat.is_contiguous() else Wt.detach()[:1, :1]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _columns(Wt: Tensor) -> int:
    """How many columns of W0^T [in, out] are widened at a time. A GPU wants few launches, a compiler a small graph."""
    if not _is_eager():
        return Wt.shape[1]
    return max(1, (_BLOCK_ELEMENTS if Wt.is_cpu else 64 * _BLOCK_ELEMENTS) // Wt.shape[0])


def _squares(Wt: Tensor) -> Tensor:
    """|w_i|^2 [out] in float32 at least. Summed in float64: done once, and long float32 sums lose a digit."""
    if not _is_eager() or Wt.device.type == "mps":  # which has no float64
        return torch.linalg.vector_norm(Wt, dim=0, dtype=_wide(Wt.dtype)).square()
    parts = [torch.linalg.vector_norm(some, dim=0, dtype=torch.float64) for some in Wt.split(_columns(Wt), dim=1)]
    return torch.cat(parts).square().to(_wide(Wt.dtype))


def _row_norms(Wt: Tensor, A: Tensor, B: Tensor, s: float, squares: Tensor) -> Tensor:
    """|w_i + s b_i A| [out] from W0^T [in, out], A [r, in], B [out, r] and |w_i|^2 [out]."""
    wide = torch.promote_types(squares.dtype, A.dtype)
    A, B = A.to(wide), B.to(wide)
    if Wt.dtype == A.dtype:
        AWt = A @ Wt  # [r, out]
    else:
        AWt = torch.cat([A @ some.to(A.dtype) for some in Wt.split(_columns(Wt), dim=1)], dim=1)
    AAt = A @ A.T
    cross = torch.addmm(AWt.T, B, AAt, beta=2 * s, alpha=s * s)
    squared = squares + (cross * B).sum(1)
    # What the terms amount to without their signs; where they cancel, only digits above epsilon times it are left.
    terms = squares + B.square().sum(1) * (s * s * torch.linalg.matrix_norm(AAt))
    if _is_eager() and squared.is_cpu:  # elsewhere looking would make the host wait
        rows = (squared < _CANCELLED * terms).nonzero().view(-1)
        for some in rows.split(_columns(Wt)) if len(rows) else ():
            delta = torch.mm(A.T, B[some].T)
            squared[some] = torch.linalg.vector_norm(Wt[:, some].to(A.dtype).add_(delta, alpha=s), dim=0).square()
    else:
        squared = torch.maximum(squared, terms * torch.finfo(terms.dtype).eps)
    return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()


def _dora(
    y0: Tensor, x: Tensor, A: Tensor, B: Tensor, c: Tensor, s: float, bias: Tensor | None, result: Tensor | None = None
) -> Tensor:
    """y = c (y0 - b + s x A^T B^T) + b by torch operators; with ``result``, result + that - y0 (under dropout).

    c enters the low-rank product through B, so that autograd keeps y0 and nothing else of size [.., out].
    """
    u = F.linear(x, A)
    scaled = ((s * c).unsqueeze(1) * B).to(u.dtype)  # [out, r]
    shift = None if bias is None else ((1 - c) * bias).to(u.dtype)
    low_rank = F.linear(u, scaled, shift)
    return torch.addcmul(low_rank, y0, c) if result is None else torch.addcmul(result + low_rank, y0, c - 1)


class _AddLowRank(torch.autograd.Function):
    """z = y0 + s (x A^T) B^T, written over y0 [.., out]. First half of y = c z, see `_Scale`."""

    @staticmethod
    def forward(
        ctx: Any, y0: Tensor, x: Tensor, A: Tensor, B: Tensor, m: Tensor, norm: Tensor, Wt: Tensor, s: float
    ) -> Tensor:
        u = x.reshape(-1, x.shape[-1]) @ A.T
        z = y0.detach()
        z.view(-1, z.shape[-1]).addmm_(u, B.T, alpha=s)
        ctx.save_for_backward(x, u, A, B, m, norm, Wt)
        ctx.s, ctx.y_is_lost = s, False
        return z

    @staticmethod
    def backward(ctx: Any, dZ: Tensor) -> tuple[Tensor | None, ...]:
        x, u, A, B, m, norm, Wt = ctx.saved_tensors
        s, x2, dm = ctx.s, x.reshape(-1, x.shape[-1]), None
        if torch.is_grad_enabled():  # differentiated twice
            u = x2 @ A.T
        if ctx.y_is_lost:  # then this is dL/dy, and z is computed once more
            dY = dZ.reshape(-1, dZ.shape[-1])
            z = torch.addmm(x2 @ Wt, u, B.T, alpha=s)
            dm = (dY * z).sum(0, dtype=norm.dtype) / norm
            dZ = (dZ * (m / norm)).to(dZ.dtype)
        dZ2 = dZ.reshape(-1, dZ.shape[-1])
        du = (dZ2 @ B) * s if any(ctx.needs_input_grad[1:3]) else None
        dx = (du @ A).view(x.shape) if ctx.needs_input_grad[1] else None
        dA = du.T @ x2 if ctx.needs_input_grad[2] else None
        dB = (u.T @ dZ2).T * s if ctx.needs_input_grad[3] else None
        return dZ, dx, dA, dB, dm, None, None, None


class _Scale(torch.autograd.Function):
    """y = c z with c = m / norm, written over z [.., out]. Second half of y = c z.

    dm = sum_tokens dY z / norm = sum_tokens dY y / m, so y itself is kept, which most often its next user keeps too.
    If the model then writes over y (an in-place activation, say), `_AddLowRank` computes dm from x instead.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, m: Tensor, norm: Tensor) -> Tensor:
        y = z.detach()
        y.mul_(_off_zero(m) / norm)
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, m, norm)
        ctx.version = None if y.is_inference() else y._version
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        try:
            y, m, norm = ctx.saved_tensors
            lost = y is not None and y._version > ctx.version  # how it shows where checkpointing hands y back
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            lost = True
        if lost:
            ctx.next_functions[0][0].y_is_lost = True
            return dY, None, None
        m = _off_zero(m)
        if y is None:
            return (dY * (m / norm)).to(dY.dtype), None, None
        product = dY * y
        dm = product.reshape(-1, product.shape[-1]).sum(0, dtype=norm.dtype) / m
        if torch.is_grad_enabled():  # differentiated twice
            return (dY * (m / norm)).to(dY.dtype), dm, None
        return torch.mul(dY, m / norm, out=product), dm, None


def _off_zero(m: Tensor) -> Tensor:
    return torch.where(m.abs() < _TINY, _TINY, m)

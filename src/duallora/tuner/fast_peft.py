"""PEFT's Hadamard methods, faster in place: ``fast_peft(peft_model)``.

    LoHa (arXiv 2108.06098)    dW = s (w1_a w1_b) . (w2_a w2_b)       two identity groups of :class:`Update`
    HiRA (ICLR 2025)           dW = W0 . (B A)                        one, and W0 where fixed signs stand

so that the product of :mod:`duallora.ops` computes them: W' is built once, and nothing of size [out, in] is kept for the
backward, where PEFT keeps several. DoRA goes to :mod:`duallora.tuner.fast_dora`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import peft
import torch
from peft.tuners import loha, lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from duallora.core.equation import Update
from duallora.errors import ConfigError
from duallora.ops.autograd import How, product
from duallora.tuner.fast_dora import fast_dora
from duallora.tuner.layer import is_ordinary, is_untouched


class _Fast:
    """A layer of PEFT with another forward where one adapter acts on a plain weight; else PEFT's own."""

    factors: str  # the attribute that holds one of each adapter

    def _update_of(self, adapter: str, W: Tensor) -> Update | None:
        """dW of the adapter on W [out, in]; None where the method does more than that, dropout say."""
        raise NotImplementedError

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output y [.., out] from x [.., in]."""
        if not (args or kwargs or self.disable_adapters or self.merged) and (found := _plain(self, x)) is not None:
            adapter, base = found
            turned = isinstance(base, Conv1D)
            update = self._update_of(adapter, base.weight.T if turned else base.weight)
            if update is not None:
                # Rounded to the grid of a 16-bit W0, dW would not be PEFT's any more.
                form = "merged" if base.weight.dtype == update.A.dtype else "added"
                return product(x, base.weight, base.bias, None, update, How(form, turned))
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


def _plain(layer: Any, x: Tensor) -> tuple[str, Any] | None:
    """(adapter, base layer) where one adapter acts on a resident weight, frozen, of the dtype of x, that nobody hooked."""
    base: Any = layer.base_layer
    acting = [adapter for adapter in layer.active_adapters if adapter in getattr(layer, layer.factors)]
    fits = (
        len(acting) == 1
        and type(base) in (nn.Linear, Conv1D)
        and is_untouched(base)
        and is_ordinary(base.weight)
        and not base.weight.requires_grad
        and (base.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type))
        and base.weight.device == x.device
    )
    return (acting[0], base) if fits else None


class FastLoha(_Fast, loha.layer.Linear):
    factors = "hada_w1_a"

    def _update_of(self, adapter: str, W: Tensor) -> Update | None:
        if self.training and (self.rank_dropout[adapter] or self.module_dropout[adapter]):
            return None
        A, B, C, D = (held[adapter] for held in (self.hada_w1_b, self.hada_w1_a, self.hada_w2_b, self.hada_w2_a))
        return Update(A, B, C, D, self.scaling[adapter], "identity", "identity")


_FAST: dict[type, type] = {loha.layer.Linear: FastLoha}
_LAYERS: tuple[type, ...] = (loha.layer.LoHaLayer,)

if hasattr(peft, "HiraConfig"):  # PEFT 0.20 and later
    from peft.tuners import hira

    class FastHira(_Fast, hira.layer.Linear):
        factors = "hira_A"

        def _update_of(self, adapter: str, W: Tensor) -> Update | None:
            if self.training and not isinstance(self.hira_dropout[adapter], nn.Identity):
                return None
            return Update(
                self.hira_A[adapter], self.hira_B[adapter], None, None, 1.0, "identity", "fixed", fixed_sign=W
            )

    _FAST[hira.layer.Linear] = FastHira
    _LAYERS = (*_LAYERS, hira.layer.HiraLayer)


def fast_peft(peft_model: nn.Module) -> nn.Module:
    """Speed up the LoHa, HiRA and DoRA layers of a PEFT model in place; outputs, gradients and checkpoints stay PEFT's.

    Linear layers with a plain frozen weight are taken over, for every adapter they hold now or get later. What acts
    otherwise (dropout, several adapters at once, a quantized or hooked base layer) goes PEFT's own way, call by call.
    Calling it again takes over the layers that were added since.

    Args:
        peft_model: what ``get_peft_model`` or ``PeftModel.from_pretrained`` returned.

    Returns:
        The same object.

    Raises:
        ConfigError: it holds no layer of these methods.
    """
    left: Counter[str] = Counter()
    taken = dora = 0
    for module in peft_model.modules():
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]
        if type(module) in _FAST.values():
            taken += 1
        elif isinstance(module, _LAYERS):
            left[type(module).__name__] += 1
        dora += isinstance(module, lora.LoraLayer) and any(module.use_dora.values())
    if dora:
        fast_dora(peft_model)
    if not taken and not dora:
        raise ConfigError(
            f"fast_peft found no linear layer of LoHa, HiRA or DoRA in this {type(peft_model).__name__}; expected an adapter "
            "made with one of their configs that is not merged away. Call it after get_peft_model or from_pretrained."
        )
    if left:
        warnings.warn(
            f"fast_peft left {sum(left.values())} layers to PEFT's own code: "
            f"{', '.join(f'{count} x {kind}' for kind, count in sorted(left.items()))}. Linear layers alone are sped up.",
            stacklevel=2,
        )
    return peft_model

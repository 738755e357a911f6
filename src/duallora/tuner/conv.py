"""Dual LoRA on convolutions: the base layer's own convolution with W0 + dW.

    W0 [out, in/groups, *kernel], seen as [out, in/groups * prod(kernel)]: A and C [r, in/groups * prod(kernel)]

Groups, stride, dilation and padding are the base layer's; DoRA's lengths m [out] are those of the flattened kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from duallora.errors import ConfigError
from duallora.tuner.layer import DualLoraLayer

TORCH = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def convolves_as_torch(base: nn.Module) -> bool:
    """Whether ``base`` is torch's convolution or a subclass that leaves the forward alone."""
    return any(isinstance(base, c) and type(base).forward is c.forward for c in TORCH)


class Conv(DualLoraLayer, nn.Module):
    """Dual LoRA on ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``; ``gradient_tokens`` does not apply, it is exact.

    A subclass with a forward of its own runs it on W0 + dW, which needs a plain resident weight and no dropout.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        DualLoraLayer.__init__(self, base_layer)
        base = self.get_base_layer()
        self.kernel_shape = (base.out_channels, base.in_channels // base.groups, *base.kernel_size)
        self.out_features, self.in_features = base.out_channels, math.prod(self.kernel_shape[1:])
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **kwargs)

    def _computes(self, base: nn.Module) -> bool:
        return isinstance(base, TORCH)

    def _matrix(self, W: Tensor) -> Tensor:
        return W.flatten(1)

    def _convolve(self, x: Tensor, adapters: list[str]) -> Tensor:
        """The base layer's forward with W0 + dW."""
        base = self.base_layer
        weight = self._merged_weight(self._matrix(base.weight), adapters).view(self.kernel_shape)
        if convolves_as_torch(base):
            return base._conv_forward(x, weight, base.bias)
        return torch.func.functional_call(base, {"weight": weight}, (x,))

    def _added(self, x: Tensor, adapter: str) -> Tensor:
        """dropout(x) convolved with dW, in the dtype of x."""
        base = self.get_base_layer()
        if not convolves_as_torch(base):
            raise ConfigError(
                f"{type(base).__name__} has a forward of its own, which Dual LoRA can only run on W0 + dW: without "
                "dropout, forward='added', quantization or offloading. Name it in exclude_modules, or drop these."
            )
        W = self._matrix(self._base_weight()) if self.duallora_config[adapter].use_dora else None
        dW = self._delta(adapter, W).view(self.kernel_shape).to(x.dtype)
        return base._conv_forward(self.duallora_dropout[adapter](x), dW, None)

    def _with_update(self, x: Tensor, y: Tensor, adapter: str) -> Tensor:
        if self._is_plain() and not convolves_as_torch(self.base_layer):
            return self._convolve(x, [adapter])
        return super()._with_update(x, y, adapter)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """y [batch, out, ...] for x [batch, in, ...]; ``adapter_names`` gives each row an adapter of its own."""
        if self.disable_adapters or adapter_names is not None:
            if self.merged:
                self.unmerge()
            y = self.base_layer(x, *args, **kwargs)
            return y if adapter_names is None else self._add_by_row(x, y, adapter_names)
        adapters = self._acting()
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        if not (args or kwargs) and self._form(adapters) == "merged":
            return self._convolve(x, adapters)
        y = self.base_layer(x, *args, **kwargs)
        return (y + sum(self._added(x, adapter) for adapter in adapters)).to(y.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's conversion writes factors of linear layers only."""
        return False

"""Dual LoRA on convolutions: the base layer's own convolution with W0 + dW.

    W0 [out, in/groups, *kernel], seen as [out, in/groups * prod(kernel)]: A and C [r, in/groups * prod(kernel)]

Groups, stride, dilation and padding are the base layer's; DoRA's lengths m [out] are those of the flattened kernels.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from duallora.errors import ConfigError
from duallora.tuner.layer import DualLoraLayer

TORCH = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Conv(DualLoraLayer):
    """Dual LoRA on ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``; ``gradient_tokens`` does not apply, it is exact.

    A subclass with a forward of its own runs it on W0 + dW, which needs a plain resident weight and no dropout.
    """

    kinds = TORCH
    forwards = tuple(kind.forward for kind in kinds)

    def _sizes(self, base: Any) -> tuple[int, int]:
        self.kernel_shape = (base.out_channels, base.in_channels // base.groups, *base.kernel_size)
        return base.out_channels, math.prod(self.kernel_shape[1:])

    def _matrix(self, W: Tensor) -> Tensor:
        return W.flatten(1)

    def _added(self, x: Tensor, adapter: str, y0: Tensor | None = None) -> Tensor:
        """dropout(x) convolved with dW, in the dtype of x."""
        base: Any = self.get_base_layer()
        if not self.computes(base):
            raise ConfigError(
                f"{type(base).__name__} has a forward of its own, which Dual LoRA can only run on W0 + dW: without "
                "dropout, forward='added', quantization or offloading. Name it in exclude_modules, or drop these."
            )
        W = self._matrix(self._base_weight()) if self.duallora_config[adapter].use_dora else None
        dW = self._delta(adapter, W).view(self.kernel_shape).to(x.dtype)
        return base._conv_forward(self.duallora_dropout[adapter](x), dW, None)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """y [batch, out, ...] for x [batch, in, ...]; ``adapter_names`` gives each row an adapter of its own."""
        adapters = self._acting()
        if adapters and adapter_names is None and not (args or kwargs) and self._form(adapters) == "merged":
            base = self.base_layer
            weight = self._merged_weight(self._matrix(base.weight), adapters).view(self.kernel_shape)
            return base._conv_forward(x, weight, base.bias)
        return self._through_base(x, *args, adapter_names=adapter_names, **kwargs)

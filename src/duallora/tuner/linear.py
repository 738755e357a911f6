"""Dual LoRA on linear layers: W0 plus one update dW per active adapter, in one of three forms.

merged form   y = x (W0 + dW)^T + b           one product; the bits of the merged model
added form    y = x W0^T + b + x dW^T         dW is not rounded to the grid of W0
apart         y = base_layer(x) + dropout(x) dW^T     any base layer
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from duallora.ops.autograd import How, product
from duallora.ops.reference import apply_weight
from duallora.tuner import quantized
from duallora.tuner.layer import DualLoraLayer


class Linear(DualLoraLayer):
    """Dual LoRA on ``nn.Linear`` (weight [out, in]) and transformers' ``Conv1D`` (weight [in, out])."""

    kinds = (nn.Linear, Conv1D)
    forwards = tuple(kind.forward for kind in kinds)

    def _sizes(self, base: Any) -> tuple[int, int]:
        if isinstance(base, Conv1D):
            return tuple(reversed(getattr(base.weight, "ds_shape", base.weight.shape)))
        found = quantized.sizes(base)
        assert found is not None  # or the model would not have made this layer
        return found

    def _how(self, adapter: str, form: str, fan_in_fan_out: bool) -> How:
        config = self.duallora_config[adapter]
        return How(form, fan_in_fan_out, config.backend, config.gradient_tokens if self.training else 1.0)

    def _added(self, x: Tensor, adapter: str, y0: Tensor | None = None) -> Tensor:
        """dropout(x) dW^T (with DoRA dropout(x) (W' - W0)^T), in the dtype of x; y0 = base_layer(x) where it is known."""
        x = self.duallora_dropout[adapter](x)
        use_dora = self.duallora_config[adapter].use_dora
        if use_dora and not self.merged and quantized.storage(self.base_layer) is not None:
            if y0 is None or self._drops(adapter):
                y0 = self.base_layer(x)
            return self._added_to_quantized(x, adapter, y0)
        update = self._update(adapter)
        if not use_dora:
            return product(x, None, None, None, update, self._how(adapter, "delta", False))
        how = self._how(adapter, "delta", self.fan_in_fan_out)
        return product(x, self._base_weight(), None, self.duallora_m[adapter], update, how)

    def _added_to_quantized(self, x: Tensor, adapter: str, y0: Tensor) -> Tensor:
        """x (W' - W0)^T of DoRA from y0 = x W0^T + b: with c = m / |W0 + dW|, W' - W0 = (c - 1) W0 + c dW.

        So W0 is dequantized for its norms alone and nothing of it is kept for the backward.
        """
        update = self._update(adapter)
        c = self.duallora_m[adapter] / self._lengths(self._base_weight(), update)
        delta = product(x, None, None, None, update, self._how(adapter, "delta", False))
        bias = self.base_layer.bias
        y = y0 if bias is None else y0 - bias
        return ((c - 1) * y + c * delta).to(x.dtype)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """y [..., out] for x [..., in]; ``adapter_names`` gives each row of the batch an adapter of its own."""
        adapters = self._acting()
        if adapters and adapter_names is None and not (args or kwargs) and (form := self._form(adapters)) != "apart":
            base: Any = self._modules["base_layer"]
            if len(adapters) == 1:
                (adapter,) = adapters
                m = self.duallora_m[adapter] if self.duallora_config[adapter].use_dora else None
                how = self._how(adapter, form, self.fan_in_fan_out)
                return product(x, base.weight, base.bias, m, self._update(adapter), how)
            if form == "merged":
                return apply_weight(x, self._merged_weight(base.weight, adapters), base.bias, self.fan_in_fan_out)
        return self._through_base(x, *args, adapter_names=adapter_names, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """dW is additive, so PEFT can approximate it by a LoRA; it is of full rank, so only approximately."""
        return True

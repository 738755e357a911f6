"""Dual LoRA on linear layers: W0 plus one update dW per active adapter, in one of three forms.

merged form   y = x (W0 + dW)^T + b           one product; the bits of the merged model
added form    y = x W0^T + b + x dW^T         dW is not rounded to the grid of W0
apart         y = base_layer(x) + dropout(x) dW^T     any base layer
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from duallora.errors import ConfigError
from duallora.ops.autograd import How, product
from duallora.ops.backends import pick
from duallora.ops.reference import apply_weight
from duallora.tuner import quantized
from duallora.tuner.layer import DualLoraLayer


class Linear(DualLoraLayer, nn.Module):
    """Dual LoRA on ``nn.Linear`` (weight [out, in]) and transformers' ``Conv1D`` (weight [in, out])."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        DualLoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **kwargs)

    def _computes(self, base: nn.Module) -> bool:
        return type(base).forward in (nn.Linear.forward, Conv1D.forward)

    def _runs_base(self) -> bool:
        """Falcon's linear layer, or a router that gives two tensors: a subclass with a forward of its own."""
        return isinstance(self.base_layer, nn.Linear) and not self._computes(self.base_layer) and self._is_resident()

    def _run_base(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with W0 + dW."""
        weight = self._merged_weight(self.base_layer.weight, adapters)
        return torch.func.functional_call(self.base_layer, {"weight": weight}, args, kwargs)

    def _all_in_weight(self, adapters: list[str]) -> bool:
        """Whether these adapters are W0 + dW, and have no input of their own."""
        return not any(
            self.duallora_config[a].forward == "added"
            or (self.merged and a in self.duallora_m)
            or (self.training and isinstance(self.duallora_dropout[a], nn.Dropout))
            for a in adapters
        )

    def _with_update(self, x: Tensor, y: Tensor, adapter: str) -> Tensor:
        if self._runs_base() and self._all_in_weight([adapter]):
            return self._run_base([adapter], x)
        return super()._with_update(x, y, adapter)

    def _how(self, adapter: str, form: str, fan_in_fan_out: bool) -> How:
        config = self.duallora_config[adapter]
        if config.gradient_tokens == 1 or not self.training:
            return How(form, fan_in_fan_out, config.backend)
        # Drawn under no_grad too: checkpointing repeats the forward from the same state of the generator.
        seed = torch.randint(1 << 62, (), dtype=torch.int64, device="cpu")
        return How(form, fan_in_fan_out, config.backend, seed, torch.tensor(config.gradient_tokens, device="cpu"))

    def _added(self, x: Tensor, adapter: str, y0: Tensor | None = None) -> Tensor:
        """dropout(x) dW^T (with DoRA dropout(x) (W' - W0)^T), in the dtype of x; y0 = base_layer(x) where it is known."""
        dropout = self.duallora_dropout[adapter]
        x = dropout(x)
        use_dora = self.duallora_config[adapter].use_dora
        if use_dora and not self.merged and quantized.storage(self.base_layer) is not None:
            if y0 is None or (self.training and isinstance(dropout, nn.Dropout)):
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
        with torch.no_grad():
            W = self._base_weight()
            ones = torch.ones(self.out_features, device=W.device)
            norm = pick("auto", update, W.dtype).build_weight(W, update, fan_in_fan_out=False, dtype=W.dtype, m=ones)[1]
            del W
        c = self.duallora_m[adapter] / norm
        delta = product(x, None, None, None, update, self._how(adapter, "delta", False))
        bias = self.base_layer.bias
        y = y0 if bias is None else y0 - bias
        return ((c - 1) * y + c * delta).to(x.dtype)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """y [..., out] for x [..., in]; ``adapter_names`` gives each row of the batch an adapter of its own."""
        if self.disable_adapters or adapter_names is not None:
            if self.merged:
                self.unmerge()
            y = self.base_layer(x, *args, **kwargs)
            return y if adapter_names is None else self._add_by_row(x, y, adapter_names)
        adapters = self._acting()
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        form = "apart" if args or kwargs else self._form(adapters)
        if form != "apart":
            base = self.base_layer
            if len(adapters) == 1:
                (adapter,) = adapters
                m = self.duallora_m[adapter] if self.duallora_config[adapter].use_dora else None
                how = self._how(adapter, form, self.fan_in_fan_out)
                return product(x, base.weight, base.bias, m, self._update(adapter), how)
            if form == "merged":
                return apply_weight(x, self._merged_weight(base.weight, adapters), base.bias, self.fan_in_fan_out)
        elif self._runs_base() and self._all_in_weight(adapters):
            return self._run_base(adapters, x, *args, **kwargs)
        y = y0 = self.base_layer(x, *args, **kwargs)
        if not isinstance(y, Tensor):
            raise ConfigError(
                f"{self.module_name} is a {type(self.base_layer).__name__}, whose output is a {type(y).__name__}: Dual LoRA can "
                "only run it on W0 + dW, without dropout and forward='added'. Set these so, or name it in exclude_modules."
            )
        for adapter in adapters:
            y = y + self._added(x, adapter, y0)
        return y.to(y0.dtype)

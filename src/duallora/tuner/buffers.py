"""The tensors of an adapter that are counted and drawn, not trained: they survive casts and copies that average them."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from duallora.core.gate import uncast


class Counters(BufferDict):
    """The gate's counters: float32 whatever the model is cast to, and what version 0.1 saved as int64 too."""

    def _apply(self, *args: Any, **kwargs: Any) -> Counters:
        before = dict(self._buffers)
        super()._apply(*args, **kwargs)
        self.uncast(before)
        return self

    def uncast(self, before: dict[str, Tensor | None]) -> None:
        """Counters of another type become float32, from what they were ``before``."""
        for name, after in self._buffers.items():
            if after is not None:
                self._buffers[name] = uncast(before.get(name), after)


_ROUNDED = 0.01  # at most this far, as a fraction, is an average of equal seeds from them (bfloat16: 0.004)


class Seeds(BufferDict):
    """Seeds that survive a copy whose tensors are averaged: what is saved and rebuilt from are Python integers."""

    def __init__(self) -> None:
        super().__init__({}, persistent=True)
        self.values_of: dict[str, int] = {}

    def __setitem__(self, name: str, seed: Tensor) -> None:
        if not seed.is_meta:
            self.values_of[name] = int(seed)
        super().__setitem__(name, seed)

    def __delitem__(self, name: str) -> None:
        self.values_of.pop(name, None)
        super().__delitem__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, buffer in self._buffers.items():
            if buffer is not None and name in self.values_of:
                buffer = torch.tensor(self.values_of[name], device=buffer.device)
            destination[prefix + name] = buffer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._buffers:
            loaded = state_dict.get(prefix + name)
            if loaded is None or loaded.is_meta:
                continue
            if not loaded.is_floating_point():
                self.values_of[name] = int(loaded)
                continue
            ours = self.values_of[name]
            if abs(float(loaded) - ours) > _ROUNDED * ours:
                errors: list[str] = args[-1]  # of load_state_dict(), which raises them together
                errors.append(
                    f"{prefix}{name} is {float(loaded):.6g}, the seed here {ours}: not an average of equal seeds, and no "
                    "seed either. Average only copies of one model."
                )
            state_dict[prefix + name] = torch.tensor(ours)
        super()._load_from_state_dict(state_dict, prefix, *args)

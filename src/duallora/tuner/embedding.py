"""Dual LoRA on embeddings: y = W'[ids] with W' = W0 + dW, of which only the rows of the batch are computed.

    W0 [V, d]    A [r1, d]   B [V, r1]   C [r2, d]   D [V, r2]

The layout is that of an output layer with the same weight. Each distinct id of a batch makes one row of W', so the
straight-through clip sees the gradient of a weight summed over all its occurrences, as it would with the whole of W'.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from duallora.errors import ConfigError
from duallora.ops.autograd import transformed
from duallora.tuner.layer import DualLoraLayer


def distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, where) with rows[where] = ids and no id twice among the rows that are used.

    Where the graph is compiled or transformed, rows has as many entries as ids: its shape must not depend on their values.
    """
    if not torch.compiler.is_compiling() and not transformed():
        return torch.unique(ids, return_inverse=True)
    flat, order = ids.flatten().sort()
    rank = torch.cat([flat.new_zeros(1), (flat[1:] != flat[:-1]).to(flat.dtype)]).cumsum(0)
    where = torch.empty_like(rank).scatter(0, order, rank)
    return torch.zeros_like(flat).scatter(0, rank, flat), where.view(ids.shape)


class Embedding(DualLoraLayer):
    """Dual LoRA on ``nn.Embedding`` and its subclasses, which keep their scales, positions and norms.

    The row of ``padding_idx`` stays as it is, like its gradient in the base layer. There is no dropout (ids cannot be
    dropped) and no ``gradient_tokens`` (the gradient is exact). With DoRA the lengths m [V] are those of the rows.
    """

    kinds = (nn.Embedding,)
    forwards = (nn.Embedding.forward,)

    def _sizes(self, base: Any) -> tuple[int, int]:
        return base.num_embeddings, base.embedding_dim

    def _runs_base(self) -> bool:
        return False  # its look-ups are caught instead

    def _build(
        self, adapter: str, W: Tensor | None, rows: Tensor | None, dtype: torch.dtype, minus_base: bool = False
    ) -> Tensor:
        if rows is not None and self.duallora_config[adapter].direction == "dorefa":  # a mean over all of dW
            return self._build(adapter, W, None, dtype, minus_base)[rows]
        weight = super()._build(adapter, W, rows, dtype, minus_base)
        layer: Any = self.get_base_layer()
        padding = layer.padding_idx
        if padding is None:
            return weight
        base = weight.new_zeros(()) if minus_base or W is None else W[padding].detach().to(dtype)
        if rows is None:
            weight[padding] = base
            return weight
        return torch.where((rows == padding)[:, None], base, weight)

    def _rows_of(self, table: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        """``table(rows)[ids]`` of the distinct rows alone."""
        rows, where = distinct(ids)
        base: Any = self.get_base_layer()
        return F.embedding(where, table(rows), scale_grad_by_freq=base.scale_grad_by_freq)

    def _looked_up(self, ids: Tensor, W: Tensor, adapters: list[str]) -> Tensor:
        """W'[ids], rounded to the dtype of W as merging rounds it."""
        return self._rows_of(lambda rows: self._merged_weight(W, adapters, rows), ids)

    def _added(self, x: Tensor, adapter: str, y0: Tensor | None = None) -> Tensor:
        """dW[ids]."""
        W = self._base_weight() if self.duallora_config[adapter].use_dora else None
        return self._rows_of(lambda rows: self._delta(adapter, W, rows), x)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """y [..., d] for ids [...]; ``adapter_names`` gives each row of the batch an adapter of its own."""
        adapters = self._acting()
        if adapter_names is not None:
            if self.merged:
                self.unmerge()
        elif not adapters:
            return self._through_base(x, *args, adapter_names=None, **kwargs)
        elif not (args or kwargs) and self._is_plain() and not any(map(self._is_beside, adapters)):
            return self._looked_up(x, self.base_layer.weight, adapters)
        y, seen = self._around(partial(self.base_layer, x, *args, **kwargs), adapters, adapter_names)
        if not seen:
            raise ConfigError(
                f"{type(self.get_base_layer()).__name__} does not look its weight up through F.embedding, so Dual LoRA "
                "cannot adapt it: name it in exclude_modules."
            )
        return y

    def __getattr__(self, name: str) -> Any:
        """A method of the base layer (ProphetNet calls one) looks W0 + dW up as its forward does."""
        found = super().__getattr__(name)
        if inspect.ismethod(found) and found.__self__ is self.get_base_layer():
            return partial(self._call, found)
        return found

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        adapters = self._acting()
        return self._around(partial(method, *args, **kwargs), adapters)[0] if adapters else method(*args, **kwargs)

    def _around(
        self, call: Callable[[], Any], adapters: list[str], adapter_names: list[str] | None = None
    ) -> tuple[Any, bool]:
        """What ``call`` gives with each lookup in the base weight made in W0 + dW, or dW added to it; whether one was."""
        seen = False

        def look_up(ids: Tensor, W: Tensor, found: Callable[[], Tensor]) -> Tensor:
            nonlocal seen
            seen = True
            if adapter_names is not None:
                y = found()
                if len(ids) == 1:  # positions, the same for all rows of the batch
                    ids, y = (t.expand(len(adapter_names), *t.shape[1:]) for t in (ids, y))
                return self._add_by_row(ids, y, adapter_names)
            if not any(map(self._is_beside, adapters)):
                return self._looked_up(ids, W, adapters)
            y = found()
            return y + reduce(torch.add, [self._added(ids, adapter) for adapter in adapters]).to(y.dtype)

        base: Any = self.get_base_layer()
        with _Lookup(base, look_up):
            y = call()
        return y, seen


class _Lookup(TorchFunctionMode):
    """Inside it, ``look_up(ids, weight, found)`` stands for each lookup in the weight of ``base``; ``found()`` is what
    the lookup itself gives. So a subclass keeps what it does around it, and hooks bring the weight as they always do."""

    def __init__(self, base: Any, look_up: Callable[[Tensor, Tensor, Callable[[], Tensor]], Tensor]) -> None:
        super().__init__()
        self.base, self.look_up = base, look_up

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            ids, W = (*args, *(kwargs[k] for k in ("input", "weight") if k in kwargs))[:2]
            if W is self.base.weight:
                return self.look_up(ids, W, lambda: func(*args, **kwargs))
        return func(*args, **kwargs)

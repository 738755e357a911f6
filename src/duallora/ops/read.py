"""The weight of an adapted layer, for a parent that reads ``layer.weight`` instead of calling the layer.

WavLM's attention, Mamba's ``dt_proj``, ``nn.MultiheadAttention``, an output layer inside a fused loss: handed the base
weight, they would leave the adapter out. They get W0 + dW, differentiable in the factors. Most readers want the type, the
device or the shape alone, though, so W0 + dW is built when an operator takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# What a tensor answers without its values. What writes is meant for W0 itself, and so is .data.
_FACTS = {
    getattr(Tensor, name) if callable(getattr(Tensor, name)) else getattr(Tensor, name).__get__
    for name in (
        "dtype", "device", "shape", "ndim", "layout", "requires_grad", "grad", "data", "is_leaf", "is_cuda", "is_cpu",
        "is_meta", "is_sparse", "is_quantized", "itemsize", "nbytes", "_version", "size", "dim", "numel", "stride",
        "storage_offset", "is_contiguous", "is_floating_point", "is_complex", "element_size", "get_device", "data_ptr",
        "untyped_storage", "requires_grad_", "__len__", "__hash__", "nelement", "ndimension", "is_pinned",
    )
}  # fmt: skip
_WRITES = {"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


class ReadWeight(Tensor):
    """Answers what is asked about ``W`` as W does, and stands for ``build()`` where an operator takes it."""

    W: Tensor
    build: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        take = (lambda read: read.W) if func in _FACTS or writes else (lambda read: read.build())
        args, kwargs = tree_map_only(ReadWeight, take, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"W0 + dW of {tuple(self.shape)}, built when it is used"


class _ReadExperts(ReadWeight):
    """Of [experts, ...]: ``build()`` is asked for once, and for ``self[e]`` with a number e ``build_one(e)`` instead."""

    build_one: Callable[[int], Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(read := args[0], _ReadExperts):
            index = args[1]
            if isinstance(index, Tensor) and index.dim() == 0 and index.dtype in (torch.int64, torch.int32):
                index = int(index)
            if type(index) is int:
                return read.build_one(index)
        return super().__torch_function__(func, types, args, kwargs)


def read_experts(W: Tensor, build_one: Callable[[int], Tensor]) -> Tensor:
    """As :func:`read_weight`, for weights [experts, ...] of which a forward may take few; ``build_one(e)`` is one expert's."""

    def build() -> Tensor:
        return torch.stack([build_one(e) for e in range(len(W))])

    if torch.compiler.is_compiling() or type(W) not in (Tensor, nn.Parameter):  # a tensor without values, say
        return build()
    read = W.detach().as_subclass(_ReadExperts)
    read.W, read.build, read.build_one = W, cache(build), build_one
    return read


def read_weight(W: Tensor, build: Callable[[], Tensor]) -> Tensor:
    """What a parent reads as ``layer.weight``: W0 to look at, ``build()``, which gives W0 + dW, to compute with."""
    if torch.compiler.is_compiling():  # which drops what is not used
        return build()
    read = W.detach().as_subclass(ReadWeight)
    read.W, read.build = W, build
    return read

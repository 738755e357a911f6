"""W' kept between evaluations of an unmerged layer, checked by content so that it cannot go stale.

A kept weight is used again only if everything it was made from is as it was: the adapters, their options, and the bytes
of the factors, of the gate and of every other small input. Addresses and 64-bit fingerprints of contents are compared in
every forward, so a write that torch does not count (``.data``) is seen too. Of the frozen base weight, as large as W'
itself, every forward compares the address, torch's version counter and a spread sample of the content, and every
forward of more than one token per sequence (each prompt, each evaluation batch) all of it.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from duallora.ops.backends import fastest

DEFAULT_LIMIT = 4 << 30  # bytes
_SPOTS, _SPOT_BYTES = 16, 64  # the sample of the base weight
_HASH_BYTES_PER_THREAD = 1 << 20

_lock = threading.RLock()  # a garbage collection inside may call __del__
_limit = DEFAULT_LIMIT
_used = 0


def set_eval_cache(max_bytes: int) -> None:
    """Bound the memory for weights kept between evaluations, over all models of this process; 0 keeps none.

    The layers that are evaluated first keep theirs; those that find no room build W' in every forward. A layer
    gives its weight back when it goes to training, is merged, moved or deleted, and in its next forward while more
    than ``max_bytes`` are kept.

    Args:
        max_bytes: default 4 GiB.

    Raises:
        ValueError: ``max_bytes`` is negative.
    """
    global _limit
    if max_bytes < 0:
        raise ValueError(f"max_bytes={max_bytes}: expected a number of bytes >= 0.")
    _limit = max_bytes


def eval_cache_bytes() -> int:
    """Bytes of the weights kept now."""
    return _used


def over_limit() -> bool:
    """Whether more is kept than allowed (the limit was lowered)."""
    return _used > _limit


class Content:
    """Memory ranges and what they held when :meth:`take` was called."""

    def __init__(self, ranges: Iterable[tuple[int, int]], hashes: Sequence[int] = ()) -> None:
        self.ranges, self.hashes = list(ranges), list(hashes)
        self.count = len(self.ranges)
        self._addresses = (ctypes.c_void_p * self.count)(*(address for address, _ in self.ranges))
        self._sizes = (ctypes.c_int64 * self.count)(*(size for _, size in self.ranges))
        self._hashes = (ctypes.c_uint64 * self.count)(*self.hashes)
        self._bytes = sum(size for _, size in self.ranges)
        self._native = getattr(fastest("cpu"), "library", None)
        if not self.hashes:
            self._hash(self._hashes)
            self.hashes = list(self._hashes)

    def _hash(self, into: Any) -> None:
        if self._native is not None:
            self._native().duallora_fingerprint(self._addresses, self._sizes, self.count, into)
            return
        for i, (address, size) in enumerate(self.ranges):  # no compiler: zlib's sum, slower
            into[i] = zlib.crc32((ctypes.c_char * size).from_address(address)) if size else 0

    def holds(self) -> bool:
        """Whether the ranges still hold it."""
        if self._native is not None:
            threads = max(1, min(torch.get_num_threads(), self._bytes // _HASH_BYTES_PER_THREAD))
            return bool(
                self._native().duallora_unchanged(self._addresses, self._sizes, self.count, self._hashes, threads)
            )
        now = (ctypes.c_uint64 * self.count)()
        self._hash(now)
        return list(now) == self.hashes


def tensor_range(tensor: Tensor) -> tuple[int, int]:
    """(address, bytes) of a contiguous tensor."""
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def _view(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies and how it reads its memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Watch:
    """Everything that kept weights depend on, as it was: looked up again through the containers that hold it.

    Args:
        owner: the module that holds the watch, known weakly, or watch and module would keep each other alive.
        attributes: (name, value) of the owner's own attributes: compared by ``==``.
        values: (dict, key, value): compared by ``==``.
        objects: (dict, key, object): compared by identity.
        tensors: (dict, key): small tensors, compared by address and content.
        bases: (dict, key): frozen weights, compared by address, version and a sample of the content.
    """

    def __init__(
        self,
        owner: Any,
        attributes: list[tuple[str, Any]],
        values: list[tuple[dict, Any, Any]],
        objects: list[tuple[dict, Any, Any]],
        tensors: list[tuple[dict, Any]],
        bases: list[tuple[dict, Any]],
    ) -> None:
        reference = weakref.ref(owner)
        self.attributes = [(reference, name, value) for name, value in attributes]
        self.values, self.objects = values, objects
        self.tensors = [(d, k, _view(d[k])) for d, k in tensors]
        self.bases = [(d, k, _view(d[k]), _version(d[k])) for d, k in bases]
        ranges = [tensor_range(d[k]) for d, k in tensors]
        for d, k in bases:
            address, size = tensor_range(d[k])
            step = max(1, (size - _SPOT_BYTES) // (_SPOTS - 1))
            spots = range(_SPOTS) if size > _SPOTS * _SPOT_BYTES else [0]
            ranges += [(address + i * step, min(size, _SPOT_BYTES) if len(spots) > 1 else size) for i in spots]
        self.content = Content(ranges)

    @classmethod
    def all(cls, watches: Sequence[Watch]) -> Watch:
        """One watch over what ``watches`` saw when they were made."""
        joined = cls.__new__(cls)
        for name in ("attributes", "values", "objects", "tensors", "bases"):
            setattr(joined, name, [entry for watch in watches for entry in getattr(watch, name)])
        joined.content = Content(
            [r for watch in watches for r in watch.content.ranges], [h for w in watches for h in w.content.hashes]
        )
        return joined

    def holds(self) -> bool:
        """Whether everything is as it was. Addresses come before contents: the old memory may be gone."""
        for reference, name, value in self.attributes:
            owner = reference()
            if owner is None or owner.__dict__.get(name) != value:
                return False
        for d, k, value in self.values:
            if d.get(k) != value:
                return False
        for d, k, thing in self.objects:
            if d.get(k) is not thing:
                return False
        for d, k, view in self.tensors:
            tensor = d.get(k)
            if tensor is None or _view(tensor) != view:
                return False
        for d, k, view, version in self.bases:
            tensor = d.get(k)
            if tensor is None or _view(tensor) != view or _version(tensor) != version:
                return False
        return self.content.holds()


class Session:
    """One forward of a whole model: while ``valid``, its layers were found unchanged all at once."""

    valid = False


class _Kept(NamedTuple):
    weight: Tensor
    watch: Watch
    base: Content
    whole: bool

    @property
    def size(self) -> int:
        return self.weight.numel() * self.weight.element_size()


class EvalCache:
    """The kept W' of one layer. Threads may evaluate it at the same time: what is kept is one object, swapped whole."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self.session = Session()

    # A copied or unpickled layer starts without.
    def __deepcopy__(self, memo: Any) -> EvalCache:
        return EvalCache()

    def __reduce__(self) -> tuple[type[EvalCache], tuple[()]]:
        return EvalCache, ()

    def __del__(self) -> None:
        if self._kept is not None and _release is not None:  # None while the interpreter shuts down
            self._swap(None)

    def _swap(self, kept: _Kept | None) -> None:
        with _lock:
            before, self._kept = self._kept, kept
            if before is not None:
                _release(before.size)

    @property
    def weight(self) -> Tensor | None:
        """What is kept, right or not."""
        return None if self._kept is None else self._kept.weight

    @property
    def watch(self) -> Watch | None:
        return None if self._kept is None else self._kept.watch

    def drop(self) -> None:
        """Give the memory back."""
        self.session = Session()
        self._swap(None)

    def distrust(self) -> None:
        """Leave the session: something changed inside the forward that it stands for."""
        self.session = Session()

    def find(self, x: Tensor) -> Tensor | None:
        """The kept weight if it is still right for x, else None."""
        kept = self._kept
        if kept is None:
            return None
        if over_limit():
            self.drop()
            return None
        if kept.weight.dtype != x.dtype or not kept.watch.holds():
            return None
        one_token = x.dim() > 2 and x.shape[-2] == 1
        return kept.weight if one_token or kept.base.holds() else None

    def decode(self, x: Tensor) -> Tensor | None:
        """W' for x [batch, 1, in], one token per sequence, in a valid session; else None."""
        kept = self._kept
        if kept is None or not self.session.valid or not kept.whole or x.dim() != 3 or x.shape[1] != 1:
            return None
        return kept.weight if x.dtype == kept.weight.dtype and not torch.is_grad_enabled() else None

    def keep(self, weight: Tensor, watch: Watch, whole: bool) -> None:
        """Keep ``weight``, if memory allows; ``whole``: it is W', all that a forward multiplies by."""
        self.drop()
        kept = _Kept(weight, watch, Content([tensor_range(d[k]) for d, k, *_ in watch.bases]), whole)
        if _reserve(kept.size):
            self._swap(kept)


def _reserve(size: int) -> bool:
    global _used
    with _lock:
        if _used + size > _limit:
            return False
        _used += size
        return True


def _release(size: int) -> None:
    global _used
    with _lock:
        _used -= size

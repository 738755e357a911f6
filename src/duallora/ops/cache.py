"""W' kept between evaluations of an unmerged layer, checked by content so that it cannot go stale.

A kept weight is used again only if the factors, the gate and every other input of W' hold the very bytes they held when
it was built: their addresses and a 64-bit fingerprint of their contents are compared in every forward, so a write that
torch does not count (``.data``) is seen too. Of the frozen base weight, as large as W' itself, every forward compares the
address, torch's version counter and a spread sample of the content, and every forward of more than one token per
sequence (so each prompt, and each evaluation batch) all of it.
"""

from __future__ import annotations

import ctypes
import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

DEFAULT_LIMIT = 4 << 30  # bytes
_SPOTS, _SPOT_BYTES = 16, 64  # the sample of the base weight

_lock = threading.Lock()
_limit = DEFAULT_LIMIT
_used = 0


def set_eval_cache(max_bytes: int) -> None:
    """Bound the memory for weights kept between evaluations, over all models of this process; 0 keeps none.

    The layers that are evaluated first keep theirs; those that find no room build W' in every forward. A layer
    gives its weight back when it goes to training, is merged, moved or deleted.

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


def _native() -> Callable[[Any, Any, int], int] | None:
    from duallora.ops import backends

    module = backends._fastest("cpu")
    return getattr(module, "fingerprint", None)


class _Ranges:
    """Memory to fingerprint: addresses and sizes as C arrays, made once."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.count = len(ranges)
        self.addresses = (ctypes.c_void_p * self.count)(*(address for address, _ in ranges))
        self.sizes = (ctypes.c_int64 * self.count)(*(size for _, size in ranges))
        self.hash = _native()

    def fingerprint(self) -> int:
        if self.hash is not None:
            return self.hash(self.addresses, self.sizes, self.count)
        value = 0  # no compiler: zlib's sum, slower
        for address, size in zip(self.addresses, self.sizes, strict=True):
            if size:
                value = zlib.crc32((ctypes.c_char * size).from_address(address), value)  # type: ignore[arg-type]
        return value


def _range(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class EvalCache:
    """The kept W' of one layer."""

    def __init__(self) -> None:
        self.weight: Tensor | None = None

    # A copied or unpickled layer starts without.
    def __deepcopy__(self, memo: Any) -> EvalCache:
        return EvalCache()

    def __reduce__(self) -> tuple[type[EvalCache], tuple[()]]:
        return EvalCache, ()

    def __del__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Give the memory back."""
        if self.weight is not None:
            _release(self.weight.numel() * self.weight.element_size())
            self.weight = None

    def find(self, x: Tensor, key: tuple[Any, ...], inputs: Sequence[Tensor], W: Tensor | None) -> Tensor | None:
        """The kept weight, if it is still what ``inputs`` (factors, gate, ...), ``key`` and W make; else None."""
        weight = self.weight
        if weight is None or weight.dtype != x.dtype or key != self.key:
            return None
        if [t.data_ptr() for t in inputs] != self.addresses:
            return None
        if self.content.fingerprint() != self.fingerprint:
            return None
        if W is not None:
            if W.data_ptr() != self.base_address or W.dtype != self.base_dtype or _version(W) != self.base_version:
                return None
            one_token = x.dim() > 2 and x.shape[-2] == 1
            if not one_token and self.base_content.fingerprint() != self.base_fingerprint:
                return None
        return weight

    def keep(self, weight: Tensor, key: tuple[Any, ...], inputs: Sequence[Tensor], W: Tensor | None) -> None:
        """Keep ``weight``, if memory allows and everything it depends on can be watched."""
        self.drop()
        watched = [*inputs, weight] if W is None else [*inputs, W, weight]
        if not all(t.device.type == "cpu" and t.is_contiguous() for t in watched):
            return
        if not _reserve(weight.numel() * weight.element_size()):
            return
        self.weight, self.key = weight, key
        self.addresses = [t.data_ptr() for t in inputs]
        content = [_range(t) for t in inputs]
        if W is not None:
            self.base_address, self.base_dtype, self.base_version = W.data_ptr(), W.dtype, _version(W)
            self.base_content = _Ranges([_range(W)])
            self.base_fingerprint = self.base_content.fingerprint()
            address, size = _range(W)
            if size > _SPOTS * _SPOT_BYTES:
                step = (size - _SPOT_BYTES) // (_SPOTS - 1)
                content += [(address + i * step, _SPOT_BYTES) for i in range(_SPOTS)]
            else:
                content.append((address, size))
        self.content = _Ranges(content)
        self.fingerprint = self.content.fingerprint()

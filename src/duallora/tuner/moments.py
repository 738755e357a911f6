"""Second moments of what layers read: C = mean of x x^T over tokens, from a few batches of data.

    linear          x [in]: a token's features                    C [in, in]
    convolution     x [in * prod(kernel)]: what the kernel sees   C square as well
    embedding       x is one-hot [tokens]                         C is diagonal, kept as [tokens]: each token's share

|dW x|^2 is on average |dW C^(1/2)|_F^2, so C says which changes of a weight its outputs feel. One forward pass fills the
matrices of a bounded group of layers; those of a large model never lie in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duallora.errors import ConfigError, NonFiniteError, is_out_of_memory
from duallora.tuner.conv import TORCH as CONVOLUTIONS

GROUP = 2 << 30  # bytes of C that one forward pass over the batches may fill; a larger C is a group of its own
Batches = Sequence[Mapping[str, Any]]


class Moments(NamedTuple):
    """What one layer reads."""

    C: Tensor
    """[in, in], or [in] where it is diagonal, float64."""
    tokens: int
    """How many vectors it is the mean of; 0 for a layer that none reached, and C is zero."""


class _Sum:
    """C of a layer in the making."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.base = name, base_of(module)
        self.count = 0
        device = next(module.parameters()).device
        self.device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        side = inputs(module)
        shape = (side,) if isinstance(self.base, nn.Embedding) else (side, side)
        self.total = torch.zeros(shape, dtype=torch.float64, device=self.device)

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Adds what the layer reads; ``mask`` tells the tokens from the padding where x has one vector for each."""
        if isinstance(self.base, CONVOLUTIONS):
            x = patches(self.base, x)
        else:
            x = x.flatten() if isinstance(self.base, nn.Embedding) else x.reshape(-1, x.shape[-1])
            if mask is not None and len(x) == mask.numel():
                x = x[mask.flatten()]
        self.count += len(x)
        if isinstance(self.base, nn.Embedding):
            known = x[(x >= 0) & (x < len(self.total))]  # what others do, the layer itself says
            self.total += torch.bincount(known, minlength=len(self.total)).to(self.total)
        else:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            self.total += (x.T @ x).to(self.total)

    def mean(self) -> Moments:
        if not bool(torch.isfinite(self.total).all()):
            raise NonFiniteError(
                f"{self.name} reads NaN or infinite values on the calibration rows: expected finite activations. Load the "
                "model in float32 or bfloat16, or convert without data (--no-calibrate)"
            )
        return Moments(self.total / max(self.count, 1), self.count)


def base_of(module: Any) -> Any:
    """The layer that an adapter's layer adapts; a layer without one is its own."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def inputs(module: Any) -> int:
    """The side of a layer's C; a convolution's kernel counts to it, an embedding's is its tokens."""
    base = base_of(module)
    if isinstance(base, nn.Embedding):
        return base.num_embeddings
    if isinstance(base, CONVOLUTIONS):
        return base.weight[0].numel()
    return base.in_features if hasattr(base, "in_features") else base.weight.shape[0]  # Conv1D stores [in, out]


def patches(base: Any, x: Tensor) -> Tensor:
    """What the kernel of a convolution sees, [places, in * prod(kernel)], for x [batch, in, ...] or [in, ...].

    Of one group, without dilation and padded by zeros.
    """
    sizes = base.kernel_size
    x = x if x.ndim == len(sizes) + 2 else x[None]
    x = F.pad(x, base._reversed_padding_repeated_twice)
    for at, (size, stride) in enumerate(zip(sizes, base.stride, strict=True)):
        x = x.unfold(2 + at, size, stride)
    return x.movedim(1, 1 + len(sizes)).flatten(1 + len(sizes)).flatten(0, len(sizes))


def in_groups(layers: Mapping[str, nn.Module], limit: int = GROUP) -> Iterator[dict[str, nn.Module]]:
    """The layers in their order, as many at a time as have their C in ``limit`` bytes; at least one."""
    group: dict[str, nn.Module] = {}
    held = 0
    for name, module in layers.items():
        side = inputs(module)
        own = 8 * (side if isinstance(base_of(module), nn.Embedding) else side * side)
        if group and held + own > limit:
            yield group
            group, held = {}, 0
        group[name] = module
        held += own
    if group:
        yield group


@torch.no_grad()
def second_moments(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]) -> dict[str, Moments]:
    """C of each of the ``layers`` (modules of ``model`` by name) over all of ``batches``, with the adapters as they act.

    A batch is what ``model(**batch)`` takes; its labels are left out, and so is what its ``attention_mask`` marks as
    padding. The model is in evaluation mode meanwhile. All of C is in memory at once: see :func:`in_groups`.

    Raises:
        ConfigError: there is no batch, or one that the model does not take.
        NonFiniteError: a layer reads NaN or infinities.
    """
    sums = {name: _Sum(name, module) for name, module in layers.items()}
    mask: Tensor | None = None

    def watch(module: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        sums[name].add(x.detach(), mask)

    handles = [m.register_forward_pre_hook(partial(watch, name=n), with_kwargs=True) for n, m in layers.items()]
    modes = [(m, m.training) for m in model.modules()]
    count = 0
    try:
        model.eval()
        for count, batch in enumerate(batches, 1):
            given = {key: value for key, value in batch.items() if key != "labels"}
            found = given.get("attention_mask")
            mask = found.bool() if isinstance(found, Tensor) and found.ndim == 2 else None
            _forward(model, given, count)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if not count:
        raise ConfigError("there is no calibration batch: give at least one, or convert without data")
    return {name: total.mean() for name, total in sums.items()}


def _forward(model: nn.Module, batch: Mapping[str, Any], number: int) -> None:
    try:
        model(**batch)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"calibration batch {number} ({', '.join(batch)}) does not fit the model: {type(error).__name__}: {reason}. Give "
            "rows encoded by the model's own tokenizer, no longer than it reads"
        ) from error

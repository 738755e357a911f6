"""Evaluation with W0 + dW in the weights: built once, not in every forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


class Foldable:
    """A layer whose forward multiplies by W0 + dW, and can do so without building it anew."""

    def fold(self, shared: Container[int]) -> None:
        """Compute with W0 + dW as it is now; do nothing where that would change a bit of the output.

        ``shared``: ids of the parameters that several modules hold.
        """
        raise NotImplementedError

    def unfold(self) -> None:
        """Be again what :meth:`fold` found."""
        raise NotImplementedError


@contextmanager
def folded(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the active Dual LoRA adapters of ``model`` are merged; after, also after an exception, W0 is back bit for bit.

    For evaluation, above all for ``generate``, where each token would build W0 + dW anew::

        with duallora.folded(model.eval()):
            model.generate(**inputs)

    The output is bit for bit that of the adapter. So a layer stays as it is, and its adapter acts in every forward,
    where merging would round otherwise: on a quantized, sharded or offloaded base weight, on a base layer with hooks or
    a forward of its own, with ``forward="added"``, and with dropout in training mode. So does a layer that holds merged
    adapters already. Inside, evaluate and no more: factors get no gradient, and a change of them, of the gate or of the active
    adapters does not act as it would outside. Adapters of other methods are left alone.

    Args:
        model: a PeftModel, a model with injected layers, or one that :func:`duallora.nn.adapt` made; any part of one.
    """
    with ExitStack() as stack:
        with torch.inference_mode(False), torch.no_grad():
            users = Counter(id(p) for module in model.modules() for p in module._parameters.values())
            shared = {parameter for parameter, count in users.items() if count > 1}
            for layer in [module for module in model.modules() if isinstance(module, Foldable)]:
                stack.callback(layer.unfold)
                layer.fold(shared)
        yield model

"""One check per forward of the model, where each layer checking for itself would cost as much as the layer.

While text is generated, a forward is one token: a layer then takes microseconds, and asking in Python whether its kept
weight (:mod:`duallora.ops.cache`) is still right takes as many. So a hook before the model's forward asks for all layers
at once; in that forward the layers take their kept weight as it is. (A hook inside the model that writes to a factor in
the middle of a one-token forward is seen in the next one.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from duallora.ops.cache import Session, Watch, over_limit
from duallora.tuner.layer import Linear


class Forwards:
    """The two hooks of one model and what they remember; it lives and dies with the model."""

    def __init__(self) -> None:
        self.session = Session()
        self.watch: Watch | None = None

    # A copied or unpickled model starts afresh.
    def __deepcopy__(self, memo: Any) -> Forwards:
        return Forwards()

    def __reduce__(self) -> tuple[type[Forwards], tuple[()]]:
        return Forwards, ()

    def before(self, model: nn.Module, args: Any) -> None:
        """Ask for all layers whether their kept weights are right."""
        if not torch.compiler.is_compiling() and self.watch is not None:
            self.session.valid = not (torch.is_grad_enabled() or over_limit()) and self.watch.holds()

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """End the session; if there was none, prepare the next from what the layers have kept."""
        if torch.compiler.is_compiling():
            return
        if self.session.valid:
            self.session.valid = False
            return
        if model.training or torch.is_grad_enabled():
            return
        kept = [(m._eval_cache, m._eval_cache.watch) for m in model.modules() if isinstance(m, Linear)]
        watches = [watch for _, watch in kept if watch is not None]
        if watches:
            # What the layers saw when they built their weights, not what is there now.
            self.session, self.watch = Session(), Watch.all(watches)
            for cache, watch in kept:
                if watch is not None:
                    cache.session = self.session


def watch_forwards(model: nn.Module) -> list[Any]:
    """Register the hooks, once for a model; returns their handles."""
    if any(isinstance(getattr(hook, "__self__", None), Forwards) for hook in model._forward_pre_hooks.values()):
        return []
    hooks = Forwards()
    return [
        model.register_forward_pre_hook(hooks.before),
        model.register_forward_hook(hooks.after, always_call=True),
    ]

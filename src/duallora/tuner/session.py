"""One check per forward of the model, where each layer checking for itself would cost as much as the layer.

While text is generated, a forward is one token: a layer then takes microseconds, and asking in Python whether its kept
weight (:mod:`duallora.ops.cache`) is still right takes as many. So a hook before the model's forward asks for all layers
at once; in that forward the layers take their kept weight as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from duallora.ops.cache import Session, Watch, over_limit
from duallora.tuner.layer import Linear


@dataclass
class _State:
    session: Session = field(default_factory=Session)
    watch: Watch | None = None


_states: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


def watch_forwards(model: nn.Module) -> list[Any]:
    """Register the hooks; returns their handles."""
    return [
        model.register_forward_pre_hook(_before),
        model.register_forward_hook(_after, always_call=True),
    ]


def _before(model: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    state = _states.get(model)
    if state is not None and state.watch is not None:
        state.session.valid = not (torch.is_grad_enabled() or over_limit()) and state.watch.holds()


def _after(model: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    state = _states.get(model)
    if state is not None and state.session.valid:
        state.session.valid = False
        return
    if model.training or torch.is_grad_enabled():
        return
    caches = [m._eval_cache for m in model.modules() if isinstance(m, Linear) and m._eval_cache.watch is not None]
    if caches:
        # What the layers saw when they built their weights, not what is there now.
        state = _State(Session(), Watch.all([cache.watch for cache in caches if cache.watch is not None]))
        _states[model] = state
        for cache in caches:
            cache.session = state.session

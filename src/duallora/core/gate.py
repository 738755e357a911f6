"""The gate: how dW = 0 at the start (the paper's warm-up), opening by itself as the optimizer steps.

    gate = min(1, t / warmup_steps)        t = optimizer steps applied to this layer's factors

t is a persistent int64 tensor per layer and adapter, saved with the weights. It advances from torch's global
optimizer-step hook, so accumulation, gradient checkpointing, Trainer and accelerate need no code; an optimizer that
torch cannot see (DeepSpeed's) needs :func:`advance_gate` after each step.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


class Gate(NamedTuple):
    """One counter and the factors it counts steps of."""

    name: str  # of the adapter
    step: Tensor  # [] int64
    warmup_steps: int  # 0: open from the start
    factors: list[nn.Parameter]
    frozen: bool  # True while merged


class Gated(Protocol):
    """A layer with gates. ``active_only`` leaves out the adapters that do not act on the output."""

    def gates(self, active_only: bool = False) -> Iterator[Gate]: ...


@dataclass
class _Watch:
    """What the hook remembers of one gate."""

    owner: int | None = None  # the first trained factor that any optimizer has ever held: its owner's steps count
    misses: int = 0
    gradient: weakref.ref[Tensor] | None = None  # the last one seen


MISSES_BEFORE_WARNING = 10  # optimizer steps that left a layer's new gradients unused before we say so

_tracked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_watches: weakref.WeakKeyDictionary[nn.Module, dict[str, _Watch]] = weakref.WeakKeyDictionary()
# Optimizers inside step(), outermost first, and the gates each has counted.
_running: list[tuple[int, set[tuple[int, str]]]] = []
_hooks: list[Any] = []


def ramp(step: Tensor, warmup_steps: int) -> Tensor:
    """min(1, step / warmup_steps), [] float32; 1 where warmup_steps is 0."""
    if warmup_steps == 0:
        return torch.ones((), dtype=torch.float32, device=step.device)
    return (step / warmup_steps).clamp(max=1.0)


def track(layer: nn.Module) -> None:
    """Count optimizer steps for ``layer`` (a :class:`Gated` module) for as long as it lives."""
    _tracked.add(layer)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_optimizer_step))
        _hooks.append(register_optimizer_step_post_hook(_after_optimizer_step))


def tracked_layers() -> list[nn.Module]:
    """Every live layer with a gate."""
    return list(_tracked)


def _before_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # An exception inside step() leaves its entry behind; an optimizer is not inside itself.
    inside = [identity for identity, _ in _running]
    if id(optimizer) in inside:
        del _running[inside.index(id(optimizer)) :]
    _running.append((id(optimizer), set()))


def _after_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # A wrapper (ZeroRedundancyOptimizer, SAM) steps an inner optimizer over the same factors: that is one step.
    counted: set[tuple[int, str]] = set()
    while _running:
        identity, inner = _running.pop()
        counted |= inner
        if identity == id(optimizer):
            break
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    # A fused optimizer is called even when GradScaler found an overflow, and skips the update itself.
    found_inf = getattr(optimizer, "found_inf", None)
    stuck = 0
    with torch.no_grad():
        for layer in tracked_layers():
            for gate in cast(Gated, layer).gates():
                trained = [p for p in gate.factors if p.requires_grad]
                # A sharded factor can be empty on this rank; its peers step all the same.
                touched = any(p.grad is not None or p.numel() == 0 for p in trained)
                if gate.warmup_steps == 0 or gate.frozen or not touched or (id(layer), gate.name) in counted:
                    continue
                watch = _watches.setdefault(layer, {}).setdefault(gate.name, _Watch())
                fresh = _has_new_gradient(watch, trained)
                held = [i for i, p in enumerate(trained) if id(p) in owned]
                if held and (watch.owner is None or held[0] <= watch.owner):
                    # With one optimizer for each group, the first group's counts, so a step counts once.
                    watch.owner = held[0]
                    gate.step.add_(1 if found_inf is None else (found_inf == 0).to(gate.step).reshape(()))
                    counted.add((id(layer), gate.name))
                elif fresh and watch.owner is None:
                    watch.misses += 1
                    stuck += watch.misses == MISSES_BEFORE_WARNING
    if _running:
        _running[-1][1].update(counted)
    if stuck:
        warnings.warn(
            f"{MISSES_BEFORE_WARNING} optimizer steps passed, but no optimizer that torch can see holds the Dual LoRA "
            f"factors of {stuck} layers, although they have gradients: their gate does not open and they learn "
            "nothing. Put the factors into your optimizer, or call duallora.advance_gate(model) after each step.",
            stacklevel=2,
        )


def _has_new_gradient(watch: _Watch, trained: list[nn.Parameter]) -> bool:
    """Whether the gradient is another tensor than last time: not the leftover of a finished model, nor one that is
    still being accumulated."""
    gradient = next((p.grad for p in trained if p.grad is not None), None)
    before = None if watch.gradient is None else watch.gradient()
    watch.gradient = None if gradient is None else weakref.ref(gradient)
    return gradient is not None and before is not gradient


def _gates_of(model: nn.Module, active_only: bool) -> list[Gate]:
    layers = [cast(Gated, module) for module in model.modules() if module in _tracked]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Dual LoRA layer, so there is no gate: add an adapter first.")
    gates = [g for layer in layers for g in layer.gates(active_only)]
    if not gates:
        raise ValueError(f"no adapter of {type(model).__name__} is active, so there is no gate: set_adapter one first.")
    return gates


def gate(model: nn.Module) -> float:
    """Mean gate over the active Dual LoRA layers of ``model``, in [0, 1].

    Raises:
        ValueError: the model has no Dual LoRA layer, or none of its adapters is active.
    """
    gates = _gates_of(model, active_only=True)
    return float(torch.stack([ramp(g.step, g.warmup_steps).cpu() for g in gates]).mean())


def closed_gate_message(step: int, warmup_steps: int) -> str | None:
    """What to tell a user whose adapter is saved or merged before its ramp is open; None if it is open."""
    if step >= warmup_steps:
        return None
    if step == 0:
        return (
            f"the gate is at 0 (0 of {warmup_steps} warm-up steps counted), so dW = 0 and the adapter has no effect. If "
            "it was trained, torch could not see the optimizer: call duallora.advance_gate(model) after each step."
        )
    return (
        f"the gate is at {step / warmup_steps:.2f} (step {step} of {warmup_steps}), so dW acts at that fraction of its "
        "full scale. It opens further as training goes on."
    )


def advance_gate(model: nn.Module, steps: int = 1) -> None:
    """Count ``steps`` optimizer steps (>= 0) by hand, for optimizers torch cannot see. Merged adapters stay as they are.

    Raises:
        ValueError: ``steps`` is negative, or the model has no Dual LoRA layer.
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}, but the gate only moves forward: give a number >= 0.")
    with torch.no_grad():
        for g in _gates_of(model, active_only=False):
            if not g.frozen and any(p.requires_grad for p in g.factors):
                g.step.add_(steps)

"""The gate: how dW = 0 at the start (the paper's warm-up), opening by itself as the optimizer steps.

    gate = min(1, t / warmup_steps)        t = optimizer steps applied to this layer's factors

t is a persistent float32 tensor per layer and adapter, saved with the weights. A float, and never capped, because copies
of a model that average its tensors (EMA, SWA) average t as well: the mean number of steps behind the averaged factors,
which opens their gate as it does that of the model itself. Integers they skip, or truncate to 0.

It advances from torch's optimizer-step hooks, so accumulation, gradient checkpointing, Trainer and accelerate need no
code; an optimizer that torch cannot see (DeepSpeed's) needs :func:`advance_gate` after each step. The hooks touch the
layers whose factors the stepping optimizer holds and no others: those may be trained by another thread.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from ctypes import c_float
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from duallora.core.settings import share_of


class Gate(NamedTuple):
    """One counter and the factors it counts steps of."""

    name: str  # of the adapter
    step: Tensor  # [] float32
    warmup_steps: int  # 0: open from the start
    factors: Sequence[Tensor]
    frozen: bool  # True while merged
    family: int = 0  # the same for the layers of one model


@dataclass
class _Watch:
    """What the hooks remember of one gate."""

    # Steps by optimizer, known by the first factor it holds: where several share the factors, the busiest one's count.
    steps: dict[int, int] = field(default_factory=dict)
    copied: tuple[Tensor, Tensor] | None = None  # of a copy: t and the sum of its first factor, as they were
    named: bool = False  # as one that had no gradient when its optimizer first stepped
    idle: int = 0  # training forwards between which a stranger's optimizer stepped and ours did not
    strangers: int | None = None  # what _strangers was at the last of them


class Gated:
    """A module with gates, counted from :func:`track` on for as long as it lives."""

    module_name: str
    gate_watches: defaultdict[str, _Watch]

    def gates(self, active_only: bool = False) -> Iterator[Gate]:
        """One for each adapter; ``active_only`` leaves out those that do not act on the output."""
        raise NotImplementedError


_BY_HAND = -1  # among the optimizers of _Watch.steps
AUTO_STEPS = 100  # of a ramp whose length is "auto", where nobody says how long the run is (the paper's base recipe)
IDLE_BEFORE_WARNING = 10  # optimizer steps that left a layer's new gradients unused before we say so
SHOWN = 5  # names in a message


class _Running(threading.local):
    """The optimizers of this thread that are inside step(), outermost first, and the gates each has counted."""

    def __init__(self) -> None:
        self.stack: list[tuple[int, set[tuple[int, str]]]] = []


class _Held(NamedTuple):
    """The gates of which an optimizer holds a factor, as found when it had these parameters and there were so many layers."""

    parameters: list[Any]  # kept, so that no id is given to another tensor
    ids: list[int]
    layers: int
    gates: list[tuple[weakref.ref[Any], str]]


_lock = threading.RLock()  # for the three below, which threads share
_layers: weakref.WeakSet[Any] = weakref.WeakSet()
_held: weakref.WeakKeyDictionary[Optimizer, _Held] = weakref.WeakKeyDictionary()
_tracked = 0  # how many there were so far
_strangers = 0  # steps so far of optimizers that hold no factor of ours
_idle_said = -1  # what _strangers was when the last warning of a shut gate was given
_running = _Running()
_hooks: list[Any] = []


def _renew_lock() -> None:
    """In a forked process: another thread of the parent may have held it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def ramp(step: Tensor, warmup_steps: int) -> Tensor:
    """min(1, step / warmup_steps), [] float32; 1 where warmup_steps is 0."""
    if warmup_steps == 0:
        return torch.ones((), dtype=torch.float32, device=step.device)
    return (step / warmup_steps).clamp(max=1.0)


def gated(scaling: float | Tensor, step: Tensor, warmup_steps: int) -> float | Tensor:
    """``scaling`` times :func:`ramp`, bit for bit, as a number where looking at the counter is free."""
    if warmup_steps == 0:
        return scaling
    plain = type(step) is Tensor and step.is_cpu and torch._C._functorch.peek_interpreter_stack() is None
    if isinstance(scaling, Tensor) or not plain or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return scaling * ramp(step, warmup_steps)
    # In float64, rounded after each operation: of float32 numbers that gives what float32 would.
    return _float32(_float32(scaling) * _float32(min(step.item() / warmup_steps, 1.0)))


def _float32(number: float) -> float:
    return c_float(number).value


def new_counter(step: int = 0, device: torch.device | None = None) -> Tensor:
    """t, [] float32."""
    return torch.full((), step, dtype=torch.float32, device=device)


def uncast(before: Tensor | None, after: Tensor) -> Tensor:
    """The counter ``after`` a module was cast, moved or loaded: t stays float32, since bfloat16 cannot count past 256."""
    if after.dtype == torch.float32 or after.is_meta:
        return after
    if before is not None and before.dtype == torch.float32 and not before.is_meta:
        return before.to(after.device)
    return after.to(torch.float32)


def track(layer: Any) -> None:
    """Count optimizer steps for ``layer`` (:class:`Gated`) from now on: a new one, a copy or an unpickled one."""
    global _tracked
    layer.gate_watches = defaultdict(_Watch)
    with _lock:
        _layers.add(layer)
        _tracked += 1
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before_optimizer_step))
            _hooks.append(register_optimizer_step_post_hook(_after_optimizer_step))


def track_copy(layer: Any) -> None:
    """:func:`track` for a copy or an unpickled layer, which also remembers what it was copied with."""
    track(layer)
    with torch.no_grad():
        for gate in layer.gates():
            if gate.warmup_steps and gate.factors and not gate.step.is_meta:
                copied = gate.step.clone(), gate.factors[0].detach().float().sum()
                layer.gate_watches[gate.name] = _Watch(copied=copied)


def _gate_of(layer: Any, adapter: str) -> Gate | None:
    return next((g for g in layer.gates() if g.name == adapter), None)


def tracked_layers() -> list[Any]:
    """Every live layer with a gate, of all threads."""
    with _lock:
        return list(_layers)


def _before_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # An exception inside step() leaves its entry behind; an optimizer is not inside itself.
    stack = _running.stack
    inside = [identity for identity, _ in stack]
    if id(optimizer) in inside:
        del stack[inside.index(id(optimizer)) :]
    stack.append((id(optimizer), set()))


def _after_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # A wrapper (ZeroRedundancyOptimizer, SAM) steps an inner optimizer over the same factors: that is one step.
    global _strangers
    stack = _running.stack
    if all(identity != id(optimizer) for identity, _ in stack):
        return  # told twice of one step: two threads that made a class's first optimizers at once wrapped its step() twice
    counted: set[tuple[int, str]] = set()
    while stack:
        identity, inner = stack.pop()
        counted |= inner
        if identity == id(optimizer):
            break
    held = _gates_held_by(optimizer)
    if held.gates:
        _count(optimizer, held, counted)
    else:
        _strangers += 1
    if stack:
        stack[-1][1].update(counted)


def _gates_held_by(optimizer: Optimizer) -> _Held:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ids = list(map(id, parameters))
    with _lock:
        known = _held.get(optimizer)
        if known is not None and known.layers == _tracked and known.ids == ids:
            return known
        layers, count = list(_layers), _tracked
    # Layers of other threads are compared by identity alone: their tensors are not ours to look at.
    owned = set(ids)
    gates = [(weakref.ref(x), g.name) for x in layers for g in x.gates() if any(id(p) in owned for p in g.factors)]
    found = _Held(parameters, ids, count, gates)
    with _lock:
        _held[optimizer] = found
    return found


@torch.no_grad()
def _count(optimizer: Optimizer, held: _Held, counted: set[tuple[int, str]]) -> None:
    """One step for each gate that the optimizer holds a factor of and that took part; names those that did not."""
    owned = set(held.ids)
    idle: list[tuple[Any, _Watch, int]] = []
    families: set[int] = set()  # of which some layer took part
    counters: list[Tensor] = []
    for reference, name in held.gates:
        layer = reference()
        gate = None if layer is None else _gate_of(layer, name)
        trained = [] if gate is None else [p for p in gate.factors if p.requires_grad]
        first = next((i for i, p in enumerate(trained) if id(p) in owned), None)
        if layer is None or gate is None or gate.frozen or first is None:
            continue
        watch = layer.gate_watches[name]
        # A sharded factor can be empty on this rank; its peers step all the same.
        if not any(p.grad is not None or p.numel() == 0 for p in trained):
            idle.append((layer, watch, gate.family))
            continue
        families.add(gate.family)
        if (id(layer), name) not in counted:
            counted.add((id(layer), name))
            # Whoever comes later to factors that are trained already shares the step that is going on.
            before, most = watch.steps.get(first), max(watch.steps.values(), default=0)
            watch.steps[first] = most if before is None and most else (before or 0) + 1
            if watch.steps[first] > most:
                counters.append(_as_float32(gate.step))
    # A fused optimizer is called even when GradScaler found an overflow, and skips the update itself.
    found_inf = getattr(optimizer, "found_inf", None)
    if counters and found_inf is None:
        torch._foreach_add_(counters, 1)
    for step in counters if found_inf is not None else ():
        step.add_(torch.as_tensor(found_inf == 0).to(step).reshape(()))
    # A model none of whose layers took part did not run.
    here = [(layer, watch) for layer, watch, family in idle if family in families]
    _name_idle([layer for layer, watch in here if not (watch.steps or watch.named)])
    for _, watch in here:
        watch.named = True


def _as_float32(step: Tensor) -> Tensor:
    """The counter, put right where it was cast behind its layer's back, as FSDP1's mixed precision does."""
    if step.dtype != torch.float32:
        step.data = step.float()
    return step


def _name_idle(layers: list[Any]) -> None:
    if layers:
        warnings.warn(
            f"{len(layers)} adapted layers got no gradient in their optimizer's first step: "
            f"{named(layer.module_name or type(layer).__name__ for layer in layers)}. Where only no row has reached "
            "them yet (an expert, a layer skipped at random), all is well. Where the model never runs them, or reads a "
            "quantized or sharded weight instead of calling the layer, they are not trained: leave them out "
            "(exclude_modules). Saving names those that never got one.",
            stacklevel=2,
        )


def named(names: Iterable[str]) -> str:
    """The first few of them, and how many there are."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def watch_forward(layer: Any, adapter: str) -> None:
    """To be called in a forward: warns of a gate that stays shut though the factors seem to be trained, or to change."""
    watch = layer.gate_watches[adapter]
    if not watch.steps and layer.training and torch.is_grad_enabled():
        _expect_steps(layer, adapter, watch)
    if not watch.steps and watch.copied is not None:
        _expect_counter(layer, adapter, watch, *watch.copied)


def _expect_counter(layer: Any, adapter: str, watch: _Watch, step: Tensor, total: Tensor) -> None:
    """A copy whose factors are averaged by a loop over parameters() keeps the counter, a buffer, of when it was made."""
    gate = _gate_of(layer, adapter)
    if gate is None or gate.step.is_meta or float(gate.step) != float(step) or float(step) >= gate.warmup_steps:
        watch.copied = None
        return
    with torch.no_grad():
        same = float(gate.factors[0].float().sum()) == float(total)
    if not same:
        watch.copied = None
        warnings.warn(
            f"The factors of this copy of a Dual LoRA model have changed since it was made, but its gate is where it was, at "
            f"{float(ramp(gate.step, gate.warmup_steps)):.2f}: the counter is a buffer, so average state_dict() or buffers() "
            "too, as AveragedModel(..., use_buffers=True) does, or copy them.",
            stacklevel=2,
        )


def _expect_steps(layer: Any, adapter: str, watch: _Watch) -> None:
    """Warns if optimizers step again and again, but none that holds the factors: between two training forwards that
    begin a new gradient (it is None) some optimizer stepped, and this gate was not counted."""
    global _idle_said
    before, watch.strangers = watch.strangers, _strangers
    if before is None or before == _strangers:
        return
    gate = _gate_of(layer, adapter)
    trained = [] if gate is None else [p for p in gate.factors if p.requires_grad]
    if not trained or any(p.grad is not None for p in trained):
        return
    watch.idle += 1
    if watch.idle == IDLE_BEFORE_WARNING and _idle_said != _strangers:
        _idle_said = _strangers  # the other layers of the model would say the same
        warnings.warn(
            f"{IDLE_BEFORE_WARNING} optimizer steps passed, but no optimizer that torch can see holds the Dual LoRA "
            f"factors of this model ({layer.module_name or type(layer).__name__} and others): their gate does not open and "
            "they learn nothing. Put the factors into your optimizer, or call duallora.advance_gate(model) after each step.",
            stacklevel=2,
        )


def warn_never_trained(verb: str, layers: Iterable[Any], adapter: str, stacklevel: int = 2) -> None:
    """Name those layers whose factors no optimizer step ever had a gradient for, while others' had."""
    with torch.no_grad():
        gates = [(x, g) for x in layers for g in x.gates() if g.name == adapter and not g.step.is_meta]
        gates = [(x, g) for x, g in gates if any(p.requires_grad for p in g.factors)]
        steps = torch.stack([g.step.cpu().float() for _, g in gates]).tolist() if gates else []
    names = [x.module_name for (x, _), step in zip(gates, steps, strict=True) if step == 0]
    if names and any(steps):
        warnings.warn(
            f"{verb} a Dual LoRA adapter of which {len(names)} adapted layers never got a gradient, so they hold what they "
            f"started with: {named(names)}. Leave them out (exclude_modules), or train on rows that reach them.",
            stacklevel=stacklevel + 1,
        )


def _gates_of(model: nn.Module, active_only: bool) -> list[Gate]:
    layers = [module for module in model.modules() if isinstance(module, Gated)]
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
        f"full scale. It opens further as training goes on; if this is its end, train again with warmup_steps={share_of(step)}, "
        'or "auto" with transformers\' Trainer.'
    )


def advance_gate(model: nn.Module, steps: int = 1) -> None:
    """Count ``steps`` optimizer steps (>= 0) by hand, for optimizers torch cannot see. Merged adapters stay as they are.

    Raises:
        ValueError: ``steps`` is negative, or the model has no Dual LoRA layer.
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}, but the gate only moves forward: give a number >= 0.")
    _gates_of(model, active_only=False)  # or there is nothing to count
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Gated)]
    with torch.no_grad():
        for layer in layers:
            for g in layer.gates():
                if not g.frozen and any(p.requires_grad for p in g.factors):
                    _as_float32(g.step).add_(steps)
                    layer.gate_watches[g.name].steps.setdefault(_BY_HAND, 0)

"""How a training run's Dual LoRA layers fare, in the logs it writes anyway: ``duallora.watch(trainer)``."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from duallora.core.equation import Update, clip_direction_gradient, sign
from duallora.core.gate import gate, named, tracked_layers
from duallora.core.settings import share_of
from duallora.tuner.config import DualLoraConfig
from duallora.tuner.layer import DualLoraLayer, is_ordinary
from duallora.tuner.linear import Linear

logger = logging.getLogger(__name__)

ROWS = 4  # of dW that are looked at in each layer: a few hundredths of a step's time, once a log
PATIENCE = 3  # logs in a row that must show the same before it is warned of
STILL = 1e-4  # share of signs that turn from log to log in the middle of a run; in sound ones above 1e-2
UNSETTLED = 0.25  # the same in its second half; in sound runs less than 0.2


def watch(trainer: Any) -> Any:
    """Adds what the Dual LoRA layers do to everything the trainer logs, and warns of what cannot learn.

    With each training loss, from :data:`ROWS` output rows of every layer, the same throughout:

    * ``gate``: mean gate of the active layers, in [0, 1].
    * ``frozen_share``: share of entries with ReLU(B A) = 0, which neither move a weight nor have a gradient.
    * ``sign_flips``: share of the signs of D C that changed since the last log.
    * ``clip_share``: share of entries of dL/d(D C) that the clip of Eq. 7 (or 12) cut in the last step, by the layer's inputs and
      its output's gradient. Linear layers alone, and not with DoRA.
    * ``update_size``: |dW| / |W0|, of plain weights.
    * ``layers_without_gradient``: layers whose factors all had a gradient of 0 in the last step; left out where it is 0.

    A warning names, once, layers that are dead (no entry above 0 in three logs), a warm-up that the run will not reach the
    end of, and signs that stand still in the middle of the run (next to none turned in three logs) or do not settle (more than a
    quarter turned in each of three logs of its second half).

    Args:
        trainer: a transformers ``Trainer`` or one of its kin (TRL's), before ``train()``.

    Returns:
        The same object, so that ``duallora.watch(Trainer(...)).train()`` is one line.

    Raises:
        ValueError: its model has no Dual LoRA layer.
    """
    watcher = Watcher(trainer.model)
    plain = trainer.log

    def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        return plain({**logs, **watcher.measure()} if "loss" in logs else logs, *args, **kwargs)

    trainer.log = log
    trainer.add_callback(watcher)
    return trainer


class RampOfTheRun(TrainerCallback):
    """Gives adapters of ``warmup_steps="auto"`` their number of steps, :func:`duallora.core.settings.share_of` the run's."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, DualLoraLayer)] if model is not None else []
        for config in {id(config): config for layer in layers for config in layer.duallora_config.values()}.values():
            mine = _holders(layers, config)
            # Of an earlier model's run, where one object configures several: nothing of this one has been trained with it.
            is_stale = config.warmup_steps == getattr(config, "resolved", None) and not any(
                float(layer.duallora_step[adapter]) for layer, adapter in mine
            )
            if state.max_steps <= 0 or not (config.warmup_steps == "auto" or is_stale):
                continue
            steps = share_of(state.max_steps)
            if len(_holders(tracked_layers(), config)) > len(mine):  # another model is using it
                config = _own_copy(config, model, mine)
            config.warmup_steps = config.resolved = steps
            logger.info("warmup_steps is %d of this run's %d steps", steps, state.max_steps)


def _holders(layers: Iterable[Any], config: DualLoraConfig) -> list[tuple[Any, str]]:
    """(layer, adapter) that this very object configures."""
    return [
        (layer, adapter)
        for layer in layers
        for adapter, held in list(getattr(layer, "duallora_config", {}).items())
        if held is config
    ]


def _own_copy(config: DualLoraConfig, model: Any, mine: Iterable[tuple[Any, str]]) -> DualLoraConfig:
    """A copy in the place of ``config`` in ``model``, whose layers are ``mine``."""
    own = copy.copy(config)
    for layer, adapter in mine:
        layer.duallora_config[adapter] = own
    for module in model.modules():
        known: Any = getattr(module, "peft_config", None)
        for adapter, held in list(known.items()) if isinstance(known, dict) else ():
            if held is config:
                known[adapter] = own
    return own


class Watcher(TrainerCallback):
    """What :func:`watch` measures of one model; a callback, to see gradients before they are applied."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = [layer for layer in model.modules() if isinstance(layer, DualLoraLayer) and layer.duallora_A]
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no Dual LoRA layer to watch: add an adapter first.")
        draw = torch.Generator().manual_seed(0)
        self.rows = [torch.randperm(layer.out_features, generator=draw)[:ROWS].sort().values for layer in self.layers]
        self.signs: list[Tensor | None] = [None] * len(self.layers)
        self.base: list[float | None] = [_mean_square(layer) for layer in self.layers]
        self.dead_logs = [0] * len(self.layers)
        self.still_logs = self.unsettled_logs = 0
        self.progress = 0.0  # share of the run's steps that are done
        self.clipped: list[Tensor] = []  # of each layer in the step to be logged
        self.halves: dict[int, dict[str, Tensor]] = {}  # of a layer under gradient checkpointing: x, or rows of dY
        self.hooks: list[Any] = []
        self.said: set[str] = set()
        self.without_gradient = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ramps = [gate.warmup_steps for layer in self.layers for gate in layer.gates(active_only=True)]
        longest, steps = max(ramps, default=0), state.max_steps
        if longest > steps > 0:
            self._say(
                "ramp",
                f"this run has {steps} optimizer steps, but warmup_steps={longest}: its gate ends at {steps / longest:.2f}, "
                f'and dW at that share of its size. Set warmup_steps to {share_of(steps)}, or to "auto"',
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress = state.global_step / max(state.max_steps, 1)
        self._let_go()
        if _is_logged(state):
            self.clipped = []
            for at, layer in enumerate(self.layers):
                if isinstance(layer, Linear):
                    self.hooks.append(layer.register_forward_pre_hook(partial(self._look_at_input, at)))
                    self.hooks.append(layer.register_forward_hook(partial(self._look_at_forward, at)))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._let_go()
        if _is_logged(state):
            opened = gate(self.model) > 0  # while it is shut none has one
            self.without_gradient = sum(not _has_gradient(layer) for layer in self.layers) if opened else 0

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The numbers of now, by the names of :func:`watch`."""
        frozen: dict[int, Tensor] = {}
        flips, sizes, base = [], [], 0.0
        for at, layer in enumerate(self.layers):
            if (own := self._own(at)) is None:
                continue
            if own.magnitude == "relu":
                frozen[at] = (own.B.float() @ own.A.float() <= 0).float().mean()
            if own.C is not None and own.D is not None and own.direction != "identity":
                signs = sign(own.D.float() @ own.C.float())
                before, self.signs[at] = self.signs[at], signs
                if before is not None:
                    flips.append((signs != before.to(signs.device)).float().mean())
            if (held := self.base[at]) is not None:
                sizes.append(own.delta().square().mean() * layer.in_features * layer.out_features)
                base += held * layer.in_features * layer.out_features
        found = {"gate": gate(self.model)}
        if frozen:
            shares = _together(frozen.values()).tolist()
            found["frozen_share"] = sum(shares) / len(shares)
            self._look_for_dead(dict(zip(frozen, shares, strict=True)))
        if flips:
            found["sign_flips"] = float(_together(flips).mean())
            self._look_for_restless(found["sign_flips"], found["gate"])
        if self.clipped:
            found["clip_share"] = float(_together(self.clipped).mean())
        if base:
            found["update_size"] = (float(_together(sizes).sum()) / base) ** 0.5
        if self.without_gradient:
            found["layers_without_gradient"] = float(self.without_gradient)
        return found

    def _own(self, at: int) -> Update | None:
        """The rows of dW that are looked at, of the first adapter that is here as a whole."""
        layer = self.layers[at]
        adapter = next((name for name in layer._acting() if _is_whole(layer.duallora_A[name])), None)
        return (
            None if adapter is None else layer._update(adapter).rows(self.rows[at].to(layer.duallora_A[adapter].device))
        )

    def _look_at_input(self, at: int, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling() and _in_backward() and isinstance(inputs[0], Tensor):
            self._meet(at, x=inputs[0].detach())

    def _look_at_forward(self, at: int, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or layer.duallora_m:
            return
        if isinstance(output, Tensor) and output.requires_grad:
            # Held weakly: what autograd does not keep for the backward shall not be kept for this.
            output.register_hook(partial(self._look_at_gradient, at, weakref.ref(inputs[0])))

    def _look_at_gradient(self, at: int, held: weakref.ref[Tensor], dY: Tensor) -> None:
        dY, x = dY.flatten(0, -2)[:, self.rows[at].to(dY.device)], held()
        if x is None:
            self._meet(at, dY=dY)
        else:
            self.halves.pop(at, None)
            self._count(at, x, dY)

    def _meet(self, at: int, **half: Tensor) -> None:
        """Of what is checkpointed the input comes again within the backward, before the output's gradient or after it."""
        halves = self.halves.setdefault(at, {})
        halves |= half
        if len(halves) == 2:
            self._count(at, **self.halves.pop(at))

    @torch.no_grad()
    def _count(self, at: int, x: Tensor, dY: Tensor) -> None:
        own, x = self._own(at), x.flatten(0, -2)
        if own is None or own.direction != "ste" or own.ste_clip not in ("chain", "update") or len(x) != len(dY):
            return
        G = dY.float().T @ x.float()
        M = own._replace(initial=()).delta()  # M . Sign(Q): the clip is symmetric
        cut, whole = (clip_direction_gradient(G, M, M, "ste", clip) for clip in (own.ste_clip, "none"))
        self.clipped.append((cut != whole).float().mean())

    def _let_go(self) -> None:
        self.halves.clear()
        while self.hooks:
            self.hooks.pop().remove()

    def _look_for_restless(self, share: float, opened: float) -> None:
        still = share < STILL and opened > 0 and 0.25 <= self.progress <= 0.75
        self.still_logs = self.still_logs + 1 if still else 0
        self.unsettled_logs = self.unsettled_logs + 1 if share > UNSETTLED and self.progress >= 0.5 else 0
        if self.still_logs == PATIENCE:
            self._say(
                "still",
                f"the signs of D C stand still: fewer than one in {1 / STILL:,.0f} turned in each of the last {PATIENCE} logs. "
                "Either the learning rate is too low for them, or it was so high that D C is far from 0 everywhere: "
                "try another, and see whether C and D are trained",
            )
        if self.unsettled_logs == PATIENCE:
            self._say(
                "unsettled",
                f"the signs of D C do not settle: {share:.0%} turned since the last log, in the second half of the run. "
                "Lower the learning rate, or let it decay",
            )

    def _look_for_dead(self, shares: dict[int, float]) -> None:
        for at, share in shares.items():
            self.dead_logs[at] = self.dead_logs[at] + 1 if share == 1 else 0
        dead = [layer for count, layer in zip(self.dead_logs, self.layers, strict=True) if count == PATIENCE]
        if dead:
            self._say(
                "dead",
                f"{len(dead)} layers are dead: ReLU(B A) is 0 wherever it was looked at, so they have no gradient. "
                f"{named(layer.module_name for layer in dead)}. Lower the learning rate, or use a larger r1",
            )

    def _say(self, what: str, words: str) -> None:
        if what not in self.said:
            self.said.add(what)
            logger.warning("%s", words)


def _is_logged(state: Any) -> bool:
    """Whether the step under way is one whose loss is logged."""
    return (state.global_step + 1) % max(int(state.logging_steps), 1) == 0


def _in_backward() -> bool:
    """Whether autograd runs this, as it does what was checkpointed."""
    return torch._C._current_graph_task_id() != -1


@torch.no_grad()
def _mean_square(layer: DualLoraLayer) -> float | None:
    """Of the entries of W0; None where it is quantized, sharded or not here."""
    W = getattr(layer.get_base_layer(), "weight", None)
    return float(torch.linalg.vector_norm(W, dtype=torch.float32)) ** 2 / W.numel() if is_ordinary(W) else None  # type: ignore[union-attr]


def _together(values: Iterable[Tensor]) -> Tensor:
    """Numbers of layers that may be on several devices, as one tensor."""
    values = [*values]
    return torch.stack([value.to(values[0].device) for value in values])


def _is_whole(factor: Any) -> bool:
    """Whether a factor is one matrix that is here: no shard of it, and no stack of experts."""
    return is_ordinary(factor) and factor.ndim == 2


def _has_gradient(layer: DualLoraLayer) -> bool:
    """Of a layer whose factors are shards nothing is said."""
    factors: list[Any] = [f for name in layer.duallora_A for f in layer._factors(name) if f is not None]
    return not all(map(is_ordinary, factors)) or any(f.grad is not None and bool(f.grad.any()) for f in factors)

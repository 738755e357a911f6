"""How a training run's Dual LoRA layers fare, in the logs it writes anyway: ``duallora.watch(trainer)``."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from duallora.core.equation import sign
from duallora.core.gate import gate, named
from duallora.core.settings import share_of
from duallora.tuner.layer import DualLoraLayer, is_ordinary

logger = logging.getLogger(__name__)

ROWS = 4  # of dW that are looked at in each layer: a few hundredths of a step's time, once a log
DEAD_LOGS = 3  # logs in a row without a moving entry before a layer is called dead


def watch(trainer: Any) -> Any:
    """Adds what the Dual LoRA layers do to everything the trainer logs, and warns of what cannot learn.

    With each training loss, from :data:`ROWS` output rows of every layer, the same throughout:

    * ``gate``: mean gate of the active layers, in [0, 1].
    * ``frozen_share``: share of entries with ReLU(B A) = 0, which neither move a weight nor have a gradient.
    * ``sign_flips``: share of the signs of D C that changed since the last log.
    * ``update_size``: |dW| / |W0|, of plain weights.
    * ``layers_without_gradient``: layers whose factors all had a gradient of 0 in the last step; left out where it is 0.

    A warning names, once, layers that are dead (no entry above 0 in three logs), and a warm-up that the run will not reach
    the end of.

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
            if config.warmup_steps == "auto" and state.max_steps > 0:
                config.warmup_steps = share_of(state.max_steps)
                logger.info("warmup_steps is %d of this run's %d steps", config.warmup_steps, state.max_steps)


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

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (state.global_step + 1) % max(int(state.logging_steps), 1) == 0:
            opened = gate(self.model) > 0  # while it is shut none has one
            self.without_gradient = sum(not _has_gradient(layer) for layer in self.layers) if opened else 0

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The numbers of now, by the names of :func:`watch`."""
        frozen: dict[int, Tensor] = {}
        flips, sizes, base = [], [], 0.0
        for at, layer in enumerate(self.layers):
            adapter = next((name for name in layer._acting() if _is_whole(layer.duallora_A[name])), None)
            if adapter is None:
                continue
            update = layer._update(adapter)
            own = update.rows(self.rows[at].to(update.A.device))
            if update.magnitude == "relu":
                frozen[at] = (own.B.float() @ own.A.float() <= 0).float().mean()
            if own.C is not None and own.D is not None and update.direction != "identity":
                signs = sign(own.D.float() @ own.C.float())
                before, self.signs[at] = self.signs[at], signs
                if before is not None:
                    flips.append((signs != before.to(signs.device)).float().mean())
            if (held := self.base[at]) is not None:
                sizes.append(own.delta().square().mean() * layer.in_features * layer.out_features)
                base += held * layer.in_features * layer.out_features
        found = {"gate": gate(self.model)}
        if frozen:
            shares = torch.stack([*frozen.values()]).tolist()
            found["frozen_share"] = sum(shares) / len(shares)
            self._look_for_dead(dict(zip(frozen, shares, strict=True)))
        if flips:
            found["sign_flips"] = float(torch.stack(flips).mean())
        if base:
            found["update_size"] = (float(torch.stack(sizes).sum()) / base) ** 0.5
        if self.without_gradient:
            found["layers_without_gradient"] = float(self.without_gradient)
        return found

    def _look_for_dead(self, shares: dict[int, float]) -> None:
        for at, share in shares.items():
            self.dead_logs[at] = self.dead_logs[at] + 1 if share == 1 else 0
        dead = [layer for count, layer in zip(self.dead_logs, self.layers, strict=True) if count == DEAD_LOGS]
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


@torch.no_grad()
def _mean_square(layer: DualLoraLayer) -> float | None:
    """Of the entries of W0; None where it is quantized, sharded or not here."""
    W = getattr(layer.get_base_layer(), "weight", None)
    return float(torch.linalg.vector_norm(W, dtype=torch.float32)) ** 2 / W.numel() if is_ordinary(W) else None  # type: ignore[union-attr]


def _is_whole(factor: Any) -> bool:
    """Whether a factor is one matrix that is here: no shard of it, and no stack of experts."""
    return is_ordinary(factor) and factor.ndim == 2


def _has_gradient(layer: DualLoraLayer) -> bool:
    """Of a layer whose factors are shards nothing is said."""
    factors: list[Any] = [f for name in layer.duallora_A for f in layer._factors(name) if f is not None]
    return not all(map(is_ordinary, factors)) or any(f.grad is not None and bool(f.grad.any()) for f in factors)

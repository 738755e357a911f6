"""The loops that people train with, each run on LoRA and on Dual LoRA: did it train, and did the gate count its steps?

``LOOPS`` is the table. A loop takes a :class:`Task`, trains its model and returns what :meth:`Task.judge` says of each
model that somebody would use afterwards. LoRA's result says whether the loop ought to train; the number of steps that
the loop knows it took says where the gate ought to stand.

    python tests/loops.py lbfgs peft                   one loop by one method
    python tests/loops.py --output results/loops.json --page docs/support.md   all of them (``make loops``)
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import functools
import io
import json
import multiprocessing
import pickle
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import duallora
import duallora.nn
from duallora.store import record

STEPS = 40
RAMP = 64  # warm-up steps: above STEPS, so that the gate tells the count; a power of two, so that it tells it exactly
SHORT = 8  # the ramp of loops that ask for an open gate
DECAY = 0.9  # of the averages
TRAINED = 0.9  # of the first loss, at which an adapter with a closed gate stays to the bit

FORMS = {  # of DualLoraConfig, for the long sweep
    "dora": {"use_dora": True},
    "added": {"forward": "added"},
    "residual": {"warmup": "residual"},
    "reference": {"backend": "reference"},
}
DUAL = ("peft", "nn", *FORMS)
METHODS = ("lora", *DUAL)
WITH_PEFT = ("lora", "peft", *FORMS)
Judgements = list[dict[str, Any]]


class Net(nn.Module):
    """[n, 5] tokens to [n, 6] numbers, or to their loss where ``labels`` are given."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.first, self.second = nn.Embedding(20, 12), nn.Linear(12, 24), nn.Linear(24, 6)
        self.reentrant: bool | None = None  # None: no checkpointing

    def block(self, hidden: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(hidden)).mean(1))

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.embedding(ids)
        if self.reentrant is None:
            out = self.block(hidden)
        else:
            if not hidden.requires_grad:
                hidden.requires_grad_()
            out = checkpoint(self.block, hidden, use_reentrant=self.reentrant)
        return out if labels is None else {"loss": F.mse_loss(out, labels), "logits": out}


def data() -> tuple[Tensor, Tensor]:
    """64 rows: what another network of the same shape says of random tokens, standardized."""
    ids = torch.randint(0, 20, (64, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = Net(seed=7)(ids)
    return ids, (out - out.mean(0)) / out.std(0)


class Task:
    """A fresh adapted model and its data.

    Args:
        method: one of METHODS.
        ramp: its warm-up steps.
    """

    lr = 0.03

    def __init__(self, method: str, ramp: int = RAMP) -> None:
        self.method, self.ramp = method, ramp
        self.ids, self.targets = data()
        self.model = self.build()
        self.start = float(self.loss().detach())

    def build(self) -> nn.Module:
        """The adapted model as it is before training: the same bits each time."""
        net, layers = Net(seed=0), ["embedding", "first", "second"]
        if self.method == "lora":
            model = peft.get_peft_model(net, peft.LoraConfig(r=5, lora_alpha=8, target_modules=layers))
        elif self.method == "nn":
            model = duallora.nn.adapt(
                net, layers[1:], r1=5, r2=6, alpha=8, warmup_steps=self.ramp, direction_init_std=0.002
            )
        else:
            form = FORMS.get(self.method, {})
            config = duallora.DualLoraConfig(
                r1=5,
                r2=6,
                alpha=8,
                target_modules=layers,
                warmup_steps=self.ramp,
                init_seed=3,
                **{"direction_init_std": 0.002, **form},
            )
            model = peft.get_peft_model(net, config)
        return model.train()

    @property
    def net(self) -> Net:
        return next(module for module in self.model.modules() if isinstance(module, Net))

    def loss(self, rows: slice = slice(None), model: nn.Module | None = None) -> Tensor:
        """[] mean squared error of ``model`` (the task's own) on some rows."""
        out = (self.model if model is None else model)(self.ids[rows])
        return F.mse_loss(out, self.targets[rows].to(out.dtype))

    def trained(self, *letters: str, model: nn.Module | None = None) -> list[nn.Parameter]:
        """The parameters that are trained; of the factors ``letters`` (of A, B, C, D) alone, where given."""
        named = [
            (name, p) for name, p in (self.model if model is None else model).named_parameters() if p.requires_grad
        ]
        return [p for name, p in named if not letters or factor(name) in letters]

    def optimizer(self, *, of: type = torch.optim.AdamW, parameters: Iterable | None = None, **options: Any) -> Any:
        """One over the trained parameters, or those given."""
        options = {"lr": self.lr, **options}
        return of(self.trained() if parameters is None else list(parameters), **options)

    def train(
        self, optimizer: Any, steps: int, model: nn.Module | None = None, backward: Callable[[], Any] | None = None
    ) -> None:
        """``steps`` times zero_grad, forward and ``backward`` (that of the loss), step."""
        for _ in range(steps):
            optimizer.zero_grad()
            backward() if backward else self.loss(model=model).backward()
            optimizer.step()

    def run(self, steps: int = STEPS, optimizer: Any = None, **how: Any) -> Judgements:
        """:meth:`train`, judged."""
        self.train(optimizer or self.optimizer(), steps, **how)
        return [self.judge(steps)]

    @torch.no_grad()
    def judge(self, steps: float, model: nn.Module | None = None, twin: nn.Module | None = None) -> dict[str, Any]:
        """What became of ``model`` (the task's own), whose layers had ``steps`` optimizer steps on the mean.

        ``fall``: last loss over first. ``counted`` and ``expected``: the gate as a number of steps, where there is one.
        ``twin``: the largest difference of its outputs to those of the model that it ought to be equal to.
        """
        model = (self.model if model is None else model).eval()
        found: dict[str, Any] = {"fall": float(self.loss(model=model)) / self.start}
        if self.method not in ("lora", "residual"):
            found |= {"counted": duallora.gate(model) * self.ramp, "expected": min(steps, self.ramp)}
        if twin is not None:
            found["twin"] = float((model(self.ids) - twin.eval()(self.ids)).abs().max())
        return found


def factor(name: str) -> str:
    """A, B, C or D of a parameter's name; LoRA's A and B included."""
    part = next(part for part in name.split(".") if part.startswith(("lora_", "duallora_")))
    return part[-1]


@dataclass
class Loop:
    """One row of the table.

    ``ramp``: warm-up steps of its task. ``apart``: run it in another process, since a fault may kill the interpreter.
    ``slow``: not in every test run. ``learns``: False for a user's mistake, of which nobody learns anything.
    ``says``: words of the warning that is due where the loop cannot do what it does with LoRA; else none may come.
    """

    run: Callable[[Task], Judgements]
    family: str
    ramp: int = RAMP
    apart: bool = False
    slow: bool = False
    learns: bool = True
    says: str = ""
    methods: tuple[str, ...] = METHODS


LOOPS: dict[str, Loop] = {}


def loop(family: str, **how: Any) -> Callable:
    """Enter a function into the table."""

    def enter(run: Callable[[Task], Judgements]) -> Callable[[Task], Judgements]:
        LOOPS[run.__name__] = Loop(run, family, **how)
        return run

    return enter


# -- plain loops and what they do to gradients ---------------------------------------------------------------------------


@loop("gradients")
def plain(task: Task) -> Judgements:
    return task.run()


@loop("gradients", slow=True)
def plain_to_an_open_gate(task: Task) -> Judgements:
    return task.run(2 * STEPS)


@loop("gradients")
def accumulation_of_four(task: Task) -> Judgements:
    return task.run(backward=lambda: [(task.loss(slice(k, None, 4)) / 4).backward() for k in range(4)])


@loop("gradients", slow=True)
def gradients_kept_as_zeros(task: Task) -> Judgements:
    optimizer = task.optimizer()
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        task.loss().backward()
        optimizer.step()
    return [task.judge(STEPS)]


@loop("gradients", learns=False)
def gradients_dropped_before_the_step(task: Task) -> Judgements:
    """A user's mistake: nothing is applied, so nothing counts."""
    optimizer = task.optimizer()
    for _ in range(STEPS):
        task.loss().backward()
        optimizer.zero_grad()
        optimizer.step()
    return [task.judge(0)]


@loop("gradients", slow=True)
def clipped_gradients_and_a_schedule(task: Task) -> Judgements:
    optimizer = task.optimizer()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2 * task.lr, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        task.loss().backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return [task.judge(STEPS)]


@loop("gradients", slow=True)
def gradient_hooks(task: Task) -> Judgements:
    for p in task.trained():
        p.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return task.run()


@loop("gradients")
def two_losses_of_one_graph(task: Task) -> Judgements:
    def backward() -> None:
        out = task.model(task.ids)
        F.mse_loss(out[:, :3], task.targets[:, :3]).backward(retain_graph=True)
        F.mse_loss(out[:, 3:], task.targets[:, 3:]).backward()

    return task.run(backward=backward)


@loop("gradients", slow=True)
def gradients_by_autograd_grad(task: Task) -> Judgements:
    def backward() -> None:
        for p, g in zip(task.trained(), torch.autograd.grad(task.loss(), task.trained()), strict=True):
            p.grad = g

    return task.run(backward=backward)


@loop("gradients")
def gradient_penalty(task: Task) -> Judgements:
    """Second derivatives: those of plain autograd, which ``backend="reference"`` is."""
    twin = Task("reference" if task.method == "peft" else task.method, task.ramp)
    for each in (task, twin):

        def backward(each: Task = each) -> None:
            gradients = torch.autograd.grad(loss := each.loss(), each.trained(), create_graph=True)
            (loss + 1e-3 * sum(g.square().sum() for g in gradients)).backward()

        each.run(backward=backward)
    return [task.judge(STEPS, twin=twin.model)]


@loop("gradients")
def evaluation_in_between(task: Task) -> Judgements:
    """Evaluation, in inference mode too, neither counts nor leaves anything behind: as without it, bit for bit."""
    optimizer, plain = task.optimizer(), Task(task.method, task.ramp)
    for n in range(STEPS):
        task.train(optimizer, 1)
        task.model.eval()
        with torch.inference_mode() if n % 2 else torch.no_grad():
            task.loss()
        task.model.train()
    plain.train(plain.optimizer(), STEPS)
    return [task.judge(STEPS, twin=plain.model)]


@loop("gradients", slow=True)
def training_in_evaluation_mode(task: Task) -> Judgements:
    task.model.eval()
    return task.run()


@loop("gradients")
def step_in_another_thread(task: Task) -> Judgements:
    optimizer = task.optimizer()
    for _ in range(STEPS):
        optimizer.zero_grad()
        for work in (lambda: task.loss().backward(), optimizer.step):
            together(work)
    return [task.judge(STEPS)]


# -- memory --------------------------------------------------------------------------------------------------------------


def checkpointed(task: Task, reentrant: bool) -> Judgements:
    task.net.reentrant = reentrant
    task.train(task.optimizer(), STEPS)
    plain = Task(task.method, task.ramp)
    plain.train(plain.optimizer(), STEPS)
    return [task.judge(STEPS, twin=plain.model)]


@loop("memory")
def checkpointing(task: Task) -> Judgements:
    return checkpointed(task, reentrant=False)


@loop("memory")
def reentrant_checkpointing(task: Task) -> Judgements:
    return checkpointed(task, reentrant=True)


@loop("memory", slow=True)
def checkpointing_with_accumulation(task: Task) -> Judgements:
    task.net.reentrant = False
    return accumulation_of_four(task)


@loop("memory")
def activations_offloaded(task: Task) -> Judgements:
    with torch.autograd.graph.save_on_cpu():
        return task.run()


def step_in_backward(task: Task) -> None:
    """One optimizer per parameter, which steps as soon as its gradient is complete."""
    for p in task.trained():
        optimizer = task.optimizer(parameters=[p])

        def step(_: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)


@loop("memory", slow=True)
def optimizer_in_backward(task: Task) -> Judgements:
    step_in_backward(task)
    for _ in range(STEPS):
        task.loss().backward()
    return [task.judge(STEPS)]


@loop("memory", slow=True)
def optimizer_in_backward_with_checkpointing(task: Task) -> Judgements:
    task.net.reentrant = False
    return optimizer_in_backward(task)


@loop("memory")
def optimizer_in_backward_by_torch(task: Task) -> Judgements:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.AdamW, task.trained(), {"lr": task.lr})
    for _ in range(STEPS):
        task.loss().backward()
    return [task.judge(STEPS)]


# -- precision -----------------------------------------------------------------------------------------------------------


@loop("precision")
def autocast_bf16(task: Task) -> Judgements:
    def backward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.loss()
        loss.backward()

    return task.run(backward=backward)


def scaled(task: Task, **options: Any) -> Judgements:
    """Every fourth loss overflows: GradScaler skips that step, which does not count."""
    optimizer, scaler = task.optimizer(**options), torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
    for n in range(STEPS + STEPS // 3):
        optimizer.zero_grad()
        scaler.scale(task.loss() * (float("inf") if n % 4 == 1 else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(task.trained(), 5.0)
        scaler.step(optimizer)
        scaler.update()
    return [task.judge(STEPS)]


@loop("precision")
def grad_scaler_that_skips(task: Task) -> Judgements:
    return scaled(task)


@loop("precision")
def grad_scaler_that_skips_with_a_fused_optimizer(task: Task) -> Judgements:
    return scaled(task, fused=True)


@loop("precision", slow=True)
def cast_to_bf16_in_mid_run(task: Task) -> Judgements:
    task.train(task.optimizer(), STEPS // 2)
    task.model.to(torch.bfloat16)
    task.train(task.optimizer(), STEPS // 2)
    return [task.judge(STEPS)]


@loop("precision", ramp=1024)
def cast_to_bf16_and_back_far_into_the_ramp(task: Task) -> Judgements:
    """A counter in bf16 could not tell 301 from 300, and would not move on by 1."""
    if task.method not in ("lora", "residual"):
        duallora.advance_gate(task.model, 301)
    task.model.to(torch.bfloat16)
    task.train(task.optimizer(), STEPS // 2)
    task.model.to(torch.float32)
    task.train(task.optimizer(), STEPS // 2)
    return [task.judge(301 + STEPS)]


@loop("precision")
def float64(task: Task) -> Judgements:
    task.model.double()
    return task.run()


# -- compilers -----------------------------------------------------------------------------------------------------------


@loop("compilers")
def compiled(task: Task) -> Judgements:
    return task.run(model=torch.compile(task.model, backend="aot_eager", fullgraph=True))


@loop("compilers", slow=True)
def compiled_optimizer(task: Task) -> Judgements:
    optimizer = task.optimizer()
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    for _ in range(STEPS):
        optimizer.zero_grad()
        task.loss().backward()
        step()
    return [task.judge(STEPS)]


@loop("compilers", slow=True)
def compiled_train_step(task: Task) -> Judgements:
    """Forward, loss and backward in one compiled function."""
    forward_and_loss = torch.compile(task.loss, backend="aot_eager")
    return task.run(backward=lambda: forward_and_loss().backward())


# -- optimizers ----------------------------------------------------------------------------------------------------------


def closed(task: Task, optimizer: Any) -> Callable[[], Tensor]:
    """What an optimizer calls that evaluates the loss by itself."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        (loss := task.loss()).backward()
        return loss

    return closure


@loop("optimizers", ramp=SHORT)
def lbfgs(task: Task) -> Judgements:
    """Several closures, one step. The ramp is short: what is solved at a half-open gate is none of the final problem's."""
    optimizer = task.optimizer(of=torch.optim.LBFGS, lr=0.5, max_iter=5, line_search_fn="strong_wolfe")
    closure = closed(task, optimizer)
    for _ in range(SHORT // 2):
        optimizer.step(closure)
    half_way = task.judge(SHORT // 2)
    del half_way["fall"]  # at the gate of this moment it was lower
    task.model.train()
    for _ in range(STEPS):
        optimizer.step(closure)
    return [half_way, task.judge(SHORT // 2 + STEPS)]


@loop("optimizers", slow=True)
def closure_of_adam(task: Task) -> Judgements:
    optimizer = task.optimizer()
    for _ in range(STEPS):
        optimizer.step(closed(task, optimizer))
    return [task.judge(STEPS)]


def each_anew(task: Task, *options: dict[str, Any]) -> Judgements:
    """A training for each of the optimizers."""
    tasks = [Task(task.method, task.ramp) for _ in options]
    return [one for each, own in zip(tasks, options, strict=True) for one in each.run(optimizer=each.optimizer(**own))]


@loop("optimizers", slow=True)
def every_optimizer_of_torch(task: Task) -> Judgements:
    kinds: dict[str, dict[str, float]] = {
        "Adam": {}, "Adamax": {}, "NAdam": {}, "RAdam": {"lr": 0.1}, "Adafactor": {"lr": 0.3}, "RMSprop": {"lr": 0.01},
        "Rprop": {}, "SGD": {"lr": 0.2, "momentum": 0.9},
    }  # fmt: skip
    return each_anew(task, *({"of": getattr(torch.optim, kind), **options} for kind, options in kinds.items()))


@loop("optimizers", slow=True)
def foreach_and_fused(task: Task) -> Judgements:
    return each_anew(task, {"foreach": True}, {"fused": True})


def interleaved(task: Task, groups: Iterable[list[nn.Parameter]]) -> Judgements:
    optimizers = [task.optimizer(parameters=group) for group in groups]
    for _ in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        task.loss().backward()
        for optimizer in optimizers:
            optimizer.step()
    return [task.judge(STEPS)]


@loop("optimizers", slow=True)
def an_optimizer_for_each_group(task: Task) -> Judgements:
    return interleaved(task, [task.trained("A", "C"), task.trained("B", "D")])


@loop("optimizers", slow=True)
def an_optimizer_for_each_group_the_last_first(task: Task) -> Judgements:
    return interleaved(task, [task.trained("B", "D"), task.trained("A", "C")])


@loop("optimizers")
def an_optimizer_for_each_parameter(task: Task) -> Judgements:
    return interleaved(task, [[p] for p in reversed(task.trained())])


@loop("optimizers", slow=True)
def parameter_groups(task: Task) -> Judgements:
    groups = [{"params": [p], "lr": task.lr * (1 + n % 2)} for n, p in enumerate(task.trained())]
    return task.run(optimizer=torch.optim.AdamW(groups, lr=task.lr))


@loop("optimizers")
def layers_added_to_the_optimizer_later(task: Task) -> Judgements:
    """Gradual unfreezing with ``add_param_group``: the layers that join later count from then on, the gate is the mean."""
    layers: dict[str, list[nn.Parameter]] = {}
    for name, p in task.model.named_parameters():
        if p.requires_grad:
            key = "second" if ".second." in f".{name}" else "others"
            layers.setdefault(key, []).append(p)
    for p in layers["others"]:
        p.requires_grad_(False)
    optimizer = task.optimizer(parameters=layers["second"])
    task.train(optimizer, STEPS // 2)
    for p in layers["others"]:
        p.requires_grad_(True)
    optimizer.add_param_group({"params": layers["others"]})
    task.train(optimizer, STEPS)
    late = 1 if task.method == "nn" else 2
    return [task.judge(STEPS + STEPS / 2 / (1 + late))]


@loop("optimizers")
def an_optimizer_anew_in_mid_run(task: Task) -> Judgements:
    for _ in range(4):
        task.train(task.optimizer(), STEPS // 4)
    return [task.judge(STEPS)]


@loop("optimizers", methods=tuple(method for method in DUAL if method != "residual"))  # which has no gate to count
def the_magnitude_group_then_the_direction_group(task: Task) -> Judgements:
    """Two stages, each with the other group frozen."""
    for group in ("AB", "CD"):
        for name, p in task.model.named_parameters():
            if "duallora_" in name:
                p.requires_grad_(factor(name) in group)
        task.train(task.optimizer(), STEPS // 2)
    return [task.judge(STEPS)]


@loop("optimizers", slow=True)
def only_b_is_trained(task: Task) -> Judgements:
    for name, p in task.model.named_parameters():
        if p.requires_grad and factor(name) != "B":
            p.requires_grad_(False)
    return task.run()


@loop("optimizers", slow=True)
def an_optimizer_that_holds_the_frozen_parameters_too(task: Task) -> Judgements:
    return task.run(optimizer=task.optimizer(parameters=task.model.parameters()))


@loop("optimizers")
def two_models_one_optimizer(task: Task) -> Judgements:
    """The second model takes part in every other step, so it counts half as many."""
    other = Task(task.method, task.ramp)
    optimizer = task.optimizer(parameters=task.trained() + other.trained())
    for n in range(2 * STEPS):
        optimizer.zero_grad()
        (task.loss() + other.loss() if n % 2 else task.loss()).backward()
        optimizer.step()
    return [task.judge(2 * STEPS), other.judge(STEPS)]


@loop("optimizers", slow=True)
def two_models_with_an_optimizer_each(task: Task) -> Judgements:
    other = Task(task.method, task.ramp)
    optimizers = task.optimizer(), other.optimizer()
    for n in range(2 * STEPS):
        task.train(optimizers[0], 1)
        if n % 2:
            other.train(optimizers[1], 1)
    return [task.judge(2 * STEPS), other.judge(STEPS)]


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization (arXiv 2010.01412): a step up by rho, and a step of ``inner`` with the gradient there."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, rho: float = 0.05) -> None:
        super().__init__(parameters, {"rho": rho})
        self.inner = torch.optim.AdamW(self.param_groups, lr=lr)
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def climb(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm() + 1e-12
        for p in parameters:
            self.state[p]["up"] = p.grad * (self.defaults["rho"] / norm)
            p.add_(self.state[p]["up"])
        self.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "up" in self.state[p]:
                    p.sub_(self.state[p].pop("up"))
        self.inner.step()
        self.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        self.climb()
        with torch.enable_grad():
            closure().backward()
        self.descend()


@loop("optimizers", slow=True)
def sharpness_aware_in_two_calls(task: Task) -> Judgements:
    optimizer = task.optimizer(of=Sam)
    for _ in range(STEPS):
        task.loss().backward()
        optimizer.climb()
        task.loss().backward()
        optimizer.descend()
    return [task.judge(STEPS)]


@loop("optimizers")
def sharpness_aware_in_one_call(task: Task) -> Judgements:
    optimizer = task.optimizer(of=Sam)
    for _ in range(STEPS):
        task.loss().backward()
        optimizer.step(task.loss)
    return [task.judge(STEPS)]


class Lookahead:
    """No Optimizer of torch's, but around one (arXiv 1907.08610): every fifth step half-way back."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        self.inner = torch.optim.AdamW(parameters, lr=lr)
        self.slow, self.n = [p.detach().clone() for p in parameters], 0
        self.zero_grad = self.inner.zero_grad

    @torch.no_grad()
    def step(self) -> None:
        self.inner.step()
        self.n += 1
        if self.n % 5 == 0:
            for slow, p in zip(self.slow, self.inner.param_groups[0]["params"], strict=True):
                p.copy_(slow.lerp_(p, 0.5))


@loop("optimizers", slow=True)
def lookahead(task: Task) -> Judgements:
    return task.run(optimizer=task.optimizer(of=Lookahead))


@loop("optimizers", slow=True)
def masters_unseen_by_torch_and_a_call(task: Task) -> Judgements:
    """Steps on float32 copies, as DeepSpeed's: torch cannot see whose; ``advance_gate`` says it."""
    masters = [nn.Parameter(p.detach().clone()) for p in task.trained()]
    optimizer = task.optimizer(parameters=masters)
    for _ in range(STEPS):
        task.loss().backward()
        for master, p in zip(masters, task.trained(), strict=True):
            master.grad, p.grad = p.grad, None
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, task.trained(), strict=True):
                p.copy_(master)
        if task.method != "lora":
            duallora.advance_gate(task.model)
    return [task.judge(STEPS)]


# -- averages ------------------------------------------------------------------------------------------------------------


def averaged(task: Task, copies: nn.Module, update: Callable[[nn.Module], Any], start: int = 0) -> Judgements:
    """Train, average by ``update(model)`` after each step: the copy is the model that holds the averaged factors.

    The oracle averages the factors by hand and puts them into a copy of the trained model, whose gate is open.
    """
    optimizer, means = task.optimizer(), [p.detach().clone() for p in task.trained()]
    for n in range(STEPS):
        task.train(optimizer, 1)
        update(task.model)
        for mean, p in zip(means, task.trained(), strict=True):
            mean.lerp_(p.detach(), 1.0 if n < start else 1 - DECAY)
    wanted = copy.deepcopy(task.model)
    with torch.no_grad():
        for p, mean in zip(task.trained(model=wanted), means, strict=True):
            p.copy_(mean)
    after = (copies, reloaded(task, copies))
    return [task.judge(STEPS), *(task.judge(STEPS, model, twin=wanted) for model in after)]


def reloaded(task: Task, copies: nn.Module) -> nn.Module:
    """What is there again after the copy was saved and loaded, by PEFT's calls or duallora.nn's."""
    model = copies.module if isinstance(copies, AveragedModel) else copies
    if task.method == "nn":
        return duallora.nn.load_adapter_state_dict(task.build(), duallora.nn.adapter_state_dict(model))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return peft.PeftModel.from_pretrained(Net(seed=0), folder)


def averaged_pairwise(
    task: Task, mix: Callable[[Tensor, Tensor], Any], of: Callable[[nn.Module], Iterable[Tensor]] | None = None
) -> Judgements:
    """A copy made before training; after each step ``mix(mine, its)`` for each of its tensors (``of``: all of the state)."""
    ema, of = copy.deepcopy(task.model), of or (lambda model: model.state_dict().values())

    @torch.no_grad()
    def update(model: nn.Module) -> None:
        for mine, its in zip(of(ema), of(model), strict=True):
            mix(mine, its)

    return averaged(task, ema, update)


@loop("averages", ramp=SHORT)
def ema_by_lerp_of_the_floats(task: Task) -> Judgements:
    """Anything that is no float is left as it is in the copy."""
    return averaged_pairwise(task, lambda mine, its: mine.is_floating_point() and mine.lerp_(its, 1 - DECAY))


@loop("averages", ramp=SHORT, slow=True)
def ema_by_a_new_state_dict(task: Task) -> Judgements:
    """The average of the floats and the first value of the others, kept beside and loaded at the end."""
    kept = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    ema = copy.deepcopy(task.model)

    @torch.no_grad()
    def update(model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            if tensor.dtype.is_floating_point:
                kept[name] = DECAY * kept[name] + (1 - DECAY) * tensor
        ema.load_state_dict(kept)

    return averaged(task, ema, update)


@loop("averages", ramp=SHORT)
def ema_in_place_over_everything(task: Task) -> Judgements:
    """As timm's ModelEmaV2: deepcopy, then ``copy_`` of the mean into every entry of the state, integers too."""
    return averaged_pairwise(task, lambda mine, its: mine.copy_(DECAY * mine + (1 - DECAY) * its))


@loop("averages", ramp=SHORT, slow=True)
def ema_by_lerp_or_copy(task: Task) -> Judgements:
    """As timm's ModelEmaV3: floats by lerp, the others copied."""
    return averaged_pairwise(
        task, lambda mine, its: mine.lerp_(its, 1 - DECAY) if mine.is_floating_point() else mine.copy_(its)
    )


@loop("averages", ramp=SHORT, says="average state_dict() or buffers() too")
def ema_of_parameters_alone(task: Task) -> Judgements:
    """Buffers keep the value that they had when the copy was made: before training. No gate in a buffer can be right."""
    return averaged_pairwise(task, lambda mine, its: mine.lerp_(its, 1 - DECAY), nn.Module.parameters)


@loop("averages", ramp=SHORT, slow=True)
def ema_of_shadows_put_into_the_model(task: Task) -> Judgements:
    """As diffusers' EMAModel: shadow parameters, copied into the live model at the end."""
    shadows, last = [p.detach().clone() for p in task.model.parameters()], copy.deepcopy(task.model)

    @torch.no_grad()
    def update(model: nn.Module) -> None:
        last.load_state_dict(model.state_dict())
        for shadow, p, out in zip(shadows, model.parameters(), last.parameters(), strict=True):
            shadow.sub_((1 - DECAY) * (shadow - p))
            out.copy_(shadow)

    return averaged(task, last, update)


def averaged_by_torch(task: Task, **options: Any) -> Judgements:
    ema = AveragedModel(task.model, **options)
    return averaged(task, ema, ema.update_parameters, start=1)


@loop("averages", ramp=SHORT)
def ema_by_torch_with_buffers(task: Task) -> Judgements:
    return averaged_by_torch(task, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)


@loop("averages", ramp=SHORT, slow=True)
def ema_by_torch_without_buffers(task: Task) -> Judgements:
    return averaged_by_torch(task, multi_avg_fn=get_ema_multi_avg_fn(DECAY))


@loop("averages", ramp=SHORT, slow=True)
def ema_by_torch_one_by_one_with_buffers(task: Task) -> Judgements:
    return averaged_by_torch(task, avg_fn=get_ema_avg_fn(DECAY), use_buffers=True)


def stochastic(task: Task, use_buffers: bool) -> Judgements:
    """SWA over the second half of the run, with its learning rate: the plain mean of the factors."""
    optimizer = task.optimizer()
    swa, schedule = AveragedModel(task.model, use_buffers=use_buffers), SWALR(optimizer, swa_lr=task.lr / 2)
    kept = []
    for n in range(STEPS):
        task.train(optimizer, 1)
        if n >= STEPS // 2:
            swa.update_parameters(task.model)
            schedule.step()
            kept.append([p.detach().clone() for p in task.trained()])
    wanted = copy.deepcopy(task.model)
    with torch.no_grad():
        for p, *values in zip(task.trained(model=wanted), *kept, strict=True):
            p.copy_(torch.stack(values).mean(0))
    return [task.judge(STEPS), task.judge(STEPS, swa, twin=wanted)]


@loop("averages", ramp=SHORT)
def swa(task: Task) -> Judgements:
    return stochastic(task, use_buffers=False)


@loop("averages", ramp=SHORT, slow=True)
def swa_with_buffers(task: Task) -> Judgements:
    return stochastic(task, use_buffers=True)


# -- threads and processes -----------------------------------------------------------------------------------------------

CROWD = 80  # steps of each training beside another


def together(*works: Callable[[], Any]) -> None:
    """Run all at once, each in a thread; the first exception is raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def eager_switching() -> Iterator[None]:
    """Threads that change places after every microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@loop("threads and processes", apart=True, ramp=2 * CROWD)
def two_trainings_in_threads(task: Task) -> Judgements:
    """Each comes out as it does alone, bit for bit."""
    tasks = [task, Task(task.method, task.ramp)]
    alone = Task(task.method, task.ramp)
    alone.train(alone.optimizer(), CROWD)
    with eager_switching():
        together(*(lambda t=t: t.train(t.optimizer(), CROWD) for t in tasks))
    return [t.judge(CROWD, twin=alone.model) for t in tasks]


def beside(task: Task, other: Callable[[], Any]) -> Judgements:
    """Train while another thread does its own over and over; the training comes out as alone, bit for bit."""
    alone, done = Task(task.method, task.ramp), threading.Event()
    alone.train(alone.optimizer(), CROWD)

    def train() -> None:
        try:
            task.train(task.optimizer(), CROWD)
        finally:
            done.set()

    def repeat() -> None:
        while not done.is_set():
            other()

    with eager_switching():
        together(train, repeat)
    return [task.judge(CROWD, twin=alone.model)]


@loop("threads and processes", apart=True, ramp=2 * CROWD)
def a_training_without_adapters_in_a_thread(task: Task) -> Judgements:
    """Many quick steps, of which each runs the optimizer hooks while our gradients come and go."""
    line = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(line.parameters(), lr=0.01)
    line(torch.ones(1, 1)).sum().backward()
    return beside(task, optimizer.step)


@loop("threads and processes", apart=True, ramp=2 * CROWD)
def building_training_and_dropping_models_in_a_thread(task: Task) -> Judgements:
    def build() -> None:
        other = Task(task.method, task.ramp)
        other.train(other.optimizer(), 2)
        assert round(other.judge(2).get("counted", 2), 3) == 2

    return beside(task, build)


@loop("threads and processes", apart=True, ramp=2 * CROWD, methods=("lora", "peft"))
def adding_and_deleting_adapters_in_a_thread(task: Task) -> Judgements:
    other = Task(task.method, task.ramp).model

    def change() -> None:
        other.add_adapter("more", other.peft_config["default"])
        other.delete_adapter("more")

    return beside(task, change)


@loop("threads and processes", apart=True, slow=True, ramp=2 * CROWD)
def copying_and_saving_in_a_thread(task: Task) -> Judgements:
    """A checkpoint writer: what it reads meanwhile is no matter here, the training is."""

    def save() -> None:
        torch.save(task.model.state_dict(), io.BytesIO())
        copy.deepcopy(task.model)

    return beside(task, save)


@loop("threads and processes", apart=True, slow=True, ramp=2 * CROWD)
def four_trainings_with_wrapped_optimizers_in_threads(task: Task) -> Judgements:
    tasks = [task, *(Task(task.method, task.ramp) for _ in range(3))]

    def train(task: Task) -> None:
        optimizer = task.optimizer(of=Sam)
        for _ in range(CROWD // 2):
            task.loss().backward()
            optimizer.step(task.loss)

    with eager_switching():
        together(*(lambda t=t: train(t) for t in tasks))
    return [t.judge(CROWD // 2) for t in tasks]


def in_a_process(task: Task, how: str) -> Judgements:
    """Half the steps here, half in a child that is given the model; the child's judgement, then what lies here.

    A model sent to another process has its memory shared, so its training is seen here as well; a forked one is a copy
    unless it was shared before.
    """
    task.train(task.optimizer(), STEPS // 2)
    if how == "shared":
        task.model.share_memory()
    context = multiprocessing.get_context("spawn" if how == "spawn" else "fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_half, args=(task, theirs))
    child.start()
    theirs.close()
    found = ours.recv()
    child.join()
    return [found, task.judge(STEPS // 2 if how == "fork" else STEPS)]


def _half(task: Task, pipe: Any) -> None:
    torch.set_num_threads(1)
    task.train(task.optimizer(), STEPS // 2)
    pipe.send(task.judge(STEPS))


@loop("threads and processes", apart=True)
def fork(task: Task) -> Judgements:
    return in_a_process(task, "fork")


@loop("threads and processes", apart=True, slow=True)
def spawn(task: Task) -> Judgements:
    return in_a_process(task, "spawn")


@loop("threads and processes", apart=True)
def shared_memory(task: Task) -> Judgements:
    """Hogwild's way: the child's steps are steps on the model that lies here."""
    return in_a_process(task, "shared")


@contextlib.contextmanager
def one_process_group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@loop("threads and processes", apart=True, slow=True)
def data_parallel_with_no_sync(task: Task) -> Judgements:
    with one_process_group():
        model = nn.parallel.DistributedDataParallel(task.model)
        optimizer = task.optimizer()
        for _ in range(STEPS):
            optimizer.zero_grad()
            with model.no_sync():
                (task.loss(slice(0, None, 2), model) / 2).backward()
            (task.loss(slice(1, None, 2), model) / 2).backward()
            optimizer.step()
        del model  # or its reducer takes the group down with it, which can wait for ever
    return [task.judge(STEPS)]


@loop("threads and processes", apart=True)
def zero_redundancy(task: Task) -> Judgements:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    with one_process_group():
        return task.run(optimizer=ZeroRedundancyOptimizer(task.trained(), torch.optim.AdamW, lr=task.lr))


# -- copies and checkpoints ----------------------------------------------------------------------------------------------


def continued(task: Task, carry: Callable[[nn.Module, Any], tuple[nn.Module, Any]]) -> Judgements:
    """Half the run, then with what ``carry`` makes of model and optimizer: the same bits as without it."""
    whole = Task(task.method, task.ramp)
    whole.train(whole.optimizer(), STEPS)
    optimizer = task.optimizer()
    task.train(optimizer, STEPS // 2)
    before, held = task.model, task.judge(STEPS // 2)
    model, optimizer = carry(task.model.train(), optimizer)
    task.train(optimizer, STEPS // 2, model)
    found = [held, task.judge(STEPS, model, twin=whole.model)]
    if model is not before:
        found.append(task.judge(STEPS // 2, before))
    return found


@loop("copies and checkpoints")
def deepcopy_in_mid_run(task: Task) -> Judgements:
    return continued(task, lambda model, optimizer: copy.deepcopy((model, optimizer)))


@loop("copies and checkpoints")
def pickle_in_mid_run(task: Task) -> Judgements:
    def carry(model: nn.Module, optimizer: Any) -> Any:
        return pickle.loads(pickle.dumps((model, optimizer)))  # noqa: S301

    return continued(task, carry)


@loop("copies and checkpoints", slow=True)
def saved_whole_in_mid_run(task: Task) -> Judgements:
    def carry(model: nn.Module, optimizer: Any) -> Any:
        torch.save((model, optimizer), file := io.BytesIO())
        file.seek(0)
        return torch.load(file, weights_only=False)

    return continued(task, carry)


@loop("copies and checkpoints")
def state_dict_in_mid_run(task: Task) -> Judgements:
    """Plain torch, strict, into a model built anew."""

    def carry(model: nn.Module, optimizer: Any) -> Any:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file := io.BytesIO())
        file.seek(0)
        state, again = torch.load(file, weights_only=True), task.build()
        again.load_state_dict(state["model"], strict=True)
        optimizer = task.optimizer(parameters=task.trained(model=again))
        optimizer.load_state_dict(state["optimizer"])
        return again, optimizer

    return continued(task, carry)


@loop("copies and checkpoints", slow=True)
def state_dict_assigned_in_mid_run(task: Task) -> Judgements:
    def carry(model: nn.Module, optimizer: Any) -> Any:
        again = task.build()
        again.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        for p, its in zip(again.parameters(), model.parameters(), strict=True):
            p.requires_grad_(its.requires_grad)
        state, optimizer = optimizer.state_dict(), task.optimizer(parameters=task.trained(model=again))
        optimizer.load_state_dict(state)
        return again, optimizer

    return continued(task, carry)


@loop("copies and checkpoints")
def rolled_back_in_mid_run(task: Task) -> Judgements:
    """The best checkpoint is loaded into the model that went on: its gate goes back as well."""
    optimizer = task.optimizer()
    task.train(optimizer, STEPS // 2)
    best, twin = copy.deepcopy(task.model.state_dict()), copy.deepcopy(task.model)
    task.train(optimizer, STEPS // 2)
    task.model.load_state_dict(best)
    return [task.judge(STEPS // 2, twin=twin)]


@loop("copies and checkpoints")
def distributed_checkpoint_in_mid_run(task: Task) -> Judgements:
    """torch.distributed.checkpoint's state dicts, which name parameters rather than number them."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def carry(model: nn.Module, optimizer: Any) -> Any:
        states = copy.deepcopy(get_state_dict(model, optimizer))
        again = task.build()
        optimizer = task.optimizer(parameters=task.trained(model=again))
        set_state_dict(again, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
        return again, optimizer

    return continued(task, carry)


@loop("copies and checkpoints")
def copy_trained_beside_the_original(task: Task) -> Judgements:
    """A teacher and a student, or two branches of a search: each counts for itself."""
    task.train(task.optimizer(), STEPS // 4)
    other = copy.deepcopy(task.model)
    optimizers = task.optimizer(), task.optimizer(parameters=task.trained(model=other))
    for _ in range(STEPS):
        task.train(optimizers[0], 1)
        task.train(optimizers[1], 1, other)
    task.train(optimizers[0], STEPS // 4)
    return [task.judge(STEPS + STEPS // 2), task.judge(STEPS + STEPS // 4, other)]


# -- adapters (PEFT) -----------------------------------------------------------------------------------------------------


@loop("several adapters", methods=WITH_PEFT, slow=True)
def adapters_switched_in_mid_run(task: Task) -> Judgements:
    """10, 20 and 30 steps, the middle ones on another adapter."""
    task.model.add_adapter("other", task.model.peft_config["default"])
    found = []
    for adapter, steps in (("default", 10), ("other", STEPS // 2), ("default", 30)):
        task.model.set_adapter(adapter)
        task.train(task.optimizer(), steps)
        if adapter == "other":
            found.append(task.judge(STEPS // 2))
            task.model.train()
    return [*found, task.judge(STEPS)]


@loop("several adapters", methods=WITH_PEFT)
def one_optimizer_over_adapters_that_take_turns(task: Task) -> Judgements:
    """Every parameter in one optimizer; the adapter that is not active has no gradient."""
    task.model.add_adapter("other", task.model.peft_config["default"])
    everything = [p for name, p in task.model.named_parameters() if "lora_" in name]
    optimizer = task.optimizer(parameters=everything)
    for n in range(2 * STEPS):
        task.model.set_adapter("other" if n % 2 else "default")
        task.train(optimizer, 1)
    found = [task.judge(STEPS)]
    task.model.set_adapter("default")
    return [*found, task.judge(STEPS)]


@contextlib.contextmanager
def merged(model: Any) -> Iterator[None]:
    """With its adapter merged, at whatever gate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the gate is half open
        model.merge_adapter()
    yield
    model.unmerge_adapter()


@loop("several adapters", methods=WITH_PEFT)
def merged_and_unmerged_in_mid_run(task: Task) -> Judgements:
    def carry(model: nn.Module, optimizer: Any) -> Any:
        with merged(model), torch.no_grad():
            task.loss()
        return model, optimizer

    return continued(task, carry)


@loop("several adapters", methods=WITH_PEFT)
def merged_while_another_model_trains(task: Task) -> Judgements:
    """Its gate is frozen, also where its own optimizer is called by the way, without a gradient."""
    optimizer, other = task.optimizer(), Task(task.method, task.ramp)
    task.train(optimizer, STEPS)
    with merged(task.model):
        other.train(other.optimizer(), STEPS)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    return [task.judge(STEPS), other.judge(STEPS)]


@loop("several adapters", methods=WITH_PEFT)
def a_reference_policy_by_disabling(task: Task) -> Judgements:
    """As DPO's: the same model without its adapter, in every step."""

    def backward() -> None:
        with torch.no_grad(), task.model.disable_adapter():
            reference = task.model(task.ids)
        (task.loss() + 1e-3 * F.mse_loss(task.model(task.ids), reference)).backward()

    return task.run(backward=backward)


# -- functional ----------------------------------------------------------------------------------------------------------


def functional(
    task: Task,
    gradients: Callable[[Callable, dict[str, Tensor]], dict[str, Tensor]],
    rows: Iterable[slice] = (slice(None),),
) -> Judgements:
    """Gradients of a pure function of the trained parameters, put where an optimizer looks for them.

    At the end they are compared with the mean of the usual ones over ``rows``: the models are not, since rounding may turn
    a sign, after which they are two.
    """
    named = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    optimizer = task.optimizer(parameters=named.values())

    def loss(parameters: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(functional_call(task.model, parameters, (ids,)), targets)

    for _ in range(STEPS):
        for name, g in gradients(loss, {name: p.detach() for name, p in named.items()}).items():
            named[name].grad = g
        optimizer.step()
    found = gradients(loss, {name: p.detach() for name, p in named.items()})
    each = [torch.autograd.grad(task.loss(row), list(named.values())) for row in rows]
    for g, *usual in zip(found.values(), *each, strict=True):
        wanted = torch.stack(usual).mean(0)
        torch.testing.assert_close(g, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    return [task.judge(STEPS)]


@loop("functional")
def functional_call_and_autograd(task: Task) -> Judgements:
    def gradients(loss: Callable, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: p.requires_grad_() for name, p in parameters.items()}
        found = torch.autograd.grad(loss(leaves, task.ids, task.targets), list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    return functional(task, gradients)


@loop("functional", slow=True)
def func_grad(task: Task) -> Judgements:
    return functional(task, lambda loss, parameters: grad(loss)(parameters, task.ids, task.targets))


@loop("functional")
def per_sample_gradients_by_vmap(task: Task) -> Judgements:
    """As differential privacy needs them."""

    def gradients(loss: Callable, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, task.ids[:, None], task.targets[:, None])
        return {name: g.mean(0) for name, g in each.items()}

    # Sign's gradient is clipped for each row, so that of their mean is another one.
    return functional(task, gradients, [slice(n, n + 1) for n in range(len(task.ids))])


@loop("functional")
def ensemble_by_vmap(task: Task) -> Judgements:
    """Three models as one: ``stack_module_state`` trains copies of the factors that no layer holds, so nothing counts here."""
    tasks = [task, Task(task.method, task.ramp), Task(task.method, task.ramp)]
    if task.method != "lora":
        for t in tasks:
            duallora.advance_gate(t.model, STEPS)
    parameters, buffers = stack_module_state([t.model for t in tasks])
    trained = {name: parameters[name] for name, p in task.model.named_parameters() if p.requires_grad}
    optimizer = task.optimizer(parameters=trained.values())

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(functional_call(task.model, (parameters, buffers), (task.ids,)), task.targets)

    for _ in range(STEPS):
        optimizer.zero_grad()
        vmap(loss)(parameters, buffers).sum().backward()
        optimizer.step()
    with torch.no_grad():
        for n, t in enumerate(tasks):
            for name, p in t.model.named_parameters():
                p.copy_(parameters[name][n])
    return [t.judge(STEPS) for t in tasks]


# -- libraries -----------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """The task's rows as transformers and accelerate want them."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __len__(self) -> int:
        return len(self.task.ids)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        return {"ids": self.task.ids[n], "labels": self.task.targets[n]}


def by_trainer(task: Task, **options: Any) -> Judgements:
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder, "max_steps": STEPS, "learning_rate": task.lr, "per_device_train_batch_size": 32,
            "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no",
            "remove_unused_columns": False, "lr_scheduler_type": "constant", **options,
        }  # fmt: skip
        Trainer(task.model, TrainingArguments(**arguments), train_dataset=Rows(task)).train()
    return [task.judge(STEPS)]


@loop("libraries", slow=True)
def trainer(task: Task) -> Judgements:
    return by_trainer(task)


@loop("libraries")
def trainer_with_accumulation_and_bf16(task: Task) -> Judgements:
    return by_trainer(task, gradient_accumulation_steps=2, per_device_train_batch_size=16, bf16=True)


@loop("libraries", slow=True)
def trainer_with_each_optimizer(task: Task) -> Judgements:
    found = []
    for name, rate in {"adamw_torch_fused": 0.03, "adafactor": 0.03, "rmsprop": 0.01}.items():
        task = Task(task.method, task.ramp)
        found += by_trainer(task, optim=name, learning_rate=rate)
    return found


def by_accelerate(task: Task, save: bool) -> Judgements:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(Rows(task), batch_size=16, shuffle=False)
    model, optimizer, loader = accelerator.prepare(task.model, task.optimizer(), loader)
    steps = 0
    while steps < STEPS:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch["ids"], labels=batch["labels"])["loss"])
                steps += accelerator.sync_gradients
                optimizer.step()
                optimizer.zero_grad()
        if save and steps == STEPS // 2:
            with tempfile.TemporaryDirectory() as folder:
                accelerator.save_state(folder)
                task.train(optimizer, 5)  # to be undone
                accelerator.load_state(folder)
    return [task.judge(steps)]


@loop("libraries", slow=True)
def accelerate_with_accumulation(task: Task) -> Judgements:
    return by_accelerate(task, save=False)


@loop("libraries")
def accelerate_that_saves_and_loads_its_state(task: Task) -> Judgements:
    return by_accelerate(task, save=True)


# -- running -------------------------------------------------------------------------------------------------------------


@functools.cache
def pool() -> ProcessPoolExecutor:
    """The other process."""
    atexit.register(pool.cache_clear)  # before the modules that its end needs are gone
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))


def attempt(name: str, method: str) -> dict[str, Any]:
    """What one loop did by one method.

    ``trained``, ``counted``, ``equal`` and the ``judgements`` themselves, or the ``error``; ``said``: our warnings.
    """
    loop = LOOPS[name]
    if loop.apart and multiprocessing.parent_process() is None:
        try:
            return pool().submit(attempt, name, method).result()
        except BrokenProcessPool:
            pool.cache_clear()
            return {"error": "the interpreter died"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = loop.run(Task(method, loop.ramp))
        except Exception as error:
            return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    package = str(Path(duallora.__file__).parent)  # a checkout's folder may have our name too
    ours = [str(one.message) for one in caught if one.filename.startswith(package) or "Dual LoRA" in str(one.message)]
    texts = [text for text in ours if "performance drop" not in text]  # what vmap says of clamp_
    return {
        "trained": all(one["fall"] < TRAINED for one in found if "fall" in one),
        "counted": all(abs(one["counted"] - one["expected"]) < 1e-3 for one in found if "counted" in one),
        "equal": all(one["twin"] < 1e-5 for one in found if "twin" in one),
        "said": sorted(set(texts)),
        "judgements": found,
    }


def wrong(name: str, method: str, done: dict[str, Any]) -> str:
    """What is wrong with an outcome of :func:`attempt`; empty where it is as it should be."""
    loop = LOOPS[name]
    if "error" in done:
        return done["error"]
    faults = {
        f"it {'did not train' if loop.learns else 'trained'}": done["trained"] != loop.learns,
        "the gate did not count its steps": not done["counted"],
        "it is not the model that it ought to be": not done["equal"],
    }
    if loop.says and any(loop.says in text for text in done["said"]):
        return ""
    faults[f"it warned: {done['said']}"] = bool(done["said"])
    return "; ".join(fault for fault, present in faults.items() if present) + (
        f": {done['judgements']}" if any(faults.values()) else ""
    )


# -- the committed figures -----------------------------------------------------------------------------------------------

START, END = "<!-- loops: written by `make loops` -->", "<!-- end of loops -->"


def table(figures: dict[str, dict[str, Any]]) -> str:
    """A row of the documentation for each family: how many of its loops did what they should, by each method."""
    text = f"| family | loops | {' | '.join(METHODS)} |\n|---|---:|{'---:|' * len(METHODS)}\n"
    for family in dict.fromkeys(loop.family for loop in LOOPS.values()):
        rows = [name for name in figures if LOOPS[name].family == family]
        cells = []
        for method in METHODS:
            tried = [figures[name][method]["wrong"] for name in rows if method in figures[name]]
            cells.append(f"{tried.count('')} of {len(tried)}")
        text += f"| {family} | {len(rows)} | {' | '.join(cells)} |\n"
    return text


def measure() -> dict[str, dict[str, Any]]:
    """All loops by all methods, told as they end."""
    figures: dict[str, dict[str, Any]] = {}
    for name, entry in LOOPS.items():
        for method in entry.methods:
            done = attempt(name, method)
            fault = wrong(name, method, done)
            figures.setdefault(name, {"family": entry.family})[method] = {"wrong": fault, **done}
            print(f"{name}, {method}: {fault or 'as it should be'}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=LOOPS)
    parser.add_argument("method", nargs="?", choices=METHODS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--page", type=Path, help="the page of the documentation that holds the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.name:
        done = attempt(arguments.name, arguments.method)
        print(json.dumps(done, indent=2))
        return sys.exit(wrong(arguments.name, arguments.method, done))
    started, figures = time.time(), measure()
    if arguments.output:
        recipe = {"steps": STEPS, "warmup_steps": RAMP, "learning_rate": Task.lr, "trained_below": TRAINED}
        found = record.result("loops", recipe, figures, seeds=[0], started=started)
        record.write_json(arguments.output, found)
    if arguments.page:
        before, rest = arguments.page.read_text(encoding="utf-8").split(START)
        record.write_text(arguments.page, f"{before}{START}\n\n{table(figures)}\n{END}{rest.split(END)[1]}")
    sys.exit(any(done["wrong"] for row in figures.values() for done in row.values() if isinstance(done, dict)))


if __name__ == "__main__":
    main()

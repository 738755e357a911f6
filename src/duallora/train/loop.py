"""The steps of a run: transformers' Trainer with our loss, order of rows, checks, log and bar, and a way to stop it."""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import save_model as save_model_weights
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from duallora import methods
from duallora.errors import ConfigError, DivergedError, NonFiniteError, is_out_of_memory
from duallora.methods.projected import over_factors
from duallora.store.processes import ALONE, Processes
from duallora.store.run_folder import Log
from duallora.store.sealed import gradient_norm
from duallora.tasks import IGNORE
from duallora.tasks.task import Kind
from duallora.terminal import progress_bar
from duallora.train.adapter import WHOLE_MODEL, gate, has_gate, load_weights
from duallora.train.launch import Stopping


class RunTrainer(Trainer):
    """Counts real tokens, stops at the first non-finite loss, and saves nothing but what is trained."""

    model: Any
    lr_scheduler: Any

    def __init__(
        self,
        method: methods.Adapted,
        kind: Kind,
        processes: Processes,
        *,
        projected: str,
        auto_batch: bool,
        halved: Callable[[int], None],
        **options: Any,
    ):
        """``projected``: one of `OPTIMIZERS`, over the method's factors, or "". ``halved`` hears of fewer rows at once."""
        self.method, self.kind, self.processes = method, kind, processes
        self.projected, self.auto_batch, self.halved = projected, auto_batch, halved
        self.rows_at_once = 0  # of a micro-batch, where memory has run out; 0: all of them
        self.pending: list[dict[str, torch.Tensor]] = []  # the micro-batches of the step under way
        self.tokens = self.step_tokens = 0
        self.step_loss = 0.0
        self.logged = (0, 0.0, 0.0)  # tokens, time and processor time at the last line of the log
        super().__init__(model=method.model, **options)

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            own, options = self.method.method, self.method.spec.options
            rates = self.args.learning_rate, self.args.weight_decay
            if self.projected:
                self.optimizer = over_factors(self.projected, self._spared(self.method.groups(*rates)), own.title)
            elif own.optimizer is not None:
                self.optimizer = self.method.optimizer(*rates)
            elif own.groups is not None and options.get("direction_lr_ratio") != 1:  # with 1 Trainer's groups will do
                kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = kind(self._spared(self.method.groups(*rates)), **settings)
        try:
            return super().create_optimizer(*args, **kwargs)
        except ImportError as error:
            raise ConfigError(f"train.optimizer={OptimizerNames(self.args.optim).value}: {error}") from error

    def _spared(self, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """``groups`` with what Trainer's own would spare weight decay (biases, norms) in groups apart."""
        decayed = set(self.get_decay_parameter_names(self.model))
        spared = {id(weight) for name, weight in self.model.named_parameters() if name not in decayed}
        found = []
        for group in groups:
            held: list[list[torch.nn.Parameter]] = [[], []]
            for weight in group["params"]:
                held[bool(group.get("weight_decay")) and id(weight) in spared].append(weight)
            found += [{**group, "params": held[0]}, {**group, "params": held[1], "weight_decay": 0.0}]
        return [group for group in found if group["params"]]

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.step_tokens += int(inputs["attention_mask"].sum())
        self.pending.append(inputs)
        todo, loss = [inputs], torch.tensor(0.0)
        while todo:
            try:
                loss = self._by_parts(model, todo[0], num_items_in_batch)
            except Exception as error:
                rows = min(self.rows_at_once or self.args.train_batch_size, len(todo[0]["input_ids"]))
                if not (self.auto_batch and is_out_of_memory(error) and rows > 1):
                    raise
                self.rows_at_once = rows // 2
            else:
                del todo[0]
                continue
            # What the step has added up so far is incomplete: all of it again.
            model.zero_grad()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.halved(self.rows_at_once)
            todo = list(self.pending)
        self.step_loss += float(loss)
        if self.processes.world_size == 1:  # several stop together: see FiniteGradients
            self.require_finite("loss", self.step_loss)
        return loss

    def _by_parts(self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any) -> torch.Tensor:
        """The summed loss of a micro-batch, of which ``rows_at_once`` rows at a time are in memory."""
        step, rows = super().training_step, len(inputs["input_ids"])
        size = self.rows_at_once or rows
        parts = ({key: value[at : at + size] for key, value in inputs.items()} for at in range(0, rows, size))
        return torch.stack([step(model, part, num_items_in_batch) for part in parts]).sum()

    def require_finite(self, what: str, value: float) -> None:
        """NonFiniteError for a NaN or infinite ``what`` in the step under way, which is also logged."""
        if math.isfinite(value):
            return
        step = self.state.global_step + 1
        self.log({what: value, "stopped_in_step": step})
        raise NonFiniteError(
            f"the {what.replace('_', ' ')} is {value} in step {step}; the step was not applied and nothing of it was "
            f"saved. Lower train.learning_rate (it is {self.args.learning_rate:g}), look at the rows, or use "
            "model.dtype=float32; earlier checkpoints are intact"
        )

    def _get_train_sampler(self, train_dataset=None):
        rows: Any = self.train_dataset
        lengths = [len(row["input_ids"]) for row in rows[:-1]]  # the last one is `nothing_to_learn`
        # By optimizer step, so that a smaller batch with more accumulation or more processes is the same run.
        at_once = self.args.train_batch_size * self.processes.world_size
        step = at_once * self.args.gradient_accumulation_steps
        fill_to = at_once if self.processes.world_size > 1 else 1
        self.sampler = LikeLengths(lengths, step, self.args.seed, fill_to)
        return self.sampler

    def _get_num_items_in_batch(self, batch_samples, device):
        if self.kind == "generate":
            return super()._get_num_items_in_batch(batch_samples, device)
        own = sum(int(has_label(batch["labels"]).sum()) for batch in batch_samples)
        return torch.tensor(sum(count for (count,) in self.processes.all_gather([own])), device=device)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            tokens, moment, cpu = self.logged
            self.logged = (self.tokens, time.monotonic(), time.process_time())
            seconds = self.logged[1] - moment
            speed = (self.tokens - tokens) / max(seconds, 1e-9)
            logs = {**logs, "gate": gate(self.model), "tokens_per_second": speed, "seconds": seconds}
            logs["cpu_seconds"] = self.logged[2] - cpu
        super().log(logs, start_time)

    def save_model(self, output_dir=None, _internal_call=False):
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        if isinstance(self.model, PeftModel) or self.method.method.save is not None:
            self.method.save(folder)
        else:  # as they are called here: from_pretrained may rename and restack
            folder.mkdir(parents=True, exist_ok=True)
            save_model_weights(self.model, str(folder / WHOLE_MODEL))
        if self.method.method.checkpoint is not None:
            self.method.method.checkpoint(self.method, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        if isinstance(self.model, PeftModel) and self.method.method.restore is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:  # Trainer's own passes over what does not fit
            load_weights(self.method, Path(resume_from_checkpoint))


def nothing_to_learn(row: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """A row of one token that adds nothing to any loss: it fills the last step, where processes would lack rows."""
    nothing: dict[str, Any] = {"generate": [IGNORE], "classify": IGNORE, "regress": math.nan}
    return {**{key: row[key][:1] for key in row if key != "labels"}, "labels": nothing[kind]}


def has_label(labels: torch.Tensor) -> torch.Tensor:
    """Which rows of a batch [rows] of class ids or targets are to be learned."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORE


def token_loss(smoothing: float, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """The share of one micro-batch in the mean loss over the trained tokens of a step,

    (1 - s) (-log p_y) + s mean_v (-log p_v),  s = ``smoothing``, v over the whole vocabulary.
    """
    labels = labels[:, 1:]
    trained = labels != IGNORE
    logits = outputs["logits"][:, -labels.shape[1] - 1 : -1][trained].float()  # virtual tokens come first
    return F.cross_entropy(logits, labels[trained], reduction="sum", label_smoothing=smoothing) / num_items_in_batch


def row_loss(
    kind: Kind, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """The share of one micro-batch in the mean loss over the ``num_items_in_batch`` rows of a step."""
    learned = has_label(labels)
    logits, labels = outputs["logits"][learned].float(), labels[learned]
    if kind == "classify":
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing) / num_items_in_batch
    return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum") / num_items_in_batch


def training_loss(kind: Kind, smoothing: float) -> Callable[..., torch.Tensor] | None:
    """The loss of a step's micro-batches; None where it is the model's own."""
    if kind == "generate":
        return partial(token_loss, smoothing) if smoothing else None
    return partial(row_loss, kind, smoothing=smoothing)


class LikeLengths(torch.utils.data.Sampler[int]):
    """A random order in which the rows of a step have like lengths, so that little is padding.

    Rows are drawn at random into groups of ``GROUP`` batches; a group is sorted, cut into batches, and the batches of
    the epoch are drawn at random again. The order depends on seed and epoch alone, so a resumed run finds it again.
    The last batch is filled to a multiple of ``fill_to`` with the number after the last row's.
    """

    GROUP = 8

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, fill_to: int = 1):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0
        self.filling = [len(lengths)] * (-len(lengths) % fill_to)

    def __len__(self) -> int:
        return len(self.lengths) + len(self.filling)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        whole = len(order) - len(order) % self.batch_size  # the last, smaller batch stays last and random
        span = self.GROUP * self.batch_size
        batches = []
        for start in range(0, whole, span):
            group = sorted(order[start : min(start + span, whole)], key=lambda row: self.lengths[row])
            batches += [group[first : first + self.batch_size] for first in range(0, len(group), self.batch_size)]
        draw.shuffle(batches)
        return itertools.chain(*batches, order[whole:], self.filling)


class FiniteGradients(TrainerCallback):
    """Looks at every gradient before it is applied: an infinite one would only show in the loss a step later."""

    def __init__(self, trainer: RunTrainer):
        self.trainer = trainer
        self.without = 0  # steps up to now whose gradient was 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trainer = self.trainer
        told = trainer.processes.all_gather([trainer.step_loss, trainer.step_tokens])
        trainer.tokens += round(sum(tokens for _, tokens in told))
        trainer.step_tokens = 0
        trainer.pending.clear()
        trainer.step_loss = sum(loss for loss, _ in told) / len(told)
        trainer.require_finite("loss", trainer.step_loss)
        norm = gradient_norm(model)
        trainer.require_finite("grad_norm", norm)
        self.without = 0 if norm else self.without + 1


class Rollback(Exception):
    """Training is to go on from the last checkpoint."""


class Spikes(TrainerCallback):
    """Looks at the loss of each step before it is applied, against the median of the last ``WINDOW``.

    ``on_spike`` is the recipe's; ``left_out`` holds the steps that are not learned from, whose gradients are dropped.
    ``leave_out(step)`` notes one more and says whether there is a checkpoint to go back to; without one the step alone is
    left out. Comes after `FiniteGradients`, which gathers the loss.
    """

    WINDOW, LEAST, TIMES, FLOOR = 50, 10, 10.0, 0.1

    def __init__(
        self, on_spike: str, left_out: Collection[int], leave_out: Callable[[int], bool], tell: Callable[[str], None]
    ):
        self.on_spike, self.left_out, self.leave_out, self.tell = on_spike, left_out, leave_out, tell
        self.trainer: RunTrainer  # whose steps are looked at
        self.losses: deque[float] = deque(maxlen=self.WINDOW)
        self.found: list[int] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if not self.losses:  # a resumed run knows those of its log
            self.losses.extend(line["loss"] for line in state.log_history if "loss" in line)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        step, loss = state.global_step + 1, self.trainer.step_loss
        if step in self.left_out:
            self._drop(model)
            return
        usual = statistics.median(self.losses) if len(self.losses) >= self.LEAST else math.inf
        if loss <= self.TIMES * max(usual, self.FLOOR):
            self.losses.append(loss)
            return
        self.found.append(step)
        said = f"the loss of step {step} is {loss:.3g}, where {usual:.3g} is usual"
        if self.on_spike == "stop":
            raise DivergedError(
                f"{said}; the step was not applied. Lower train.learning_rate (it is {args.learning_rate:g}), look at its "
                "rows, or set train.on_spike to warn or rollback; earlier checkpoints are intact"
            )
        self.tell(said)
        if self.on_spike == "rollback":
            if self.leave_out(step):
                raise Rollback
            self._drop(model)

    @staticmethod
    def _drop(model: Any) -> None:
        """The optimizer passes over what has no gradient."""
        for parameter in model.parameters():
            parameter.grad = None


class LossDuringTraining(TrainerCallback):
    """The validation loss every ``every`` steps, into the log; draws no random number, so training is unchanged."""

    def __init__(self, trainer: RunTrainer, loss: Callable[[], float], every: int):
        self.trainer, self.loss, self.every = trainer, loss, every

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            wanted = control.should_log
            self.trainer.log({"eval_loss": self.loss()})
            control.should_log = wanted  # logging clears it, and this step's own line may be due


class LogSteps(TrainerCallback):
    """What belongs to the course of the run into its log; Trainer's closing summary does not."""

    MARKS = ("loss", "eval_loss", "stopped_in_step")

    def __init__(self, log: Log):
        self.lines = log

    def on_log(self, args, state, control, logs=None, **kwargs):
        if any(mark in logs for mark in self.MARKS):
            self.lines.append(state.global_step, logs)


class ShowTraining(TrainerCallback):
    """The bar: steps, time left, loss (smoothed over about ten steps), learning rate, gate, real tokens per second."""

    def __init__(self, console: Console, trainer: RunTrainer):
        self.console, self.trainer = console, trainer
        self.bar = ExitStack()
        self.loss: float | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate's shards of a loader, shortened for a resumed run, hide the sampler from Trainer.
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer._train_batch_size != args.train_batch_size:
            raise ConfigError(
                f"this version of transformers resumes with the batch size of the checkpoint ({self.trainer._train_batch_size}), "
                f"not with train.batch_size={args.train_batch_size}: set it back, or upgrade transformers"
            )
        self.began = time.monotonic()
        self.trainer.logged = (0, self.began, time.process_time())
        bar = progress_bar(self.console, "train", state.max_steps, done=state.global_step)
        self.update = self.bar.enter_context(bar)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last steps belong in the log, whatever logging_steps is
        loss, self.trainer.step_loss = self.trainer.step_loss, 0.0
        self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        speed = self.trainer.tokens / max(time.monotonic() - self.began, 1e-9)
        self.update(
            state.global_step,
            loss=f"{self.loss:.3f}",
            lr=f"{self.trainer.lr_scheduler.get_last_lr()[0]:.1e}",
            **({"gate": f"{gate(model):.2f}"} if has_gate(model) else {}),
            **{"tok/s": f"{speed:,.0f}"},
        )


class StopTraining(Stopping, TrainerCallback):
    """Turns SIGINT and SIGTERM into: finish this optimizer step, save, stop.

    Outside of training there is nothing to finish, so `Interrupted` is raised on the spot. Of several processes it is
    enough that one is asked: all stop after the same step.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        super().__init__()
        self.processes = processes

    def on_train_begin(self, args, state, control, **kwargs):
        self.noted = True

    def agreed(self) -> int | None:
        """The signal that came to any of the processes, or None."""
        return round(max(number for (number,) in self.processes.all_gather([self.number or 0]))) or None

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed() is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.noted = False

"""One training run: transformers' Trainer around an adapter, in a run folder (`duallora.store.run_folder`)."""

from __future__ import annotations

import math
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import duallora
from duallora import methods
from duallora.config.recipe import Recipe, default_output, fingerprint
from duallora.errors import (
    ConfigError,
    DiskError,
    DivergedError,
    DualLoraError,
    IntegrityError,
    Interrupted,
    NonFiniteError,
    OutOfMemoryError,
    is_disk_failure,
    is_out_of_memory,
)
from duallora.methods.projected import OPTIMIZERS
from duallora.store import adapters, checkpoint, record
from duallora.store.lock import locked
from duallora.store.models import load_model, tokenizer_fingerprint, weights_fingerprint
from duallora.store.positions import positions
from duallora.store.processes import ALONE, Processes
from duallora.store.run_folder import Facts, Fingerprints, RunFolder
from duallora.store.sealed import SealedCheckpoints, require_finite
from duallora.tasks import Collator, Task, encode_split, metrics
from duallora.terminal import amount, clock, command, quiet_libraries, say, shown, size
from duallora.train import begin, calibration, chance, curve, evaluate, plugins, prepare
from duallora.train.adapter import check_method, gate, has_gate, load_weights, parameter_counts, put
from duallora.train.launch import end_with_parent, ignore_quantized, lost, process_group
from duallora.train.loop import (
    FiniteGradients,
    LogSteps,
    LossDuringTraining,
    Rollback,
    RunTrainer,
    ShowTraining,
    Spikes,
    StopTraining,
    nothing_to_learn,
    row_loss,
    token_loss,
    training_loss,
)

MAX_LEFT_OUT = 5  # steps whose loss was a spike
ANSWERS, ANSWER_LETTERS = 3, 400  # validation rows whose answers are kept before and after, and how much of each
LAST_STEPS = 10  # whose training loss tells whether anything was learned
# What the steps of a run have found that no line of its log has, where there was such a thing.
OF_STEPS = ("train_peak_memory", "rows_at_once", "steps_without_gradient", "spikes", "left_out")


def train(recipe: Recipe, *, resume: str = "never", console: Console | None = None) -> dict[str, Any]:
    """Trains ``recipe`` into its run folder and returns ``{"status", "folder", "adapter", "steps", "metrics", ...}``.

    "adapter" is the folder of the result, also where that is a whole model.

    Started in several processes (`duallora.train.launch`), it shares the rows of each step out among them.

    ``resume``: "never" starts a new run; "auto" continues the folder's run from its newest whole checkpoint, or starts
    one; a path names a checkpoint (or a run folder). A resumed run ends bit for bit where the uninterrupted one does.

    Raises:
        ConfigError: the folder holds another run, or what is resumed was started with other settings.
        DataError, IntegrityError, LockedError, DiskError, OutOfMemoryError: see `duallora.errors`.
        NonFiniteError: a loss, gradient or weight became NaN or infinite; nothing of that step was saved.
        Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint saved.
        LostProcessError: another process of the run has ended.
    """
    end_with_parent()
    with process_group() as processes:
        console = (console or Console()) if processes.main else Console(quiet=True)
        folder, source = processes.from_main(lambda: _folder_and_source(recipe, resume))
        recipe = recipe.model_copy(update={"output": str(folder), "plugins": plugins.resolved(recipe.plugins)})
        with _plain_errors(recipe, folder, processes), ExitStack() as held, quiet_libraries():
            processes.from_main(lambda: held.enter_context(locked(folder)))
            stopping = held.enter_context(StopTraining(processes))
            return _Run(recipe, folder, console, processes).go(source, stopping)


def plan(recipe: Recipe, console: Console) -> dict[str, Any]:
    """What `train` would do, from everything but the training: data read, rows encoded, model and adapter built."""
    folder = recipe.output or default_output(recipe)
    run = _Run(recipe, Path(folder), console)
    with quiet_libraries():
        run.prepare()
        run.put(None, look=False)
    say(console, "dry run", f"nothing was trained or written; the run folder would be {escape(folder)}")
    return {
        "folder": folder,
        "rows": run.counts.rows,
        "tokens": run.counts.tokens,
        "trained_tokens": run.counts.trained_tokens,
        "truncated": run.counts.truncated,
        "steps": run.steps,
        "warmup_steps": run.lr_warmup,
        "trainable_parameters": parameter_counts(run.method.model)[0],
        "recipe": recipe.model_dump(mode="json"),
    }


class _Run:
    """The state the steps of one run share; `prepare` and `put` come first."""

    task: Task
    model: Any  # the base
    tokenizer: Any
    rows: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    elsewhere: list[dict[str, Any]]  # text that is not trained on, for what is forgotten
    steps: int
    lr_warmup: int
    fingerprints: Fingerprints
    method: methods.Adapted

    def __init__(self, recipe: Recipe, folder: Path, console: Console, processes: Processes = ALONE):
        self.recipe, self.folder, self.console, self.processes = recipe, RunFolder(folder), console, processes
        self.began = False  # whether a training step may have been taken
        self.facts = Facts()
        self.writer: Any = None  # tensorboard's
        self.init: dict[str, float] = {}  # what start values from data took
        self.notes: dict[str, str] = {}  # on the metrics, by split
        self.findings: list[chance.Finding] = []  # whether they are above chance
        self.answers: list[dict[str, Any]] = []  # of the first validation rows, before and after

    def go(self, source: str | Path, stopping: StopTraining) -> dict[str, Any]:
        previous, finished = self.processes.from_main(lambda: self._previous(source))
        if finished is not None:
            say(self.console, "done", f"this run is finished already: [bold]{shown(self.folder.path)}[/]")
            return finished
        try:
            with _plain_errors(self.recipe, self.folder.path, self.processes):  # so that the record has their kind
                return self._train(previous, source, stopping)
        except BaseException as error:
            if self.processes.main:
                self._record_failure(error, previous)
            raise

    def _train(self, previous: Facts | None, source: str | Path, stopping: StopTraining) -> dict[str, Any]:
        recipe = self.recipe
        started = time.time()
        say(self.console, "run", f"[bold]{shown(self.folder.path)}[/]" + (" (resumed)" if previous else ""))
        self.prepare()
        resume_from = self.processes.from_main(lambda: self._resume_from(previous, source))
        self.put(resume_from)
        if recipe.adapter.init_from is not None:
            self.fingerprints["init_from"] = self._begin(recipe.adapter.init_from, previous, resume_from)
        method = self.method.method
        if resume_from is not None and method.no_resume and method.checkpoint is None:
            raise ConfigError(f"{method.title} cannot be resumed: {method.no_resume} Start a new run with -o")
        self._first_facts(previous)
        self.method.model.to(adapters.default_device())
        if self.held_out and recipe.eval.before and self.facts["loss_before"] is None:
            self._write_facts(loss_before=self._loss("before"))
        if self._answers_are_kept() and recipe.eval.before and self.facts.get("answers_before") is None:
            self._write_facts(answers_before=self._answers_before())
        if self.elsewhere and self.facts.get("forgetting_before") is None:
            self._write_facts(forgetting_before=self._loss_of(self.elsewhere))
        if resume_from is None:
            self._start_values()
        trained = self._fit(resume_from, stopping)
        adapter = self._save()
        scores = {**trained, **self.facts["init"], **self._validate(), **self._forgetting(), **self._test()}
        at_chance = self._at_chance()
        if self.processes.main:
            self._draw(scores.get("loss"))
            result = record.result(
                "train",
                self.facts["recipe"],
                scores,
                seeds=[recipe.seed],
                started=started,
                data=self.fingerprints["data"],
                base=self.fingerprints["base"],
                processes=self.processes.world_size,
                parameters=self.facts["parameters"],
                **{key: value for key, value in self.fingerprints.items() if key == "init_from"},
                main_metric=self.task.main_metric,
                notes=self.notes,
                at_chance=at_chance,
                **({"answers": self.answers} if self.answers else {}),
            )
            self.folder.write_metrics(result)
        told = {
            "status": "done",
            "folder": str(self.folder.path),
            "adapter": str(adapter),
            "steps": self.steps,
            "metrics": scores,
            "at_chance": at_chance,
            "trainable_parameters": self.facts["parameters"]["trainable"],
            "seconds": round(time.time() - started, 1),
        }
        self._write_facts(status="done", kind="done", finished=record.now(), result=told)
        return self.processes.from_main(lambda: told)

    def _draw(self, loss: float | None) -> None:
        """The run's losses as loss.svg, and as a line of the console."""
        lines = self.folder.log.lines()
        training = [(line["step"], line["loss"]) for line in lines if "gate" in line]
        held = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
        points = [(0, self.facts.get("loss_before")), *held, (self.steps, loss)]
        held = [(step, value) for step, value in points if value is not None]
        record.write_text(self.folder.curve, curve.svg(self.folder.path.name, training, held))
        if self.console.is_terminal and (drawn := curve.line([value for _, value in training])):
            say(self.console, "curve", f"{drawn}  training loss; {shown(self.folder.curve)}")

    def _first_facts(self, previous: Facts | None) -> None:
        before, task, model = previous or Facts(), self.task, self.recipe.model
        recipe = before.get("recipe", {})
        same_rows = recipe.get("data", {}).get("eval_limit") == self.recipe.data.eval_limit
        same_text = recipe.get("eval", {}).get("forgetting") == self.recipe.eval.forgetting
        if self.processes.main:
            self.folder.write_recipe(self.recipe)
        self._write_facts(
            status="running",
            pid=os.getpid(),
            processes=self.processes.world_size,
            **record.environment(),
            started=before.get("started", record.now()),
            resumed=[*before.get("resumed", ()), *([record.now()] if previous else ())],
            seed=self.recipe.seed,
            recipe=self.recipe.model_dump(mode="json"),
            fingerprints=self.fingerprints,
            model={**model.model_dump(include={"name", "revision", "quantization"}), "dtype": _name(self.model.dtype)},
            parameters=dict(zip(("trainable", "total"), parameter_counts(self.method.model), strict=True)),
            data={
                "source": task.source,
                "format": task.format,
                "kind": task.kind,
                "labels": list(task.labels),
                "train": len(self.rows),
                "validation": len(self.held_out),
            },
            steps=self.steps,
            loss_before=before.get("loss_before") if same_rows else None,
            forgetting_before=before.get("forgetting_before") if same_text else None,
            answers_before=before.get("answers_before") if same_rows else None,
            init=before.get("init") or self.init,
            left_out=before.get("left_out", []),
        )

    def _write_facts(self, **facts: Any) -> None:
        self.facts = cast(Facts, {**self.facts, **facts})
        if self.processes.main:
            self.folder.write_facts(self.facts)

    # -- before the first step -----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Reads data, model and plug-ins, encodes the rows, and says what will be trained on what for how long."""
        recipe = self.recipe
        code = plugins.load(recipe.plugins)
        prepare.check_settings(recipe, self.processes)
        self.task = task = prepare.load(recipe, self.console)
        set_seed(recipe.seed)  # a classification head and, where adapter.init_seed is unset, the factors are drawn
        self._load_model()
        self._encode()
        self._check_lengths(self.model)
        splits = ("train", "validation", "test") if recipe.eval.test else ("train", "validation")
        self.fingerprints = {
            "recipe": fingerprint(recipe),
            "data": {split: task.fingerprint(split) for split in splits if split in task.splits},
            "base": weights_fingerprint(self.model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "plugins": code,
        }
        self.steps, self.lr_warmup = prepare.schedule(recipe, len(self.rows))
        check_method(recipe, self.steps)
        say(self.console, "steps", prepare.in_words(recipe, len(self.rows), self.steps, self.lr_warmup))

    def _load_model(self) -> None:
        recipe, task = self.recipe.model, self.task
        labels = {"classify": len(task.labels) or None, "regress": 1}.get(task.kind)
        self.model, self.tokenizer = load_model(
            recipe.name, task.kind, dtype=recipe.dtype, num_labels=labels, revision=recipe.revision,
            quantization=recipe.quantization,
        )  # fmt: skip
        if task.labels:
            adapters.set_labels(self.model, task.labels)
        count = self.model.num_parameters()  # also of packed codes
        device, dtype = adapters.default_device(), recipe.quantization or _name(self.model.dtype)
        where = f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else record.device_name()
        if self.processes.world_size > 1:
            where += f", {self.processes.world_size} processes"
        kind = type(self.model).__name__
        say(self.console, "model", f"{escape(recipe.name)}: {kind}, {amount(count)} parameters, {dtype}, {where}")

    def _encode(self) -> None:
        data, task = self.recipe.data, self.task
        examples = evaluate.select(task, "train", data.limit)
        self.rows, self.counts = encode_split(
            examples, self.tokenizer, task.kind, max_length=data.max_length, train_on=data.train_on
        )
        counts = self.counts
        self.held_out = []
        if "validation" in task.splits and len(task.splits["validation"]):
            validation = evaluate.select(task, "validation", data.eval_limit)
            self.held_out, _ = encode_split(validation, self.tokenizer, task.kind, max_length=data.max_length)
        self.elsewhere = prepare.elsewhere(self.recipe, task, self.tokenizer)
        message = f"{counts.tokens:,} tokens in {counts.rows:,} rows"
        if counts.rows > len(examples):
            message += f" (of {len(examples):,} chats: their template rewrites earlier turns, so each stands by itself)"
        if task.kind == "generate":
            message += f", {counts.trained_tokens:,} trained ({counts.trained_tokens / counts.tokens:.0%})"
        if counts.truncated:
            message += f", [yellow]{counts.truncated:,} rows cut to {data.max_length} tokens[/]"
        say(self.console, "tokens", message)

    def _warn(self, label: str, words: str) -> None:
        say(self.console, label, f"[yellow]{words}[/]")

    def _check_lengths(self, model: Any) -> None:
        for note in prepare.check_lengths(self.recipe, model, self.tokenizer, self.task, self.rows):
            self._warn("note", escape(note))

    def put(self, resume_from: Path | None, *, look: bool = True) -> None:
        """The adapter on the model; start values that come from data ``look`` at rows of the run."""
        recipe, kind, wanted = self.recipe, self.task.kind, 0
        source = getattr(recipe.adapter, "options", {}).get("calibration_data")

        def batches(count: int) -> list[dict[str, torch.Tensor]]:
            nonlocal wanted
            rows = self.rows if source is None else self._other_rows(source)
            drawn = calibration.draw_rows(rows, count, recipe.seed)
            wanted = len(drawn)
            self.model.to(adapters.default_device())
            return list(calibration.batches(drawn, self.tokenizer, recipe.train.batch_size, self.model))

        if recipe.adapter.init_from is not None:  # what it begins from has had its look at data
            earlier = adapters.find(recipe.adapter.init_from) if resume_from is None else resume_from
            known = earlier if earlier is not None and (earlier / "adapter_config.json").is_file() else None
            self.method = put(self.model, recipe, kind, self.lr_warmup, checkpoint=known)
        else:
            began = time.monotonic(), time.process_time()
            self.method = put(
                self.model, recipe, kind, self.lr_warmup, batches=batches if look else None, checkpoint=resume_from
            )
            if wanted:
                whose = f"rows of {escape(source)}" if source else "training rows"
                self._note_init(f"from {wanted:,} {whose}", wanted, *began)
        if positions(self.method.model) != positions(self.model):  # virtual tokens take some
            self._check_lengths(self.method.model)
        self._announce_adapter()

    def _other_rows(self, source: str) -> list[dict[str, Any]]:
        """Question-answering rows that start values look at in place of the run's."""
        data = type(self.recipe.data)(path=source, max_length=self.recipe.data.max_length)
        task = prepare.read(self.recipe.model_copy(update={"data": data}))
        if task.kind != "generate":
            raise ConfigError(
                f"calibration_data={source}: expected question-answering rows (prompt and completion), and it is {task.format}"
            )
        examples = [example for split in task.splits.values() for example in split]
        return encode_split(examples, self.tokenizer, task.kind, max_length=data.max_length)[0]

    def _note_init(self, words: str, rows: int, began: float, cpu: float) -> None:
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        self.init = {"start_rows": rows, "start_seconds": round(seconds, 1), "start_cpu_seconds": round(cpu, 1)}
        say(self.console, "init", f"{words} in {clock(seconds)}")

    def _begin(self, source: str, previous: Facts | None, resume_from: Path | None) -> str:
        """Loads the run this one begins from, unless a checkpoint goes on from there; its fingerprint."""
        before = (previous or Facts()).get("fingerprints", Fingerprints()).get("init_from")
        if resume_from is not None:
            return str(before)
        found = begin.from_run(self.method, source, self.task.kind, self.fingerprints["base"])
        if before is not None:
            checkpoint.refuse_drift({"weights of adapter.init_from": before}, {"weights of adapter.init_from": found})
        say(self.console, "init_from", f"[bold]{shown(Path(source))}[/]")
        return found

    def _announce_adapter(self) -> None:
        model, method = self.method.model, self.method.method
        trainable, total = parameter_counts(model)
        title, gate_opens = method.title, ""
        if method.name == "duallora":
            config = cast(duallora.DualLoraConfig, model.peft_config["default"])
            layers = sum(hasattr(module, "duallora_A") for module in model.modules())
            r1, r2 = config.r1 or config.r, config.r2 or config.r
            ranks = f"r1 {r1}, r2 {r2}" if config.r1 or config.r2 else f"r {config.r}"
            title = f"Dual LoRA, {ranks}, alpha {config.alpha:g} on {layers} layers"
            if self.recipe.adapter.init_from is not None:
                gate_opens = "; gate open"
            elif config.warmup == "ramp":
                gate_opens = f"; gate opens over {config.warmup_steps} of {self.steps} steps"
            else:
                gate_opens = f"; warm-up: {config.warmup}"
        share = f"{amount(trainable)} trainable parameters ({trainable / total:.2%})"
        say(self.console, "adapter", f"{title}: {share}{gate_opens}")
        if method.whole and model.dtype != torch.float32:
            note = (
                f"the weights train in {_name(model.dtype)}, where a step below half a unit of the last place is lost"
            )
            self._warn("note", f"{note}; model.dtype=float32 keeps every step")
        with_moments = 3 * sum(
            weight.numel() * weight.element_size() for weight in methods.trained(model)
        )  # AdamW's two
        free = shutil.disk_usage(_existing(self.folder.path)).free
        if free < 3 * with_moments:
            note = f"{size(free)} free at {shown(self.folder.path)}, and a checkpoint takes {size(with_moments)}"
            self._warn("disk", f"{note}: free some, or lower train.save_total_limit")

    def _start_values(self) -> None:
        """Start values from the gradient where the recipe asks for them; the start is kept, for `analyze`."""
        recipe, init = self.recipe, getattr(self.recipe.adapter, "init", "gaussian")
        if init.startswith("gradient"):
            began = time.monotonic(), time.process_time()
            loss = partial(token_loss, 0.0) if self.task.kind == "generate" else partial(row_loss, self.task.kind)
            start = partial(calibration.start_from_gradient, self.method.model, recipe, self.rows, self.tokenizer, loss)
            seen = self.processes.from_main(start)  # the others get these factors as DDP begins
            self._note_init(f"{init} of {seen:,} training rows", seen, *began)
            self._write_facts(init=self.init)
        if self.processes.main and isinstance(self.method.model, PeftModel):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Saving a Dual LoRA adapter whose gate is not open")
                self.method.save(self.folder.init)
            record.follow_umask(self.folder.init)

    # -- the steps ----------------------------------------------------------------------------------------------------

    def _fit(self, resume_from: Path | None, stopping: StopTraining) -> dict[str, Any]:
        """Trains to the last step, from a checkpoint if given; the numbers of the training itself."""
        log, done = self.folder.log, checkpoint.step_of(resume_from) if resume_from else 0
        if self.processes.main and (aside := log.drop_after(done)):
            self._warn("note", f"{log.path.name} was damaged: kept as {aside.name}, its whole lines go on")
        if resume_from is not None and done >= self.steps:
            # Trainer would take one more step here if the last one was not the last of its epoch.
            load_weights(self.method, resume_from)
            return {**self._found_before(), **log.summary()}
        self.began, rows_at_once = True, 0
        spikes = Spikes(
            self.recipe.train.on_spike, (), self._leave_out, lambda said: self._warn("warning", escape(said))
        )
        while True:
            trainer = self._trainer(stopping)
            show = ShowTraining(self.console, trainer)
            trainer.rows_at_once = rows_at_once
            spikes.trainer, spikes.left_out = trainer, self.facts.get("left_out", ())
            finite = FiniteGradients(trainer)
            for callback in (finite, spikes, show):
                trainer.add_callback(callback)
            try:
                trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
                break
            except Rollback:
                rows_at_once = trainer.rows_at_once
                resume_from, _ = checkpoint.newest_verified(self.folder.checkpoints)
                done = checkpoint.step_of(resume_from) if resume_from else 0
                if self.processes.main:
                    log.drop_after(done)
                left_out = self.facts["left_out"][-1]
                say(self.console, "rollback", f"to step {done}; the rows of step {left_out} are left out")
            finally:
                show.bar.close()
                stopping.noted = False
        number = stopping.agreed()
        if number is not None:
            raise Interrupted(number, f"stopped after step {trainer.state.global_step} of {self.steps}")
        require_finite(self.method.model, f"step {self.steps}")
        if finite.without > 1:
            words = f"the gradient was 0 in the last {finite.without} steps: nothing was learned in them"
            self._warn("warning", f"{words}; look at the rows, or lower train.learning_rate")
        of_steps: dict[str, Any] = {
            "train_peak_memory": _peak_memory(),
            "rows_at_once": trainer.rows_at_once,
            "steps_without_gradient": finite.without if finite.without > 1 else 0,
            "spikes": spikes.found,
            "left_out": self.facts.get("left_out"),
        }
        found = {
            **self.processes.from_main(log.summary),
            **{name: of_steps[name] for name in OF_STEPS if of_steps[name]},
        }
        seconds, loss = found.get("train_seconds", 0), found.get("train_loss", math.nan)
        opened = f", gate {gate(self.method.model):.2f}" if has_gate(self.method.model) else ""
        say(self.console, "trained", f"{self.steps:,} steps in {clock(seconds)}, last loss {loss:.3f}{opened}")
        return found

    def _found_before(self) -> dict[str, Any]:
        """`OF_STEPS` of a finished training, from its metrics.json, where that is whole."""
        found: dict[str, Any] = {}
        with suppress(IntegrityError):
            found = (self.folder.metrics() or {}).get("metrics", {})
        return {name: found[name] for name in OF_STEPS if name in found}

    def _leave_out(self, step: int) -> bool:
        """Notes that the rows of ``step`` are not learned from; whether there is a checkpoint to go back to.

        Raises:
            DivergedError: it is one step too many.
        """
        left_out = [*self.facts.get("left_out", ()), step]
        if len(left_out) > MAX_LEFT_OUT:
            raise DivergedError(
                f"the loss of {len(left_out)} steps was a spike ({', '.join(map(str, left_out))}): lower "
                f"train.learning_rate (it is {self.recipe.train.learning_rate:g})"
            )
        self._write_facts(left_out=left_out)
        return self.processes.from_main(lambda: checkpoint.newest_verified(self.folder.checkpoints)[0]) is not None

    def _trainer(self, stopping: StopTraining) -> RunTrainer:
        recipe, model, kind, processes = self.recipe, self.method.model, self.task.kind, self.processes
        callbacks: list[TrainerCallback] = [
            stopping,
            SealedCheckpoints(self.fingerprints, check_gradients=False),  # FiniteGradients looks, with the loss
        ]
        trainer = RunTrainer(
            self.method,
            kind,
            processes,
            projected=recipe.train.optimizer if recipe.train.optimizer in OPTIMIZERS else "",
            auto_batch=recipe.train.auto_batch and processes.world_size == 1,
            halved=self._say_halved,
            args=prepare.arguments(recipe, self.folder.checkpoints, self.steps, self.lr_warmup, processes),
            train_dataset=[*self.rows, nothing_to_learn(self.rows[0], kind)],
            data_collator=Collator(self.tokenizer),
            callbacks=[*callbacks, LogSteps(self.folder.log)] if processes.main else callbacks,
            compute_loss_func=training_loss(kind, recipe.train.label_smoothing),
        )
        if processes.world_size > 1:
            ignore_quantized(model)
        if processes.rank:  # each draws its own dropout and tokens
            set_seed((recipe.seed + processes.rank) % 2**32)
        if self.method.method.name == "duallora":
            duallora.watch(trainer)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if "tensorboard" in recipe.train.report_to and processes.main:
            from torch.utils.tensorboard import SummaryWriter
            from transformers.integrations import TensorBoardCallback

            if self.writer is None:  # one for all that a run goes back to
                self.writer = SummaryWriter(log_dir=str(self.folder.tensorboard))
            trainer.add_callback(TensorBoardCallback(self.writer))
        if kind != "generate":
            trainer.model_accepts_loss_kwargs = False  # the loss is `row_loss`; the model's forward knows no row count
        elif not trainer.model_accepts_loss_kwargs:  # its own loss is a mean over the rows at once, not over the step
            trainer.compute_loss_func = partial(token_loss, recipe.train.label_smoothing)
        if recipe.train.eval_steps and self.held_out:
            held_out = partial(self._loss_of, self.held_out)
            trainer.add_callback(LossDuringTraining(trainer, held_out, recipe.train.eval_steps))
        return trainer

    def _say_halved(self, rows: int) -> None:
        words = f"out of memory: {rows} {'row' if rows == 1 else 'rows'} at once from here; the rows of a step stay"
        self._warn("memory", words)

    def _loss_of(self, rows: Sequence[dict[str, Any]], console: Console | None = None) -> float:
        return evaluate.loss_on(
            self.method.model, self.tokenizer, rows, self.task.kind,
            batch_size=self.recipe.eval.batch_size, console=console, processes=self.processes,
        )  # fmt: skip

    # -- after the last step -------------------------------------------------------------------------------------------

    def _save(self) -> Path:
        target = self.folder.path / ("model" if self.method.method.whole else "adapter")
        beside = target.with_name(f".{target.name}.tmp")
        if not self.processes.main:
            return target
        shutil.rmtree(beside, ignore_errors=True)
        self.method.save(beside)
        self.tokenizer.save_pretrained(str(beside))
        task, facts = self.task, self.facts
        files = adapters.seal(
            beside,
            {
                "method": self.recipe.adapter.method.upper(),
                "kind": task.kind,
                "task": task.name,
                "labels": list(task.labels),
                "steps": self.steps,
                "gate": gate(self.method.model),
                "base": {**facts["model"], "fingerprint": self.fingerprints["base"]},
                "data": self.fingerprints["data"],
                "recipe": self.fingerprints["recipe"],
                "commit": facts["commit"],
                "dirty": facts["dirty"],
                "versions": facts["versions"],
            },
        )
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
        record.fsync_folder(target.parent)
        weights = sum(file["size"] for name, file in files.items() if name.endswith(".safetensors"))
        say(self.console, "saved", f"[bold]{shown(target)}[/] ({size(weights)})")
        return target

    def _validate(self) -> dict[str, Any]:
        """The held-out metrics after training, with the loss before beside the loss after."""
        if not self.held_out:
            say(self.console, "after", "no validation rows: nothing to compare with")
            return {}
        loss_before = self.facts["loss_before"]
        before = {} if loss_before is None else {"loss_before": loss_before}
        if not self.recipe.eval.metrics or self.task.loss_only:
            loss = self._loss("after")
            if self.task.kind == "generate":
                self.findings.append(chance.of_losses("validation", loss, loss_before))
            return {**before, "loss": loss}
        result = self._score("validation", loss_before)
        self._keep_answers(result)
        self._say_loss("after", result.metrics["loss"])
        self._say_scores(result, "validation")
        return {**before, **result.metrics}

    def _answers_are_kept(self) -> bool:
        options = self.recipe.eval
        return bool(self.held_out) and self.task.kind == "generate" and options.metrics and not self.task.loss_only

    def _answers_before(self) -> list[str]:
        """What the untrained model answers to the first validation rows."""
        first = evaluate.select(self.task, "validation", ANSWERS)
        how: dict[str, Any] = {"max_length": self.recipe.data.max_length, "processes": self.processes}
        how |= self.recipe.eval.generation()
        return evaluate.answers(self.method.model, self.tokenizer, self.task, first, **how)

    def _keep_answers(self, result: evaluate.EvalResult) -> None:
        """The first rows' answers beside what is right, each cut, for metrics.json."""
        if not self._answers_are_kept():
            return
        before = self.facts.get("answers_before") or []
        for number, (example, after) in enumerate(zip(result.examples[:ANSWERS], result.predictions, strict=False)):
            right = example.references[0] if example.references else example.answer
            one = {"prompt": evaluate.in_words(example)[-ANSWER_LETTERS:], "expected": right, "after": after}
            one |= {"before": before[number]} if number < len(before) else {}
            self.answers.append({name: str(text)[:ANSWER_LETTERS] for name, text in one.items()})

    def _forgetting(self) -> dict[str, float]:
        """How much the loss on other text grew, in nats a token; below 0 where it fell."""
        before = self.facts.get("forgetting_before")
        if not self.elsewhere or before is None:
            return {}
        after = self._loss_of(self.elsewhere)
        words = f"loss on {escape(str(self.recipe.eval.forgetting))}, not trained on: {after:.4f} (was {before:.4f})"
        say(self.console, "forgetting", words)
        return {"forgetting": after - before}

    def _test(self) -> dict[str, Any]:
        """The metrics on the test rows; every prediction is kept beside what it should have been."""
        if not self.recipe.eval.test:
            return {}
        result = self._score("test")
        self._say_scores(result, "test")
        if self.processes.main:
            lines = []
            for number, (prediction, example) in enumerate(zip(result.predictions, result.examples, strict=True)):
                generated = self.task.kind == "generate"
                truth = {"references": example.references} if generated else {"label": example.label}
                part = {"group": example.group} if example.group else {}
                answer = result.answers[number]._asdict() if result.answers else {}
                lines.append({"prediction": prediction, **truth, **part, **answer})
            self.folder.write_predictions(lines)
        return {"test": result.metrics}

    def _score(self, split: str, before: float | None = None) -> evaluate.EvalResult:
        recipe = self.recipe
        result = evaluate.evaluate(
            self.method.model,
            self.tokenizer,
            self.task,
            split=split,
            limit=recipe.data.eval_limit,
            batch_size=recipe.eval.batch_size,
            generation=recipe.eval.generation(),
            max_length=recipe.data.max_length,
            scoring=recipe.eval.scoring,
            console=self.console,
            processes=self.processes,
        )
        self.findings.append(chance.of_result(self.task, split, result, before=before))
        return result

    def _at_chance(self) -> dict[str, Any] | None:
        """What to say of a run that has learned nothing, said as the last thing of its summary."""
        options, kind = self.recipe.train, self.task.kind
        targets = [] if kind == "generate" else [row["labels"] for row in self.rows]
        loss = self.folder.log.last_loss(LAST_STEPS)
        trained = chance.of_training(kind, loss, targets)
        found = chance.verdict([*self.findings, *([trained] if trained else [])])
        if found is None:
            return None
        if trained and not trained.at_chance and loss is not None:  # the rows were learned, and nothing beyond them
            remedy = f"the training loss fell to {loss:.3f}, so the rows were memorized: train on more rows, or for fewer steps"
        else:
            remedy = (
                f"train again with train.learning_rate={options.learning_rate / 3:.1g} (now {options.learning_rate:g}); if "
                "the loss was still falling, with more steps (train.epochs); and look at the rows: duallora data preview"
            )
        said = found.record(remedy)
        say(self.console, "warning", f"[bold red]{escape(said['message'])}[/]")
        say(self.console, "remedy", f"[bold]{escape(remedy)}[/]")
        return said

    def _say_scores(self, result: evaluate.EvalResult, split: str) -> None:
        told = {name: value for name, value in result.metrics.items() if not metrics.find(name).likelihood}
        values = ", ".join(f"{name} {value:.4g}" for name, value in told.items())
        say(self.console, "scores", f"{values} ({len(result.examples):,} {split} rows)")
        if result.note:
            say(self.console, "note", escape(result.note))
            self.notes[split] = result.note

    def _loss(self, when: str) -> float:
        loss = self._loss_of(self.held_out, self.console)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss on the {len(self.held_out):,} validation rows is {loss} {when} training: the model itself gives "
                "NaN or infinite values. Load it with model.dtype=float32, or check its weights"
            )
        self._say_loss(when, loss)
        return loss

    def _say_loss(self, when: str, loss: float) -> None:
        unit = "answer loss" if self.task.kind == "generate" else "loss"
        was = self.facts["loss_before"]
        compared = f" (was {was:.4f})" if when == "after" and was is not None else ""
        say(self.console, when, f"validation {unit} [bold]{loss:.4f}[/]{compared}")

    # -- the folder ---------------------------------------------------------------------------------------------------

    def _previous(self, source: str | Path) -> tuple[Facts | None, dict[str, Any] | None]:
        """(facts of the run this one continues or None for a new one, its result where it is finished)."""
        previous = self.folder.claim(resume=source != "never")
        if previous is None:
            return None, None
        before, after = self.folder.recipe(), self.recipe.model_dump(mode="json")
        if previous["status"] != "done":  # each process has generators of its own
            before["processes (--launch)"] = previous.get("processes", 1)
            after["processes (--launch)"] = self.processes.world_size
        checkpoint.refuse_drift(before, after)
        return previous, self._finished(previous) if previous["status"] == "done" and source == "auto" else None

    def _finished(self, previous: Facts) -> dict[str, Any]:
        """The result of a finished run, with the places of now: the folder may have been moved."""
        place = self.folder.path / ("model" if methods.get(self.recipe.adapter.method).whole else "adapter")
        reason = adapters.damage(place) if place.is_dir() else "it is gone"
        if reason is not None:
            last = self.folder.checkpoints / f"checkpoint-{previous.get('steps')}"
            raise IntegrityError(
                f"this run is finished, but {place}: {reason}. Restore it, or make it again with --resume {last}"
            )
        return {**previous["result"], "folder": str(self.folder.path), "adapter": str(place)}

    def _resume_from(self, previous: Facts | None, source: str | Path) -> Path | None:
        if previous is None:
            return None
        known, ours = previous.get("fingerprints", Fingerprints()), self.fingerprints
        checkpoint.refuse_drift(
            *(
                {
                    "data": one.get("data"),
                    "base model weights": one.get("base"),
                    "tokenizer and chat template": one.get("tokenizer", ours.get("tokenizer")),
                    "plug-ins": one.get("plugins", {}),
                }
                for one in (known, ours)
            )
        )
        if isinstance(source, Path):
            reason = checkpoint.verify(source)
            if reason:
                raise IntegrityError(f"{source}: {reason}; use --resume auto to take the newest whole one")
            found: Path | None = source
        else:
            found, passed_over = checkpoint.require_resumable(self.folder.checkpoints)
            for reason in passed_over:
                self._warn("skipped", escape(reason))
        told = f"from {found.name}" if found else "no checkpoint was finished: from the first step"
        say(self.console, "resume", told)
        return found

    def _record_failure(self, error: BaseException, previous: Facts | None) -> None:
        stopped = isinstance(error, KeyboardInterrupt)
        if self.began:
            for _, path in checkpoint.checkpoints(self.folder.checkpoints):
                if not checkpoint.is_sealed(path):
                    shutil.rmtree(path, ignore_errors=True)
        if self.facts:
            with suppress(OSError):
                self._write_facts(
                    status="interrupted" if stopped else "failed",
                    kind=getattr(error, "kind", "stopped" if stopped else "failed"),
                    error=f"{type(error).__name__}: {error}",
                    finished=record.now(),
                )
        if stopped and (self.began or previous):
            again = escape(command("train", "-c", self.folder.recipe_file, "--resume", "auto"))
            say(self.console, "stopped", f"{error or 'interrupted'}; continue with: [bold]{again}[/]")


def _peak_memory() -> int:
    """Bytes: what torch held on the GPU at most; without one, the most that was resident of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _folder_and_source(recipe: Recipe, resume: str) -> tuple[Path, str | Path]:
    """The run folder, and where to resume from: "never", "auto" or the path of a checkpoint."""
    if resume == "never":
        return Path(recipe.output or default_output(recipe)), resume
    if resume == "auto":
        if recipe.output is None:
            raise ConfigError("--resume auto needs the run's folder: give -o FOLDER, or -c FOLDER/recipe.yaml")
        return Path(recipe.output), resume
    path = Path(resume)
    source: str | Path = "auto"
    if RunFolder(path).exists():
        folder = path
    elif path.is_dir() and checkpoint.step_of(path) >= 0:
        source = path.resolve()
        folder = source.parent.parent
    else:
        raise ConfigError(f"--resume {resume}: expected never, auto, a run folder or one of its checkpoint folders")
    if recipe.output is not None and Path(recipe.output).resolve() != folder.resolve():
        raise ConfigError(f"--resume {resume} belongs to the run in {folder}, but the output is {recipe.output}")
    return folder, source


@contextmanager
def _plain_errors(recipe: Recipe, folder: Path, processes: Processes) -> Iterator[None]:
    """Failures of the machine as `DiskError`, `OutOfMemoryError` and `LostProcessError`, with what to do about them."""
    try:
        yield
    except DualLoraError:
        raise
    except Exception as error:
        said = (str(error).splitlines() or ["no memory left"])[0]
        if is_out_of_memory(error):
            options = recipe.train
            raise OutOfMemoryError(
                f"out of memory with train.batch_size={options.batch_size} and data.max_length="
                f"{recipe.data.max_length} ({said}). Halve the batch size "
                f"and set train.gradient_accumulation_steps={2 * options.gradient_accumulation_steps} (the same run; train.auto_batch=true does so by itself), "
                "shorten data.max_length, or set train.gradient_checkpointing=true"
            ) from error
        if processes.world_size > 1 and (gone := lost(error)):
            raise gone from error
        if is_disk_failure(error):
            place, reason = (error.filename, error.strerror) if isinstance(error, OSError) else (None, said)
            free = f"{size(shutil.disk_usage(_existing(folder)).free)} are free there"
            raise DiskError(
                f"{place or folder} cannot be written: {reason}; {free}. Free some space, or choose another folder with -o"
            ) from error
        raise


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())

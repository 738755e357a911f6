"""One training run: transformers' Trainer around a Dual LoRA adapter, in a folder that tells the whole story.

recipe.yaml  the resolved recipe; run.json  versions, code, fingerprints, status; log.jsonl, tb/  the curves
checkpoints/  sealed checkpoints (`checkpoint`); metrics.json  the figures
adapter/  the result; model/  where the method trains the whole model
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from safetensors.torch import load_model as load_model_weights
from safetensors.torch import save_model as save_model_weights
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import duallora
from duallora import methods
from duallora.errors import (
    ConfigError,
    DataError,
    DiskError,
    IntegrityError,
    Interrupted,
    NonFiniteError,
    OutOfMemoryError,
)
from duallora.methods import starts
from duallora.tasks import IGNORE, Collator, Task, encode_split, hold_out, load_data, load_task
from duallora.train import begin, calibration, checkpoint, evaluate, plugins, record
from duallora.train.launch import ALONE, Processes, leave_in_place, shares, together
from duallora.train.lock import locked
from duallora.train.models import load_model, weights_fingerprint
from duallora.train.progress import Bar, amount, clock, quiet_libraries, say, shown, size
from duallora.train.recipe import RUNS_OWN, Recipe, default_output, fingerprint, recipe_yaml, with_later

MATTERS = (
    "run.json", "recipe.yaml", "log.jsonl", "metrics.json", "predictions.jsonl", "adapter", "model", "checkpoints",
    "tb",
)  # fmt: skip

START = "start"  # beside the checkpoints: the adapter before its first step

WHOLE_MODEL = "model.safetensors"  # of a checkpoint, where the method trains the model's own weights


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
    with together() as processes:
        console = (console or Console()) if processes.main else Console(quiet=True)
        folder, source = processes.from_main(lambda: _folder_and_source(recipe, resume))
        recipe = recipe.model_copy(update={"output": str(folder), "plugins": plugins.resolved(recipe.plugins)})
        with _plain_errors(recipe, folder), ExitStack() as held, quiet_libraries():
            processes.from_main(lambda: held.enter_context(locked(folder)))
            stopping = held.enter_context(Stopping(processes))
            return _Run(recipe, folder, source, stopping, console, processes).go()


class _Run:
    """The state the steps of one run share."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        source: str | Path,
        stopping: Stopping,
        console: Console,
        processes: Processes = ALONE,
    ):
        self.recipe, self.folder, self.source = recipe, folder, source
        self.stopping, self.console, self.processes = stopping, console, processes
        self.checkpoints = folder / "checkpoints"
        self.began = False  # whether a training step may have been taken
        self.facts: dict[str, Any] = {}
        self.notes: dict[str, str] = {}  # on the figures, by split

    def go(self) -> dict[str, Any]:
        previous = self.processes.from_main(self._previous)
        if previous and previous.get("status") == "done":
            say(self.console, "done", f"this run is finished already: [bold]{shown(self.folder)}[/]")
            return previous["result"]
        try:
            return self._train(previous)
        except BaseException as error:
            if self.processes.main:
                self._record_failure(error, previous)
            raise

    def _train(self, previous: dict[str, Any] | None) -> dict[str, Any]:
        recipe, console = self.recipe, self.console
        started = time.time()
        say(console, "run", f"[bold]{shown(self.folder)}[/]" + (" (resumed)" if previous else ""))

        code = plugins.load(recipe.plugins)
        check_settings(recipe, self.processes)
        task = load(recipe, console)
        set_seed(recipe.seed)  # a classification head and, where adapter.init_seed is unset, the factors are drawn
        model, tokenizer = self._load_model(task)
        rows, held_out = self._encode(task, tokenizer)
        base = weights_fingerprint(model)
        splits = ("train", "validation", "test") if recipe.eval.test else ("train", "validation")
        fingerprints: dict[str, Any] = {
            "recipe": fingerprint(recipe),
            "data": {split: task.fingerprint(split) for split in splits if split in task.splits},
            "base": base,
            "plugins": code,
        }
        start = self.processes.from_main(lambda: self._resume_from(previous, fingerprints))

        steps, lr_warmup = schedule(recipe, len(rows))
        dtype = str(model.dtype).removeprefix("torch.")
        method, seen = self._put(model, tokenizer, task.kind, rows, lr_warmup, start)
        adapted = method.model
        if recipe.adapter.start is not None:
            fingerprints["start"] = self._begin(method, recipe.adapter.start, task.kind, base, previous, start)
        if start is not None and method.method.no_resume and method.method.checkpoint is None:
            raise ConfigError(
                f"{method.method.title} cannot be resumed: {method.method.no_resume} Start a new run with -o"
            )
        self._announce_adapter(method, steps)

        self.facts = {
            "status": "running",
            "pid": os.getpid(),
            "processes": self.processes.count,
            **record.environment(),
            "started": (previous or {}).get("started", record.now()),
            "resumed": [*(previous or {}).get("resumed", ()), *([record.now()] if previous else ())],
            "seed": recipe.seed,
            "recipe": recipe.model_dump(mode="json"),
            "fingerprints": fingerprints,
            "model": {**recipe.model.model_dump(include={"name", "revision", "quantization"}), "dtype": dtype},
            "parameters": dict(zip(("trainable", "total"), parameter_counts(adapted), strict=True)),
            "data": {"source": task.source, "format": task.format, "train": len(rows), "validation": len(held_out)},
            "steps": steps,
            "loss_before": _loss_before(previous, recipe),
            "start": (previous or {}).get("start", {}) or seen,
        }
        if self.processes.main:
            record.write_text(self.folder / "recipe.yaml", recipe_yaml(recipe))
        self._write_facts()

        adapted.to(evaluate.default_device())
        if held_out and recipe.eval.before and self.facts["loss_before"] is None:
            self.facts["loss_before"] = self._loss(adapted, tokenizer, held_out, task, "before")
            self._write_facts()

        if start is None:
            self._start(method, rows, tokenizer, task.kind)
        trained = self._fit(method, tokenizer, rows, held_out, task, steps, lr_warmup, start, fingerprints)
        adapter = self._save(method, tokenizer, task, steps, dtype)
        metrics = {**trained, **self.facts["start"], **self._figures(adapted, tokenizer, task, held_out)}
        metrics |= self._test(adapted, tokenizer, task)
        result = {
            "status": "done",
            "folder": str(self.folder),
            "adapter": str(adapter),
            "steps": steps,
            "metrics": metrics,
            "trainable_parameters": self.facts["parameters"]["trainable"],
            "seconds": round(time.time() - started, 1),
        }
        if self.processes.main:
            record.write_json(
                self.folder / "metrics.json",
                record.result(
                    "train",
                    self.facts["recipe"],
                    metrics,
                    seeds=[recipe.seed],
                    started=started,
                    data=fingerprints["data"],
                    base=base,
                    processes=self.processes.count,
                    parameters=self.facts["parameters"],
                    **({"start": fingerprints["start"]} if "start" in fingerprints else {}),
                    main_metric=task.main_metric,
                    notes=self.notes,
                ),
            )
        self._write_facts(status="done", finished=record.now(), result=result)
        return self.processes.from_main(lambda: result)

    def _write_facts(self, **more: Any) -> None:
        if self.processes.main:
            record.write_json(self.folder / "run.json", {**self.facts, **more})

    # -- the steps ----------------------------------------------------------------------------------------------------

    def _load_model(self, task: Task) -> tuple[torch.nn.Module, Any]:
        recipe = self.recipe
        labels = {"classify": len(task.labels) or None, "regress": 1}.get(task.kind)
        model, tokenizer = load_model(
            recipe.model.name, task.kind, dtype=recipe.model.dtype, num_labels=labels, revision=recipe.model.revision,
            quantization=recipe.model.quantization,
        )  # fmt: skip
        if task.labels:
            evaluate.set_labels(model, task.labels)
        count = model.num_parameters()  # also of packed codes
        device, dtype = evaluate.default_device(), str(model.dtype).removeprefix("torch.")
        where = f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else record.device_name()
        if self.processes.count > 1:
            where += f", {self.processes.count} processes"
        say(
            self.console,
            "model",
            f"{escape(recipe.model.name)}: {type(model).__name__}, {amount(count)} parameters, {recipe.model.quantization or dtype}, {where}",
        )
        return model, tokenizer

    def _encode(self, task: Task, tokenizer) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        data = self.recipe.data
        examples = evaluate.select(task, "train", data.limit)
        rows, counts = encode_split(examples, tokenizer, task.kind, max_length=data.max_length, train_on=data.train_on)
        held_out: list[dict[str, Any]] = []
        if "validation" in task.splits and len(task.splits["validation"]):
            validation = evaluate.select(task, "validation", data.eval_limit)
            held_out, _ = encode_split(validation, tokenizer, task.kind, max_length=data.max_length)
        message = f"{counts.tokens:,} tokens in {counts.rows:,} rows"
        if task.kind == "generate":
            message += f", {counts.trained_tokens:,} trained ({counts.trained_tokens / counts.tokens:.0%})"
        if counts.truncated:
            message += f", [yellow]{counts.truncated:,} rows cut to {data.max_length} tokens[/]"
        say(self.console, "tokens", message)
        return rows, held_out

    def _put(
        self, model: Any, tokenizer, kind: evaluate.Kind, rows, lr_warmup: int, start: Path | None
    ) -> tuple[methods.Adapted, dict[str, Any]]:
        """`put`, with rows of the run for a start that looks at data, and how long it looked."""
        recipe = self.recipe
        wanted = 0

        def batches(count: int) -> list[dict[str, torch.Tensor]]:
            nonlocal wanted
            drawn = calibration.draw_rows(rows, count, recipe.seed)
            wanted = len(drawn)
            model.to(evaluate.default_device())
            return list(calibration.batches(drawn, tokenizer, recipe.train.batch_size, model))

        if recipe.adapter.start is not None:  # what it begins from has had its look at data
            earlier = evaluate.find(recipe.adapter.start) if start is None else start
            known = earlier if earlier is not None and (earlier / "adapter_config.json").is_file() else None
            return put(model, recipe, kind, lr_warmup, checkpoint=known), {}
        began, cpu = time.monotonic(), time.process_time()
        method = put(model, recipe, kind, lr_warmup, batches=batches, checkpoint=start)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        if not wanted:
            return method, {}
        say(self.console, "start", f"from {wanted:,} training rows in {clock(seconds)}")
        return method, {"start_rows": wanted, "start_seconds": round(seconds, 1), "start_cpu_seconds": round(cpu, 1)}

    def _begin(
        self,
        method: methods.Adapted,
        source: str,
        kind: evaluate.Kind,
        base: str,
        previous: dict[str, Any] | None,
        start: Path | None,
    ) -> str:
        """Loads the run this one begins from, unless a checkpoint ``start`` goes on from there; its fingerprint."""
        before = (previous or {}).get("fingerprints", {}).get("start")
        if start is not None:
            return before
        found = begin.from_run(method, source, kind, base)
        if before is not None:
            checkpoint.refuse_drift({"weights of adapter.start": before}, {"weights of adapter.start": found})
        say(self.console, "start", f"from [bold]{shown(Path(source))}[/]")
        return found

    def _announce_adapter(self, method: methods.Adapted, steps: int) -> None:
        model = method.model
        trainable, total = parameter_counts(model)
        title, opening = method.method.title, ""
        if method.method.name == "duallora":
            title, opening = self._dual_lora(model, steps)
        share = f"{amount(trainable)} trainable parameters ({trainable / total:.2%})"
        say(self.console, "adapter", f"{title}: {share}{opening}")
        if method.method.whole and model.dtype != torch.float32:
            say(
                self.console,
                "note",
                f"[yellow]the weights train in {str(model.dtype).removeprefix('torch.')}, where a step below half a unit of "
                "the last place is lost; model.dtype=float32 keeps every step[/]",
            )
        # The trained weights and AdamW's two moments.
        need = 3 * sum(weight.numel() * weight.element_size() for weight in methods.trained(model))
        free = shutil.disk_usage(self.folder).free
        if free < 3 * need:
            say(
                self.console,
                "disk",
                f"[yellow]{size(free)} free at {shown(self.folder)}, and a checkpoint takes {size(need)}: "
                "free some, or lower train.save_total_limit[/]",
            )

    def _dual_lora(self, model: PeftModel, steps: int) -> tuple[str, str]:
        config = cast(duallora.DualLoraConfig, model.peft_config["default"])
        layers = len([module for module in model.modules() if hasattr(module, "duallora_A")])
        ranks = (
            f"r {config.r}"
            if not (config.r1 or config.r2)
            else f"r1 {config.r1 or config.r}, r2 {config.r2 or config.r}"
        )
        opening = {"ramp": f"gate opens over {config.warmup_steps} of {steps} steps"}.get(
            config.warmup, f"warm-up: {config.warmup}"
        )
        opening = opening if self.recipe.adapter.start is None else "gate open"
        return f"Dual LoRA, {ranks}, alpha {config.alpha:g} on {layers} layers", f"; {opening}"

    def _start(self, method: methods.Adapted, rows, tokenizer, kind: evaluate.Kind) -> None:
        """A start from the gradient where the recipe asks for one, and the start kept where every checkpoint is."""
        recipe, processes = self.recipe, self.processes
        if recipe.adapter.init != "gaussian":
            began, cpu = time.monotonic(), time.process_time()

            def start() -> int:
                loss = None if kind == "generate" else partial(row_loss, kind)
                return calibration.start_from_gradient(method.model, recipe, rows, tokenizer, loss)

            seen = processes.from_main(start)  # the others get these factors as DDP begins
            seconds, cpu = time.monotonic() - began, time.process_time() - cpu
            told = {"start_seconds": round(seconds, 1), "start_cpu_seconds": round(cpu, 1)}
            self.facts["start"] = {"start_rows": seen, **told}
            self._write_facts()
            say(self.console, "start", f"{recipe.adapter.init} of {seen:,} training rows in {clock(seconds)}")
        if recipe.train.save_total_limit is None and processes.main and isinstance(method.model, PeftModel):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Saving a Dual LoRA adapter whose gate is not open")
                method.save(self.checkpoints / START)

    def _fit(self, method, tokenizer, rows, held_out, task, steps, lr_warmup, start, fingerprints) -> dict[str, Any]:
        """Trains to ``steps`` from ``start`` (a checkpoint or None); the figures of the training itself."""
        recipe, model = self.recipe, method.model
        processes = self.processes
        log = JsonLines(self.folder / "log.jsonl")
        if processes.main:
            log.drop_after(_step_of(start) if start else 0)
        if start is not None and _step_of(start) >= steps:
            # Trainer would take one more step here if the last one was not the last of its epoch.
            load_weights(method, start)
            return log.summary()
        callbacks: list[TrainerCallback] = [
            self.stopping,
            checkpoint.SealCheckpoints(self.checkpoints, recipe.train.save_total_limit, fingerprints, processes),
        ]
        trainer = _Trainer(
            model=model,
            args=_arguments(recipe, self.checkpoints, steps, lr_warmup, processes),
            train_dataset=[*rows, nothing_to_learn(rows[0], task.kind)],
            data_collator=Collator(tokenizer),
            callbacks=[*callbacks, log] if processes.main else callbacks,
            compute_loss_func=None if task.kind == "generate" else partial(row_loss, task.kind),
        )
        trainer.processes, trainer.kind, trainer.method = processes, task.kind, method
        if processes.count > 1:
            leave_in_place(model)
        if processes.index:  # each draws its own dropout and tokens
            set_seed((recipe.seed + processes.index) % 2**32)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if "tensorboard" in recipe.train.report_to and processes.main:
            from torch.utils.tensorboard import SummaryWriter
            from transformers.integrations import TensorBoardCallback

            trainer.add_callback(TensorBoardCallback(SummaryWriter(log_dir=str(self.folder / "tb"))))
        if task.kind != "generate":
            trainer.model_accepts_loss_kwargs = False  # the loss is `row_loss`; the model's forward knows no row count
        if recipe.train.eval_steps and held_out:
            options: dict[str, Any] = {"batch_size": recipe.eval.batch_size, "processes": processes}
            loss = partial(evaluate.loss_on, model, tokenizer, held_out, task.kind, **options)
            trainer.add_callback(LossDuringTraining(trainer, loss, recipe.train.eval_steps))
        show = ShowTraining(self.console, trainer)
        trainer.add_callback(FiniteGradients(trainer))
        trainer.add_callback(show)
        self.began = True
        try:
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
        finally:
            show.close()
            self.stopping.training = False
        number = self.stopping.agreed()
        if number is not None:
            raise Interrupted(number, f"stopped after step {trainer.state.global_step} of {steps}")
        checkpoint.require_finite(model, f"step {steps}")
        figures = processes.from_main(log.summary)
        say(
            self.console,
            "trained",
            f"{steps:,} steps in {clock(figures.get('train_seconds', 0))}, "
            f"last loss {figures.get('train_loss', math.nan):.3f}, gate {gate(model):.2f}",
        )
        return figures

    def _save(self, method: methods.Adapted, tokenizer, task: Task, steps: int, dtype: str) -> Path:
        model = method.model
        target = self.folder / ("model" if method.method.whole else "adapter")
        beside = target.with_name(f".{target.name}.tmp")
        if not self.processes.main:
            return target
        shutil.rmtree(beside, ignore_errors=True)
        method.save(beside)
        tokenizer.save_pretrained(str(beside))
        (beside / "README.md").unlink(missing_ok=True)  # PEFT's card is an empty form
        record.follow_umask(beside)
        files = {path.name: checkpoint.file_record(path) for path in sorted(beside.iterdir())}
        record.write_json(
            beside / evaluate.SIDECAR,
            {
                "method": self.recipe.adapter.method.upper(),
                "kind": task.kind,
                "task": task.name,
                "labels": list(task.labels),
                "steps": steps,
                "gate": gate(model),
                "base": {**self.facts["model"], "dtype": dtype, "fingerprint": self.facts["fingerprints"]["base"]},
                "data": self.facts["fingerprints"]["data"],
                "recipe": self.facts["fingerprints"]["recipe"],
                **{key: self.facts[key] for key in ("commit", "dirty", "versions")},
                "files": files,
            },
        )
        for name in files:
            record.flush(beside / name)
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
        record.fsync_folder(self.folder)
        weights = sum(file["size"] for name, file in files.items() if name.endswith(".safetensors"))
        say(self.console, "saved", f"[bold]{shown(target)}[/] ({size(weights)})")
        return target

    def _figures(self, model, tokenizer, task: Task, held_out) -> dict[str, Any]:
        """The held-out figures after training, with the loss before beside the loss after."""
        if not held_out:
            say(self.console, "after", "no validation rows: nothing to compare with")
            return {}
        before = {} if self.facts["loss_before"] is None else {"loss_before": self.facts["loss_before"]}
        if not self.recipe.eval.metrics:
            return {**before, "loss": self._loss(model, tokenizer, held_out, task, "after")}
        result = self._score(model, tokenizer, task, "validation")
        self._say_loss("after", result.metrics["loss"], task)
        self._say_scores(result, "validation")
        return {**before, **result.metrics}

    def _score(self, model, tokenizer, task: Task, split: str) -> evaluate.EvalResult:
        recipe = self.recipe
        chosen = {"max_new_tokens": recipe.eval.max_new_tokens, "num_beams": recipe.eval.num_beams}
        return evaluate.evaluate(
            model,
            tokenizer,
            task,
            split=split,
            limit=recipe.data.eval_limit,
            batch_size=recipe.eval.batch_size,
            generation={name: value for name, value in chosen.items() if value is not None},
            max_length=recipe.data.max_length,
            scoring=recipe.eval.scoring,
            console=self.console,
            processes=self.processes,
        )

    def _say_scores(self, result: evaluate.EvalResult, split: str) -> None:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items() if name not in LOSSES)
        say(self.console, "scores", f"{figures} ({len(result.examples):,} {split} rows)")
        if result.note:
            say(self.console, "note", escape(result.note))
            self.notes[split] = result.note

    def _test(self, model, tokenizer, task: Task) -> dict[str, Any]:
        """The figures on the test rows, and every prediction beside what it should have been in predictions.jsonl."""
        if not self.recipe.eval.test:
            return {}
        result = self._score(model, tokenizer, task, "test")
        self._say_scores(result, "test")
        if self.processes.main:
            lines = []
            for prediction, example in zip(result.predictions, result.examples, strict=True):
                truth = {"references": example.references} if task.kind == "generate" else {"label": example.label}
                part = {"group": example.group} if example.group else {}
                lines.append(json.dumps({"prediction": prediction, **truth, **part}) + "\n")
            record.write_text(self.folder / "predictions.jsonl", "".join(lines))
        return {"test": result.metrics}

    def _loss(self, model, tokenizer, held_out, task: Task, label: str) -> float:
        options: dict[str, Any] = {"console": self.console, "processes": self.processes}
        options["batch_size"] = self.recipe.eval.batch_size
        loss = evaluate.loss_on(model, tokenizer, held_out, task.kind, **options)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss on the {len(held_out):,} validation rows is {loss} {label} training: the model itself gives "
                "NaN or infinite values. Load it with model.dtype=float32, or check its weights"
            )
        self._say_loss(label, loss, task)
        return loss

    def _say_loss(self, label: str, loss: float, task: Task) -> None:
        unit = "answer loss" if task.kind == "generate" else "loss"
        was = self.facts.get("loss_before")
        compared = f" (was {was:.4f})" if label == "after" and was is not None else ""
        say(self.console, label, f"validation {unit} [bold]{loss:.4f}[/]{compared}")

    # -- the folder ---------------------------------------------------------------------------------------------------

    def _previous(self) -> dict[str, Any] | None:
        """The facts of the run this one continues, or None for a new one; ConfigError where the folder is taken."""
        path = self.folder / "run.json"
        finished = any((self.folder / name).exists() for name in ("adapter", "model"))
        resumable = bool(checkpoint.checkpoints(self.checkpoints)) or finished
        if self.source == "never":
            if path.is_file() and resumable:
                raise ConfigError(
                    f"{self.folder} holds another run; continue it with --resume auto, or choose another folder with -o"
                )
            strangers = [entry.name for entry in self.folder.iterdir() if entry.name not in (*MATTERS, ".lock")]
            if strangers:
                raise ConfigError(
                    f"{self.folder} is not empty (it holds {strangers[0]}) and is no run; choose another folder with -o"
                )
            return None
        if not path.is_file():
            if isinstance(self.source, Path):
                raise ConfigError(f"{self.folder} holds no run to resume (run.json is missing)")
            return None
        try:
            previous = record.read_json(path)
            before = with_later(previous["recipe"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} is damaged; restore it, or start a new run in another folder with -o") from None
        after = self.recipe.model_dump(mode="json")
        if previous.get("status") != "done":  # each process has generators of its own
            before = {**before, "processes (--launch)": previous.get("processes", 1)}
            after["processes (--launch)"] = self.processes.count
        checkpoint.refuse_drift(before, after)
        return previous

    def _resume_from(self, previous: dict[str, Any] | None, fingerprints: dict[str, Any]) -> Path | None:
        if previous is None:
            return None
        ours = {"data": fingerprints["data"], "base model weights": fingerprints["base"]}
        before = {"data": previous["fingerprints"]["data"], "base model weights": previous["fingerprints"]["base"]}
        ours["plug-ins"], before["plug-ins"] = fingerprints["plugins"], previous["fingerprints"].get("plugins", {})
        checkpoint.refuse_drift(before, ours)
        found: Path | None
        passed_over: list[str] = []
        if isinstance(self.source, Path):
            reason = checkpoint.verify(self.source)
            if reason:
                raise IntegrityError(f"{self.source}: {reason}; use --resume auto to take the newest whole one")
            found = self.source
        else:
            found, passed_over = checkpoint.require_resumable(self.checkpoints)
        for reason in passed_over:
            say(self.console, "skipped", f"[yellow]{escape(reason)}[/]")
        say(self.console, "resume", f"from {found.name}" if found else "no checkpoint yet: from the first step")
        return found

    def _record_failure(self, error: BaseException, previous: dict[str, Any] | None) -> None:
        stopped = isinstance(error, KeyboardInterrupt)
        if self.began:
            for _, path in checkpoint.checkpoints(self.checkpoints):
                if not (path / checkpoint.MANIFEST).is_file():
                    shutil.rmtree(path, ignore_errors=True)
        if self.facts:
            outcome = {"status": "interrupted" if stopped else "failed", "error": f"{type(error).__name__}: {error}"}
            with suppress(OSError):
                record.write_json(self.folder / "run.json", {**self.facts, **outcome, "finished": record.now()})
        if stopped and (self.began or previous):
            command = f"duallora train -c {shown(self.folder / 'recipe.yaml')} --resume auto"
            say(self.console, "stopped", f"{error or 'interrupted'}; continue with: [bold]{command}[/]")


# -- what the run is made of ------------------------------------------------------------------------------------------

LOSSES = ("loss", "perplexity")


def load(recipe: Recipe, console: Console) -> Task:
    """The recipe's task or data, announced on the console."""
    data = recipe.data
    if data.task is not None:
        task = load_task(data.task, data_dir=data.data_dir)
    else:
        task = load_data(
            str(data.path),
            eval_data=data.eval_path,
            eval_fraction=data.eval_fraction,
            seed=recipe.seed,
            format=data.format,
            bad_rows=data.bad_rows,
        )
    if "train" not in task.splits:
        raise DataError(f"{task.source or task.name} has no train split; it has {', '.join(task.splits) or 'none'}")
    if data.holdout:
        task = hold_out(task, data.holdout)
    evaluate.check_scoring(task, recipe.eval.scoring)
    if recipe.eval.test and "test" not in task.splits:
        raise ConfigError(
            f"eval.test=true: {task.source or task.name} has no test rows; it has {', '.join(task.splits)}"
        )
    counts = ", ".join(
        f"{len(task.splits[split]):,} {split}" for split in ("train", "validation") if split in task.splits
    )
    limit = f" (the first {data.limit:,} used)" if data.limit and data.limit < len(task.splits["train"]) else ""
    say(console, "data", f"{escape(task.source or task.name)}: {escape(task.format)}, {counts} rows{limit}")
    return task


def adapt(model: torch.nn.Module, recipe: Recipe, kind: evaluate.Kind, lr_warmup: int) -> Any:
    """``model`` with the recipe's adapter on it, its factors in float32; a new head is trained in full.

    A method that trains the weights themselves gives the model back, all of it trained.
    """
    return put(model, recipe, kind, lr_warmup).model


def put(
    model: torch.nn.Module,
    recipe: Recipe,
    kind: evaluate.Kind,
    lr_warmup: int,
    *,
    batches: Callable[[int], Iterable[Mapping[str, Any]]] | None = None,
    checkpoint: Path | None = None,
) -> methods.Adapted:
    """`adapt`, with what the method says of its optimizer.

    ``batches(n)`` are n rows of data for a start that looks at some; without them, and without the ``checkpoint`` of a run
    that is resumed, such an adapter is given the usual start: its shapes are what they will be.
    """
    name = recipe.adapter.method
    method = methods.get(name)
    fields = recipe.adapter.model_dump(exclude=set(RUNS_OWN))
    if fields["warmup_steps"] == "auto":
        fields["warmup_steps"] = max(1, lr_warmup) if recipe.adapter.start is None else 0
    if kind != "generate" and not method.whole:
        heads = evaluate.head_modules(model)
        # PEFT adds "classifier" and "score" by itself; DeBERTa's pooler, new as well, it forgets.
        own = {*(fields["modules_to_save"] or ()), *heads} - {"classifier", "score"}
        fields["modules_to_save"] = sorted(own) or None
        if fields["exclude_modules"] is None and fields["target_modules"] == "all-linear":
            fields["exclude_modules"] = rf"({'|'.join(heads)})(\..*)?"
    task_type = "CAUSAL_LM" if kind == "generate" else "SEQ_CLS"
    if name == "duallora":
        config = duallora.DualLoraConfig(**fields, task_type=task_type, revision=recipe.model.revision)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(f"adapter.target_modules={recipe.adapter.target_modules!r}: {error}") from error
        options = {"direction_lr_ratio": recipe.train.direction_lr_ratio}
        found = methods.Adapted(adapted, method, methods.MethodSpec(name, options=options))
    else:
        spec = other(recipe, method, fields, task_type)
        count = methods.rows_wanted(method, spec)
        if count and checkpoint is None and batches is None:
            spec = starts.without_data(spec)
        data = batches(count) if count and checkpoint is None and batches else None
        found = methods.apply(model, spec, batches=data, checkpoint=checkpoint)
    if method.whole:
        return found
    config = found.model.peft_config["default"]
    # The name the user gave, not the local folder it resolved to: the adapter may be loaded on another machine.
    config.base_model_name_or_path, config.revision = recipe.model.name, recipe.model.revision
    return found


def other(recipe: Recipe, method: methods.Method, fields: dict[str, Any], task_type: str) -> methods.MethodSpec:
    """The recipe's settings as those of another method than Dual LoRA; ``fields`` are the adapter section's."""
    values = {"r": fields["r"], "alpha": fields["alpha"], "dropout": fields["duallora_dropout"] or None}
    values["target_modules"] = fields["target_modules"]
    untouched = type(recipe.adapter)()
    for name, key in (("r", "r"), ("target_modules", "target_modules")):
        # What a method has not got, or has a better place for, is its own where the recipe says nothing else.
        if values[name] == getattr(untouched, key) and (name not in method.defaults or (method.rule and name != "r")):
            values[name] = None
    options = dict(recipe.adapter.options)
    if "target_modules" in method.defaults or method.whole:  # a whole model's method refuses what it has not got
        chosen = ("exclude_modules", "modules_to_save", "layers_to_transform")
        options |= {name: fields[name] for name in chosen if fields[name] is not None}
    return methods.MethodSpec(method.name, task_type=task_type, options=options, **values)


def parameter_counts(model: Any) -> tuple[int, int]:
    """(trained, all) weights of a model, with or without an adapter."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    return sum(weight.numel() for weight in methods.trained(model)), model.num_parameters()


def load_weights(method: methods.Adapted, folder: Path) -> None:
    """The trained weights of a checkpoint into the model; IntegrityError where they are another model's."""
    model = method.model
    if method.method.restore is not None:
        method.method.restore(method, folder)
        return
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        return
    try:
        load_model_weights(model, folder / WHOLE_MODEL)
    except RuntimeError as error:  # names or shapes
        raise IntegrityError(f"{folder / WHOLE_MODEL} does not fit the model: {str(error).splitlines()[0]}") from error


def gate(model: Any) -> float:
    """Dual LoRA's gate; 1 for methods that have none."""
    return duallora.gate(model) if any(hasattr(m, "duallora_step") for m in model.modules()) else 1.0


def _arguments(
    recipe: Recipe, checkpoints: Path, steps: int, lr_warmup: int, processes: Processes = ALONE
) -> TrainingArguments:
    options = recipe.train
    batch_size, accumulation = shares(options.batch_size, options.gradient_accumulation_steps, processes.count)
    try:
        arguments = TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            average_tokens_across_devices=processes.count > 1,
            # Biases outside the adapted layers, and a model's own weights, may have no part in the loss (a pooler's).
            ddp_find_unused_parameters=recipe.adapter.bias == "all" or methods.get(recipe.adapter.method).whole,
            ddp_broadcast_buffers=False,  # the gates count the same steps everywhere
            learning_rate=options.learning_rate,
            lr_scheduler_type=options.lr_scheduler,
            warmup_steps=lr_warmup,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            optim=options.optimizer,
            gradient_checkpointing=options.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
            seed=recipe.seed,
            data_seed=recipe.seed,
            logging_steps=options.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=options.save_steps,
            save_total_limit=None,
            report_to=[name for name in options.report_to if name != "tensorboard"],
            run_name=checkpoints.parent.name,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_num_workers=0,
            dataloader_pin_memory=torch.cuda.is_available(),
            push_to_hub=False,
        )
    except ValueError as error:
        raise ConfigError(f"transformers does not accept these settings: {error}") from error
    # transformers would put a batch on each GPU it sees, and the steps would be of other sizes than the recipe's.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def schedule(recipe: Recipe, rows: int) -> tuple[int, int]:
    """(optimizer steps, those that warm up the learning rate) of a run on ``rows`` training rows."""
    options = recipe.train
    per_epoch = math.ceil(math.ceil(rows / options.batch_size) / options.gradient_accumulation_steps)
    steps = options.max_steps or math.ceil(options.epochs * per_epoch)
    warmup = options.lr_warmup_steps
    return steps, math.ceil((options.lr_warmup_ratio or 0) * steps) if warmup is None else warmup


def check_settings(recipe: Recipe, processes: Processes = ALONE) -> None:
    """ConfigError now, before anything heavy is loaded, for what transformers would refuse when training starts."""
    _arguments(recipe, Path("checkpoints"), steps=1, lr_warmup=0, processes=processes)
    method = methods.get(recipe.adapter.method)
    if method.optimizer and recipe.train.optimizer != type(recipe.train).model_fields["optimizer"].default:
        raise ConfigError(
            f"train.optimizer={recipe.train.optimizer}: {method.title} is an optimizer itself; leave it out"
        )
    trackers = [name for name in recipe.train.report_to if name != "tensorboard"]
    try:
        for callback in get_reporting_integration_callbacks(trackers):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"train.report_to={trackers}: {error}") from error


def _loss_before(previous: dict[str, Any] | None, recipe: Recipe) -> float | None:
    """The loss before training that a resumed run may keep: None if it was taken on other rows."""
    if not previous or previous.get("recipe", {}).get("data", {}).get("eval_limit") != recipe.data.eval_limit:
        return None
    return previous.get("loss_before")


class _Trainer(Trainer):
    """Counts real tokens, stops at the first non-finite loss, and saves nothing but what is trained."""

    model: Any
    lr_scheduler: Any
    processes = ALONE
    kind: evaluate.Kind = "generate"
    method: methods.Adapted | None = None
    tokens = 0
    step_tokens = 0
    step_loss = 0.0
    logged = (0, 0.0, 0.0)  # tokens, time and processor time at the last line of the log

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None and self.method is not None:
            own, options = self.method.method, self.method.spec.options
            rates = self.args.learning_rate, self.args.weight_decay
            if own.optimizer is not None:
                self.optimizer = self.method.optimizer(*rates)
            elif own.groups is not None and options.get("direction_lr_ratio") != 1:  # with 1 Trainer's groups will do
                kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = kind(self._spared(self.method.groups(*rates)), **settings)
        return super().create_optimizer(*args, **kwargs)

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
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss += float(loss)
        if self.processes.count == 1:  # several stop together: see FiniteGradients
            self.require_finite("loss", self.step_loss)
        return loss

    def require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise self.non_finite(what, value)

    def _get_train_sampler(self, train_dataset=None):
        rows: Any = self.train_dataset
        lengths = [len(row["input_ids"]) for row in rows[:-1]]  # the last one is `nothing_to_learn`
        # By optimizer step, so that a smaller batch with more accumulation or more processes is the same run.
        at_once = self.args.train_batch_size * self.processes.count
        step = at_once * self.args.gradient_accumulation_steps
        self.sampler = LikeLengths(lengths, step, self.args.seed, fill_to=at_once if self.processes.count > 1 else 1)
        return self.sampler

    def _get_num_items_in_batch(self, batch_samples, device):
        if self.kind == "generate":
            return super()._get_num_items_in_batch(batch_samples, device)
        own = sum(int(has_label(batch["labels"]).sum()) for batch in batch_samples)
        return torch.tensor(sum(count for (count,) in self.processes.numbers([own])), device=device)

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
        if self.method is not None and self.method.method.save is not None:
            self.method.save(folder)
        elif isinstance(self.model, PeftModel):
            # PEFT's own default asks the hub whether the vocabulary grew.
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        else:  # as they are called here: from_pretrained may rename and restack
            folder.mkdir(parents=True, exist_ok=True)
            save_model_weights(self.model, str(folder / WHOLE_MODEL))
        if self.method is not None and self.method.method.checkpoint is not None:
            self.method.method.checkpoint(self.method, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        method = self.method
        if method is None or (isinstance(self.model, PeftModel) and method.method.restore is None):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:  # Trainer's own passes over what does not fit
            load_weights(method, Path(resume_from_checkpoint))

    def non_finite(self, what: str, value: float) -> NonFiniteError:
        """The error for a NaN or infinite ``what`` in the step under way, which is also logged."""
        step = self.state.global_step + 1
        self.log({what: value, "stopped_in_step": step})
        return NonFiniteError(
            f"the {what.replace('_', ' ')} is {value} in step {step}; the step was not applied and nothing of it was "
            f"saved. Lower train.learning_rate (it is {self.args.learning_rate:g}), look at the rows, or use "
            "model.dtype=float32; earlier checkpoints are intact"
        )


def nothing_to_learn(row: dict[str, Any], kind: evaluate.Kind) -> dict[str, Any]:
    """A row of one token that adds nothing to any loss: it fills the last step, where processes would lack rows."""
    nothing: dict[str, Any] = {"generate": [IGNORE], "classify": IGNORE, "regress": math.nan}
    return {**{key: row[key][:1] for key in row if key != "labels"}, "labels": nothing[kind]}


def has_label(labels: torch.Tensor) -> torch.Tensor:
    """Which rows of a batch [rows] of class ids or targets are to be learnt."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORE


def row_loss(kind: evaluate.Kind, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """The share of one micro-batch in the mean loss over the ``num_items_in_batch`` rows of a step."""
    learnt = has_label(labels)
    logits, labels = outputs["logits"][learnt].float(), labels[learnt]
    if kind == "classify":
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
    return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum") / num_items_in_batch


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

    def __init__(self, trainer: _Trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trainer = self.trainer
        told = trainer.processes.numbers([trainer.step_loss, trainer.step_tokens])
        trainer.tokens += round(sum(tokens for _, tokens in told))
        trainer.step_tokens = 0
        trainer.step_loss = sum(loss for loss, _ in told) / len(told)
        trainer.require_finite("loss", trainer.step_loss)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        trainer.require_finite("grad_norm", float(torch.nn.utils.get_total_norm(gradients)))
        share_token_errors(model, trainer.processes)


def share_token_errors(model: torch.nn.Module, processes: Processes) -> None:
    """Gives every process the same sampling errors, so that the token budget is spent alike (gradient_tokens_by)."""
    probes = [probe for module in model.modules() for probe in getattr(module, "token_probes", {}).values()]
    probes = [probe for probe in probes if probe.grad is not None]
    if probes and processes.count > 1:
        for probe, error in zip(probes, processes.mean(torch.stack([p.grad for p in probes])), strict=True):
            probe.grad = error


class LossDuringTraining(TrainerCallback):
    """The validation loss every ``every`` steps, into the log; draws no random number, so training is unchanged."""

    def __init__(self, trainer: _Trainer, loss: Callable[[], float], every: int):
        self.trainer, self.loss, self.every = trainer, loss, every

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            wanted = control.should_log
            self.trainer.log({"eval_loss": self.loss()})
            control.should_log = wanted  # logging clears it, and this step's own line may be due


class JsonLines(TrainerCallback):
    """``log.jsonl``: one object per logging step, flushed at once. NaN is written as NaN."""

    MARKS = ("loss", "eval_loss", "stopped_in_step")  # what tells a line of the course from Trainer's closing summary

    def __init__(self, path: Path):
        self.path = path

    def drop_after(self, step: int) -> None:
        """Forgets lines past ``step``: the steps they tell of are about to be taken again."""
        kept = [line for line in self.read() if line["step"] <= step]
        if self.path.exists():
            record.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def read(self) -> list[dict[str, Any]]:
        lines = []
        if self.path.is_file():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # a kill can cut the last line short
                    lines.append(json.loads(text))
        return lines

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not any(mark in logs for mark in self.MARKS):
            return
        line = {"step": state.global_step, **logs, "time": record.now()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def summary(self) -> dict[str, Any]:
        """The last loss, and the time and speed of the training steps."""
        steps = [line for line in self.read() if "gate" in line]
        if not steps:
            return {}
        seconds = sum(line["seconds"] for line in steps)
        tokens = sum(line["tokens_per_second"] * line["seconds"] for line in steps)
        return {
            "train_loss": steps[-1]["loss"],
            "train_seconds": round(seconds, 1),
            "train_cpu_seconds": round(sum(line.get("cpu_seconds", 0.0) for line in steps), 1),
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        }


class ShowTraining(TrainerCallback):
    """The bar: steps, time left, loss (smoothed over about ten steps), learning rate, gate, real tokens per second."""

    def __init__(self, console: Console, trainer: _Trainer):
        self.console, self.trainer = console, trainer
        self.bar: Bar | None = None
        self.loss: float | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate's shards of a loader, shortened for a resumed run, hide the sampler from Trainer.
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()
        self.trainer.logged = (0, self.began, time.process_time())
        self.bar = Bar(self.console, "train", state.max_steps, done=state.global_step).__enter__()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last steps belong in the log, whatever logging_steps is
        loss, self.trainer.step_loss = self.trainer.step_loss, 0.0
        self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        speed = self.trainer.tokens / max(time.monotonic() - self.began, 1e-9)
        if self.bar is not None:
            self.bar.update(
                state.global_step,
                loss=f"{self.loss:.3f}",
                lr=f"{self.trainer.lr_scheduler.get_last_lr()[0]:.1e}",
                gate=f"{gate(model):.2f}",
                **{"tok/s": f"{speed:,.0f}"},
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.__exit__()
            self.bar = None


class Stopping(TrainerCallback):
    """Turns SIGINT and SIGTERM into: finish this optimizer step, save, stop. A second one leaves at once.

    Outside of training there is nothing to finish, so `Interrupted` is raised on the spot. Of several processes it is
    enough that one is asked: all stop after the same step.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, processes: Processes = ALONE) -> None:
        self.processes = processes
        self.number: int | None = None
        self.training = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # the only thread that may set handlers
            self.before = {number: signal.signal(number, self._handle) for number in self.NUMBERS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.training and self.number is None:
            self.number = number
            return
        raise Interrupted(number, f"stopped by {signal.Signals(number).name}")

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = True

    def agreed(self) -> int | None:
        """The signal that came to any of the processes, or None."""
        return round(max(number for (number,) in self.processes.numbers([self.number or 0]))) or None

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed() is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False


# -- the folder and its lock ------------------------------------------------------------------------------------------


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
    if (path / "run.json").is_file():
        folder = path
    elif path.is_dir() and path.name.startswith("checkpoint-"):
        source = path.resolve()
        folder = source.parent.parent
    else:
        raise ConfigError(f"--resume {resume}: expected never, auto, a run folder or one of its checkpoint folders")
    if recipe.output is not None and Path(recipe.output).resolve() != folder.resolve():
        raise ConfigError(f"--resume {resume} belongs to the run in {folder}, but the output is {recipe.output}")
    return folder, source


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
MEMORY_WORDS = ("out of memory", "DefaultCPUAllocator", "can't allocate memory")
WRITER_WORDS = ("iostream error", "PytorchStreamWriter", "No space left", "os error 28", "File too large")


@contextmanager
def _plain_errors(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Failures of the machine as `DiskError` and `OutOfMemoryError`, with what to do about them."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise DiskError(f"{error.filename or folder} cannot be written: {error.strerror}; {_free(folder)}") from error
    except (MemoryError, RuntimeError, SafetensorError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or any(word in text for word in MEMORY_WORDS):
            options = recipe.train
            raise OutOfMemoryError(
                f"out of memory with train.batch_size={options.batch_size} and data.max_length="
                f"{recipe.data.max_length} ({text.splitlines()[0] if text else 'no memory left'}). Halve the batch size "
                f"and set train.gradient_accumulation_steps={2 * options.gradient_accumulation_steps} (the same run), "
                "shorten data.max_length, or set train.gradient_checkpointing=true"
            ) from error
        if any(word in text for word in WRITER_WORDS):
            raise DiskError(f"{folder} cannot be written: {text.splitlines()[0]}; {_free(folder)}") from error
        raise


def _free(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{size(shutil.disk_usage(existing).free)} are free there. Free some space, or choose another folder with -o"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))

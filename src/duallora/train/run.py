"""One training run: transformers' Trainer around a Dual LoRA adapter, in a folder that tells the whole story.

recipe.yaml  the resolved recipe; run.json  versions, code, fingerprints, status; log.jsonl, tb/  the curves
checkpoints/  sealed checkpoints (`checkpoint`); metrics.json  the metrics
adapter/  the result; model/  where the method trains the whole model
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import duallora
from duallora import methods
from duallora.config.recipe import DataSection, Recipe, default_output, fingerprint, recipe_yaml, recorded
from duallora.errors import (
    ConfigError,
    DataError,
    DiskError,
    DualLoraError,
    IntegrityError,
    Interrupted,
    NonFiniteError,
    OutOfMemoryError,
    is_disk_failure,
    is_out_of_memory,
)
from duallora.store import adapters, checkpoint, record
from duallora.store.lock import locked
from duallora.store.models import load_model, weights_fingerprint
from duallora.store.positions import check_room, positions
from duallora.store.processes import ALONE, Processes
from duallora.tasks import Collator, Task, encode_split, hold_out, load_data, load_task, metrics
from duallora.tasks.task import Kind
from duallora.terminal import amount, clock, command, quiet_libraries, say, shown, size
from duallora.train import begin, calibration, chance, evaluate, plugins
from duallora.train.adapter import check_method, gate, load_weights, parameter_counts, put
from duallora.train.launch import end_with_parent, ignore_quantized, process_group, shares
from duallora.train.loop import (
    FiniteGradients,
    JsonLines,
    LossDuringTraining,
    RunTrainer,
    ShowTraining,
    StopTraining,
    nothing_to_learn,
    row_loss,
)

MATTERS = (
    "run.json", "recipe.yaml", "log.jsonl", "metrics.json", "predictions.jsonl", "adapter", "model", "checkpoints",
    "tb",
)  # fmt: skip

START = "start"  # beside the checkpoints: the adapter before its first step


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
        with _plain_errors(recipe, folder), ExitStack() as held, quiet_libraries():
            processes.from_main(lambda: held.enter_context(locked(folder)))
            stopping = held.enter_context(StopTraining(processes))
            return _Run(recipe, folder, source, stopping, console, processes).go()


class _Run:
    """The state the steps of one run share."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        source: str | Path,
        stopping: StopTraining,
        console: Console,
        processes: Processes = ALONE,
    ):
        self.recipe, self.folder, self.source = recipe, folder, source
        self.stopping, self.console, self.processes = stopping, console, processes
        self.checkpoints = folder / "checkpoints"
        self.began = False  # whether a training step may have been taken
        self.facts: dict[str, Any] = {}
        self.notes: dict[str, str] = {}  # on the metrics, by split
        self.findings: list[chance.Finding] = []  # whether they are above chance

    def go(self) -> dict[str, Any]:
        previous = self.processes.from_main(self._previous)
        if previous and previous.get("status") == "done":
            say(self.console, "done", f"this run is finished already: [bold]{shown(self.folder)}[/]")
            result = previous["result"]  # with the places of then: the folder may have been moved since
            adapter = self.folder / Path(result["adapter"]).name
            return {**result, "folder": str(self.folder), "adapter": str(adapter)}
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
        self._check_lengths(model, tokenizer, task, rows)
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
        check_method(recipe, steps)
        say(console, "steps", in_words(recipe, len(rows), steps, lr_warmup))
        dtype = str(model.dtype).removeprefix("torch.")
        method, seen = self._put(model, tokenizer, task.kind, rows, lr_warmup, start)
        adapted = method.model
        if positions(adapted) != positions(model):  # virtual tokens take some
            self._check_lengths(adapted, tokenizer, task, rows)
        if recipe.adapter.init_from is not None:
            fingerprints["start"] = self._begin(method, recipe.adapter.init_from, task.kind, base, previous, start)
        if start is not None and method.method.no_resume and method.method.checkpoint is None:
            raise ConfigError(
                f"{method.method.title} cannot be resumed: {method.method.no_resume} Start a new run with -o"
            )
        self._announce_adapter(method, steps)

        self.facts = {
            "status": "running",
            "pid": os.getpid(),
            "processes": self.processes.world_size,
            **record.environment(),
            "started": (previous or {}).get("started", record.now()),
            "resumed": [*(previous or {}).get("resumed", ()), *([record.now()] if previous else ())],
            "seed": recipe.seed,
            "recipe": recipe.model_dump(mode="json"),
            "fingerprints": fingerprints,
            "model": {**recipe.model.model_dump(include={"name", "revision", "quantization"}), "dtype": dtype},
            "parameters": dict(zip(("trainable", "total"), parameter_counts(adapted), strict=True)),
            "data": {
                "source": task.source,
                "format": task.format,
                "kind": task.kind,
                "labels": list(task.labels),
                "train": len(rows),
                "validation": len(held_out),
            },
            "steps": steps,
            "loss_before": _loss_before(previous, recipe),
            "start": (previous or {}).get("start", {}) or seen,
        }
        if self.processes.main:
            record.write_text(self.folder / "recipe.yaml", recipe_yaml(recipe))
        self._write_facts()

        adapted.to(adapters.default_device())
        if held_out and recipe.eval.before and self.facts["loss_before"] is None:
            self.facts["loss_before"] = self._loss(adapted, tokenizer, held_out, task, "before")
            self._write_facts()

        if start is None:
            self._start(method, rows, tokenizer, task.kind)
        trained = self._fit(method, tokenizer, rows, held_out, task, steps, lr_warmup, start, fingerprints)
        adapter = self._save(method, tokenizer, task, steps, dtype)
        metrics = {**trained, **self.facts["start"], **self._metrics(adapted, tokenizer, task, held_out)}
        metrics |= self._test(adapted, tokenizer, task)
        at_chance = self._at_chance(task, rows)
        result = {
            "status": "done",
            "folder": str(self.folder),
            "adapter": str(adapter),
            "steps": steps,
            "metrics": metrics,
            "at_chance": at_chance,
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
                    processes=self.processes.world_size,
                    parameters=self.facts["parameters"],
                    **({"start": fingerprints["start"]} if "start" in fingerprints else {}),
                    main_metric=task.main_metric,
                    notes=self.notes,
                    at_chance=at_chance,
                ),
            )
        self._write_facts(status="done", kind="done", finished=record.now(), result=result)
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
            adapters.set_labels(model, task.labels)
        count = model.num_parameters()  # also of packed codes
        device, dtype = adapters.default_device(), str(model.dtype).removeprefix("torch.")
        where = f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else record.device_name()
        if self.processes.world_size > 1:
            where += f", {self.processes.world_size} processes"
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
        if counts.rows > len(examples):
            message += f" (of {len(examples):,} chats: their template rewrites earlier turns, so each stands by itself)"
        if task.kind == "generate":
            message += f", {counts.trained_tokens:,} trained ({counts.trained_tokens / counts.tokens:.0%})"
        if counts.truncated:
            message += f", [yellow]{counts.truncated:,} rows cut to {data.max_length} tokens[/]"
        say(self.console, "tokens", message)
        return rows, held_out

    def _check_lengths(self, model: Any, tokenizer, task: Task, rows: Sequence[Mapping[str, Any]]) -> None:
        for note in check_lengths(self.recipe, model, tokenizer, task, rows):
            say(self.console, "note", f"[yellow]{escape(note)}[/]")

    def _put(
        self, model: Any, tokenizer, kind: Kind, rows, lr_warmup: int, start: Path | None
    ) -> tuple[methods.Adapted, dict[str, Any]]:
        """`put`, with rows of the run for a start that looks at data, and how long it looked."""
        recipe = self.recipe
        wanted = 0
        source = getattr(recipe.adapter, "options", {}).get("calibration_data")

        def batches(count: int) -> list[dict[str, torch.Tensor]]:
            nonlocal wanted, rows
            if source is not None:
                rows = self._other_rows(source, tokenizer)
            drawn = calibration.draw_rows(rows, count, recipe.seed)
            wanted = len(drawn)
            model.to(adapters.default_device())
            return list(calibration.batches(drawn, tokenizer, recipe.train.batch_size, model))

        if recipe.adapter.init_from is not None:  # what it begins from has had its look at data
            earlier = adapters.find(recipe.adapter.init_from) if start is None else start
            known = earlier if earlier is not None and (earlier / "adapter_config.json").is_file() else None
            return put(model, recipe, kind, lr_warmup, checkpoint=known), {}
        began, cpu = time.monotonic(), time.process_time()
        method = put(model, recipe, kind, lr_warmup, batches=batches, checkpoint=start)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        if not wanted:
            return method, {}
        whose = f"rows of {escape(source)}" if source else "training rows"
        say(self.console, "start", f"from {wanted:,} {whose} in {clock(seconds)}")
        return method, {"start_rows": wanted, "start_seconds": round(seconds, 1), "start_cpu_seconds": round(cpu, 1)}

    def _other_rows(self, source: str, tokenizer) -> list[dict[str, Any]]:
        """Question-answering rows that a start looks at in place of the run's."""
        data = type(self.recipe.data)(path=source, max_length=self.recipe.data.max_length)
        task = read(self.recipe.model_copy(update={"data": data}))
        if task.kind != "generate":
            raise ConfigError(
                f"calibration_data={source}: expected question-answering rows (prompt and completion), and it is {task.format}"
            )
        examples = [example for split in task.splits.values() for example in split]
        return encode_split(examples, tokenizer, task.kind, max_length=data.max_length)[0]

    def _begin(
        self,
        method: methods.Adapted,
        source: str,
        kind: Kind,
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
            checkpoint.refuse_drift({"weights of adapter.init_from": before}, {"weights of adapter.init_from": found})
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
        opening = opening if self.recipe.adapter.init_from is None else "gate open"
        return f"Dual LoRA, {ranks}, alpha {config.alpha:g} on {layers} layers", f"; {opening}"

    def _start(self, method: methods.Adapted, rows, tokenizer, kind: Kind) -> None:
        """A start from the gradient where the recipe asks for one, and the start kept where every checkpoint is."""
        recipe, processes = self.recipe, self.processes
        if recipe.adapter.method == "duallora" and recipe.adapter.init != "gaussian":
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
        """Trains to ``steps`` from ``start`` (a checkpoint or None); the numbers of the training itself."""
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
        trainer = RunTrainer(
            model=model,
            args=_arguments(recipe, self.checkpoints, steps, lr_warmup, processes),
            train_dataset=[*rows, nothing_to_learn(rows[0], task.kind)],
            data_collator=Collator(tokenizer),
            callbacks=[*callbacks, log] if processes.main else callbacks,
            compute_loss_func=None if task.kind == "generate" else partial(row_loss, task.kind),
        )
        trainer.processes, trainer.kind, trainer.method = processes, task.kind, method
        if processes.world_size > 1:
            ignore_quantized(model)
        if processes.rank:  # each draws its own dropout and tokens
            set_seed((recipe.seed + processes.rank) % 2**32)
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
            show.bar.close()
            self.stopping.noted = False
        number = self.stopping.agreed()
        if number is not None:
            raise Interrupted(number, f"stopped after step {trainer.state.global_step} of {steps}")
        checkpoint.require_finite(model, f"step {steps}")
        found = processes.from_main(log.summary)
        say(
            self.console,
            "trained",
            f"{steps:,} steps in {clock(found.get('train_seconds', 0))}, "
            f"last loss {found.get('train_loss', math.nan):.3f}, gate {gate(model):.2f}",
        )
        return found

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
            beside / adapters.SIDECAR,
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

    def _metrics(self, model, tokenizer, task: Task, held_out) -> dict[str, Any]:
        """The held-out metrics after training, with the loss before beside the loss after."""
        if not held_out:
            say(self.console, "after", "no validation rows: nothing to compare with")
            return {}
        before = {} if self.facts["loss_before"] is None else {"loss_before": self.facts["loss_before"]}
        if not self.recipe.eval.metrics:
            loss = self._loss(model, tokenizer, held_out, task, "after")
            if task.kind == "generate":
                self.findings.append(chance.of_losses("validation", loss, self.facts["loss_before"]))
            return {**before, "loss": loss}
        result = self._score(model, tokenizer, task, "validation")
        self._say_loss("after", result.metrics["loss"], task)
        self._say_scores(result, "validation")
        return {**before, **result.metrics}

    def _score(self, model, tokenizer, task: Task, split: str) -> evaluate.EvalResult:
        recipe = self.recipe
        result = evaluate.evaluate(
            model,
            tokenizer,
            task,
            split=split,
            limit=recipe.data.eval_limit,
            batch_size=recipe.eval.batch_size,
            generation=recipe.eval.generation(),
            max_length=recipe.data.max_length,
            scoring=recipe.eval.scoring,
            console=self.console,
            processes=self.processes,
        )
        before = self.facts["loss_before"] if split == "validation" else None
        self.findings.append(chance.of_result(task, split, result, before=before))
        return result

    def _at_chance(self, task: Task, rows) -> dict[str, Any] | None:
        """What to say of a run that has learned nothing, said as the last thing of its summary."""
        options = self.recipe.train
        targets = [] if task.kind == "generate" else [row["labels"] for row in rows]
        loss = JsonLines(self.folder / "log.jsonl").last_loss(LAST_STEPS)
        trained = chance.of_training(task.kind, loss, targets)
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

    def _test(self, model, tokenizer, task: Task) -> dict[str, Any]:
        """The metrics on the test rows, and every prediction beside what it should have been in predictions.jsonl."""
        if not self.recipe.eval.test:
            return {}
        result = self._score(model, tokenizer, task, "test")
        self._say_scores(result, "test")
        if self.processes.main:
            lines = []
            for number, (prediction, example) in enumerate(zip(result.predictions, result.examples, strict=True)):
                truth = {"references": example.references} if task.kind == "generate" else {"label": example.label}
                part = {"group": example.group} if example.group else {}
                answer = result.answers[number]._asdict() if result.answers else {}
                lines.append(json.dumps({"prediction": prediction, **truth, **part, **answer}) + "\n")
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
            before = recorded(previous["recipe"], str(path))
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} is damaged; restore it, or start a new run in another folder with -o") from None
        after = self.recipe.model_dump(mode="json")
        if previous.get("status") != "done":  # each process has generators of its own
            before = {**before, "processes (--launch)": previous.get("processes", 1)}
            after["processes (--launch)"] = self.processes.world_size
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
            outcome = {
                "status": "interrupted" if stopped else "failed",
                "kind": getattr(error, "kind", "stopped" if stopped else "failed"),
                "error": f"{type(error).__name__}: {error}",
            }
            with suppress(OSError):
                record.write_json(self.folder / "run.json", {**self.facts, **outcome, "finished": record.now()})
        if stopped and (self.began or previous):
            again = escape(command("train", "-c", self.folder / "recipe.yaml", "--resume", "auto"))
            say(self.console, "stopped", f"{error or 'interrupted'}; continue with: [bold]{again}[/]")


# -- what the run is made of ------------------------------------------------------------------------------------------

LAST_STEPS = 10  # whose training loss tells whether anything was learned


def reading(data: DataSection) -> dict[str, Any]:
    """How the rows of a recipe's data are read, as `load_data` takes it: also what to read other rows by."""
    return {
        "format": data.format,
        "labels": data.labels,
        "bad_rows": data.bad_rows,
        "ignore_keys": data.ignore_keys or (),
        "chat_template_kwargs": data.chat_template_kwargs,
    }


def read(recipe: Recipe, trained: adapters.Trained | None = None) -> Task:
    """The recipe's task or data; ``trained``: what a model was trained for that these rows are for."""
    data = recipe.data
    if data.task is not None:
        return load_task(data.task, data_dir=data.data_dir)
    return load_data(
        str(data.path),
        eval_data=data.eval_path,
        eval_fraction=data.eval_fraction,
        seed=recipe.seed,
        trained=trained,
        **reading(data),
    )


def load(recipe: Recipe, console: Console, trained: adapters.Trained | None = None) -> Task:
    """`read`, announced on the console."""
    data = recipe.data
    task = read(recipe, trained)
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
    for note in task.notes:
        say(console, "", escape(note))
    return task


def check_lengths(recipe: Recipe, model: Any, tokenizer, task: Task, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to say where rows to train or to score on, or answers to write, are longer than the model was made for.

    Raises ConfigError where the model has no positions for them: before training, not at its end.
    """
    data, options = recipe.data, recipe.eval
    notes = [check_room(model, tokenizer, row=evaluate.longest(rows))]
    for split, scoring in (("validation", options.scoring if options.metrics else None), ("test", options.scoring)):
        if split not in task.splits or (split == "test" and not options.test) or not len(task.splits[split]):
            continue
        examples = evaluate.select(task, split, data.eval_limit)
        chosen: dict[str, Any] = {"generation": options.generation(), "scoring": scoring}
        notes.append(evaluate.check_lengths(model, tokenizer, task, examples, max_length=data.max_length, **chosen))
    return [note for note in dict.fromkeys(notes) if note]


def _arguments(
    recipe: Recipe, checkpoints: Path, steps: int, lr_warmup: int, processes: Processes = ALONE
) -> TrainingArguments:
    options = recipe.train
    batch_size, accumulation = shares(options.batch_size, options.gradient_accumulation_steps, processes.world_size)
    try:
        arguments = TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            average_tokens_across_devices=processes.world_size > 1,
            # Biases outside the adapted layers, and a model's own weights, may have no part in the loss (a pooler's).
            ddp_find_unused_parameters=getattr(recipe.adapter, "bias", "") == "all"
            or methods.get(recipe.adapter.method).whole,
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


def _steps_a_pass(recipe: Recipe, rows: int) -> int:
    return math.ceil(math.ceil(rows / recipe.train.batch_size) / recipe.train.gradient_accumulation_steps)


def schedule(recipe: Recipe, rows: int) -> tuple[int, int]:
    """(optimizer steps, those that warm up the learning rate) of a run on ``rows`` training rows."""
    options = recipe.train
    per_epoch = _steps_a_pass(recipe, rows)
    epochs = min(10, math.ceil(100 / per_epoch)) if options.epochs == "auto" else options.epochs
    steps = options.max_steps or math.ceil(epochs * per_epoch)
    if options.lr_warmup_steps is not None:
        return steps, options.lr_warmup_steps
    if options.lr_warmup_ratio == "auto":
        # While the gate opens the signs settle on the first gradients: three steps of that left runs at chance (LOG.md).
        return steps, max(math.ceil(steps / 10), min(10, steps // 3))
    return steps, math.ceil((options.lr_warmup_ratio or 0) * steps)


def in_words(recipe: Recipe, rows: int, steps: int, lr_warmup: int) -> str:
    """A schedule for people."""
    at_once = recipe.train.batch_size * recipe.train.gradient_accumulation_steps
    passes = steps / _steps_a_pass(recipe, rows)
    return f"{steps:,} of {at_once:,} rows, {passes:.3g} {'pass' if passes == 1 else 'passes'}; {lr_warmup:,} warm up the learning rate"


def check_settings(recipe: Recipe, processes: Processes = ALONE) -> None:
    """ConfigError now, before anything heavy is loaded, for what transformers would refuse when training starts."""
    _arguments(recipe, Path("checkpoints"), steps=1, lr_warmup=0, processes=processes)
    method = methods.get(recipe.adapter.method)
    check_method(recipe, recipe.train.max_steps)
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


@contextmanager
def _plain_errors(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Failures of the machine as `DiskError` and `OutOfMemoryError`, with what to do about them."""
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
                f"and set train.gradient_accumulation_steps={2 * options.gradient_accumulation_steps} (the same run), "
                "shorten data.max_length, or set train.gradient_checkpointing=true"
            ) from error
        if is_disk_failure(error):
            place, reason = (error.filename, error.strerror) if isinstance(error, OSError) else (None, said)
            raise DiskError(f"{place or folder} cannot be written: {reason}; {_free(folder)}") from error
        raise


def _free(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{size(shutil.disk_usage(existing).free)} are free there. Free some space, or choose another folder with -o"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))

"""What a recipe comes to before anything is trained: its rows, its schedule, Trainer's arguments, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from duallora import methods
from duallora.config.recipe import DataSection, Recipe, share_of
from duallora.errors import ConfigError, DataError
from duallora.methods.projected import OPTIMIZERS
from duallora.store import adapters
from duallora.store.positions import check_room
from duallora.store.processes import ALONE, Processes
from duallora.tasks import Task, encode_split, hold_out, load_data, load_task
from duallora.terminal import say
from duallora.train import evaluate
from duallora.train.adapter import check_method
from duallora.train.launch import shares


def reading(data: DataSection) -> dict[str, Any]:
    """How the rows of a recipe's data are read, as `load_data` takes it: also what to read other rows by."""
    return {
        "columns": data.columns,
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
    if recipe.train.label_smoothing and task.kind == "regress":
        raise ConfigError(
            f"train.label_smoothing={recipe.train.label_smoothing} spreads a class's target, and {task.name} has numbers: expected 0"
        )
    if recipe.eval.test and "test" not in task.splits:
        raise ConfigError(
            f"eval.test=true: {task.source or task.name} has no test rows; it has {', '.join(task.splits)}. "
            "Set data.holdout=N, which makes its validation rows the test rows and validates on N training rows, or leave "
            "eval.test out"
        )
    counts = ", ".join(
        f"{len(task.splits[split]):,} {split}" for split in ("train", "validation") if split in task.splits
    )
    limit = f" (the first {data.limit:,} used)" if data.limit and data.limit < len(task.splits["train"]) else ""
    say(console, "data", f"{escape(task.source or task.name)}: {escape(task.format)}, {counts} rows{limit}")
    for note in task.notes:
        say(console, "", escape(note))
    return task


FORGETTING_ROWS = 64


def elsewhere(recipe: Recipe, task: Task, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of `eval.forgetting`, text that the run does not train on, cut to its length; none where it is not asked for.

    Raises:
        ConfigError: the run or the rows do not generate, or the rows are those of the run.
    """
    name = recipe.eval.forgetting
    if name is None:
        return []
    if task.kind != "generate":
        raise ConfigError(
            f"eval.forgetting={name}: expected a run that generates, and this one is to {task.kind}; leave it out"
        )
    if name == "auto":
        name = "builtin:docstrings" if recipe.data.path == "builtin:reference" else "builtin:reference"
    if name == recipe.data.path:
        raise ConfigError(f"eval.forgetting={name} is what the run trains on; name other text, or auto")
    other = read(recipe.model_copy(update={"data": type(recipe.data)(path=name)}))
    if other.kind != "generate":
        raise ConfigError(
            f"eval.forgetting={name}: expected text, or prompts and completions, and it is {other.format}"
        )
    splits = (other.splits[name] for name in ("test", "validation", "train") if name in other.splits)
    examples = list(itertools.islice(itertools.chain.from_iterable(splits), FORGETTING_ROWS))
    return encode_split(examples, tokenizer, "generate", max_length=recipe.data.max_length)[0]


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


def arguments(
    recipe: Recipe, checkpoints: Path, steps: int, lr_warmup: int, processes: Processes = ALONE
) -> TrainingArguments:
    options = recipe.train
    batch_size, accumulation = shares(options.batch_size, options.gradient_accumulation_steps, processes.world_size)
    whole = methods.get(recipe.adapter.method).whole
    try:
        found = TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            average_tokens_across_devices=processes.world_size > 1,
            # Biases outside the adapted layers, and a model's own weights, may have no part in the loss (a pooler's).
            ddp_find_unused_parameters=whole or getattr(recipe.adapter, "bias", "") == "all",
            ddp_broadcast_buffers=False,  # the gates count the same steps everywhere
            learning_rate=options.learning_rate,
            lr_scheduler_type=options.lr_scheduler,
            warmup_steps=lr_warmup,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            optim="adamw_torch" if options.optimizer in OPTIMIZERS else options.optimizer,
            gradient_checkpointing=options.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
            seed=recipe.seed,
            data_seed=recipe.seed,
            logging_steps=options.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_steps=options.save_steps,
            save_total_limit=options.save_total_limit,
            report_to=[name for name in options.report_to if name != "tensorboard"],
            run_name=checkpoints.parent.name,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
    except ValueError as error:
        raise ConfigError(
            f"transformers does not accept train.optimizer={options.optimizer}, train.lr_scheduler={options.lr_scheduler} "
            f"and the rest of train: {error}"
        ) from error
    # transformers would put a batch on each GPU it sees, and the steps would be of other sizes than the recipe's.
    found._n_gpu = min(found.n_gpu, 1)
    return found


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
        return steps, share_of(steps)
    return steps, math.ceil((options.lr_warmup_ratio or 0) * steps)


def in_words(recipe: Recipe, rows: int, steps: int, lr_warmup: int) -> str:
    """A schedule for people."""
    at_once = recipe.train.batch_size * recipe.train.gradient_accumulation_steps
    passes = steps / _steps_a_pass(recipe, rows)
    return f"{steps:,} of {at_once:,} rows, {passes:.3g} {'pass' if passes == 1 else 'passes'}; {lr_warmup:,} warm up the learning rate"


def check_settings(recipe: Recipe, processes: Processes = ALONE) -> None:
    """ConfigError now, before anything heavy is loaded, for what transformers would refuse when training starts."""
    arguments(recipe, Path("checkpoints"), steps=1, lr_warmup=0, processes=processes)
    method = methods.get(recipe.adapter.method)
    check_method(recipe, recipe.train.max_steps)
    if method.whole and recipe.train.optimizer in OPTIMIZERS:
        raise ConfigError(
            f"train.optimizer={recipe.train.optimizer} with adapter.method={method.name}: expected another method's factors; over the "
            f"weights themselves it is adapter.method={OPTIMIZERS[recipe.train.optimizer]}"
        )
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

"""Scoring what somebody names: a run, an adapter or a model, on the run's own data, other data or a task."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from duallora.config.load import load_recipe
from duallora.config.recipe import EvalSection
from duallora.errors import ConfigError
from duallora.store import adapters, record
from duallora.store.run_folder import RunFolder
from duallora.tasks import Example, Task, load_data, load_task
from duallora.terminal import command
from duallora.train import chance, evaluate, plugins, prepare

ALL_ROWS = "all rows"  # the split of data that came without splits and that nothing here was trained on
KINDS = {
    "generate": "text to generate (prompt-completion, messages or alpaca rows)",
    "classify": "classes (rows with a label)",
    "regress": "numbers (rows with a label that is one)",
}


class Chosen(NamedTuple):
    """The rows to score ``source`` on, and how its run would; ``own``: they are of the data it was trained on."""

    source: str
    task: Task
    split: str
    examples: list[Example]
    limit: int | None
    settings: EvalSection
    max_length: int
    own: bool

    def score(self, model: Any, tokenizer: Any, **options: Any) -> tuple[Task, evaluate.EvalResult]:
        """(the task with the model's own numbers for its classes, `evaluate`'s result)."""
        task = with_labels_of(model, self.task, self.split, self.examples)
        options = {"batch_size": self.settings.batch_size, "max_length": self.max_length, **options}
        return task, evaluate.evaluate(model, tokenizer, task, split=self.split, **options)


def choose(
    source: str,
    console: Console,
    *,
    task: str | None = None,
    data: str | None = None,
    columns: str | None = None,
    data_dir: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Chosen:
    """What to evaluate ``source`` on: ``task``, ``data``, else what its run was trained on.

    Data the run was trained on are split as the run split them; of other data without splits every row counts. What the
    rows' labels are is the run's word, not theirs: they may hold one class of many, or whole numbers to regress. The split
    is test where there is one, else what is held out.

    Raises:
        ConfigError: nothing, or two things to score on, plug-ins nobody allowed, or data of another kind.
        DataError: a file is not as it should be.
    """
    if task is not None and data is not None:
        raise ConfigError(f"--task {task} and --data {data} exclude each other: keep one")
    file = recipe_file(source)
    if file is None and task is None and data is None:
        raise ConfigError(f"nothing to evaluate {source} on: name a task (--task e2e) or data (--data mine.jsonl)")
    recipe = None if file is None else load_recipe(file, data_dir=None if task or data else data_dir)
    if recipe is not None:
        plugins.require(recipe.plugins, source)
    trained = adapters.trained_for(source)
    own = recipe is not None and task is None and (data is None or _same_data(data, recipe.data.path))
    if columns is not None and (own or data is None):
        raise ConfigError(
            f"--columns {columns} is for other data than a run's own, which are read as the run did: leave it out"
        )
    if recipe is not None and own:
        chosen = prepare.load(recipe, console, trained)
        limit = limit or recipe.data.eval_limit
    else:
        chosen = load_task(task, data_dir=data_dir) if task else _every_row(str(data), columns, file, trained)
        for note in chosen.notes:
            console.print(escape(note), soft_wrap=True)
        if trained is not None and trained.kind != chosen.kind:
            raise ConfigError(
                f"{task or data} holds {KINDS[chosen.kind]}, but {source} was trained for {KINDS[trained.kind]}: "
                "evaluate it on data of the kind it was trained for"
            )
    split = split or next(name for name in ("test", "validation", *chosen.splits) if name in chosen.splits)
    # Of files alone: a task's rows are not drawn, and hashing its training rows would read all of them.
    changed = _changed_since(source, chosen) if recipe is not None and own and recipe.data.path else []
    if changed:
        console.print(
            f"[yellow]the {' and '.join(changed)} rows are not those of {escape(source)}'s training: its data have changed, so it "
            "may have been trained on what is held out now[/]",
            soft_wrap=True,
        )
    if own and data is not None:
        told = f"{escape(data)} is what {escape(source)} was trained on: scored on the run's own {split} rows"
        console.print(told, soft_wrap=True)
    examples = evaluate.select(chosen, split, limit)  # before a model is loaded: a wrong split costs no time
    settings, max_length = (recipe.eval, recipe.data.max_length) if recipe else (EvalSection(), 512)
    return Chosen(source, chosen, split, examples, limit, settings, max_length, own)


def score(
    chosen: Chosen,
    console: Console,
    *,
    batch_size: int | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
    scoring: evaluate.Scoring | None = None,
    dtype: Any = "auto",
    strict: bool = True,
    output: Path | None = None,
) -> dict[str, Any]:
    """Loads the model and scores it; what is None is as the run's recipe has it. ``output`` gets all of it as JSON.

    Raises as `adapters.load_adapter` and `evaluate.evaluate` do.
    """
    started = time.time()
    settings: dict[str, Any] = {
        "batch_size": batch_size or chosen.settings.batch_size,
        "max_length": max_length or chosen.max_length,
        "generation": chosen.settings.generation(max_new_tokens, num_beams),
        "scoring": scoring or (chosen.settings.scoring if chosen.own else "generation"),
    }
    evaluate.check_scoring(chosen.task, settings["scoring"])
    model, tokenizer = adapters.load_adapter(chosen.source, chosen.task.kind, dtype=dtype, strict=strict)
    task, result = chosen.score(model, tokenizer, **settings, console=console)
    found = chance.of_result(task, chosen.split, result)
    facts: dict[str, Any] = {
        "source": chosen.source,
        "task": task.name,
        "split": chosen.split,
        "n": len(result.examples),
        "truncated": result.truncated,
        "main_metric": task.main_metric,
        "note": result.note,
        "at_chance": found.record(chance.REMEDY) if found.at_chance else None,
        "predictions": result.predictions,
    }
    if output is not None:
        how = {key: settings[key] for key in ("batch_size", "max_length")}
        how |= {"dtype": dtype, "limit": chosen.limit, **settings["generation"]}
        how |= {"scoring": settings["scoring"]} if settings["scoring"] == "likelihood" else {}
        data = {chosen.split: task.fingerprint(chosen.split)}
        written = record.result("eval", how, result.metrics, seeds=(), started=started, data=data, **facts)
        record.write_json(output, written)
    _show(chosen.source, task, chosen.split, result, console)  # after the file: what goes wrong here costs no scoring
    if result.note:
        console.print(f"[dim]{escape(result.note)}[/]", soft_wrap=True)
    if at_chance := facts["at_chance"]:
        said = f"[bold red]{escape(at_chance['message'])}[/]; {escape(at_chance['remedy'])}"
        console.print(said, soft_wrap=True)
    if output is not None:
        console.print(f"written to [bold]{escape(str(output))}[/]", soft_wrap=True)
    told = {"data": task.source, "notes": task.notes, "metrics": result.metrics, "labels": task.labels}
    return {**facts, **told, **({"output": str(output)} if output else {})}


def _changed_since(source: str, task: Task) -> list[str]:
    """The splits that are other rows than those ``source`` was trained with."""
    run = RunFolder.around(source)
    recorded = ((run and run.facts()) or {}).get("fingerprints", {}).get("data", {})
    return [name for name, value in recorded.items() if name in task.splits and task.fingerprint(name) != value]


def recipe_file(source: str | Path) -> Path | None:
    """The recipe of the run that ``source``, one of its checkpoints or its adapter belongs to."""
    run = RunFolder.around(source)
    return run.recipe_file if run and run.recipe_file.is_file() else None


def with_labels_of(model: Any, task: Task, split: str, examples: Sequence[Example]) -> Task:
    """The task reduced to these examples, its classes numbered as the model numbers them.

    A file that lacks one of the classes numbers the others differently than the file the model was trained on.
    """
    if task.kind != "generate" and not hasattr(model, "peft_config"):
        trained = [name for name in model.config.architectures or () if name.endswith("ForSequenceClassification")]
        if not trained:
            raise ConfigError(
                f"{model.name_or_path} has no classification head, so its classes would be drawn by lot; train one first: "
                f"{command('train', '--model', model.name_or_path)} ..."
            )
    if task.kind != "classify":
        return replace(task, splits={split: examples})
    names = {str(name): int(index) for index, name in model.config.id2label.items()}
    if adapters.are_stand_ins(list(names)):
        if len(names) == len(task.labels):
            return replace(task, splits={split: examples})
        names = {str(index): index for index in names.values()}  # whole numbers need no names
    unknown = [label for label in task.labels if label not in names]
    if unknown:
        raise ConfigError(f"the data has the classes {', '.join(unknown)}; the model knows {', '.join(names)}")
    examples = [replace(example, label=names[task.labels[int(example.label or 0)]]) for example in examples]
    return replace(task, splits={split: examples}, labels=tuple(names))


def _same_data(data: str, trained_on: str | None) -> bool:
    """Whether both name one file, hub data set or built-in, whatever way the path is written."""
    if trained_on is None:
        return False
    return data == trained_on or Path(data).expanduser().resolve() == Path(trained_on).expanduser().resolve()


def _every_row(data: str, columns: str | None, file: Path | None, trained: adapters.Trained | None) -> Task:
    """The data with the splits they come with; where they come without, with every row in the split ``ALL_ROWS``."""
    if data.startswith("builtin:"):
        return load_data(data)
    how = load_recipe(file, data=data, columns=columns).data
    task = load_data(data, eval_data=data, trained=trained, **prepare.reading(how))
    rows = task.splits["train"]
    return replace(task, splits={ALL_ROWS: rows}) if task.splits["validation"] == rows else task


def _show(source: str, task: Task, split: str, result: evaluate.EvalResult, console: Console) -> None:
    console.print(f"{escape(source)} on {escape(task.name)}, {split}", soft_wrap=True)
    table = Table("metric", box=SIMPLE)
    table.add_column("value", justify="right")
    table.add_column("n", justify="right")
    for name, value in result.metrics.items():
        style = "bold" if name == task.main_metric else ""
        table.add_row(name, f"{value:,.4g}", f"{len(result.examples):,}", style=style)
    console.print(table)
    for prediction, example in list(zip(result.predictions, result.examples, strict=True))[
        : 0 if task.loss_only else 3
    ]:
        asked = evaluate.in_words(example)
        wanted = example.references[0] if example.references else example.label
        if task.kind == "classify":
            prediction, wanted = task.labels[prediction], task.labels[int(wanted or 0)]
        given = _on_a_line(asked)
        given = given if len(given) <= 160 else "..." + given[-157:]  # the end of a prompt holds the question
        for label, text in (("given", given), ("predicted", _on_a_line(prediction)), ("expected", _on_a_line(wanted))):
            console.print(Text.assemble((f"{label:<10}", "bold cyan"), textwrap.shorten(text, 160, placeholder=" ...")))
        console.print()


def _on_a_line(value: Any) -> str:
    """Text on one line, without the control characters that an untrained model may write to the terminal."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isprintable() else " " for letter in text)

"""Verbs around a run: demo, train, eval, merge; its data and its recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from duallora import console
from duallora.cli.app import (
    ConfigFile,
    Data,
    DataDir,
    Debug,
    Dtype,
    Json,
    Lenient,
    Model,
    Overrides,
    TaskName,
    app,
    refuse_misspelt,
    refuse_unwritable,
)

if TYPE_CHECKING:
    from duallora.config.recipe import Recipe
    from duallora.store.adapters import Trained
    from duallora.tasks import Example, Task
    from duallora.tasks.task import Kind
    from duallora.train.evaluate import EvalResult

TrainOn = Literal["answer", "all"]
Into = Literal["auto", "original", "dequantized"]
EvalData = Annotated[str | None, typer.Option("--eval-data", metavar="DATA", help="Held-out data for --data.")]
MaxLength = Annotated[
    int | None, typer.Option("--max-length", min=8, metavar="N", help="Tokens per example; 512 if not given.")
]

data_app = typer.Typer(no_args_is_help=True, help="Look at training data before using it.")
config_app = typer.Typer(no_args_is_help=True, help="The settings of a run: their schema and resolved values.")
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A small classifier: under 90 seconds.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the run.")] = Path(
        "runs/demo"
    ),
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Train, evaluate and merge a real model on this machine's own Python library; offline, minutes on two cores.

    [dim]Example:[/]  duallora demo --quick
    """
    from duallora.paper.demo import demo as run_demo

    return run_demo(quick=quick, output=output, console=console.results)


@app.command()
def train(
    context: typer.Context,
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    task: TaskName = None,
    data_dir: DataDir = None,
    eval_data: EvalData = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Run folder; runs/<date-time>-<model>-<data> if not given."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of data order and factors.")] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", help="duallora, or a method to compare with: lora, dora, hira, ..."),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            metavar="auto|never|PATH",
            help="auto: continue from the run folder's newest whole checkpoint; PATH: from this run or checkpoint, "
            "under its own recipe unless -c or data is given.",
        ),
    ] = "never",
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            metavar="N|FILE",
            help="Train in N processes on this machine, or as this accelerate config says; they share each batch.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, data and model, print the plan, train nothing.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Fine-tune a model: on your own file (--data), a hub data set (--data org/name) or a task of the paper (--task).

    [dim]Examples:[/]
      duallora train --data mine.jsonl -o runs/mine
      duallora train --model builtin:smollm2-135m --task arc_easy --set learning_rate=5e-4 --set r=8
      duallora train --method dora --data mine.jsonl
      duallora train -c recipe.yaml --resume auto --launch 2
    """
    from duallora.config.load import load_recipe

    if config is None and data is None and task is None and resume not in ("auto", "never"):
        config = _recipe_file(Path(resume))
        if config is not None:
            output = output or config.parent  # the recipe's own may name the place before the folder was moved
    chosen = [*(overrides or ()), *([f"adapter.method={method}"] if method else ())]
    recipe = load_recipe(
        config,
        chosen,
        model=model,
        data=data,
        task=task,
        data_dir=data_dir,
        eval_data=eval_data,
        output=output,
        seed=seed,
    )
    if launch is not None and not dry_run:
        from duallora.train.launch import launch as start

        start(launch, _without_option("--launch", context.find_root().obj))
    from duallora.terminal import command
    from duallora.train import run

    if dry_run:
        return run.plan(recipe, console.results)
    result = run.train(recipe, resume=resume, console=console.results)
    if os.environ.get("RANK", "0") == "0":
        folder = Path(result["folder"])
        merge_it = f", or {command('merge', folder, '-o', 'MERGED')}" if Path(result["adapter"]).name != "model" else ""
        console.results.print(f"[dim]next: {escape(command('eval', folder) + merge_it)}[/]", soft_wrap=True)
    return result


@app.command("eval")
def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="ADAPTER|MODEL", help="Run, adapter or model folder, hub id, or builtin: name.")
    ],
    task: TaskName = None,
    data: Data = None,
    data_dir: DataDir = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", metavar="NAME", help="train, validation or test; test if there is one, else what is held out."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N rows.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, metavar="N", help="Rows at a time; 16 or as the run's recipe.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=8, metavar="N", help="Tokens per row; 512 or as the run's recipe.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer; the task's own if not given."),
    ] = None,
    num_beams: Annotated[
        int | None,
        typer.Option("--num-beams", min=1, metavar="N", help="Beams (1 is greedy); the task's own if not given."),
    ] = None,
    scoring: Annotated[
        Literal["generation", "likelihood"] | None,
        typer.Option("--scoring", help="Generate answers, or take the likeliest of the options a task names."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Type of the weights; auto as trained.")] = "auto",
    lenient: Lenient = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write metrics and predictions as JSON.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Score an adapter or a model on a task or on your own file; a run folder alone is scored on its own data.

    [dim]Examples:[/]
      duallora eval runs/mine
      duallora eval runs/arc --task arc_easy --limit 200 -o results.json
      duallora eval builtin:smollm2-135m --data mine.jsonl
    """
    import time

    refuse_misspelt(source)
    if output is not None:
        refuse_unwritable(output)
    from duallora.config.recipe import EvalSection
    from duallora.store import adapters, record
    from duallora.train import chance
    from duallora.train import evaluate as evaluation

    started = time.time()
    chosen, recipe, own = what_to_score(task, data, data_dir, source)
    split = split or held_out(chosen)
    if own and data is not None:
        console.results.print(
            f"{escape(data)} is what {escape(source)} was trained on: scored on the run's own {split} rows",
            soft_wrap=True,
        )
    scored = recipe.eval if recipe else EvalSection()
    batch_size = batch_size or scored.batch_size
    max_length = max_length or (recipe.data.max_length if recipe else 512)
    limit = limit or (recipe.data.eval_limit if recipe and own else None)
    generation = scored.generation(max_new_tokens, num_beams)
    scoring = scoring or (scored.scoring if own else "generation")
    evaluation.check_scoring(chosen, scoring)
    examples = evaluation.select(chosen, split, limit)  # before the model is loaded: a wrong split costs no time
    model, tokenizer = adapters.load_adapter(source, chosen.kind, dtype=dtype, strict=not lenient)
    chosen = with_labels_of(model, chosen, split, examples)
    result = evaluation.evaluate(
        model,
        tokenizer,
        chosen,
        split=split,
        batch_size=batch_size,
        generation=generation,
        max_length=max_length,
        scoring=scoring,
        console=console.results,
    )
    found = chance.of_result(chosen, split, result)
    at_chance = found.record(chance.REMEDY) if found.at_chance else None
    payload = {
        "source": source,
        "task": chosen.name,
        "data": chosen.source,
        "notes": chosen.notes,
        "split": split,
        "n": len(result.examples),
        "truncated": result.truncated,
        "main_metric": chosen.main_metric,
        "metrics": result.metrics,
        "note": result.note,
        "at_chance": at_chance,
        "labels": chosen.labels,
        "predictions": result.predictions,
    }
    if output is not None:
        settings: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "dtype": dtype, "limit": limit}
        settings |= generation
        settings |= {"scoring": scoring} if scoring == "likelihood" else {}
        more: dict[str, Any] = {
            key: payload[key]
            for key in ("source", "task", "split", "n", "truncated", "main_metric", "note", "at_chance", "predictions")
        }
        fingerprints = {split: chosen.fingerprint(split)}
        record.write_json(
            output,
            record.result("eval", settings, result.metrics, seeds=(), started=started, data=fingerprints, **more),
        )
        payload["output"] = str(output)
    _show_scores(source, chosen, split, result)  # after the file is written: what goes wrong here costs no scoring
    if result.note:
        console.results.print(f"[dim]{escape(result.note)}[/]", soft_wrap=True)
    if at_chance:
        said = f"[bold red]{escape(at_chance['message'])}[/]; {escape(at_chance['remedy'])}"
        console.results.print(said, soft_wrap=True)
    if output is not None:
        console.results.print(f"written to [bold]{escape(str(output))}[/]", soft_wrap=True)
    return payload


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Run or adapter folder, or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the merged model.")],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Type of the merged weights; auto as trained.")] = "auto",
    into: Annotated[
        Into,
        typer.Option("--into", help="Of a quantized base: its original weights (auto), or those it was trained on."),
    ] = "auto",
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Fold an adapter into its base model: a standalone model for any transformers program, checked after writing.

    [dim]Example:[/]  duallora merge runs/mine -o merged/mine
    """
    refuse_misspelt(adapter)
    from duallora.export.merge import merge as run_merge

    return run_merge(adapter, output, dtype=dtype, into=into, console=console.results)


@data_app.command("preview")
def data_preview(
    name: Annotated[str, typer.Argument(metavar="FILE|TASK", help="A file, a hub id, builtin:docstrings, or a task.")],
    rows: Annotated[int, typer.Option("--rows", min=1, metavar="N", help="Rows to show.")] = 3,
    split: Annotated[str, typer.Option("--split", metavar="NAME", help="train, validation or test.")] = "train",
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="Whose tokenizer to use.")
    ] = "builtin:smollm2-135m",
    max_length: MaxLength = None,
    train_on: Annotated[TrainOn | None, typer.Option("--train-on", help="Where the loss is: answer or all.")] = None,
    data_dir: DataDir = None,
    overrides: Overrides = None,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Show rows as the model sees them: trained tokens in color, ignored tokens dim, special tokens spelt out.

    [dim]Example:[/]  duallora data preview mine.jsonl --model builtin:smollm2-135m
    """
    from duallora.errors import ConfigError
    from duallora.store.models import load_tokenizer
    from duallora.tasks.preview import preview

    task, recipe = _named(name, data_dir, overrides)
    if split not in task.splits:
        raise ConfigError(f"{name} has no split {split!r}; it has {', '.join(task.splits)}")
    shown = preview(
        task,
        load_tokenizer(model),
        split=split,
        rows=rows,
        max_length=max_length or recipe.data.max_length,
        train_on=train_on or recipe.data.train_on,
    )
    console.results.print(shown)
    return {
        "source": task.source, "notes": task.notes, "format": task.format, "kind": task.kind, "split": split,
    }  # fmt: skip


@data_app.command("check")
def data_check(
    name: Annotated[str, typer.Argument(metavar="FILE|TASK", help="A file, a hub id, builtin:docstrings, or a task.")],
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="Whose tokenizer to use.")
    ] = "builtin:smollm2-135m",
    max_length: MaxLength = None,
    data_dir: DataDir = None,
    overrides: Overrides = None,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Read every row, name the bad ones by line, and count tokens: exit code 3 where training would stop.

    [dim]Example:[/]  duallora data check mine.csv
    """
    from rich.box import SIMPLE
    from rich.table import Column, Table

    from duallora.store.models import load_tokenizer
    from duallora.tasks import encode_split

    task, recipe = _named(name, data_dir, overrides)
    max_length = max_length or recipe.data.max_length
    tokenizer = load_tokenizer(model)
    for line in (f"{task.source}: {task.format}", *task.notes):
        console.results.print(escape(line), soft_wrap=True)
    table = Table(Column("split", no_wrap=True), box=SIMPLE)
    for heading in ("rows", "tokens", "trained", "shortest", "median", "longest", f"over {max_length}"):
        table.add_column(heading, justify="right")
    splits: dict[str, Any] = {}
    for split, examples in task.splits.items():
        encoded, counts = encode_split(
            examples, tokenizer, task.kind, max_length=max_length, train_on=recipe.data.train_on
        )
        lengths = sorted(len(row["input_ids"]) for row in encoded)
        facts = {
            "rows": counts.rows,
            "tokens": counts.tokens,
            "trained_tokens": counts.trained_tokens,
            "shortest": lengths[0],
            "median": lengths[len(lengths) // 2],
            "longest": lengths[-1],
            "truncated": counts.truncated,
        }
        splits[split] = facts
        table.add_row(split, *(f"{value:,}" for value in facts.values()))
    console.results.print(table)
    if task.labels:
        console.results.print(f"classes: {escape(', '.join(task.labels))}", soft_wrap=True)
    about = {"source": task.source, "notes": task.notes, "format": task.format, "kind": task.kind}
    return {**about, "labels": task.labels, "splits": splits}


@config_app.command("schema")
def config_schema(json: Json = False, debug: Debug = False) -> dict[str, Any]:
    """Print the JSON schema of a recipe, for editors that complete and check YAML.

    [dim]Example:[/]  duallora config schema > recipe.schema.json
    """
    from json import dumps

    from duallora.config.recipe import recipe_schema

    schema = recipe_schema()
    console.print_text(dumps(schema, indent=2))
    return {"schema": schema}


@config_app.command("show")
def config_show(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    task: TaskName = None,
    overrides: Overrides = None,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Print the resolved recipe as YAML: every setting with its meaning, range and value.

    [dim]Example:[/]  duallora config show --data mine.jsonl --set r=8 > recipe.yaml
    """
    from duallora.config.load import load_recipe
    from duallora.config.recipe import fingerprint, recipe_yaml

    sources = {"data.path", "data.task", "path", "task"}
    named = data is not None or task is not None or any(item.split("=")[0] in sources for item in overrides or ())
    if config is None and not named:
        data = "builtin:docstrings"
        console.notes.print("[dim]no data named: shown with --data builtin:docstrings[/]")
    recipe = load_recipe(config, overrides or (), model=model, data=data, task=task)
    console.print_text(recipe_yaml(recipe))
    return {"recipe": recipe.model_dump(mode="json"), "fingerprint": fingerprint(recipe)}


def _named(name: str, data_dir: Path | None, overrides: list[str] | None) -> tuple[Task, Recipe]:
    """The task of that name, else the data at that path or hub id, as a run with these settings reads it."""
    from duallora.config.load import load_recipe
    from duallora.tasks import names
    from duallora.train.prepare import read

    what = {"task": name, "data_dir": data_dir} if name in names() else {"data": name}
    recipe = load_recipe(None, overrides or (), **what)
    return read(recipe), recipe


def held_out(task: Task) -> str:
    """The split to score on where none is named."""
    return next(name for name in ("test", "validation", *task.splits) if name in task.splits)


ALL_ROWS = "all rows"  # the split of data that came without splits and that nothing here was trained on


def what_to_score(
    task: str | None, data: str | None, data_dir: Path | None, source: str
) -> tuple[Task, Recipe | None, bool]:
    """What to evaluate ``source`` on, the recipe of its run, and whether that is what the run was trained on.

    Data the run was trained on are split as the run split them; of other data without splits every row counts. What the
    rows' labels are is the run's word, not theirs: they may hold one class of many, or whole numbers to regress.
    """
    from duallora.errors import ConfigError
    from duallora.tasks import load_task

    if task is not None and data is not None:
        raise ConfigError(f"--task {task} and --data {data} exclude each other: keep one")
    file = _recipe_file(Path(source))
    if file is None and task is None and data is None:
        raise ConfigError(f"nothing to evaluate {source} on: name a task (--task e2e) or data (--data mine.jsonl)")
    from duallora.config.load import load_recipe

    own = file is not None and task is None and data is None
    recipe = None if file is None else load_recipe(file, data_dir=data_dir if own else None)
    if recipe is not None and recipe.plugins:
        from duallora.train import plugins

        plugins.require(recipe.plugins, source)
    from duallora.store.adapters import trained_for

    trained = trained_for(source)
    if recipe is not None and (own or (data is not None and _same_data(data, recipe.data.path))):
        from duallora.train.prepare import load

        return load(recipe, console.results, trained), recipe, True
    chosen = load_task(task, data_dir=data_dir) if task is not None else _every_row(str(data), recipe, trained)
    for note in chosen.notes:
        console.results.print(escape(note), soft_wrap=True)
    if trained is not None:
        _refuse_other_kind(source, trained.kind, task or str(data), chosen)
    return chosen, recipe, False


def _without_option(name: str, arguments: Sequence[str]) -> list[str]:
    """The command line without an option and its value."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != name and not argument.startswith(f"{name}="):
            kept.append(argument)
        skip = argument == name and not skip
    return kept


def _recipe_file(path: Path) -> Path | None:
    """The recipe of the run that ``path``, one of its checkpoints or its adapter belongs to."""
    from duallora.store.run_folder import RunFolder

    run = RunFolder.around(path)
    return run.recipe_file if run and run.recipe_file.is_file() else None


def _same_data(data: str, trained_on: str | None) -> bool:
    """Whether both name one file, hub data set or built-in, whatever way the path is written."""
    if trained_on is None:
        return False
    return data == trained_on or Path(data).expanduser().resolve() == Path(trained_on).expanduser().resolve()


def _every_row(data: str, recipe: Recipe | None, trained: Trained | None) -> Task:
    """The data with the splits they come with; where they come without, with every row in the split ``ALL_ROWS``."""
    from dataclasses import replace

    from duallora.tasks import load_data

    if data.startswith("builtin:"):
        return load_data(data)
    if recipe is None:
        task = load_data(data, eval_data=data, trained=trained)
    else:
        from duallora.train.prepare import reading

        task = load_data(data, eval_data=data, trained=trained, **reading(recipe.data))
    rows = task.splits["train"]
    return replace(task, splits={ALL_ROWS: rows}) if task.splits["validation"] == rows else task


def _refuse_other_kind(source: str, kind: Kind, name: str, task: Task) -> None:
    """ConfigError where ``source`` was trained for another kind of data."""
    from duallora.errors import ConfigError

    if kind != task.kind:
        words = {
            "generate": "text to generate (prompt-completion, messages or alpaca rows)",
            "classify": "classes (rows with a label)",
            "regress": "numbers (rows with a label that is one)",
        }
        raise ConfigError(
            f"{name} holds {words[task.kind]}, but {source} was trained for {words[kind]}: "
            "evaluate it on data of the kind it was trained for"
        )


def with_labels_of(model: Any, task: Task, split: str, examples: Sequence[Example]) -> Task:
    """The task reduced to these examples, its classes numbered as the model numbers them.

    A file that lacks one of the classes numbers the others differently than the file the model was trained on.
    """
    from dataclasses import replace

    from duallora.errors import ConfigError
    from duallora.store.adapters import are_stand_ins
    from duallora.terminal import command

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
    if are_stand_ins(list(names)):
        if len(names) == len(task.labels):
            return replace(task, splits={split: examples})
        names = {str(index): index for index in names.values()}  # whole numbers need no names
    unknown = [label for label in task.labels if label not in names]
    if unknown:
        raise ConfigError(f"the data has the classes {', '.join(unknown)}; the model knows {', '.join(names)}")
    examples = [replace(example, label=names[task.labels[int(example.label or 0)]]) for example in examples]
    return replace(task, splits={split: examples}, labels=tuple(names))


def _show_scores(source: str, task: Task, split: str, result: EvalResult) -> None:
    import textwrap

    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    console.results.print(f"{escape(source)} on {escape(task.name)}, {split}", soft_wrap=True)
    table = Table("metric", box=SIMPLE)
    table.add_column("value", justify="right")
    table.add_column("n", justify="right")
    for name, value in result.metrics.items():
        style = "bold" if name == task.main_metric else ""
        table.add_row(name, f"{value:,.4g}", f"{len(result.examples):,}", style=style)
    console.results.print(table)
    for prediction, example in list(zip(result.predictions, result.examples, strict=True))[:3]:
        asked = example.prompt or " | ".join(example.texts) or example.messages[0]["content"]
        wanted = example.references[0] if example.references else example.label
        if task.kind == "classify":
            prediction, wanted = task.labels[prediction], task.labels[int(wanted or 0)]
        given = _on_a_line(asked)
        given = given if len(given) <= 160 else "..." + given[-157:]  # the end of a prompt holds the question
        for label, text in (("given", given), ("predicted", _on_a_line(prediction)), ("expected", _on_a_line(wanted))):
            console.results.print(
                Text.assemble((f"{label:<10}", "bold cyan"), textwrap.shorten(text, 160, placeholder=" ..."))
            )
        console.results.print()


def _on_a_line(value: Any) -> str:
    """Text on one line, without the control characters that an untrained model may write to the terminal."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isprintable() else " " for letter in text)

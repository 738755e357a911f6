"""Verbs around a run: demo, train, eval, merge; its data and its recipe."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from typer import Argument, Option

from duallora import console
from duallora.cli.app import (
    Columns,
    ConfigFile,
    Data,
    DataDir,
    Dtype,
    Lenient,
    Model,
    Overrides,
    TaskName,
    app,
    refuse_misspelt,
    refuse_unwritable,
    verb,
)

TrainOn = Literal["answer", "all"]
Into = Literal["auto", "original", "dequantized"]
EvalData = Annotated[str | None, Option("--eval-data", metavar="DATA", help="Held-out data for --data.")]
MaxLength = Annotated[
    int | None, Option("--max-length", min=8, metavar="N", help="Tokens per example; 512 if not given.")
]

data_app = typer.Typer(no_args_is_help=True, help="Look at training data before using it.")
config_app = typer.Typer(no_args_is_help=True, help="The settings of a run: their schema and resolved values.")
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")


@verb()
def demo(
    quick: Annotated[bool, Option("--quick", help="A small classifier: under 90 seconds.")] = False,
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Folder for the run.")] = Path("runs/demo"),
) -> dict[str, Any]:
    """Train, evaluate and merge a real model on this machine's own Python library; offline, minutes on two cores.

    [dim]Example:[/]  duallora demo --quick
    """
    from duallora.paper.demo import demo as run_demo

    return run_demo(quick=quick, output=output, console=console.results)


@verb()
def train(
    context: typer.Context,
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    task: TaskName = None,
    data_dir: DataDir = None,
    eval_data: EvalData = None,
    columns: Columns = None,
    output: Annotated[
        Path | None,
        Option("--output", "-o", metavar="DIR", help="Run folder; runs/<date-time>-<model>-<data> if not given."),
    ] = None,
    seed: Annotated[int | None, Option("--seed", metavar="N", help="Seed of data order and factors.")] = None,
    method: Annotated[
        str | None,
        Option("--method", metavar="NAME", help="duallora, or a method to compare with: lora, dora, hira, ..."),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        Option(
            "--resume",
            metavar="auto|never|PATH",
            help="auto: continue from the run folder's newest whole checkpoint; PATH: from this run or checkpoint, "
            "under its own recipe unless -c or data is given.",
        ),
    ] = "never",
    launch: Annotated[
        str | None,
        Option(
            "--launch",
            metavar="N|FILE",
            help="Train in N processes on this machine, or as this accelerate config says; they share each batch.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check recipe, data and model, print the plan, train nothing.")
    ] = False,
) -> dict[str, Any]:
    """Fine-tune a model: on your own file (--data), a hub data set (--data org/name) or a task of the paper (--task).

    [dim]Examples:[/]
      duallora train --data mine.jsonl -o runs/mine
      duallora train --data questions.csv --columns prompt=question,completion=category
      duallora train --model builtin:smollm2-135m --task arc_easy --set learning_rate=5e-4 --set r=8
      duallora train --method dora --data mine.jsonl
      duallora train -c recipe.yaml --resume auto --launch 2
    """
    from duallora.config.load import load_recipe

    if config is None and data is None and task is None and resume not in ("auto", "never"):
        from duallora.train.score import recipe_file

        config = recipe_file(resume)
        if config is not None:
            output = output or config.parent  # the recipe's own may name the place before the folder was moved
    elif config is not None and resume == "auto" and output is None:
        output = _run_of(config, overrides or ())
    chosen = [*(overrides or ()), *([f"adapter.method={method}"] if method else ())]
    recipe = load_recipe(
        config,
        chosen,
        model=model,
        data=data,
        task=task,
        data_dir=data_dir,
        eval_data=eval_data,
        columns=columns,
        output=output,
        seed=seed,
    )
    if launch is not None and not dry_run:
        from duallora.train.launch import launch as start

        start(launch, _without_option("--launch", context.find_root().obj))
    from duallora.train import run

    if dry_run:
        return run.plan(recipe, console.results)
    result = run.train(recipe, resume=resume, console=console.results)
    if os.environ.get("RANK", "0") == "0":
        console.results.print(f"[dim]next: {escape(_next(Path(result['folder'])))}[/]", soft_wrap=True)
    return result


@verb()
def runs(
    folders: Annotated[
        list[Path] | None, Argument(metavar="[DIR...]", help="Runs, or folders of runs; runs/ if not given.")
    ] = None,
    live: Annotated[
        bool, Option("--live", help="In a terminal, show them anew every 2 seconds until none is running.")
    ] = False,
) -> dict[str, Any]:
    """List runs side by side: status, losses, score, time, and the settings they differ in; running ones as far as they are.

    [dim]Examples:[/]
      duallora runs
      duallora runs runs/lora runs/duallora
      duallora runs --live
    """
    from duallora.train.runs import listed

    return listed(folders or [Path("runs")], console.results, live)


@verb(app, "eval")
def evaluate(
    source: Annotated[
        str, Argument(metavar="ADAPTER|MODEL", help="Run, adapter or model folder, hub id, or builtin: name.")
    ],
    task: TaskName = None,
    data: Data = None,
    columns: Columns = None,
    data_dir: DataDir = None,
    split: Annotated[
        str | None,
        Option(
            "--split", metavar="NAME", help="train, validation or test; test if there is one, else what is held out."
        ),
    ] = None,
    limit: Annotated[int | None, Option("--limit", min=1, metavar="N", help="Only the first N rows.")] = None,
    batch_size: Annotated[
        int | None, Option("--batch-size", min=1, metavar="N", help="Rows at a time; 16 or as the run's recipe.")
    ] = None,
    max_length: Annotated[
        int | None, Option("--max-length", min=8, metavar="N", help="Tokens per row; 512 or as the run's recipe.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, Option("--max-new-tokens", min=1, metavar="N", help="Longest answer; the task's own if not given.")
    ] = None,
    num_beams: Annotated[
        int | None, Option("--num-beams", min=1, metavar="N", help="Beams (1 is greedy); the task's own if not given.")
    ] = None,
    scoring: Annotated[
        Literal["generation", "likelihood"] | None,
        Option("--scoring", help="Generate answers, or take the likeliest of the options a task names."),
    ] = None,
    dtype: Annotated[Dtype, Option("--dtype", help="Type of the weights; auto as trained.")] = "auto",
    lenient: Lenient = False,
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="FILE", help="Write metrics and predictions as JSON.")
    ] = None,
) -> dict[str, Any]:
    """Score an adapter or a model on a task or on your own file; a run folder alone is scored on its own data.

    [dim]Examples:[/]
      duallora eval runs/mine
      duallora eval runs/arc --task arc_easy --limit 200 -o results.json
      duallora eval builtin:smollm2-135m --data mine.jsonl
    """
    refuse_misspelt(source)
    if output is not None:
        refuse_unwritable(output)
    from duallora.train import score

    what: dict[str, Any] = {"task": task, "data": data, "columns": columns, "data_dir": data_dir}
    chosen = score.choose(source, console.results, **what, split=split, limit=limit)
    return score.score(
        chosen,
        console.results,
        batch_size=batch_size,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        scoring=scoring,
        dtype=dtype,
        strict=not lenient,
        output=output,
    )


@verb()
def predict(
    source: Annotated[str, Argument(metavar="RUN|ADAPTER", help="Run, adapter or model folder, or hub id.")],
    file: Annotated[
        Path, Argument(metavar="FILE", help="Rows with or without answers: .jsonl, .csv, .parquet, .txt, ...")
    ],
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="The answers, .csv or .jsonl.")],
    columns: Columns = None,
    overrides: Overrides = None,
    dtype: Annotated[Dtype, Option("--dtype", help="Type of the weights; auto as trained.")] = "auto",
    lenient: Lenient = False,
) -> dict[str, Any]:
    """Answer the rows of a file: classes with probabilities, numbers, or generated text, beside the rows' own columns.

    Any length of file; what was interrupted goes on with the same command.

    [dim]Examples:[/]
      duallora predict runs/mine new.csv -o answers.csv
      duallora predict runs/mine new.jsonl -o answers.jsonl --columns prompt=question --set max_new_tokens=20
    """
    refuse_misspelt(source)
    refuse_unwritable(output)
    from duallora.train import predict as prediction

    return prediction.predict(
        source,
        str(file),
        output,
        console.results,
        overrides=overrides or (),
        columns=columns,
        dtype=dtype,
        strict=not lenient,
    )


@verb()
def merge(
    adapter: Annotated[str, Argument(metavar="ADAPTER", help="Run or adapter folder, or hub id.")],
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Folder for the merged model.")],
    dtype: Annotated[Dtype, Option("--dtype", help="Type of the merged weights; auto as trained.")] = "auto",
    into: Annotated[
        Into, Option("--into", help="Of a quantized base: its original weights (auto), or those it was trained on.")
    ] = "auto",
) -> dict[str, Any]:
    """Fold an adapter into its base model: a standalone model for any transformers program, checked after writing.

    [dim]Example:[/]  duallora merge runs/mine -o merged/mine
    """
    refuse_misspelt(adapter)
    from duallora.export.merge import merge as run_merge

    return run_merge(adapter, output, dtype=dtype, into=into, console=console.results)


@verb(data_app, "preview")
def data_preview(
    name: Annotated[str, Argument(metavar="FILE|TASK", help="A file, a hub id, builtin:docstrings, or a task.")],
    rows: Annotated[int, Option("--rows", min=1, metavar="N", help="Rows to show.")] = 3,
    split: Annotated[str, Option("--split", metavar="NAME", help="train, validation or test.")] = "train",
    model: Annotated[str, Option("--model", metavar="MODEL", help="Whose tokenizer to use.")] = "builtin:smollm2-135m",
    max_length: MaxLength = None,
    columns: Columns = None,
    train_on: Annotated[TrainOn | None, Option("--train-on", help="Where the loss is: answer or all.")] = None,
    data_dir: DataDir = None,
    overrides: Overrides = None,
) -> dict[str, Any]:
    """Show rows as the model sees them: trained tokens in color, ignored tokens dim, special tokens spelt out.

    [dim]Example:[/]  duallora data preview mine.jsonl --model builtin:smollm2-135m
    """
    from duallora.errors import ConfigError
    from duallora.store.models import load_tokenizer
    from duallora.tasks.preview import preview

    task, recipe = _named(name, data_dir, overrides, columns)
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


@verb(data_app, "check")
def data_check(
    name: Annotated[str, Argument(metavar="FILE|TASK", help="A file, a hub id, builtin:docstrings, or a task.")],
    model: Annotated[str, Option("--model", metavar="MODEL", help="Whose tokenizer to use.")] = "builtin:smollm2-135m",
    max_length: MaxLength = None,
    columns: Columns = None,
    data_dir: DataDir = None,
    overrides: Overrides = None,
) -> dict[str, Any]:
    """Read every row, name the bad ones by line, and count tokens: exit code 3 where training would stop.

    [dim]Example:[/]  duallora data check mine.csv
    """
    from rich.box import SIMPLE
    from rich.table import Column, Table

    from duallora.store.models import load_tokenizer
    from duallora.tasks import encode_split

    task, recipe = _named(name, data_dir, overrides, columns)
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


@verb(config_app, "schema")
def config_schema() -> dict[str, Any]:
    """Print the JSON schema of a recipe, for editors that complete and check YAML.

    [dim]Example:[/]  duallora config schema > recipe.schema.json
    """
    from json import dumps

    from duallora.config.recipe import recipe_schema

    schema = recipe_schema()
    console.print_text(dumps(schema, indent=2))
    return {"schema": schema}


@verb(config_app, "show")
def config_show(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    task: TaskName = None,
    overrides: Overrides = None,
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


def _run_of(config: Path, overrides: Sequence[str]) -> Path | None:
    """The run whose own recipe that is, unless another output is set: the recipe may name the place before the folder was
    moved, or one below another working folder."""
    from duallora.store.run_folder import RunFolder

    run = RunFolder(config.parent)
    told = any(one.partition("=")[0].strip() == "output" for one in overrides)
    return run.path if run.exists() and config == run.recipe_file and not told else None


def _named(name: str, data_dir: Path | None, overrides: list[str] | None, columns: str | None) -> tuple[Any, Any]:
    """The task of that name, else the data at that path or hub id, as a run with these settings reads it."""
    from duallora.config.load import load_recipe
    from duallora.tasks import names
    from duallora.train.prepare import read

    what = {"task": name, "data_dir": data_dir} if name in names() else {"data": name}
    recipe = load_recipe(None, overrides or (), columns=columns, **what)
    return read(recipe), recipe


def _next(folder: Path) -> str:
    """The commands that a finished run is good for."""
    from duallora import methods
    from duallora.store.run_folder import Facts, RunFolder
    from duallora.terminal import command

    facts = RunFolder(folder).facts() or Facts()
    data, method = facts["data"], methods.get(facts["recipe"]["adapter"]["method"])
    found = [command("eval", folder)]
    if facts["result"].get("at_chance") is None:
        found.append(command("predict", folder, "FILE", "-o", "answers.csv"))
        found += [command("chat", folder)] * (data["kind"] == "generate" and data["format"] == "messages")
        found += [command("merge", folder, "-o", "MERGED")] * (not method.whole and not method.no_merge)
    return ", or ".join(found)


def _without_option(name: str, arguments: Sequence[str]) -> list[str]:
    """The command line without an option and its value."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != name and not argument.startswith(f"{name}="):
            kept.append(argument)
        skip = argument == name and not skip
    return kept

"""The command line: verbs only. Each reads its options, calls one function elsewhere and shows what came back.

Exit codes: 0 done, 1 a fault in the program, 2 configuration or usage, 3 data, 4 integrity, 5 non-finite, 6 locked, 7 disk,
8 memory, 9 a process of several is gone, 130 and 143 interrupted by SIGINT and SIGTERM. With ``--json`` the only line on
stdout is a JSON object, also on failure. Torch and its kin are imported inside the verbs: help and errors in options must
not wait for them.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.markup import escape

import duallora
from duallora import console

if TYPE_CHECKING:
    from duallora.tasks import Example, Task
    from duallora.train.evaluate import EvalResult
    from duallora.train.recipe import Recipe

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Into = Literal["auto", "original", "dequantized"]
TrainOn = Literal["answer", "all"]

OUTPUT = "Output"
Json = Annotated[
    bool, typer.Option("--json", help="One JSON object as the only line on stdout.", rich_help_panel=OUTPUT)
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of a failure (or set DUALLORA_DEBUG=1).", rich_help_panel=OUTPUT),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="Recipe; `duallora config show` writes one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting of the recipe; may be repeated."),
]
Model = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="Hub id, local folder, or builtin:smollm2-135m.")
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="DATA", help="Your .jsonl, .csv, .parquet file, a hub id, or builtin:docstrings."),
]
TaskName = Annotated[
    str | None, typer.Option("--task", metavar="TASK", help="A task of the paper: e2e, boolq, arc_easy, sst2, ...")
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", metavar="DIR", help="Folder with the tasks' data (or DUALLORA_DATA).")
]
EvalData = Annotated[str | None, typer.Option("--eval-data", metavar="DATA", help="Held-out data for --data.")]
MaxLength = Annotated[int, typer.Option("--max-length", min=8, metavar="N", help="Tokens per example.")]
Lenient = Annotated[
    bool, typer.Option("--lenient", help="Accept another base model than the one the adapter was trained on.")
]

BENCH = Path("results/bench")


class BenchDtype(str, Enum):  # typer takes no list of literals
    float32 = "float32"
    bfloat16 = "bfloat16"


class PlanMethod(str, Enum):
    lora = "lora"
    dora = "dora"
    duallora = "duallora"


Dtypes = Annotated[
    list[BenchDtype] | None,
    typer.Option("--dtype", help="Type of the base weights; may be repeated. Both if not given."),
]
Rounds = Annotated[int, typer.Option("--rounds", min=3, metavar="N", help="Rounds per cell at most; 3 at least.")]
Seconds = Annotated[
    float, typer.Option("--seconds", min=0, metavar="S", help="Time per cell after which no further round is begun.")
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="cpu|cuda", help="Where to measure; cuda where there is one.")
]
ResultFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Result, written cell by cell; cells it holds are skipped."),
]

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
app = typer.Typer(
    name="duallora",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)
data_app = typer.Typer(no_args_is_help=True, help="Look at training data before using it.")
config_app = typer.Typer(no_args_is_help=True, help="The settings of a run: their schema and resolved values.")
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")
bench_app = typer.Typer(
    no_args_is_help=True,
    help="Time and memory beside the arithmetic floor and PEFT's methods, as ratios within one run. Needs a quiet machine.",
)
app.add_typer(bench_app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        console.results.print(f"duallora {duallora.__version__}")
        raise typer.Exit


@app.callback()
def _duallora(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune transformers models with Dual LoRA (arXiv 2512.03402).

    Start with [bold]duallora demo[/], then [bold]duallora train --data mine.jsonl[/].
    """


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
    from duallora.train.demo import demo as run_demo

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
      duallora train --model builtin:smollm2-135m --task arc_easy --set learning_rate=2e-3 --set r=8
      duallora train --method dora --data mine.jsonl
      duallora train -c recipe.yaml --resume auto --launch 2
    """
    from duallora.train.recipe import load_recipe

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

        return {"exit_code": start(launch, _without_option("--launch", context.find_root().obj))}
    from duallora.train import run

    if dry_run:
        return _plan(recipe)
    result = run.train(recipe, resume=resume, console=console.results)
    folder = escape(str(result["folder"]))
    next_step = f"[dim]next: duallora eval {folder}, or duallora merge {folder} -o MERGED[/]"
    if os.environ.get("RANK", "0") == "0":
        console.results.print(next_step, soft_wrap=True)
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

    _refuse_misspelt(source)
    if output is not None:
        _refuse_unwritable(output)
    from duallora.train import evaluate as evaluation
    from duallora.train import record

    started = time.time()
    chosen, recipe, own = _task(task, data, data_dir, source)
    split = split or _held_out(chosen)
    if own and data is not None:
        console.results.print(
            f"{escape(data)} is what {escape(source)} was trained on: scored on the run's own {split} rows",
            soft_wrap=True,
        )
    batch_size = batch_size or (recipe.eval.batch_size if recipe else 16)
    max_length = max_length or (recipe.data.max_length if recipe else 512)
    limit = limit or (recipe.data.eval_limit if recipe and own else None)
    generation = _generation(recipe, max_new_tokens, num_beams)
    examples = evaluation.select(chosen, split, limit)  # before the model is loaded: a wrong split costs no time
    model, tokenizer = evaluation.load_adapter(source, chosen.kind, dtype=dtype, strict=not lenient)
    chosen = _with_labels_of(model, chosen, split, examples)
    result = evaluation.evaluate(
        model,
        tokenizer,
        chosen,
        split=split,
        batch_size=batch_size,
        generation=generation,
        max_length=max_length,
        console=console.results,
    )
    _show_scores(source, chosen, split, result)
    payload = {
        "source": source,
        "task": chosen.name,
        "data": chosen.source,
        "split": split,
        "n": len(result.examples),
        "main_metric": chosen.main_metric,
        "metrics": result.metrics,
        "labels": chosen.labels,
        "predictions": result.predictions,
    }
    if output is not None:
        settings = {"batch_size": batch_size, "max_length": max_length, "dtype": dtype, "limit": limit, **generation}
        more: dict[str, Any] = {
            key: payload[key] for key in ("source", "task", "split", "n", "main_metric", "predictions")
        }
        fingerprints = {split: chosen.fingerprint(split)}
        record.write_json(
            output,
            record.result("eval", settings, result.metrics, seeds=(), started=started, data=fingerprints, **more),
        )
        console.results.print(f"written to [bold]{escape(str(output))}[/]", soft_wrap=True)
        payload["output"] = str(output)
    return payload


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Run or adapter folder, or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the merged model.")],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Type of the merged weights; auto as trained.")] = "auto",
    into: Annotated[
        Into,
        typer.Option("--into", help="Of a quantised base: its original weights (auto), or those it was trained on."),
    ] = "auto",
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Fold an adapter into its base model: a standalone model for any transformers program, checked after writing.

    [dim]Example:[/]  duallora merge runs/mine -o merged/mine
    """
    _refuse_misspelt(adapter)
    from duallora.train.merge import merge as run_merge

    return run_merge(adapter, output, dtype=dtype, into=into, console=console.results)


@app.command()
def serve(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER...", help="Runs, adapters or models: folders, hub ids, or builtin: names."),
    ] = None,
    named: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="NAME=ADAPTER", help="One more, under a name of yours; may be repeated."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; others than this machine reach 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="N", help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", envvar="DUALLORA_API_KEY", help="Clients must send this key."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Type of the weights; auto as trained.")] = "auto",
    lenient: Lenient = False,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Try adapters, and their base model, over OpenAI's protocol and in a page; until Ctrl-C, which is exit code 0.

    [dim]Examples:[/]
      duallora serve runs/mine
      duallora serve runs/mine --name other=runs/other/adapter --port 9000
    """
    from duallora.serve import server

    models = server.names(sources or (), named or ())
    for source in models.values():
        _refuse_misspelt(source)
    return server.serve(
        models, host=host, port=port, api_key=api_key, dtype=dtype, strict=not lenient, console=console.results
    )


@app.command()
def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Run or adapter folder, or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the LoRA.")],
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, metavar="N", help="Rank of every layer of the LoRA.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy",
            min=0,
            max=1,
            metavar="SHARE",
            help="Smallest rank that keeps this share of |dW|² in every layer.",
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Type of the factors; auto as trained.")] = "auto",
    evaluate: Annotated[
        bool, typer.Option("--eval", help="Score adapter, LoRA and base on the run's own held-out rows.")
    ] = False,
    task: TaskName = None,
    data: Data = None,
    data_dir: DataDir = None,
    split: Annotated[str | None, typer.Option("--split", metavar="NAME", help="Of --task, --data or --eval.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N rows.")] = None,
    num_beams: Annotated[
        int | None, typer.Option("--num-beams", min=1, metavar="N", help="Beams; the task's own if not given.")
    ] = None,
    result: Annotated[
        Path | None, typer.Option("--result", metavar="FILE", help="Write the conversion's figures as JSON.")
    ] = None,
    lenient: Lenient = False,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Turn an adapter into a plain LoRA of one rank, for PEFT, vLLM, SGLang and llama.cpp; says what each layer keeps.

    [dim]Examples:[/]
      duallora convert runs/mine -o runs/mine/lora-r64 --rank 64
      duallora convert runs/mine -o lora --energy 0.99 --eval
    """
    import time

    from duallora.errors import ConfigError

    _refuse_misspelt(adapter)
    if (rank is None) == (energy is None):
        raise ConfigError("give either --rank N, or --energy SHARE to have the rank chosen")
    if result is not None:
        _refuse_unwritable(result)
    from duallora.export import convert as conversion
    from duallora.train import record

    started = time.time()
    scores = None
    scored: dict[str, Any] = {}
    if evaluate or task is not None or data is not None:
        scores, scored = _scores(adapter, task, data, data_dir, split, limit, num_beams)
    payload = conversion.convert(
        adapter,
        output,
        rank=rank,
        energy=energy,
        dtype=dtype,
        strict=not lenient,
        scores=scores,
        console=console.results,
    )
    if result is not None:
        fingerprints = scored.pop("data", {})
        settings = {"adapter": Path(adapter).name, "rank": rank, "energy": energy, "dtype": dtype, **scored}
        figures = {key: value for key, value in payload.items() if key != "output"}
        base = payload["trained"].get("base", {}).get("fingerprint")
        record.write_json(
            result,
            record.result("convert", settings, figures, seeds=(), started=started, data=fingerprints, base=base),
        )
    return payload


@app.command()
def check(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Run, adapter or LoRA folder, or hub id.")],
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Base model, where the adapter's own name fails.")
    ] = None,
    target: Annotated[
        Literal["vllm", "sglang", "llamacpp"] | None,
        typer.Option("--target", help="Fail unless this engine takes the adapter."),
    ] = None,
    files_only: Annotated[bool, typer.Option("--files-only", help="Look at the files alone; load no model.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Is an adapter whole, finite, for this base; what does it change, and which serving engine takes it?

    [dim]Examples:[/]
      duallora check runs/mine
      duallora check runs/mine/lora-r64 --target vllm
    """
    _refuse_misspelt(adapter)
    from duallora.export.check import check as run_check

    return run_check(adapter, base=base, target=target, files_only=files_only, console=console.results)


BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model", metavar="org/name", help="Hub id of the base model, where the adapter names a folder."
    ),
]


@app.command()
def card(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Run or adapter folder.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The card; the adapter's README.md if not given."),
    ] = None,
    base_model: BaseModel = None,
    repo: Annotated[
        str | None, typer.Option("--repo", metavar="org/name", help="Where the adapter will lie, for the code shown.")
    ] = None,
    license: Annotated[str | None, typer.Option("--license", metavar="ID", help="apache-2.0, mit, ...")] = None,
    language: Annotated[str | None, typer.Option("--language", metavar="CODE", help="en, de, ...")] = None,
    datasets: Annotated[
        list[str] | None, typer.Option("--dataset", metavar="org/name", help="Trained on; may be repeated.")
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option("--results", metavar="FILE", help="From `duallora eval -o`; may be repeated.")
    ] = None,
    data_dir: DataDir = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a card that was edited by hand.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Write the hub's README.md of an adapter: how to load it, its data, settings, seeds and figures with intervals.

    [dim]Example:[/]  duallora card runs/mine --repo me/mine --license apache-2.0
    """
    _refuse_misspelt(adapter)
    from duallora.export.card import card as write_card

    return write_card(
        adapter,
        output,
        base_model=base_model,
        repo=repo,
        license=license,
        language=language,
        datasets=datasets or (),
        results=results or (),
        data_dir=data_dir,
        force=force,
        console=console.results,
    )


@app.command()
def push(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Run or adapter folder.")],
    repo: Annotated[
        str, typer.Option("--to", metavar="org/name", help="Repository on the hub; made if it is not there.")
    ],
    upload: Annotated[
        bool, typer.Option("--upload/--dry-run", help="Send the files; without it they are only shown.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    base_model: BaseModel = None,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Check the files alone beforehand; load no model.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Show exactly what would go to the hub: adapter, card, lora-rNN/ conversions; --upload sends it.

    [dim]Example:[/]  duallora push runs/mine --to me/mine --upload
    """
    _refuse_misspelt(adapter)
    from duallora.export.push import push as run_push

    return run_push(
        adapter,
        repo,
        upload=upload,
        private=private,
        base_model=base_model,
        files_only=files_only,
        console=console.results,
    )


@data_app.command("preview")
def data_preview(
    name: Annotated[str, typer.Argument(metavar="FILE|TASK", help="A file, a hub id, builtin:docstrings, or a task.")],
    rows: Annotated[int, typer.Option("--rows", min=1, metavar="N", help="Rows to show.")] = 3,
    split: Annotated[str, typer.Option("--split", metavar="NAME", help="train, validation or test.")] = "train",
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="Whose tokenizer to use.")
    ] = "builtin:smollm2-135m",
    max_length: MaxLength = 512,
    train_on: Annotated[TrainOn, typer.Option("--train-on", help="Where the loss is.")] = "answer",
    data_dir: DataDir = None,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Show rows as the model sees them: trained tokens in colour, ignored tokens dim, special tokens spelt out.

    [dim]Example:[/]  duallora data preview mine.jsonl --model builtin:smollm2-135m
    """
    from duallora.errors import ConfigError
    from duallora.tasks.preview import preview
    from duallora.train.models import load_tokenizer

    task = _named(name, data_dir)
    if split not in task.splits:
        raise ConfigError(f"{name} has no split {split!r}; it has {', '.join(task.splits)}")
    shown = preview(task, load_tokenizer(model), split=split, rows=rows, max_length=max_length, train_on=train_on)
    console.results.print(shown)
    return {"source": task.source, "format": task.format, "kind": task.kind, "split": split}


@data_app.command("check")
def data_check(
    name: Annotated[str, typer.Argument(metavar="FILE|TASK", help="A file, a hub id, builtin:docstrings, or a task.")],
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="Whose tokenizer to use.")
    ] = "builtin:smollm2-135m",
    max_length: MaxLength = 512,
    data_dir: DataDir = None,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Read every row, name the bad ones by line, and count tokens: exit code 3 where training would stop.

    [dim]Example:[/]  duallora data check mine.csv
    """
    from rich.box import SIMPLE
    from rich.table import Column, Table

    from duallora.tasks import encode_split
    from duallora.train.models import load_tokenizer

    task = _named(name, data_dir)
    tokenizer = load_tokenizer(model)
    console.results.print(f"{escape(task.source)}: {task.format}", soft_wrap=True)
    table = Table(Column("split", no_wrap=True), box=SIMPLE)
    for heading in ("rows", "tokens", "trained", "shortest", "median", "longest", f"over {max_length}"):
        table.add_column(heading, justify="right")
    splits: dict[str, Any] = {}
    for split, examples in task.splits.items():
        encoded, counts = encode_split(examples, tokenizer, task.kind, max_length=max_length)
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
    return {"source": task.source, "format": task.format, "kind": task.kind, "labels": task.labels, "splits": splits}


@app.command()
def doctor(json: Json = False, debug: Debug = False) -> dict[str, Any]:
    """Check this machine: versions, method, devices, memory, disk, built-in models, data; with the fix for each gap.

    [dim]Example:[/]  duallora doctor
    """
    from rich.table import Column, Table

    from duallora.train import doctor as examination

    checks = examination.checks()
    table = Table.grid("", "", Column(overflow="fold"), padding=(0, 2))
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    for check in checks:
        table.add_row(marks[check.status], check.name, escape(check.found))
        if check.fix:
            table.add_row("", "", f"[bold]{escape(check.fix)}[/]")
    console.results.print(table)
    usable = examination.usable(checks)
    console.results.print("ready" if usable else "[red]not usable yet: see the lines marked missing[/]")
    return {"usable": usable, "checks": [check._asdict() for check in checks], "exit_code": 0 if usable else 2}


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Option("--model", metavar="MODEL", help="llama-3-70b and its like, a hub id, folder or builtin: name."),
    ],
    gpus: Annotated[
        str, typer.Option("--gpus", metavar="NxGB", help="8x80: eight GPUs of 80 GB; 2x8x80: two nodes of them.")
    ] = "1x80",
    method: Annotated[
        list[PlanMethod] | None, typer.Option("--method", help="May be repeated; all three if not given.")
    ] = None,
    rank: Annotated[
        int, typer.Option("--r", min=1, metavar="N", help="Dual LoRA's r; LoRA and DoRA get 2 r, as many parameters.")
    ] = 16,
    targets: Annotated[
        str, typer.Option("--target-modules", metavar="A,B", help="Names by comma, or all-linear.")
    ] = "all-linear",
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Rows per GPU and forward pass.")] = 1,
    length: Annotated[int, typer.Option("--length", min=1, metavar="N", help="Tokens per row.")] = 2048,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option("--dtype", help="Type of the base weights.")
    ] = "bfloat16",
    quantization: Annotated[
        Literal["none", "8bit", "4bit"], typer.Option("--quantization", help="Linear layers packed by bitsandbytes.")
    ] = "none",
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy", metavar="NAME", help="single, ddp, zero2, fsdp, zero3 or offload; all if not given."
        ),
    ] = None,
    attention: Annotated[
        Literal["sdpa", "eager"] | None, typer.Option("--attention", help="As transformers would choose if not given.")
    ] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute layers in the backward.")] = False,
    padded: Annotated[bool, typer.Option("--padded", help="Rows of unequal length: attention takes a mask.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Predict memory per GPU for LoRA, DoRA and Dual LoRA, and which distribution strategy fits; no download, no GPU.

    [dim]Example:[/]  duallora plan --model llama-3-70b --gpus 8x80
    """
    from duallora.plan import planner

    return planner.plan(
        model,
        gpus,
        methods=[name.value for name in dict.fromkeys(method or PlanMethod)],
        rank=rank,
        targets=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
        batch=batch,
        length=length,
        dtype=dtype,
        quantization=quantization,
        strategy=strategy,
        attention=attention,
        checkpointing=checkpointing,
        padded=padded,
        console=console.results,
    )


@bench_app.command("layer")
def bench_layer(
    width: Annotated[
        list[int] | None, typer.Option("--width", min=8, metavar="N", help="in = out of the layer; may be repeated.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, metavar="N", help="Rows of x; may be repeated.")
    ] = None,
    rank: Annotated[
        list[int] | None,
        typer.Option("--rank", min=1, metavar="N", help="Dual LoRA's r (LoRA has 2 r); may be repeated."),
    ] = None,
    dtype: Dtypes = None,
    full: Annotated[
        bool, typer.Option("--full", help="The whole grid: width to 4096, 512 to 8192 tokens, r 8 to 32; hours.")
    ] = False,
    rounds: Rounds = 15,
    seconds: Seconds = 25.0,
    device: Device = None,
    output: ResultFile = None,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """One layer, forward and backward, beside the three bare products and PEFT's methods; about ten minutes.

    [dim]Example:[/]  duallora bench layer --width 1024 --width 2048 --tokens 2048 --dtype float32
    """
    output = output or BENCH / "layer.json"
    _refuse_unwritable(output)
    from duallora.bench import layer

    sizes = layer.FULL if full else layer.DEFAULT
    return layer.bench(
        output,
        widths=width or sizes["widths"],
        tokens=tokens or sizes["tokens"],
        ranks=rank or sizes["ranks"],
        dtypes=[name.value for name in dtype or BenchDtype],
        rounds=rounds,
        seconds=seconds,
        device=device,
        console=console.results,
    )


@bench_app.command("step")
def bench_step(
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="Causal language model: hub id, folder or builtin: name.")
    ] = "builtin:smollm2-135m",
    dtype: Dtypes = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="With activation checkpointing.")] = False,
    masked: Annotated[
        bool, typer.Option("--masked", help="Docstrings, loss on answers, padded; else random tokens, loss on all.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Both dtypes, with and without each of these; two hours.")
    ] = False,
    rank: Annotated[int, typer.Option("--rank", min=1, metavar="N", help="Dual LoRA's r (LoRA has 2 r).")] = 8,
    rows: Annotated[int, typer.Option("--rows", min=1, metavar="N", help="Examples in the batch.")] = 8,
    length: Annotated[int, typer.Option("--length", min=8, metavar="N", help="Tokens per example.")] = 128,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Peak memory too, each method in a process of its own.")
    ] = True,
    rounds: Rounds = 15,
    seconds: Seconds = 240.0,
    device: Device = None,
    output: ResultFile = None,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """A training step of SmolLM2, all linear layers adapted, against PEFT's methods: time and peak memory.

    Without --dtype, --checkpointing and --masked: fp32 and bf16 without either, fp32 with each; about 45 minutes.

    [dim]Example:[/]  duallora bench step --dtype float32 --masked
    """
    output = output or BENCH / "step.json"
    _refuse_unwritable(output)
    from duallora.bench import step

    scenes = step.scenes(
        [name.value for name in dtype or ()],
        checkpointing=checkpointing,
        masked=masked,
        full=full,
        model=model,
        rank=rank,
        rows=rows,
        length=length,
    )
    return step.bench(
        output,
        scenes,
        rounds=rounds,
        seconds=seconds,
        with_memory=memory,
        device=device,
        console=console.results,
    )


@bench_app.command("kernel")
def bench_kernel(
    width: Annotated[
        list[int] | None, typer.Option("--width", min=8, metavar="N", help="in = out; may be repeated. 576 to 4096.")
    ] = None,
    rank: Annotated[
        list[int] | None, typer.Option("--rank", min=1, metavar="N", help="r of both groups; may be repeated. 16.")
    ] = None,
    dtype: Dtypes = None,
    rounds: Rounds = 15,
    seconds: Seconds = 10.0,
    device: Device = None,
    output: ResultFile = None,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Check each backend of this device against float64, then time its two passes; exit code 4 where one is wrong.

    A few minutes. On a GPU machine this is what proves and times the Triton kernels.

    [dim]Example:[/]  duallora bench kernel --device cuda -o results/bench/kernel-h100.json
    """
    output = output or BENCH / "kernel.json"
    _refuse_unwritable(output)
    from duallora.bench import kernel

    return kernel.bench(
        output,
        widths=width or kernel.WIDTHS,
        ranks=rank or kernel.RANKS,
        dtypes=[name.value for name in dtype or BenchDtype],
        rounds=rounds,
        seconds=seconds,
        device=device,
        console=console.results,
    )


@bench_app.command("merge")
def bench_merge(
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="Causal language model: hub id, folder or builtin: name.")
    ] = "builtin:smollm2-135m",
    rank: Annotated[int, typer.Option("--rank", min=1, metavar="N", help="Dual LoRA's r (LoRA has 2 r).")] = 8,
    dtype: Dtypes = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, metavar="N", help="Length of the prompt and of what is generated.")
    ] = 64,
    rounds: Rounds = 9,
    seconds: Seconds = 90.0,
    device: Device = None,
    output: ResultFile = None,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Merge and unmerge all of SmolLM2 beside a copy of its weights; generation unmerged beside merged; ten minutes.

    [dim]Example:[/]  duallora bench merge --dtype float32
    """
    output = output or BENCH / "merge.json"
    _refuse_unwritable(output)
    from duallora.bench import merge

    return merge.bench(
        output,
        model=model,
        rank=rank,
        dtypes=[name.value for name in dtype or BenchDtype],
        tokens=tokens,
        rounds=rounds,
        seconds=seconds,
        device=device,
        console=console.results,
    )


@bench_app.command("report")
def bench_report(
    results: Annotated[
        Path, typer.Option("--results", metavar="DIR", help="Folder of layer.json, step.json, kernel.json, merge.json.")
    ] = BENCH,
    root: Annotated[
        Path, typer.Option("--root", metavar="DIR", help="Checkout whose README.md and docs/ are filled in.")
    ] = Path(),
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw docs/img/bench-*.svg (matplotlib).")] = True,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Write the tables and plots of the docs from the results, and say which target is met.

    [dim]Example:[/]  duallora bench report
    """
    from duallora.bench.report import report as run_report

    return run_report(results, root, plots=plots, console=console.results)


@config_app.command("schema")
def config_schema(json: Json = False, debug: Debug = False) -> dict[str, Any]:
    """Print the JSON schema of a recipe, for editors that complete and check YAML.

    [dim]Example:[/]  duallora config schema > recipe.schema.json
    """
    from json import dumps

    from duallora.train.recipe import recipe_schema

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
    from duallora.train.recipe import fingerprint, load_recipe, recipe_yaml

    sources = {"data.path", "data.task", "path", "task"}
    named = data is not None or task is not None or any(item.split("=")[0] in sources for item in overrides or ())
    if config is None and not named:
        data = "builtin:docstrings"
        console.notes.print("[dim]no data named: shown with --data builtin:docstrings[/]")
    recipe = load_recipe(config, overrides or (), model=model, data=data, task=task)
    console.print_text(recipe_yaml(recipe))
    return {"recipe": recipe.model_dump(mode="json"), "fingerprint": fingerprint(recipe)}


def _refuse_misspelt(source: str) -> None:
    """ConfigError for a name in an existing local folder that is not there: the hub need not be asked for runs/mien."""
    import difflib

    from duallora.errors import ConfigError

    path = Path(source)
    missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), None)
    if missing is None or missing.parent == Path():  # a first part that is not there is an organisation on the hub
        return
    found = sorted(entry.name for entry in missing.parent.iterdir()) if missing.parent.is_dir() else []
    near = difflib.get_close_matches(missing.name, found, n=1, cutoff=0.0)
    nearest = missing.parent / near[0] / path.relative_to(missing) if near else None
    hint = f"the nearest name there is {nearest}" if nearest else f"{missing.parent} holds nothing"
    raise ConfigError(f"{source}: {missing.parent} has no {missing.name}; {hint}")


def _refuse_unwritable(file: Path) -> None:
    """ConfigError for a folder, DiskError where no file can be written there: said before the work, not after it."""
    import tempfile

    from duallora.errors import ConfigError, DiskError

    if file.is_dir():
        raise ConfigError(f"-o {file} is a folder; -o takes a file such as results.json")
    folder = next(parent for parent in file.absolute().parents if parent.exists())  # what lacks is made on writing
    try:
        with tempfile.TemporaryFile(dir=folder):  # rights alone do not tell: the disk may be full or read-only
            pass
    except OSError as error:
        raise DiskError(
            f"-o {file} cannot be written in {folder}: {error.strerror}; choose another place with -o"
        ) from error


def _scores(
    source: str,
    task: str | None,
    data: str | None,
    data_dir: Path | None,
    split: str | None,
    limit: int | None,
    num_beams: int | None,
) -> tuple[Any, dict[str, Any]]:
    """(a function of model and tokenizer that gives the task's figures, what it scores on)."""
    from duallora.train import evaluate as evaluation

    chosen, recipe, own = _task(task, data, data_dir, source)
    split = split or _held_out(chosen)
    limit = limit or (recipe.data.eval_limit if recipe and own else None)
    examples = evaluation.select(chosen, split, limit)
    generation = _generation(recipe, None, num_beams)

    def scores(model: Any, tokenizer: Any) -> dict[str, float]:
        return evaluation.evaluate(
            model,
            tokenizer,
            _with_labels_of(model, chosen, split, examples),
            split=split,
            batch_size=recipe.eval.batch_size if recipe else 16,
            generation=generation,
            max_length=recipe.data.max_length if recipe else 512,
            console=console.results,
        ).metrics

    facts = {"task": chosen.name, "split": split, "rows": len(examples), "generation": generation}
    return scores, {**facts, "data": {split: chosen.fingerprint(split)}}


def _named(name: str, data_dir: Path | None) -> Task:
    """The task of that name, else the data at that path or hub id."""
    from duallora.tasks import TASKS, load_data, load_task

    return load_task(name, data_dir=data_dir) if name in TASKS else load_data(name)


def _held_out(task: Task) -> str:
    """The split to score on where none is named."""
    return next(name for name in ("test", "validation", *task.splits) if name in task.splits)


def _generation(recipe: Recipe | None, max_new_tokens: int | None, num_beams: int | None) -> dict[str, int]:
    """What overrides the task's own settings for generating: the options, else the run's recipe."""
    chosen = {
        "max_new_tokens": max_new_tokens or (recipe.eval.max_new_tokens if recipe else None),
        "num_beams": num_beams or (recipe.eval.num_beams if recipe else None),
    }
    return {name: value for name, value in chosen.items() if value is not None}


ALL_ROWS = "all rows"  # the split of data that came without splits and that nothing here was trained on


def _task(task: str | None, data: str | None, data_dir: Path | None, source: str) -> tuple[Task, Recipe | None, bool]:
    """What to evaluate ``source`` on, the recipe of its run, and whether that is what the run was trained on.

    Data the run was trained on are split as the run split them; of other data without splits every row counts.
    """
    from duallora.errors import ConfigError
    from duallora.tasks import load_task

    if task is not None and data is not None:
        raise ConfigError(f"--task {task} and --data {data} exclude each other: keep one")
    file = _recipe_file(Path(source))
    if file is None and task is None and data is None:
        raise ConfigError(f"nothing to evaluate {source} on: name a task (--task e2e) or data (--data mine.jsonl)")
    from duallora.train.recipe import load_recipe

    own = file is not None and task is None and data is None
    recipe = None if file is None else load_recipe(file, data_dir=data_dir if own else None)
    if recipe is not None and (own or (data is not None and _same_data(data, recipe.data.path))):
        from duallora.train.run import load

        return load(recipe, console.results), recipe, True
    chosen = load_task(task, data_dir=data_dir) if task is not None else _every_row(str(data), recipe)
    _refuse_other_kind(source, task or str(data), chosen)
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
    path = path.expanduser().absolute()
    for folder in (path, *path.parents[:2]) if path.is_dir() else ():
        if (folder / "run.json").is_file() and (folder / "recipe.yaml").is_file():
            return folder / "recipe.yaml"
    return None


def _same_data(data: str, trained_on: str | None) -> bool:
    """Whether both name one file, hub data set or built-in, whatever way the path is written."""
    if trained_on is None:
        return False
    return data == trained_on or Path(data).expanduser().resolve() == Path(trained_on).expanduser().resolve()


def _every_row(data: str, recipe: Recipe | None) -> Task:
    """The data with the splits they come with; where they come without, with every row in the split ``ALL_ROWS``."""
    from dataclasses import replace

    from duallora.tasks import load_data

    if data.startswith("builtin:"):
        return load_data(data)
    if recipe is None:
        task = load_data(data, eval_data=data)
    else:
        task = load_data(data, eval_data=data, format=recipe.data.format, bad_rows=recipe.data.bad_rows)
    rows = task.splits["train"]
    return replace(task, splits={ALL_ROWS: rows}) if task.splits["validation"] == rows else task


def _refuse_other_kind(source: str, name: str, task: Task) -> None:
    """ConfigError where the files of ``source`` say that it was trained for another kind of data."""
    from duallora.errors import ConfigError
    from duallora.train import evaluate as evaluation

    folder = evaluation.find(source) if Path(source).is_dir() else None
    trained_for = evaluation.read_sidecar(folder).get("kind", task.kind) if folder else task.kind
    if trained_for != task.kind:
        words = {
            "generate": "text to generate (prompt-completion, messages or alpaca rows)",
            "classify": "classes (rows with a label)",
            "regress": "numbers (rows with a label that has a fraction)",
        }
        raise ConfigError(
            f"{name} holds {words[task.kind]}, but {source} was trained for {words[trained_for]}: "
            "evaluate it on data of the kind it was trained for"
        )


def _with_labels_of(model: Any, task: Task, split: str, examples: Sequence[Example]) -> Task:
    """The task reduced to these examples, its classes numbered as the model numbers them.

    A file that lacks one of the classes numbers the others differently than the file the model was trained on.
    """
    from dataclasses import replace

    from duallora.errors import ConfigError

    if task.kind != "generate" and not hasattr(model, "peft_config"):
        trained = [name for name in model.config.architectures or () if name.endswith("ForSequenceClassification")]
        if not trained:
            raise ConfigError(
                f"{model.name_or_path} has no classification head, so its classes would be drawn by lot; train one first: "
                f"duallora train --model {model.name_or_path} ..."
            )
    if task.kind != "classify":
        return replace(task, splits={split: examples})
    names = {str(name): int(index) for index, name in model.config.id2label.items()}
    unnamed = all(name == f"LABEL_{index}" for name, index in names.items())  # transformers' stand-ins
    if unnamed and len(names) == len(task.labels):
        return replace(task, splits={split: examples})
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
    table = Table("figure", box=SIMPLE)
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


def _plan(recipe: Recipe) -> dict[str, Any]:
    """What ``train`` would do, from everything but the training: data read, rows encoded, model and adapter built."""
    from duallora.tasks import encode_split
    from duallora.train import run
    from duallora.train.evaluate import select
    from duallora.train.models import load_model
    from duallora.train.progress import quiet_libraries, say
    from duallora.train.recipe import default_output

    run.check_settings(recipe)
    task = run.load(recipe, console.results)
    with quiet_libraries():
        labels = len(task.labels) or None
        model, tokenizer = load_model(
            recipe.model.name, task.kind, dtype=recipe.model.dtype, num_labels=labels, revision=recipe.model.revision,
            quantization=recipe.model.quantization,
        )  # fmt: skip
        _, counts = encode_split(
            select(task, "train", recipe.data.limit),
            tokenizer,
            task.kind,
            max_length=recipe.data.max_length,
            train_on=recipe.data.train_on,
        )
        steps, warmup = run.schedule(recipe, counts.rows)
        trainable, total = run.adapt(model, recipe, task.kind, warmup).get_nb_trainable_parameters()
    folder = recipe.output or default_output(recipe)
    out = console.results
    say(out, "tokens", f"{counts.tokens:,} in {counts.rows:,} rows, {counts.truncated:,} rows cut")
    say(out, "model", f"{escape(recipe.model.name)}: {trainable:,} of {total:,} parameters trained")
    say(out, "steps", f"{steps:,}, of which {warmup:,} warm up the learning rate")
    say(out, "dry run", f"nothing was trained or written; the run folder would be {escape(folder)}")
    return {
        "folder": folder,
        "rows": counts.rows,
        "tokens": counts.tokens,
        "trained_tokens": counts.trained_tokens,
        "truncated": counts.truncated,
        "steps": steps,
        "warmup_steps": warmup,
        "trainable_parameters": trainable,
        "recipe": recipe.model_dump(mode="json"),
    }


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The ``duallora`` program; leaves with the exit codes above."""
    if "_DUALLORA_COMPLETE" in os.environ:
        app(prog_name="duallora")  # the shell asks for completions
    code = run(list(sys.argv[1:] if arguments is None else arguments))
    if "DUALLORA_OUTCOME" in os.environ:
        from duallora.train.launch import leave_outcome

        leave_outcome(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Runs one command line, says what came of it, and returns its exit code.

    The command is invoked without typer's own ``main``, which would fold every interrupt into exit code 130.
    """
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    other = int(os.environ.get("RANK", "0"))  # of several processes only the first one has the word
    as_json = "--json" in options and not other
    console.use_json("--json" in options)
    try:
        # With --json stdout is the JSON line's alone, whatever a library prints (DeepSpeed does on import).
        aside = redirect_stdout(sys.stderr) if "--json" in options else nullcontext()
        with _sigterm_raises(), aside:
            payload = _invoke(arguments)
        code = payload.pop("exit_code", 0)
        if as_json and payload:
            console.print_json({"status": "done" if code == 0 else "error", "exit_code": code, **payload})
        return code
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing is wrong, and Python must not complain while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        if isinstance(error, typer.Exit):  # --help and --version have done their work
            return error.exit_code
        code = console.exit_code_for(error)
        message, hint = console.explain(error, arguments)
        if "--debug" in options or os.environ.get("DUALLORA_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        status = "interrupted" if code in (130, 143) else "error"
        if message and not (other and _is_told(code)):
            console.print_error(message, hint, label=f"{status} in process {other}" if other else status)
        if as_json:
            console.print_json({"status": status, "exit_code": code, "error": message})
        return code


def _is_told(code: int) -> bool:
    """Whether the first process, or whoever waits for them all, tells of this end."""
    from duallora.train.launch import outcome

    return code in (9, 130, 143) or outcome() == code


def _invoke(arguments: list[str]) -> dict[str, Any]:
    command: Any = typer.main.get_command(app)
    with command.make_context("duallora", list(arguments), obj=list(arguments)) as context:
        return command.invoke(context) or {}


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C does, so that locks are let go and half-written files removed."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()

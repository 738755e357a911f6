"""The first thing to run: a real model learns something visible, offline, in minutes, through the same functions as the
verbs `train`, `eval` and `merge`.

The data is Python's own standard library, parsed on this machine. Full: SmolLM2-135M learns to write one-line
docstrings. Quick: MiniLM learns which package a function belongs to. The examples shown are spread evenly over the
held-out functions, not picked.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from duallora.config.load import load_recipe
from duallora.config.recipe import Recipe
from duallora.export.merge import merge
from duallora.store import adapters, record
from duallora.store.models import load_model
from duallora.store.run_folder import RunFolder
from duallora.tasks import Example, Task
from duallora.terminal import clock, command, quiet_libraries, say, shown
from duallora.train import evaluate, prepare, run
from duallora.train.evaluate import EvalResult

SHOWN = 3  # examples before and after


@dataclass(frozen=True)
class Plan:
    """What one demonstration does, and the words for it."""

    title: str
    story: str
    model: str
    data: str
    settings: tuple[str, ...]
    held_out: int  # test rows that are scored before and after
    metrics: dict[str, tuple[str, str, str]]  # metric -> (what to call it, its format, its unit)


FULL = Plan(
    title="SmolLM2-135M learns to write docstrings",
    story=(
        "The base model goes on with code when it is shown a function of Python's standard library. Dual LoRA teaches "
        "it to say what the function does, in one line. Functions of whole modules are held out and never trained on."
    ),
    model="builtin:smollm2-135m",
    data="builtin:docstrings",
    settings=(
        "adapter.r=8",
        "adapter.target_modules=[q_proj, v_proj]",  # a third of the time of all-linear on two cores
        "adapter.direction_init_std=0.002",  # for so few steps, at four times the usual rate
        "data.max_length=128",  # the longest row has 103 tokens
        "data.eval_limit=48",
        "train.max_steps=60",
        "train.batch_size=16",
        "train.auto_batch=true",
        "train.learning_rate=4e-3",
        "train.lr_warmup_steps=8",
        "train.save_steps=30",
        "train.logging_steps=5",
        "eval.metrics=false",
    ),
    held_out=96,
    metrics={
        "loss": ("answer loss", ".3f", ""),
        "bleu": ("BLEU", ".1f", ""),
        "bleu_first_line": ("BLEU of the first line", ".1f", ""),
        "one_line": ("answers of one line", ".0f", " %"),
    },
)

QUICK = Plan(
    title="MiniLM learns which package a function belongs to",
    story=(
        "An encoder of 22.7 M parameters gets a new, random head for ten packages of Python's standard library, and is "
        "shown signatures with their first sentence. Dual LoRA trains it on one part and is scored on another."
    ),
    model="builtin:minilm-l6",
    data="builtin:packages",
    settings=(
        "adapter.r=8",
        "data.max_length=64",
        "data.eval_limit=64",
        "train.epochs=1.2",
        "train.batch_size=16",
        "train.auto_batch=true",
        "train.learning_rate=2e-3",
        "train.logging_steps=5",
        "eval.metrics=false",
    ),
    held_out=145,
    metrics={"loss": ("loss", ".3f", ""), "accuracy": ("accuracy (guessing: 10 %)", ".1f", " %")},
)


def demo(*, quick: bool = False, output: Path | str = "runs/demo", console: Console | None = None) -> dict[str, Any]:
    """Trains, scores, saves, reloads and merges a built-in model and returns the summary it writes to demo.json.

    ``output`` gets ``run/`` (see `run.train`), ``merged/`` and ``demo.json``; where it exists, a numbered sister is used.
    """
    return show(QUICK if quick else FULL, Path(output), console or Console())


def show(plan: Plan, output: Path, console: Console) -> dict[str, Any]:
    """The demonstration of a plan."""
    started = time.time()
    output = _free(output)
    console.print(Panel(Text(plan.story), title=f"[bold]{plan.title}[/]", title_align="left", border_style="cyan"))
    recipe = load_recipe(None, plan.settings, model=plan.model, data=plan.data, output=output / "run")

    console.rule("[bold]1  before[/]", align="left", style="cyan")
    task = _held_out(prepare.load(recipe, console), plan.held_out)
    before = _score_base(recipe, task, console)
    _say_scores(plan, before, console)

    console.rule("[bold]2  training[/]", align="left", style="cyan")
    trained = run.train(recipe, console=console)

    console.rule("[bold]3  after, reloaded from the disk[/]", align="left", style="cyan")
    after = _score(*adapters.load_adapter(trained["folder"], task.kind), recipe, task, console)
    _say_scores(plan, after, console)
    examples = [_example(task, before, after, index) for index in _spread(len(before.examples), SHOWN)]
    for facts in examples:
        console.print(_side_by_side(facts))

    console.rule("[bold]4  merging into a plain model[/]", align="left", style="cyan")
    merged = merge(trained["folder"], output / "merged", console=console)

    seconds = time.time() - started
    console.rule("[bold]what came of it[/]", align="left", style="cyan")
    console.print(_summary(plan, before, after))
    console.print(_next_steps(plan, output, trained, merged, seconds))
    scored = RunFolder(trained["folder"]).metrics() or {}
    summary = record.result(
        "demo",
        scored["recipe"] | {"output": None},
        {
            "before": {name: before.metrics[name] for name in plan.metrics},
            "after": {name: after.metrics[name] for name in plan.metrics},
            "max_logit_difference": merged["max_logit_difference"],
            "train_seconds": trained["metrics"]["train_seconds"],
            "tokens_per_second": trained["metrics"]["tokens_per_second"],
        },
        seeds=[recipe.seed],
        started=started,
        data={**scored["data"], "test": task.fingerprint("test")},
        base=scored["base"],
        held_out_rows=len(before.examples),
        trainable_parameters=trained["trainable_parameters"],
    )
    record.write_json(output / "demo.json", summary)  # metrics only: the library's own texts are not ours to pass on
    record.write_json(output / "examples.json", examples)
    return {
        "output": str(output),
        "run": trained["folder"],
        "adapter": trained["adapter"],
        "merged": merged["output"],
        "summary": str(output / "demo.json"),
        **summary["metrics"],
        "seconds": round(seconds, 1),
    }


def _free(output: Path) -> Path:
    """``output``, or the first of ``output-2``, ``output-3``, ... that is not taken: a second demo just works."""
    sisters = (output.with_name(f"{output.name}-{number}") for number in itertools.count(2))
    return next(one for one in itertools.chain([output], sisters) if not one.exists() or not any(one.iterdir()))


def _held_out(task: Task, count: int) -> Task:
    """The task reduced to ``count`` test rows spread evenly over the split, which is ordered by module."""
    rows = task.splits["test"]
    return replace(task, splits={"test": [rows[index] for index in _spread(len(rows), min(count, len(rows)))]})


def _spread(length: int, count: int) -> list[int]:
    """``count`` positions in the middles of equal parts of ``range(length)``."""
    return [(2 * part + 1) * length // (2 * count) for part in range(count)]


def _score_base(recipe: Recipe, task: Task, console: Console) -> EvalResult:
    torch.manual_seed(recipe.seed)  # a new head starts as it will start in training
    with quiet_libraries():
        model, tokenizer = load_model(recipe.model.name, task.kind, num_labels=len(task.labels) or None)
    return _score(model.to(adapters.default_device()), tokenizer, recipe, task, console)


def _score(model: Any, tokenizer: Any, recipe: Recipe, task: Task, console: Console) -> EvalResult:
    return evaluate.evaluate(model, tokenizer, task, batch_size=32, max_length=recipe.data.max_length, console=console)


def _say_scores(plan: Plan, result: EvalResult, console: Console) -> None:
    scores = ", ".join(
        f"{label} [bold]{result.metrics[name]:{form}}{unit}[/]" for name, (label, form, unit) in plan.metrics.items()
    )
    say(console, "scores", f"{scores} ({len(result.examples)} held-out functions)")


def _side_by_side(facts: dict[str, Any]) -> Panel:
    answers = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1), show_edge=False)
    answers.add_column("before", ratio=1, style="yellow", header_style="yellow")
    answers.add_column("after", ratio=1, style="green", header_style="green")
    answers.add_row(Text(_short(facts["before"])), Text(_short(facts["after"])))
    given = Syntax(facts["given"], "python", background_color="default", word_wrap=True)
    wanted = Text.assemble(("the library says: ", "dim"), (str(facts["expected"]), "dim"))
    return Panel(Group(given, answers, wanted), border_style="dim")


def _example(task: Task, before: EvalResult, after: EvalResult, index: int) -> dict[str, Any]:
    example: Example = before.examples[index]
    first, second = (result.predictions[index] for result in (before, after))
    if task.kind == "generate":
        return {"given": example.prompt, "before": first, "after": second, "expected": example.answer}
    names, expected = task.labels, int(example.label or 0)
    return {"given": example.texts[0], "before": names[first], "after": names[second], "expected": names[expected]}


def _short(text: str, lines: int = 6) -> str:
    kept = text.strip().splitlines()
    return "\n".join(kept[:lines] + (["..."] if len(kept) > lines else []))


def _summary(plan: Plan, before: EvalResult, after: EvalResult) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(f"{len(before.examples)} held-out functions")
    for heading, style in (("before", "yellow"), ("after", "bold green"), ("change", "")):
        table.add_column(heading, justify="right", style=style)
    for name, (label, form, unit) in plan.metrics.items():
        first, second = before.metrics[name], after.metrics[name]
        table.add_row(label, f"{first:{form}}{unit}", f"{second:{form}}{unit}", f"{second - first:+{form}}")
    return table


def _next_steps(plan: Plan, output: Path, trained: dict[str, Any], merged: dict[str, Any], seconds: float) -> Group:
    folder = shown(Path(trained["folder"]))
    logdir = command("--logdir", Path(trained["folder"]) / "tb", program="tensorboard")
    where = Table.grid(padding=(0, 2))
    for path, what in (
        (f"{folder}/adapter", "the adapter, for PeftModel.from_pretrained"),
        (f"{folder}/log.jsonl", f"the course of the training; {escape(logdir)}"),
        (shown(Path(merged["output"])), "a plain transformers model: no duallora needed to use it"),
        (f"{shown(output)}/demo.json", "these metrics, with versions, seeds and hashes"),
    ):
        where.add_row(f"[bold]{path}[/]", what)
    commands: Sequence[str] = (
        "duallora train --data mine.csv -o runs/mine    # columns prompt,completion",
        command("eval", Path(trained["folder"]), "--limit", "100")
        if plan is FULL
        else "duallora demo    # a language model, about five minutes",
        command("data", "preview", plan.data, "--model", plan.model),
        "duallora config show --data mine.csv > recipe.yaml",
    )
    return Group(
        Text.from_markup(f"done in [bold]{clock(seconds)}[/]; on the disk:\n"),
        where,
        Text("\nwhat to try next:\n"),
        *(Text.from_markup(f"  [cyan]$[/] {escape(command)}") for command in commands),
    )

"""Verbs of many runs: grids of your own, the paper's tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from typer import Argument, Option

from duallora import console
from duallora.cli.app import verb

SUMMARIES = Path("results/studies")

Workers = Annotated[int, Option("--workers", min=1, metavar="N", help="Runs at once on this machine.")]
Ray = Annotated[str | None, Option("--ray", metavar="ADDRESS", help='Run on a Ray cluster; "local" starts one here.')]
Keep = Annotated[
    Literal["none", "best", "all"], Option("--keep", help="Whose adapters stay; all keeps checkpoints too.")
]

Reuse = Annotated[
    list[Path] | None,
    Option("--reuse", metavar="DIR", help="Another grid: its finished runs of equal recipe are copied. Repeatable."),
]


@verb()
def grid(
    config: Annotated[
        Path | None, Option("--config", "-c", metavar="FILE", help="grid.yaml; the folder's own study if not given.")
    ] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="DIR", help="Folder of the grid; runs/NAME.")
    ] = None,
    workers: Workers = 1,
    ray: Ray = None,
    keep: Keep = "best",
    retries: Annotated[int, Option("--retries", min=0, metavar="N", help="New tries of a cell that was killed.")] = 1,
    reuse: Reuse = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Check every cell's recipe and list them.")] = False,
) -> dict[str, Any]:
    """Train the same tasks with several settings, search values and seeds; killed or stopped, it goes on where it was.

    [dim]Examples:[/]
      duallora grid -c grid.yaml -o runs/grid --workers 2
      duallora grid -c grid.yaml -o runs/grid --ray auto
    """
    from duallora import methods
    from duallora.errors import ConfigError
    from duallora.grid import live
    from duallora.grid.run import require_all, run
    from duallora.grid.study import Study, outcomes
    from duallora.train import plugins

    source = config or output
    if source is None:
        raise ConfigError("what is to be run? -c grid.yaml says it, and -o FOLDER goes on with a folder's study")
    study = Study.read(source)
    plugins.load(study.base.get("plugins", ()))  # their metrics say which of two values is better
    folder = output or Path("runs") / study.name
    cells = study.wanted(outcomes(folder))
    for cell in cells:  # a method's name may be a plug-in's, so the recipe itself cannot check it
        plugins.load(cell.recipe().plugins)
        methods.get(cell.recipe().adapter.method)
    if dry_run:
        for cell in cells:
            console.results.print(cell.name, soft_wrap=True, markup=False)
        expected = study.expected(outcomes(folder))
        console.results.print(f"{len(cells)} cells to begin with, {expected} if no search grows further")
        return {"cells": [cell.name for cell in cells], "expected": expected}
    options: dict[str, Any] = {"workers": workers, "ray": ray, "keep": keep, "reuse": reuse or ()}
    found = run(study, folder, console=console.results, retries=retries, **options)
    chosen = live.show_best(console.results, study, found)
    require_all(found, folder)
    return {"folder": str(folder), "cells": len(found), "best": chosen}


@verb()
def reproduce(
    name: Annotated[str, Argument(metavar="NAME", help="table1 ... table6, figure2, figure3, capacity, ...")],
    scale: Annotated[
        Literal["mini", "paper"],
        Option("--scale", help="The paper's models and data, or a built-in model and local data."),
    ],
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="DIR", help="Folder of the runs; runs/NAME-SCALE.")
    ] = None,
    result: Annotated[
        Path | None,
        Option(
            "--result", metavar="FILE", help="Summary; results/studies/STUDY-SCALE.json (of a part: in its folder)."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        Option("--only", metavar="KIND=NAME", help="task=cola, variant=lora-r16 or study=...; may be repeated."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="A setting of every run, such as model.quantization=bnb-4bit."),
    ] = None,
    workers: Workers = 1,
    ray: Ray = None,
    keep: Keep = "best",
    reuse: Reuse = None,
    gpu: Annotated[
        str | None,
        Option("--gpu", metavar="NAME", help="For the predicted hours: a100-80gb, h100, ..., or cpu (mini)."),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and the commands, run nothing.")] = False,
    commands: Annotated[int, Option("--commands", min=0, metavar="N", help="Commands to print; 0 is all of them.")] = 3,
    yes: Annotated[bool, Option("--yes", help="Do not ask before a run at the paper's scale.")] = False,
) -> dict[str, Any]:
    """Run a table or figure of the paper again: its plan with predicted hours, its runs, its values beside the paper's.

    A run that was stopped goes on where it was with the same command.

    [dim]Examples:[/]
      duallora reproduce table2 --scale mini --only task=cola
      duallora reproduce table1 --scale paper --dry-run --gpu h100
      duallora reproduce capacity --scale mini --workers 2
      duallora reproduce table1 --scale paper --only study=table1-llama3-70b-instruct --set model.quantization=bnb-4bit --workers 8
    """
    from duallora.errors import ConfigError
    from duallora.paper import reproduce as table
    from duallora.terminal import command

    chosen = table.parts(name, scale, only or (), output, settings or ())
    if result is not None and len(chosen) > 1:
        raise ConfigError(f"--result names one file, and {name} has {len(chosen)} studies: choose one by --only study=")
    if name == "capacity":
        _refuse_for_capacity(settings or (), ray, keep, reuse, gpu, commands)
        planned: dict[str, Any] = _capacity().plan([part.study for part in chosen], console.results)
    else:
        planned = table.plan(chosen, gpu or ("cpu" if scale == "mini" else "a100-80gb"))
        table.show_plan(console.results, chosen, planned)
        planned["commands"] = lines = table.commands(chosen)
        shown = lines if commands == 0 else lines[:commands]
        rest = planned["runs"] - len(lines)
        later = f"; the other {rest:,} depend on what these give" if rest > 0 else ""
        console.results.print(f"\n{len(shown)} of the {len(lines):,} runs of the first stage{later}:")
        for line in shown:
            console.results.print(line, soft_wrap=True, markup=False)
    if dry_run:
        return planned
    if scale == "paper" and not yes and not typer.confirm("\nStart these runs?", err=True):
        raise ConfigError("nothing was started; --dry-run shows the plan alone, --yes starts without asking")

    from duallora.grid import report as page
    from duallora.grid import summary as studies
    from duallora.grid.run import require_all

    summaries, outcomes = {}, []
    for part in chosen:
        found, more = _run_part(name, part, workers, {"ray": ray, "keep": keep, "reuse": reuse or ()})
        by_rule = name == "binding"  # whose rule compares main metrics
        summary = studies.summarize(part.folder, scale=scale, main=by_rule) | more
        whole = SUMMARIES / f"{part.study.name}-{scale}.json"
        file = result or (
            part.folder / "summary.json" if only or settings else whole
        )  # a part does not take the whole one's place
        studies.save(summary, file)
        _show(page.tables(summary, table.printed_lines(part.study.name)))
        for sentence in summary["statement"]:
            console.results.print(sentence, soft_wrap=True, markup=False)
        again = command("report", file, "-o", "report.html")
        console.results.print(f"written to [bold]{escape(str(file))}[/]; next: {escape(again)}", soft_wrap=True)
        summaries[part.study.name] = str(file)
        outcomes.append((found, part.folder))
    for found, folder in outcomes:  # a model whose runs fail does not keep the next one's waiting
        require_all(found, folder)
    return {"runs": planned["runs"], "summaries": summaries}


def _capacity() -> Any:
    """`duallora.paper.capacity`, which imports torch."""
    from duallora.paper import capacity

    return capacity


def _refuse_for_capacity(
    settings: Sequence[str], ray: str | None, keep: str, reuse: Sequence[Path] | None, gpu: str | None, commands: int
) -> None:
    """ConfigError for options that mean nothing where cells are no runs of `duallora train`."""
    from duallora.errors import ConfigError

    others = [text for text in settings if not text.replace(" ", "").startswith(("train.max_steps=", "max_steps="))]
    given = {
        f"--set {' '.join(others)}": others,
        "--ray": ray,
        "--keep": keep != "best",
        "--reuse": reuse,
        "--gpu": gpu,
        "--commands": commands != 3,
    }
    if refused := [option for option, value in given.items() if value]:
        raise ConfigError(
            f"{', '.join(refused)}: the cells of capacity are fits of matrices and labels in this process, no runs of `duallora "
            "train`; it takes --only, --set train.max_steps=N, --workers, --result and -o"
        )


def _run_part(name: str, part: Any, workers: int, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(outcomes of a study's cells, what its summary has beside other studies')."""
    if name == "capacity":
        study, found = _capacity().run(part.study, part.folder, workers=workers, console=console.results)
        return found, _capacity().facts(study, part.folder)
    from duallora.grid.run import run

    found = run(part.study, part.folder, console=console.results, workers=workers, **options)
    if name != "figure3":
        return found, {}
    from duallora.paper import ranks

    rows = ranks.of_study(part, found)
    for row in rows:
        console.results.print(
            f"{row['task']}, {row['variant']}: {row['matrix']} has rank {row['rank_float32']:.0f} (float32's tolerance), "
            f"{row['rank']:.0f} (float64's), effective {row['effective_rank']:.0f} of {row['largest']:.0f}",
            soft_wrap=True, markup=False,
        )  # fmt: skip
    return found, {"ranks": rows}


@verb()
def analyze(
    adapters: Annotated[list[str], Argument(metavar="ADAPTER|RUN...", help="Run folders or adapters' folders.")],
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Folder for tables and plots.")],
    only: Annotated[
        list[str] | None,
        Option(
            "--only",
            metavar="PART",
            help="flips, rank or dynamics (needs the base model); may be repeated; else all that there is.",
        ),
    ] = None,
    axis: Annotated[
        Literal["out", "in"], Option("--axis", help="Whose norms the dynamics compare: rows or columns of W.")
    ] = "out",
    plots: Annotated[bool, Option("--plots/--no-plots", help="Draw the plots (matplotlib).")] = True,
) -> dict[str, Any]:
    """What training did to adapters: flipped signs, ranks, how far the weights turned and stretched.

    A run with train.save_total_limit=null keeps all its checkpoints, which with the start make the curves; others have the start, the last ones and the result.

    [dim]Example:[/]
      duallora analyze runs/gaussian runs/gradient -o analysis
    """
    from duallora.analysis.analyze import analyze as look
    from duallora.cli.app import refuse_misspelt

    for source in adapters:
        refuse_misspelt(source)
    return look(adapters, output, only=only or None, axis=axis, draw=plots, console=console.results)


@verb()
def report(
    results: Annotated[
        list[Path], Argument(metavar="RESULTS...", help="Studies' JSON files, folders of grids, folders of either.")
    ],
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="The page, HTML.")] = Path("report.html"),
    markdown: Annotated[
        Path | None,
        Option(
            "--markdown",
            metavar="PATH",
            help="The same as Markdown; fills the marks of a file, or of a folder's files, that exist.",
        ),
    ] = None,
) -> dict[str, Any]:
    """Tables beside the paper's numbers, plots, and what the data can and cannot say, on one page that works offline.

    A grid that is still running is shown as far as it is.

    [dim]Examples:[/]
      duallora report results/studies -o report.html
      duallora report runs/grid -o report.html --markdown report.md
    """
    from duallora.grid import report as page
    from duallora.grid import summary as studies
    from duallora.paper import reproduce as table

    summaries = [summary for path in results for summary in studies.load(path)]
    printed = {summary["name"]: table.printed_lines(summary["name"]) for summary in summaries}
    made = page.report(summaries, output, markdown=markdown, printed=printed)
    for summary, known in zip(summaries, made["studies"], strict=True):
        console.results.print(f"[bold]{known['name']}[/]: {known['done']} of {known['wanted']} cells", soft_wrap=True)
        for sentence in summary["statement"]:
            console.results.print(f"  {sentence}", soft_wrap=True, markup=False)
    if not made["plots"]:
        console.results.print(f"[yellow]{escape(output.name)} has no plots: {escape(page.PLOTLY)}[/]", soft_wrap=True)
    for file in filter(None, (output, markdown)):
        console.results.print(f"written to [bold]{escape(str(file))}[/]", soft_wrap=True)
    return made


def _show(tables: Sequence[Any]) -> None:
    """Tables of `duallora.grid.report` in the terminal, small print in brackets."""
    from rich.box import SIMPLE
    from rich.table import Table

    for found in tables:
        table = Table(*found.head, box=SIMPLE, title=escape(found.title), title_justify="left")
        for row in found.rows:
            table.add_row(
                *(escape(value.text) + (f" [dim]({escape(value.small)})[/]" if value.small else "") for value in row)
            )
        console.results.print(table)
        console.results.print(f"[dim]{escape(found.caption)}[/]", soft_wrap=True)

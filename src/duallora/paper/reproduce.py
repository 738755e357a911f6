"""A table of the paper from its plan to our values beside the printed ones; the verb `duallora reproduce`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from duallora import terminal as progress
from duallora.config.load import resolve
from duallora.config.recipe import Recipe
from duallora.config.yaml import plain_value, yaml_value
from duallora.errors import ConfigError
from duallora.grid.study import CELLS, EXTENSIONS, Cell, Study
from duallora.paper import printed, studies

# The columns of Tables 1, 3, 5 and 6 as the task "commonsense" calls its metrics.
_COMMONSENSE = {"siqa": "social_i_qa"}


@dataclass(frozen=True)
class Part:
    """One study of a table and the folder it lives in."""

    study: Study
    folder: Path

    def first_cells(self) -> list[Cell]:
        """The cells of the first stage, those that wait for another task's adapter too."""
        tasks = self.study.tasks.items()
        apart = {label: {key: own[key] for key in own if key != "after"} for label, own in tasks}
        return replace(self.study, tasks=apart).wanted({})

    def after(self, task: str) -> str | None:
        """The task whose adapter each cell of ``task`` starts from."""
        return self.study.tasks[task].get("after")


def parts(
    name: str, scale: str, only: Sequence[str] = (), folder: Path | None = None, settings: Sequence[str] = ()
) -> list[Part]:
    """The studies of a table, reduced to ``only`` (``task=cola``, ``variant=lora-r16``, ``study=table2-roberta-base``), with
    ``settings`` of every run changed (``model.quantization=bnb-4bit``).

    Raises:
        ConfigError: no such table, scale, setting or part, or nothing is left.
    """
    wanted, changed = _read_only(only), _read_settings(settings)
    found = studies(name, scale)
    folder = folder or Path("runs") / f"{name}-{scale}"
    chosen = []
    for study in found:
        if study.name not in wanted.get("study", [study.name]):
            continue
        tasks = _pick(study.tasks, wanted.get("task"))
        variants = _pick(study.variants, wanted.get("variant"))
        if not tasks or not variants:
            continue
        layers = [("set by tasks or variants", layer) for layer in (*tasks.values(), *variants.values())]
        for kind, layer in [("searched", study.search), *layers]:
            if taken := sorted(changed.keys() & layer.keys()):
                expected = "expected a setting that all runs share"
                raise ConfigError(f"--set {taken[0]}: {study.name} has it {kind}; {expected}")
        reference = study.reference if study.reference in variants else None
        base = {**study.base, **changed}
        reduced = replace(study, base=base, tasks=tasks, variants=variants, reference=reference)
        chosen.append(Part(reduced, folder if len(found) == 1 else folder / study.name))
    have = {
        "study": [study.name for study in found],
        "task": sorted({task for study in found for task in study.tasks}),
        "variant": sorted({variant for study in found for variant in study.variants}),
    }
    unknown = any(one not in have[kind] for kind, names in wanted.items() for one in names)
    if unknown or not chosen:
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in have.items())
        fault = "names what is not in" if unknown else "leaves nothing of"
        raise ConfigError(f"--only {' '.join(only)} {fault} {name}. It has {listed}")
    return chosen


def _read_settings(settings: Iterable[str]) -> dict[str, Any]:
    found = {}
    for text in settings:
        key, equals, value = text.partition("=")
        field, why = resolve(key.strip())
        if not equals or field is None or why:
            raise ConfigError(
                f"--set {text}: expected KEY=VALUE, such as model.quantization=bnb-4bit" + f"; {why}" * bool(why)
            )
        found[field] = plain_value(value, f"--set {text}")
    return found


def _read_only(only: Iterable[str]) -> dict[str, list[str]]:
    wanted: dict[str, list[str]] = {}
    for text in only:
        kind, equals, name = text.partition("=")
        if kind not in ("study", "task", "variant") or not equals or not name:
            raise ConfigError(f"--only {text}: expected task=NAME, variant=NAME or study=NAME")
        wanted.setdefault(kind, []).append(name)
    return wanted


def _pick(labels: Mapping[str, Any], wanted: Sequence[str] | None) -> dict[str, Any]:
    return {label: own for label, own in labels.items() if wanted is None or label in wanted}


def command(cell: Cell, folder: Path, after: str | None = None) -> str:
    """The `duallora train` line that is this cell, for a shell; ``after``: the task whose adapter it starts from."""
    settings = {**cell.settings}
    if after:
        settings["adapter.init_from"] = f"{folder / CELLS}/BEST-OF-{after.upper()}"
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={yaml_value(value)}")]
    return progress.command("train", *words, "-o", folder / CELLS / cell.name)


def plan(chosen: Sequence[Part], gpu: str) -> dict[str, Any]:
    """Runs, steps, tokens, memory and hours of everything, before any of it has run.

    ``gpu`` is a name of `cost.GPUS`, or "cpu" for this machine, which is timed for a moment.

    Raises:
        ConfigError: no such GPU, or the size of a task's data is not known.
    """
    from duallora.paper import cost

    machine = cost.gpu_named(gpu)
    planned: list[dict[str, Any]] = []
    for part in chosen:
        study, lines = part.study, list[dict[str, Any]]()
        cells = {(cell.tags["task"], cell.tags["variant"]): cell for cell in part.first_cells()}
        recipes = {key: cells[key].recipe() for key in itertools.product(study.tasks, study.variants)}
        for (task, variant), recipe in recipes.items():
            outdone = _outdone(recipe, [recipes[other, variant] for other in study.tasks])
            one, counted = cost.cost(recipe, machine), cost.shape(recipe)
            tried = len(study.points({}, task, variant)) * study.search_seeds
            lines.append(
                {
                    "task": task,
                    "variant": variant,
                    "runs": tried + len(study.seeds) - study.search_seeds,
                    "steps": one.steps,
                    "tokens": one.tokens,
                    "hours": one.hours,
                    "trained_parameters": counted.trained,
                    "base_parameters": counted.base,
                    "memory": None if outdone else cost.memory(recipe, machine),
                }
            )
        model = study.base.get("model.name")
        planned.append({"study": study.name, "model": model, "folder": str(part.folder), "lines": lines})
    every = [line for one in planned for line in one["lines"]]
    return {
        "predicted": True,
        "gpu": gpu,
        "gpu_facts": machine._asdict(),
        "runs": sum(line["runs"] for line in every),
        "hours": sum(line["runs"] * line["hours"] for line in every),
        "studies": planned,
    }


def _outdone(recipe: Recipe, others: Sequence[Recipe]) -> bool:
    """Whether one of ``others`` has more rows or longer ones, and none fewer or shorter: the plan tells the most that is needed,
    and each prediction takes a traced step."""
    own, *sizes = ((one.train.batch_size, one.data.max_length) for one in (recipe, *others))
    return any(size != own and size[0] >= own[0] and size[1] >= own[1] for size in sizes)


def show_plan(console: Console, chosen: Sequence[Part], found: Mapping[str, Any]) -> None:
    """The plan as tables: by task, by variant, and the sum."""
    for part, one in zip(chosen, found["studies"], strict=True):
        study, lines = part.study, one["lines"]
        console.print(
            f"[bold]{escape(study.name)}[/]: {escape(str(one['model']))}, in {escape(one['folder'])}", soft_wrap=True
        )
        table = Table(Column("task", no_wrap=True), box=SIMPLE)
        for heading in ("runs", "steps each", "tokens each", "predicted h"):
            table.add_column(heading, justify="right", no_wrap=True)
        searches = {task: _search(study, task) for task in study.tasks}
        apart = len(set(searches.values())) > 1
        if apart:
            table.add_column("search", overflow="fold")
        for task in study.tasks:
            own = [line for line in lines if line["task"] == task]
            start = f" (from {part.after(task)})" if part.after(task) else ""
            table.add_row(
                task + start, f"{sum(line['runs'] for line in own):,}", f"{own[0]['steps']:,}", f"{own[0]['tokens']:,}",
                f"{sum(line['runs'] * line['hours'] for line in own):,.1f}", *([searches[task]] if apart else []),
            )  # fmt: skip
        console.print(table)
        table = Table(Column("variant", no_wrap=True), box=SIMPLE)
        for heading in ("trained", "of the model", "runs", "predicted h", "predicted GB"):
            table.add_column(heading, justify="right", no_wrap=heading == "trained")
        own_search = {name: _in_words(own["search"]) for name, own in study.variants.items() if "search" in own}
        if own_search:
            table.add_column("search of its own", overflow="fold")
        for variant in study.variants:
            own = [line for line in lines if line["variant"] == variant]
            needs = [line["memory"] for line in own if line["memory"] is not None]
            share = own[0]["trained_parameters"] / (own[0]["base_parameters"] + own[0]["trained_parameters"])
            whole = own[0]["trained_parameters"] >= own[0]["base_parameters"]
            fits = not needs or max(needs) <= 1e9 * found["gpu_facts"]["memory"]
            gigabytes = f"{max(needs) / 1e9:.1f}" if needs else "-"
            table.add_row(
                variant, f"{own[0]['trained_parameters']:,}", "all" if whole else f"{100 * share:.3f} %",
                f"{sum(line['runs'] for line in own):,}", f"{sum(line['runs'] * line['hours'] for line in own):,.1f}",
                gigabytes if fits else f"[red]{gigabytes} no[/]",
                *([own_search.get(variant, "")] if own_search else []),
            )  # fmt: skip
        console.print(table)
        seeds = f"{len(study.seeds)} seeds, {study.search_seeds} of them at every search value"
        tuned = "" if apart else f"; {next(iter(searches.values())) or 'nothing'} searched"
        console.print(f"{seeds}{tuned}", soft_wrap=True)
    machine = "this processor" if found["gpu"] == "cpu" else f"one {found['gpu']}"
    grows = (
        f"; where the best value lies at the edge of its grid the grid grows, by {EXTENSIONS} runs at most for each task and variant"
    ) * any(_grows(part.study) for part in chosen)
    console.print(
        f"[bold]in all {found['runs']:,} runs, predicted {found['hours']:,.1f} hours of {escape(machine)}[/]{grows}",
        soft_wrap=True,
    )
    console.print(
        "[dim]hours and GB are predictions from counts of products and bytes (docs/paper-tables.md), not measurements; "
        "trained: without the heads of classifiers, which a report counts too[/]",
        soft_wrap=True,
    )


def _search(study: Study, task: str) -> str:
    """The values tried on a task, in words, by the variants without a search of their own."""
    shared = (variant for variant, own in study.variants.items() if "search" not in own)
    return next((_in_words(study.search_for(task, variant)) for variant in shared), "")


def _in_words(search: Mapping[str, Sequence[Any]]) -> str:
    return "; ".join(f"{key.rpartition('.')[2]} {', '.join(map(_shown, values))}" for key, values in search.items())


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _grows(study: Study) -> bool:
    return study.extend and any(study.search_for(*pair) for pair in itertools.product(study.tasks, study.variants))


def commands(chosen: Sequence[Part]) -> list[str]:
    """The `duallora train` lines of the first stage; the later ones depend on what these give."""
    return [command(cell, part.folder, part.after(cell.tags["task"])) for part in chosen for cell in part.first_cells()]


def printed_rows(study: str) -> tuple[printed.Row, ...]:
    """What the paper prints for the model of a study, or for the first model of its table where the study's is ours."""
    name, _, model = study.partition("-")
    number = name.removeprefix("table")
    if not number.isdigit() or int(number) not in printed.FILES:
        return ()
    rows = printed.rows(int(number))
    own = [row for row in rows if row.model.lower() == model]
    return tuple(own or [row for row in rows if row.model == rows[0].model])


def printed_lines(study: str) -> list[dict[str, Any]]:
    """`printed_rows` as plain data for `duallora.grid.report`, the columns by the names of our tasks."""
    return [
        {**asdict(row), "values": {_COMMONSENSE.get(name, name): value for name, value in row.values.items()}}
        for row in printed_rows(study)
    ]

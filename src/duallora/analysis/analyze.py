"""What training did to adapters, as tables (CSV), a summary (JSON) and plots (SVG): the verb `analyze`.

flips     which signs turned over, which entries are open, state by state (`flips`); Dual LoRA
rank      rank and effective rank of the first and the last state (`rank`); Dual LoRA, LoRA, whole models
dynamics  how far the weights turned and stretched (`dynamics`); every method that merges; needs the base model
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from duallora.analysis import adapter_plots, flips, rank
from duallora.analysis.states import Adapter, State, states
from duallora.errors import ConfigError, IntegrityError
from duallora.store import record
from duallora.store.run_folder import RunFolder
from duallora.terminal import say, shown

PARTS = ("flips", "rank", "dynamics")
Row = dict[str, Any]


def analyze(
    sources: Sequence[Path | str],
    output: Path | str,
    *,
    only: Sequence[str] | None = None,
    axis: str = "out",
    draw: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Writes the files of the parts into ``output`` and returns the summary, which is ``analysis.json``.

    Args:
        sources: run folders or adapters' folders; each is a curve under its folder's name.
        only: the parts to take; None is every part that the sources allow.
        axis: of the norms in ``dynamics``, "out" or "in".
        draw: whether to draw (matplotlib).

    Raises:
        ConfigError: an unknown part or axis, no adapter there, two sources of one name, or a part of ``only`` (or every
            part) that none of the sources allows.
        IntegrityError: an adapter cannot be read.
        NonFiniteError: one holds NaN or infinite values.
    """
    chosen = PARTS if only is None else only
    if unknown := sorted({*chosen} - {*PARTS}):
        raise ConfigError(f"--only {unknown[0]}: expected {', '.join(PARTS)}")
    if axis not in ("out", "in"):
        raise ConfigError(f"--axis {axis}: expected out or in")
    console, folder = console or Console(quiet=True), Path(output)
    found = labels(sources)
    courses = {label: states(source) for label, source in found.items()}
    tables: dict[str, list[Row]] = {part: [] for part in PARTS if part in chosen}
    told: dict[str, Any] = {}
    for label, course in courses.items():
        adapter = None if course[-1].whole else Adapter(course[-1])
        told[label] = {"path": shown(found[label]), "steps": [state.step for state in course]}
        with suppress(ConfigError, IntegrityError):  # a run of another version is analyzed nevertheless
            if facts := RunFolder(found[label]).facts():
                told[label] |= {name: facts.get(name) for name in ("commit", "device", "parameters")}
                told[label]["recipe"] = facts.get("recipe", {}) | {"output": None}
        for part, table in tables.items():
            try:
                if part == "dynamics":
                    rows, summary = _dynamics(console, label, found[label], course, axis)
                elif part == "rank" and (adapter is None or adapter.layers() or adapter.low_rank_layers()):
                    rows, summary = _rank(console, label, course)
                elif part == "flips" and adapter and adapter.layers():
                    rows, summary = _flips(console, label, course)
                else:
                    continue
            except ConfigError as error:
                if only is not None:
                    raise
                say(console, "note", f"[yellow]no {part} of {escape(label)}: {escape(str(error))}[/]")
                rows, summary = [], []
            table += [{"source": label, **row} for row in rows]
            told[label][part] = summary
    empty = [part for part, rows in tables.items() if not rows]
    if only is None and len(empty) < len(tables):
        tables = {part: rows for part, rows in tables.items() if rows}
    elif empty:
        remedy = "expected one that changes weights" if only is None else "leave it out of --only"
        raise ConfigError(f"{', '.join(empty)}: none of the {len(found)} sources is of a method that has it; {remedy}")
    for part, rows in tables.items():
        record.write_text(folder / f"{part}.csv", _csv(rows))
    result = {"kind": "analysis", **record.environment(), "axis": axis, "sources": told}
    record.write_json(folder / "analysis.json", result)
    drawn = adapter_plots.draw(tables, folder) if draw else []
    files = [*(path.name for path in drawn), *(f"{part}.csv" for part in tables), "analysis.json"]
    say(console, "saved", f"{', '.join(files)} in {shown(folder)}")
    return result


def _flips(console: Console, label: str, course: Sequence[State]) -> tuple[list[Row], list[Row]]:
    """(rows, summary) of a source, as of the other parts."""
    rows = flips.course(course)
    summary = flips.overall(rows)
    first, last = summary[0], summary[-1]
    text = f"{escape(label)}, step {last['step']}: {last['open']:.1%} open, {last['positive']:.1%} positive"
    if "flipped" in last:
        text += f", {last['flipped']:.1%} of the signs flipped since step {first['step']}"
    say(console, "flips", text)
    return rows, summary


def _rank(console: Console, label: str, course: Sequence[State]) -> tuple[list[Row], list[Row]]:
    """The summary has means over the layers, by step and matrix; ``largest`` is the mean of min(out, in). The start of a whole model, all 0, is not kept."""
    ends = course[-1:] if course[-1].whole else dict.fromkeys((course[0], course[-1]))
    rows = [row for state in ends for row in rank.table(state)]
    summary: list[Row] = []
    for step, matrix in dict.fromkeys((row["step"], row["matrix"]) for row in rows):
        of = [row for row in rows if (row["step"], row["matrix"]) == (step, matrix)]
        means = {name: sum(row[name] for row in of) / len(of) for name in ("rank", "rank_float32", "effective_rank")}
        largest = sum(min(row["out"], row["in"]) for row in of) / len(of)
        summary.append({"step": step, "matrix": matrix, **means, "largest": largest, "layers": len(of)})
        ranks = f"{matrix} {means['rank_float32']:.0f} (float32's tolerance), {means['rank']:.0f} (float64's), "
        ranks += f"effective {means['effective_rank']:.0f} of {largest:.0f}"
        say(console, "rank", f"{escape(label)}, step {step}: {ranks}")
    return rows, summary


def _dynamics(
    console: Console, label: str, source: Path, course: Sequence[State], axis: str
) -> tuple[list[Row], list[Row]]:
    from duallora.analysis import dynamics  # loads PEFT and the base model

    rows = dynamics.course(source, course, axis)  # type: ignore[arg-type]
    summary = dynamics.correlations(rows)
    for row in (row for row in summary if row["step"] is None):
        low, high = row["interval"]
        text = f"Pearson {row['pearson']:+.2f} ({low:+.2f} to {high:+.2f} over other layers), Spearman {row['spearman']:+.2f} over {row['points']} points"
        say(console, "dynamics", f"{escape(label)}, {row['module']}: {text}")
    return rows, summary


def labels(sources: Sequence[Path | str]) -> dict[str, Path]:
    """A name for each source: its folder's, or the run's where the folder is called adapter or model; without the
    words between hyphens that all have (of a grid's cells, the task and the seed).

    Raises:
        ConfigError: two sources have the same.
    """
    found: dict[str, Path] = {}
    for source in sources:
        path = Path(source).absolute()
        label = path.parent.name if path.name in ("adapter", "model") else path.name
        if label in found:
            raise ConfigError(f"{found[label]} and {path} would both be {label}: give folders of different names")
        found[label] = path
    shared = set.intersection(*({*label.split("-")} for label in found))
    short = {"-".join(word for word in label.split("-") if word not in shared): path for label, path in found.items()}
    return short if all(short) and len(short) == len(found) else found


def _csv(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

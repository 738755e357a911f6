"""What training did to adapters, as tables (CSV), a summary (JSON) and plots (SVG): the verb `analyze`.

flips     which signs turned over, which entries are open, state by state (`flips`); Dual LoRA
rank      rank and effective rank of the first and the last state (`rank`); Dual LoRA and LoRA
dynamics  how far the weights turned and stretched (`dynamics`); every method that merges; needs the base model
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from duallora.analysis import adapter_plots, flips, rank
from duallora.analysis.states import Adapter, states
from duallora.errors import ConfigError
from duallora.store import record
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
    """
    chosen = PARTS if only is None else only
    if unknown := sorted({*chosen} - {*PARTS}):
        raise ConfigError(f"--only {unknown[0]}: expected {', '.join(PARTS)}")
    if axis not in ("out", "in"):
        raise ConfigError(f"--axis {axis}: expected out or in")
    console, folder = console or Console(quiet=True), Path(output)
    found = {label: states(source) for label, source in labels(sources).items()}
    tables: dict[str, list[Row]] = {part: [] for part in PARTS if part in chosen}
    told: dict[str, Any] = {}
    for (label, course), source in zip(found.items(), sources, strict=True):
        dual = low_rank = False
        if not course[-1].whole:
            adapter = Adapter(course[-1])
            dual, low_rank = bool(adapter.layers()), bool(adapter.low_rank_layers())
        summary: dict[str, Any] = {"path": str(source), "steps": [state.step for state in course]}
        if "flips" in tables and dual:
            rows = flips.course(course)
            tables["flips"] += _named(label, rows)
            summary["flips"] = flips.overall(rows)
            _say_flips(console, label, summary["flips"])
        if "rank" in tables and (dual or low_rank):
            rows = [row for state in dict.fromkeys((course[0], course[-1])) for row in rank.table(state)]
            tables["rank"] += _named(label, rows)
            summary["rank"] = mean_ranks(rows)
            for row in summary["rank"]:
                text = f"{label}, step {row['step']}: {row['matrix']} {row['rank']:.0f}, effective {row['effective_rank']:.0f}"
                say(console, "rank", f"{text} of {row['largest']:.0f}")
        if "dynamics" in tables:
            from duallora.analysis import dynamics  # loads PEFT and the base model

            try:
                rows = dynamics.course(source, course, axis)  # type: ignore[arg-type]
            except ConfigError as error:
                if only is not None:
                    raise
                rows = []
                say(console, "note", f"[yellow]no dynamics of {escape(label)}: {escape(str(error))}[/]")
            tables["dynamics"] += _named(label, rows)
            summary["dynamics"] = dynamics.correlations(rows)
            for row in summary["dynamics"]:
                if row["step"] is None:
                    text = f"Pearson {row['pearson']:+.2f}, Spearman {row['spearman']:+.2f} over {row['points']} points"
                    say(console, "dynamics", f"{label}, {row['module']}: {text}")
        told[label] = summary
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


def labels(sources: Sequence[Path | str]) -> dict[str, Path]:
    """A name for each source: its folder's, or the run's where the folder is called adapter or model.

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
    return found


def mean_ranks(rows: Sequence[Row]) -> list[Row]:
    """Means over the layers, by step and matrix; ``largest`` is the mean of min(out, in)."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["matrix"]), []).append(row)
    found = []
    for (step, matrix), of in groups.items():
        means = {name: sum(row[name] for row in of) / len(of) for name in ("rank", "effective_rank")}
        largest = sum(min(row["out"], row["in"]) for row in of) / len(of)
        found.append({"step": step, "matrix": matrix, **means, "largest": largest, "layers": len(of)})
    return found


def _named(label: str, rows: Sequence[Row]) -> list[Row]:
    return [{"source": label, **row} for row in rows]


def _say_flips(console: Console, label: str, rows: Sequence[Row]) -> None:
    last = rows[-1]
    text = f"{label}, step {last['step']}: {last['open']:.1%} open, {last['positive']:.1%} positive"
    if "flipped" in last:
        text += f", {last['flipped']:.1%} of the signs flipped since step {rows[0]['step']}"
    say(console, "flips", text)


def _csv(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

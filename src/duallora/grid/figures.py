"""The plots of the page as plain data: what is drawn for whom, with its words. How it looks, and toggling, is report.js's.

A plot has views (a task, a cost), of which one shows at a time; a view has lines of a variant, its axes, a range that
leaves outliers out, and an alternative text.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from duallora.errors import is_number
from duallora.grid.study_plots import CAPTIONS as DRAWN_CAPTIONS
from duallora.grid.study_plots import looks, mean_line, of_task, searches, tasks_of, title_of, varied
from duallora.tasks import metrics

Summary = Mapping[str, Any]
View = dict[str, Any]

SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star", "hexagon", "pentagon")
FAR = 3.0  # spans of the middle half beyond it from which a point is an outlier

CAPTIONS = {
    **DRAWN_CAPTIONS,
    "differences": "{reference} minus each other variant, at their own best values, with the 95 % interval over other test rows and "
    "other seeds: right of 0 {reference} is ahead. Each point says what can be told after Holm's correction.",
    "tradeoff": "Mean over seeds at each variant's best value, with its 95 % interval. Dashed: the Pareto front, the variants that no "
    "other one beats in both. Time is that of the training steps alone; machines shared with other work blur it.",
    "sensitivity": "The metric on validation rows by the value that was searched; the line joins the means of the seeds that chose. "
    "A cross at the lower edge: a run that diverged.",
}


def figures(summary: Summary) -> list[dict[str, Any]]:
    """Every plot that the summary has the numbers for: ``name``, ``title``, ``caption`` and ``views``."""
    made = (
        ("differences", "Differences", _differences),
        ("tradeoff", "Metric against cost", _tradeoff),
        ("settings", "Metric by setting", _by_setting),
        ("loss", "Training loss", _losses),
        ("sensitivity", "Sensitivity to the search", _sensitivity),
    )
    found = [(name, title, list(make(summary))) for name, title, make in made]
    words = {name: caption.format(reference=summary.get("reference")) for name, caption in CAPTIONS.items()}
    return [
        {"name": name, "title": title, "caption": words[name], "views": views} for name, title, views in found if views
    ]


def inks(summary: Summary) -> list[dict[str, str]]:
    """How each variant is drawn in every plot of the study."""
    symbols = itertools.cycle(SYMBOLS)
    return [{"name": name, "color": ink.color, "symbol": next(symbols)} for name, ink in looks(summary).items()]


def window(values: Sequence[float]) -> tuple[list[float], int] | None:
    """([low, high], how many lie outside) that holds all but outliers; None where there are none."""
    if len(values) < 5:
        return None
    low, _, high = statistics.quantiles(values, n=4)
    reach = FAR * (high - low)
    inside = [value for value in values if low - reach <= value <= high + reach]
    if not reach or len(inside) == len(values):
        return None
    margin = 0.05 * (max(inside) - min(inside))
    return [min(inside) - margin, max(inside) + margin], len(values) - len(inside)


def _view(label: str, x: str, y: str, lines: Sequence[Mapping[str, Any]], alt: str, **more: Any) -> View:
    found: View = {"label": label, "x": x, "y": y, "lines": list(lines), "alt": alt, **more}
    if y and (near := window([value for line in lines for value in line["y"] if is_number(value)])):
        found["range"], found["outside"] = near
    return found


def _metric(summary: Summary, task: str) -> str:
    return summary["tasks"].get(task, {}).get("metric", "mean of the tasks")


def _point(x: Any, y: Any, row: Mapping[str, Any], text: str) -> dict[str, Any]:
    low, high = row.get("interval") or (row["mean"], row["mean"])
    return {
        "variant": row["variant"], "x": [x], "y": [y], "mode": "markers", "text": [text],
        "spread": [row["mean"] - low, high - row["mean"]],
    }  # fmt: skip


def _said(row: Mapping[str, Any]) -> str:
    spread = f", 95 % {row['interval'][0]:.4g} to {row['interval'][1]:.4g}" if "interval" in row else ""
    return f"{row['variant']}: {row['mean']:.4g}{spread}"


def _differences(summary: Summary) -> Iterator[View]:
    reference, variants = summary["reference"], list(summary["study"]["variants"])
    words = {"yes": f"{reference} is better", "no": f"{reference} is worse"}
    for task in tasks_of(summary["pairs"]):
        pairs = sorted(of_task(summary["pairs"], task), key=lambda pair: -variants.index(pair["other"]))
        lines, told = [], []
        for pair in pairs:
            low, high = pair["interval"]
            answer = words.get(pair["better"], "cannot be told")
            text = f"{pair['mean']:+.4g} against {pair['other']}, 95 % {low:+.4g} to {high:+.4g}: {answer}"
            row = {"variant": pair["other"], "mean": pair["mean"], "interval": pair["interval"]}
            lines.append({**_point(pair["mean"], pair["other"], row, text), "along": "x"})
            told.append(text)
        lower = metrics.find(_metric(summary, task)).higher_is_better is False
        title = title_of(summary, task)
        alt = f"{title}: {reference} minus each other variant. {'; '.join(told)}."
        yield _view(title, f"{reference} minus the other", "", lines, alt, zero=True, turned=lower)


def _tradeoff(summary: Summary) -> Iterator[View]:
    ratio = any("cpu_ratio" in row for row in summary["rows"])
    time = ("cpu_ratio", "training time / LoRA's") if ratio else ("cpu_seconds", "processor seconds of training")
    for task in tasks_of(summary["rows"]):
        rows = [row for row in of_task(summary["rows"], task) if row["mean"] is not None]
        for cost, read in (
            ("trained parameters", lambda row: row.get("parameters", {}).get("trainable")),
            (time[1], lambda row: row.get(time[0])),
            ("peak memory in GB", lambda row: row.get("peak_memory")),
        ):
            points = [(read(row), row) for row in rows if is_number(read(row)) and read(row) > 0]
            if len(points) < 2 or len({x for x, _ in points}) == 1:
                continue
            # The average has its tasks' direction.
            first = task if task in summary["tasks"] else next(iter(summary["tasks"]))
            higher = metrics.find(_metric(summary, first)).higher_is_better
            front = _front(points, higher is not False)
            lines = [
                {**_point(x, row["mean"], row, f"{_said(row)}<br>{cost} {x:,.6g}"), "along": "y"} for x, row in points
            ]
            if higher is not None:
                xs, ys = [x for x, _ in front], [row["mean"] for _, row in front]
                lines.append({"variant": None, "name": "Pareto front", "x": xs, "y": ys, "mode": "lines", "dash": True})
            names = ", ".join(row["variant"] for _, row in front)
            over = f"{title_of(summary, task)} over {cost}"
            said = "; ".join(f"{_said(row)} at {x:,.6g}" for x, row in points)
            alt = f"{over}. On the Pareto front: {names}. {said}"
            yield _view(over, cost, _metric(summary, task), lines, alt, logx=cost == "trained parameters")


def _front(points: Sequence[tuple[float, Mapping[str, Any]]], higher: bool) -> list[tuple[float, Mapping[str, Any]]]:
    """The points that no other is at least as cheap and as good as, and better in one of both; by cost."""
    kept: list[tuple[float, Mapping[str, Any]]] = []
    sign = 1 if higher else -1
    for x, row in sorted(points, key=lambda point: (point[0], -sign * point[1]["mean"])):
        if not kept or sign * row["mean"] > sign * kept[-1][1]["mean"]:
            kept.append((x, row))
    return kept


def _by_setting(summary: Summary) -> Iterator[View]:
    key, values = varied(summary["study"]["variants"])
    rows = [row for row in summary["rows"] if row["mean"] is not None and row["variant"] in values]
    for task in tasks_of(rows):
        own = sorted(of_task(rows, task), key=lambda row: values[row["variant"]])
        xs, means = [values[row["variant"]] for row in own], [row["mean"] for row in own]
        lines: list[dict[str, Any]] = [{"variant": None, "name": "mean", "x": xs, "y": means, "mode": "lines"}]
        lines += [{**_point(values[row["variant"]], row["mean"], row, _said(row)), "along": "y"} for row in own]
        alt = f"{title_of(summary, task)} by {key}: " + "; ".join(
            f"{x:g}: {_said(row)}" for x, row in zip(xs, own, strict=True)
        )
        yield _view(title_of(summary, task), str(key), _metric(summary, task), lines, alt)


def _losses(summary: Summary) -> Iterator[View]:
    curves = [curve for curve in summary["curves"] if len(curve["steps"]) > 2]
    for task in tasks_of(curves):
        own = of_task(curves, task)
        lines = [{"variant": c["variant"], "x": c["steps"], "y": c["loss"], "mode": "lines"} for c in own]
        alt = f"{task}: training loss by step. " + "; ".join(
            f"{c['variant']} from {c['loss'][0]:.4g} to {c['loss'][-1]:.4g}" for c in own
        )
        yield _view(task, "step", "training loss", lines, alt)


def _sensitivity(summary: Summary) -> Iterator[View]:
    for task in summary["study"]["tasks"]:
        metric = summary["tasks"].get(task, {}).get("chosen_by")
        searched = searches(summary, task) if metric else {}
        keys = ", ".join(sorted({key.rpartition(".")[2].replace("_", " ") for key, _ in searched.values()}))
        lines: list[dict[str, Any]] = []
        for variant, (key, cells) in searched.items():
            xs, means = mean_line(summary, key, cells, metric)
            lines.append({"variant": variant, "x": xs, "y": means, "mode": "lines"})
            there = [cell for cell in cells if is_number(cell.get("metrics", {}).get(metric))]
            text = [f"{variant}, seed {cell['tags']['seed']}: {cell['metrics'][metric]:.4g}" for cell in there]
            points = {"x": [cell["tags"][key] for cell in there], "y": [cell["metrics"][metric] for cell in there]}
            lines.append({"variant": variant, **points, "mode": "markers", "text": text})
            if lost := [cell["tags"][key] for cell in cells if cell["status"] == "diverged"]:
                lines.append({"variant": variant, "x": lost, "y": [None] * len(lost), "mode": "lost"})
        if lines:
            tops = [
                f"{one['variant']} best {max(one['y']):.4g}" for one in lines if one["mode"] == "lines" and one["y"]
            ]
            alt = f"{title_of(summary, task)}: {metric} on validation rows by {keys}. {'; '.join(tops)}."
            positive = all(x > 0 for one in lines for x in one["x"])
            yield _view(title_of(summary, task), keys, metric, lines, alt, logx=positive)

"""The plots of a study as plain data: what is drawn for whom, with its words. How it looks is report.js's and study_plots'.

A plot has views (a task, a cost), of which the page shows one at a time and a picture all of one ``part``; a view has
lines of a variant, its axes, the page's range that leaves outliers out, and an alternative text. The ``mode`` of a line is plotly's,
"lost" for runs that diverged, or "chosen" for the value that was taken; the latter two have no height.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from duallora.errors import is_number
from duallora.plots import PALETTE
from duallora.tasks import metrics

Summary = Mapping[str, Any]
View = dict[str, Any]

SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star", "hexagon", "pentagon")
FAR = 3.0  # spans of the middle half beyond it from which a point is an outlier

CAPTIONS = {
    "differences": "{reference} minus each other variant, at their own best values: right of 0 {reference} is ahead. Thin: 95 % interval "
    "over other test rows and other seeds; thick: of these trained models on other test rows. Filled: the sign can be told after Holm's "
    "correction.",
    "tradeoff": "Mean over seeds at each variant's best value, with its 95 % interval. Dashed: the Pareto front, the variants that no "
    "other one beats in both. Time is the processor's for the training steps alone, where LoRA is in the study over LoRA's on the same "
    "task; machines shared with other work blur it.",
    "settings": "Variants that differ in one number, mean over seeds with its 95 % interval; dashed lines are other variants.",
    "loss": "Loss on the training batches at each variant's best value, the mean over seeds, smoothed over neighboring steps.",
    "sensitivity": "The line and the filled marks are values on validation rows, the hollow ones on test rows of the same runs, a mark for "
    "each seed; the line joins the means of the seeds that chose. Dotted: the chosen value. A cross at the lower edge: a run that diverged.",
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


def inks(summary: Summary) -> list[dict[str, Any]]:
    """How each variant is drawn in every plot: the reference in the first color and bold; the others in turn through the
    other colors, all through the symbols.
    """
    colors = itertools.cycle([color for color in PALETTE[1:] if color != "#000000"])
    found = []
    for name, symbol in zip(summary["study"]["variants"], itertools.cycle(SYMBOLS), strict=False):
        first = name == summary.get("reference")
        color, width = (PALETTE[0], 2.2) if first else (next(colors), 1.2)
        found.append({"name": name, "color": color, "symbol": symbol, "width": width})
    return found


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


def _view(part: str, title: str, x: str, y: str, lines: Sequence[Mapping[str, Any]], alt: str, **more: Any) -> View:
    """``label`` names it among all of its plot; the title does among those of one part."""
    found: View = {"part": part, "title": title, "label": title, "x": x, "y": y, "lines": lines, "alt": alt, **more}
    if y and (near := window([value for line in lines for value in line["y"] if is_number(value)])):
        found["range"], found["outside"] = near
    return found


def tasks_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of rows, pairs or curves, in their order."""
    return list(dict.fromkeys(row["task"] for row in rows))


def of_task(rows: Sequence[Mapping[str, Any]], task: str) -> list[Any]:
    """The rows, pairs or curves of a task."""
    return [row for row in rows if row["task"] == task]


def _titled(summary: Summary, task: str) -> str:
    metric = summary["tasks"].get(task, {}).get("metric")
    return f"{task} ({metric})" if metric else task


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
            inner = {"x": pair["interval_of_models"], "y": [pair["other"]] * 2, "mode": "lines", "wide": True}
            point = _point(pair["mean"], pair["other"], row, text)
            told_apart = pair["better"] in words
            lines += [{"variant": pair["other"], **inner}, {**point, "along": "x", "filled": told_apart}]
            told.append(text)
        lower = metrics.find(_metric(summary, task)).higher_is_better is False
        title = _titled(summary, task)
        alt = f"{title}: {reference} minus each other variant. {'; '.join(told)}."
        yield _view("differences", title, f"{reference} minus the other", "", lines, alt, zero=True, turned=lower)


def _tradeoff(summary: Summary) -> Iterator[View]:
    ratio = any("cpu_ratio" in row for row in summary["rows"])
    time = ("cpu_ratio", "training time / LoRA's") if ratio else ("cpu_seconds", "processor seconds of training")
    for task in tasks_of(summary["rows"]):
        rows = [row for row in of_task(summary["rows"], task) if row["mean"] is not None]
        for part, cost, read in (
            ("parameters", "trained parameters", lambda row: row.get("parameters", {}).get("trainable")),
            ("time", time[1], lambda row: row.get(time[0])),
            ("memory", "peak memory in GB", lambda row: row.get("peak_memory")),
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
            title = _titled(summary, task)
            over = f"{title} over {cost}"
            said = "; ".join(f"{_said(row)} at {x:,.6g}" for x, row in points)
            alt = f"{over}. On the Pareto front: {names}. {said}"
            metric = _metric(summary, task)
            yield _view(part, title, cost, metric, lines, alt, label=over, logx=part == "parameters")


def _front(points: Sequence[tuple[float, Mapping[str, Any]]], higher: bool) -> list[tuple[float, Mapping[str, Any]]]:
    """The points that no other is at least as cheap and as good as, and better in one of both; by cost."""
    kept: list[tuple[float, Mapping[str, Any]]] = []
    sign = 1 if higher else -1
    for x, row in sorted(points, key=lambda point: (point[0], -sign * point[1]["mean"])):
        if not kept or sign * row["mean"] > sign * kept[-1][1]["mean"]:
            kept.append((x, row))
    return kept


def _by_setting(summary: Summary) -> Iterator[View]:
    key, values = _varied(summary["study"]["variants"])
    rows = [row for row in summary["rows"] if row["mean"] is not None]
    for task in tasks_of([row for row in rows if row["variant"] in values]):
        own = sorted((r for r in of_task(rows, task) if r["variant"] in values), key=lambda row: values[row["variant"]])
        xs, means = [values[row["variant"]] for row in own], [row["mean"] for row in own]
        lines: list[dict[str, Any]] = [{"variant": None, "name": "mean", "x": xs, "y": means, "mode": "lines"}]
        lines += [{**_point(x, row["mean"], row, _said(row)), "along": "y"} for x, row in zip(xs, own, strict=True)]
        others = [row for row in of_task(rows, task) if row["variant"] not in values]
        if len(others) > 4:  # too many lines to tell apart
            others = [row for row in others if row["variant"] == summary.get("reference")]
        ends = {"x": [xs[0], xs[-1]], "mode": "lines", "dash": True}
        lines += [{"variant": row["variant"], **ends, "y": [row["mean"]] * 2} for row in others]
        title = _titled(summary, task)
        alt = f"{title} by {key}: " + "; ".join(f"{x:g}: {_said(row)}" for x, row in zip(xs, own, strict=True))
        yield _view("settings", title, str(key), _metric(summary, task), lines, alt)


def _varied(variants: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, dict[str, float]]:
    """The number that at least three variants of one method each have another value of, and those values."""
    for key in dict.fromkeys(key for own in variants.values() for key in own):
        by_method: dict[Any, dict[str, float]] = {}
        for name, own in variants.items():
            if is_number(own.get(key)):
                by_method.setdefault(own.get("adapter.method", "duallora"), {})[name] = own[key]
        for values in by_method.values():
            if len(values) > 2 and len(set(values.values())) == len(values):
                return key, values
    return None, {}


def _losses(summary: Summary) -> Iterator[View]:
    curves = [curve for curve in summary["curves"] if len(curve["steps"]) > 2]
    for task in tasks_of(curves):
        own = of_task(curves, task)
        lines = [{"variant": c["variant"], "x": c["steps"], "y": c["loss"], "mode": "lines"} for c in own]
        alt = f"{task}: training loss by step. " + "; ".join(
            f"{c['variant']} from {c['loss'][0]:.4g} to {c['loss'][-1]:.4g}" for c in own
        )
        yield _view("loss", task, "step", "training loss", lines, alt)


def _sensitivity(summary: Summary) -> Iterator[View]:
    for task in summary["study"]["tasks"]:
        metric = summary["tasks"].get(task, {}).get("chosen_by")
        values = {row["variant"]: row.get("values", {}) for row in of_task(summary["rows"], task)}
        for key, searched in (_searches(summary, task) if metric else {}).items():
            lines: list[dict[str, Any]] = []
            for variant, cells in searched.items():
                lines.append({"variant": variant, **_mean_line(summary, key, cells, metric), "mode": "lines"})
                for split, rows in (("metrics", "validation"), ("test", "test")):
                    there = [cell for cell in cells if is_number(cell.get(split, {}).get(metric))]
                    xs, ys = [cell["tags"][key] for cell in there], [cell[split][metric] for cell in there]
                    text = [
                        f"{variant}, seed {cell['tags']['seed']}, {rows} rows: {y:.4g}"
                        for cell, y in zip(there, ys, strict=True)
                    ]
                    own = {"x": xs, "y": ys, "mode": "markers", "text": text, "filled": split == "metrics"}
                    lines.append({"variant": variant, **own})
                lost = [cell["tags"][key] for cell in cells if cell["status"] == "diverged"]
                chosen = [values[variant][key]] if key in values.get(variant, ()) else []
                for mode, xs in (("lost", lost), ("chosen", chosen)):
                    lines.append({"variant": variant, "x": xs, "y": [None] * len(xs), "mode": mode})
            lines = [line for line in lines if line["x"]]
            tops = [f"{line['variant']} best {max(line['y']):.4g}" for line in lines if line["mode"] == "lines"]
            if not lines:
                continue
            title, name = _titled(summary, task), key.rpartition(".")[2].replace("_", " ")
            alt = f"{title}: {metric} on validation rows by {name}. {'; '.join(tops)}."
            positive = all(x > 0 for line in lines for x in line["x"])
            yield _view(
                f"sensitivity-{task}", title, name, metric, lines, alt, label=f"{title} by {name}", logx=positive
            )


def _searches(summary: Summary, task: str) -> dict[str, dict[str, list[Any]]]:
    """By the key that was searched, the cells of each variant; of several keys of a variant the learning rate."""
    study = summary["study"]
    found: dict[str, dict[str, list[Any]]] = {}
    for variant, own in study["variants"].items():
        keys = list(next(layer["search"] for layer in (own, study["tasks"][task], study) if "search" in layer))
        if "train.learning_rate" in keys:
            keys = ["train.learning_rate"]
        cells = [
            cell
            for cell in summary["cells"]
            if (cell["tags"]["task"], cell["tags"]["variant"]) == (task, variant)
            and len(keys) == 1
            and is_number(cell["tags"].get(keys[0]))
        ]
        if len({cell["tags"][keys[0]] for cell in cells}) > 1:
            found.setdefault(keys[0], {})[variant] = cells
    return found


def _mean_line(summary: Summary, key: str, cells: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[float]]:
    """Mean over the seeds that chose, by search value; broken nowhere, since a diverged run has no value to break at."""
    seeds = summary["study"]["seeds"][: summary["study"]["search_seeds"]]
    found: dict[float, list[float]] = {}
    for cell in cells:
        value = cell.get("metrics", {}).get(metric)
        if cell["tags"]["seed"] in seeds and is_number(value):
            found.setdefault(cell["tags"][key], []).append(value)
    return {"x": sorted(found), "y": [statistics.fmean(found[x]) for x in sorted(found)]}

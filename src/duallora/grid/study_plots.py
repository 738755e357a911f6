"""Plots of a summarized study: differences, metric against cost, sensitivity to the search, a varied setting, losses."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from duallora.errors import is_number
from duallora.plots import FAINT, GROUND, INK, PALETTE
from duallora.tasks import metrics

Summary = Mapping[str, Any]

WIDTH = 9.2  # inches, of every figure
COLUMNS = 4  # panels beside each other
DIVERGED = "#C62828"
MARKERS = "os^DvPX*h<>"


class Plot(NamedTuple):
    """A figure with what it shows; ``name`` ends its file's name."""

    name: str
    title: str
    caption: str
    figure: Any


class Ink(NamedTuple):
    """How one variant is drawn, in every plot of a study."""

    color: str
    marker: str
    width: float


CAPTIONS = {
    "differences": "{reference} minus each other variant, at their own best values: right of the line {reference} is ahead. Thin: 95 % "
    "interval over other test rows and other seeds; thick: of these trained models on other test rows. Filled: the sign can be told "
    "after Holm's correction.",
    "parameters": "Mean over seeds at each variant's best value, with its 95 % interval; equal counts are drawn side by side.",
    "time": "Processor time of the training steps alone, not of evaluation; where LoRA is in the study, over LoRA's on the same task. "
    "Machines shared with other work blur it.",
    "settings": "Variants that differ in one number, mean over seeds with its 95 % interval; dashed lines are other variants.",
    "ranks": "Means over the adapted layers of the first seed's chosen run. Bar: effective rank; mark: rank at float32's tolerance. On the data: "
    "of dW C^(1/2), C the second moment of the layer's inputs on held-out rows.",
    "loss": "Loss on the training batches at each variant's best value, the mean over seeds, smoothed over neighboring steps.",
    "sensitivity": "The line and the filled marks are values on validation rows, the hollow ones on test rows of the same runs, a mark for "
    "each seed; the line joins the seeds that chose. Dotted: the chosen value. Grey: {reference}. A cross on the axis: a run that "
    "diverged.",
}


def draw(summary: Summary, Figure: Any, parts: Collection[str] | None = None) -> Iterator[Plot]:
    """Every plot that the summary has the numbers for, or those that ``parts`` name as a page's marks do ("plot_loss").

    ``Figure`` is the class to draw with (`duallora.plots.figures`).
    """
    made = [
        ("differences", "Differences", _differences),
        ("parameters", "Metric against trained parameters", _against_parameters),
        ("time", "Metric against training time", _against_time),
        ("settings", "Metric by setting", _by_setting),
        ("ranks", "Ranks of the update", _ranks),
        ("loss", "Training loss", _losses),
    ]
    made += [
        (f"sensitivity-{t}", f"Sensitivity on {t}", functools.partial(_sensitivity, t))
        for t in summary["study"]["tasks"]
    ]
    look = looks(summary)
    for name, title, make in made:
        if parts is not None and f"plot_{name}" not in parts:
            continue
        figure = Figure(layout="constrained")
        if make(figure, summary, look):
            caption = CAPTIONS[name.partition("-")[0]].format(reference=summary.get("reference"))
            yield Plot(name, title, caption, figure)


def looks(summary: Summary) -> dict[str, Ink]:
    """The reference in the first color and bold; the others in turn through the other colors and all marks."""
    found = {}
    colors = itertools.cycle([color for color in PALETTE[1:] if color != "#000000"])
    for number, variant in enumerate(summary["study"]["variants"]):
        first = variant == summary.get("reference")
        mark = MARKERS[number % len(MARKERS)]
        found[variant] = Ink(PALETTE[0], mark, 2.2) if first else Ink(next(colors), mark, 1.2)
    return found


def tasks_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of rows, pairs or curves, in their order."""
    return list(dict.fromkeys(row["task"] for row in rows))


def of_task(rows: Sequence[Mapping[str, Any]], task: str) -> list[Any]:
    """The rows, pairs or curves of a task."""
    return [row for row in rows if row["task"] == task]


def _columns(count: int, legend: bool) -> int:
    """Panels beside each other, so that no last row holds one alone and a legend finds a free place after the last."""
    if legend:
        return count + 1 if count < COLUMNS else 3 if count in (4, 5, 8) else COLUMNS
    return min(count, 3 if count in (5, 6, 9) else COLUMNS)


def _panels(
    figure: Any, what: Sequence[str], *, height: float, legend: Sequence[Any] = (), **options: Any
) -> list[tuple[Any, str]]:
    """Axes for each of ``what``, in rows ``height`` inches high; the handles of a legend stand in the place after the last."""
    columns = _columns(len(what), bool(legend))
    rows = math.ceil((len(what) + bool(legend)) / columns)
    figure.set_size_inches(WIDTH, rows * height)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for spare in axes[len(what) :]:
        spare.set_axis_off()
    if legend:
        axes[len(what)].legend(handles=legend, loc="center left", frameon=False, ncols=1 + (len(legend) > 12))
    return list(zip(axes, what, strict=False))


def _ground(axes: Any, along: str = "both", **labels: Any) -> None:
    """Faint lines behind what is drawn, and its words."""
    axes.set(**labels)
    axes.grid(axis=along, color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)


def _handles(look: Mapping[str, Ink], variants: Sequence[str], **options: Any) -> list[Any]:
    from matplotlib.lines import Line2D

    shown = {
        name: {"color": look[name].color, "marker": look[name].marker, "linewidth": look[name].width}
        for name in variants
    }
    return [Line2D([], [], label=name, **{"markersize": 4, **own, **options}) for name, own in shown.items()]


def title_of(summary: Summary, task: str) -> str:
    """What a task's panel is called."""
    metric = summary["tasks"].get(task, {}).get("metric")
    return f"{task} ({metric})" if metric else task


# Each draws into a figure and says whether there was anything to draw.


def _differences(figure: Any, summary: Summary, look: Mapping[str, Ink]) -> bool:
    pairs = summary["pairs"]
    others = [name for name in summary["study"]["variants"] if any(pair["other"] == name for pair in pairs)][::-1]
    if not pairs:
        return False
    for axes, task in _panels(figure, tasks_of(pairs), height=0.75 + 0.2 * len(others), sharey=True):
        axes.axvline(0, color=INK, linewidth=0.8)
        for pair in of_task(pairs, task):
            line, color = others.index(pair["other"]), look[pair["other"]].color
            axes.plot(pair["interval"], [line] * 2, color=color, linewidth=1)
            axes.plot(pair["interval_of_models"], [line] * 2, color=color, linewidth=3.2, alpha=0.55)
            filled = GROUND if pair["better"] == "cannot be said" else color
            axes.plot(pair["mean"], line, marker="o", markersize=5, color=color, markerfacecolor=filled, zorder=3)
        axes.set(title=title_of(summary, task), ylim=(-0.6, len(others) - 0.4))
        if metrics.find(summary["tasks"].get(task, {}).get("metric")).higher_is_better is False:
            axes.invert_xaxis()
        axes.set_yticks(range(len(others)), others)
        axes.tick_params(axis="y", length=0)
        _ground(axes, "x")
    return True


def _against_parameters(figure: Any, summary: Summary, look: Mapping[str, Ink]) -> bool:
    counts = [row.get("parameters", {}).get("trainable") for row in summary["rows"]]
    known = list(filter(None, counts))
    if not known or max(known) < 1.05 * min(known):
        return False
    return _against(figure, summary, look, counts, "trained parameters", log=True)


def _against_time(figure: Any, summary: Summary, look: Mapping[str, Ink]) -> bool:
    ratio = any("cpu_ratio" in row for row in summary["rows"])
    key, label = ("cpu_ratio", "training time / LoRA's") if ratio else ("cpu_seconds", "processor seconds of training")
    return _against(figure, summary, look, [row.get(key) for row in summary["rows"]], label, log=False)


def _against(
    figure: Any, summary: Summary, look: Mapping[str, Ink], places: Sequence[Any], label: str, *, log: bool
) -> bool:
    """The metric of each row over its place in ``places``."""
    both = zip(summary["rows"], places, strict=True)
    rows = [{**row, "x": place} for row, place in both if place and row["mean"] is not None]
    tasks, variants = tasks_of(rows), [name for name in look if any(row["variant"] == name for row in rows)]
    if len(variants) < 2:
        return False
    legend = _handles(look, variants, linewidth=0)
    for axes, task in _panels(figure, tasks, height=2.3, legend=legend):
        xs = [row["x"] for row in of_task(rows, task)]
        ratio = max(max(xs) / min(xs), 2.0)
        for number, row in enumerate(of_task(rows, task)):
            x, mean, own = row["x"], row["mean"], look[row["variant"]]
            # Side by side: as many steps of a fiftieth of the width as points stand there already.
            close = sum(abs(math.log(x / other)) < 0.02 for other in xs[:number])
            errors = [[abs(mean - end)] for end in row.get("interval", [mean] * 2)]
            axes.errorbar(
                x * ratio ** (0.03 * close) if log else x, mean, yerr=errors, color=own.color, marker=own.marker,
                markersize=5, elinewidth=0.8,
            )  # fmt: skip
        axes.set(title=title_of(summary, task), xlabel=label)
        if log:
            axes.set_xscale("log")
            ticks = _apart(sorted({*xs}), ratio**0.2)
            axes.set_xticks(ticks, [_amount(tick) for tick in ticks])
            axes.minorticks_off()
        axes.margins(x=0.15)
        _ground(axes)
    return True


def _apart(values: Sequence[float], factor: float) -> list[float]:
    """Those of the rising ``values`` that leave at least ``factor`` to the one before."""
    kept: list[float] = []
    for value in values:
        if not kept or value >= factor * kept[-1]:
            kept.append(value)
    return kept


def _amount(number: float) -> str:
    """1,234,567 as 1.2M."""
    units = {1e9: "G", 1e6: "M", 1e3: "k"}
    return next((f"{number / unit:.3g}{sign}" for unit, sign in units.items() if number >= unit), f"{number:g}")


def _sensitivity(task: str, figure: Any, summary: Summary, look: Mapping[str, Ink]) -> bool:
    searched, metric = searches(summary, task), summary["tasks"].get(task, {}).get("chosen_by")
    if not searched or metric is None:
        return False
    chosen = {row["variant"]: row.get("values", {}) for row in of_task(summary["rows"], task)}
    reference: Any = summary.get("reference")
    beside = searched.get(reference, ("", []))
    columns = _columns(len(searched), legend=False)
    for number, (axes, variant) in enumerate(_panels(figure, [*searched], height=1.75, sharex=True, sharey=True)):
        key, cells = searched[variant]
        if variant != reference and beside[0] == key:
            axes.plot(*mean_line(summary, key, beside[1], metric), color="#9A9A9A", linewidth=1)
        own = {"color": look[variant].color, "marker": look[variant].marker, "linestyle": ""}
        axes.plot(*mean_line(summary, key, cells, metric), color=look[variant].color, linewidth=1.6)
        hollow = {"markersize": 5, "markerfacecolor": "none", "markeredgewidth": 0.7, "alpha": 0.8}
        for split, how in (("metrics", {"markersize": 4}), ("test", hollow)):
            there = [cell for cell in cells if is_number(cell.get(split, {}).get(metric))]
            axes.plot([cell["tags"][key] for cell in there], [cell[split][metric] for cell in there], **own, **how)
        lost = [cell["tags"][key] for cell in cells if cell["status"] == "diverged"]
        crosses = axes.plot(
            lost, [0.04] * len(lost), "x", color=DIVERGED, markersize=6, markeredgewidth=1.6, clip_on=False,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
        for cross in crosses:
            cross.set_in_layout(False)
        if key in chosen.get(variant, {}):
            axes.axvline(chosen[variant][key], color=INK, linestyle=":", linewidth=0.9)
        axes.set(title=variant, xscale="log" if min(cell["tags"][key] for cell in cells) > 0 else "linear")
        axes.minorticks_off()
        _ground(axes)
        if number % columns == 0:
            axes.set_ylabel(metric)
        if number + columns >= len(searched):  # the lowest of its column
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(key.rpartition(".")[2].replace("_", " "))
    return True


def searches(summary: Summary, task: str) -> dict[str, tuple[str, list[Any]]]:
    """Of each variant that was searched on a task: the key on the axis, and the cells.

    The key is the only one of the search, or the learning rate among several.
    """
    study, found = summary["study"], {}
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
            found[variant] = keys[0], cells
    return found


def mean_line(summary: Summary, key: str, cells: Sequence[Mapping[str, Any]], metric: str) -> tuple[list, list]:
    """Mean over the seeds that chose, by search value; broken nowhere, since a diverged run has no value to break at."""
    seeds = summary["study"]["seeds"][: summary["study"]["search_seeds"]]
    found: dict[float, list[float]] = {}
    for cell in cells:
        value = cell.get("metrics", {}).get(metric)
        if cell["tags"]["seed"] in seeds and is_number(value):
            found.setdefault(cell["tags"][key], []).append(value)
    return sorted(found), [sum(found[x]) / len(found[x]) for x in sorted(found)]


def _by_setting(figure: Any, summary: Summary, look: Mapping[str, Ink]) -> bool:
    key, values = varied(summary["study"]["variants"])
    rows = [row for row in summary["rows"] if row["mean"] is not None]
    tasks = tasks_of([row for row in rows if row["variant"] in values])
    if not tasks:
        return False
    others = [name for name in look if name not in values and any(row["variant"] == name for row in rows)]
    if len(others) > 4:  # too many lines to tell apart
        others = [name for name in others if name == summary.get("reference")]
    legend = _handles(look, others, linestyle="--", marker="", linewidth=1)
    for axes, task in _panels(figure, tasks, height=2.3, legend=legend):
        own = {row["variant"]: row for row in of_task(rows, task)}
        points = sorted((values[name], row["mean"], *row.get("interval", [row["mean"]] * 2))
                        for name, row in own.items() if name in values)  # fmt: skip
        x, means, low, high = zip(*points, strict=True)
        axes.plot(x, means, "o-", color=PALETTE[0], markersize=4)
        axes.fill_between(x, low, high, color=PALETTE[0], alpha=0.15, linewidth=0)
        for name in (name for name in others if name in own):
            axes.axhline(own[name]["mean"], color=look[name].color, linestyle="--", linewidth=1)
        axes.set_xticks(x, [f"{value:g}" for value in x])
        _ground(axes, title=title_of(summary, task), xlabel=key)
    return True


def varied(variants: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, dict[str, float]]:
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


def _ranks(figure: Any, summary: Summary, look: Mapping[str, Ink]) -> bool:
    rows = summary.get("ranks", [])
    tasks = tasks_of(rows)
    if not tasks:
        return False
    for axes, task in _panels(figure, tasks, height=2.6):
        own = of_task(rows, task)
        places = range(len(own), 0, -1)
        axes.barh(
            places,
            [row["effective_rank"] for row in own],
            color=[look[row["variant"]].color for row in own],
            height=0.6,
        )
        axes.plot([row["rank_float32"] for row in own], places, "k|", markersize=10)
        axes.set_yticks(places, [f"{row['variant']}: {row['matrix']}" for row in own])
        axes.set(xscale="log", xlim=(1, None))
        _ground(axes, "x", title=task, xlabel="rank")
    return True


def _losses(figure: Any, summary: Summary, look: Mapping[str, Ink]) -> bool:
    curves = [curve for curve in summary["curves"] if len(curve["steps"]) > 2]
    if not curves:
        return False
    tasks = tasks_of(curves)
    legend = _handles(look, [name for name in look if any(curve["variant"] == name for curve in curves)])
    for axes, task in _panels(figure, tasks, height=2.3, legend=legend):
        for curve in of_task(curves, task):
            own = look[curve["variant"]]
            axes.plot(
                curve["steps"], curve["loss"], color=own.color, linewidth=own.width, marker=own.marker, markersize=3,
                markevery=max(1, len(curve["steps"]) // 6),
            )  # fmt: skip
        _ground(axes, title=task, xlabel="step")
    figure.axes[0].set_ylabel("training loss")
    return True

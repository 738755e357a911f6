"""Plots of a summarized study: differences, metric against cost, sensitivity to the search, a varied setting, losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
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


def draw(summary: Summary, Figure: Any) -> Iterator[Plot]:
    """Every plot that the summary has the numbers for, of class ``Figure`` (`duallora.plots.figures`)."""
    look = looks(summary)
    for name, title, caption, make in (
        ("differences", "Differences", _DIFFERENCES, _differences),
        ("parameters", "Metric against trained parameters", _PARAMETERS, _against_parameters),
        ("time", "Metric against training time", _TIME, _against_time),
        ("settings", "Metric by setting", _SETTINGS, _by_setting),
        ("loss", "Training loss", _LOSS, _losses),
    ):
        figure = make(Figure, summary, look)
        if figure is not None:
            yield Plot(name, title, caption.format(reference=summary.get("reference")), figure)
    for task in summary["study"]["tasks"]:
        figure = _sensitivity(Figure, summary, look, task)
        if figure is not None:
            caption = _SENSITIVITY.format(reference=summary.get("reference"))
            yield Plot(f"sensitivity-{task}", f"Sensitivity on {task}", caption, figure)


def looks(summary: Summary) -> dict[str, Ink]:
    """The reference in the first color and bold; the others in turn through the other colors and all marks."""
    found = {}
    colors = itertools.cycle([color for color in PALETTE[1:] if color != "#000000"])
    for number, variant in enumerate(summary["study"]["variants"]):
        first = variant == summary.get("reference")
        found[variant] = Ink(
            PALETTE[0] if first else next(colors), MARKERS[number % len(MARKERS)], 2.2 if first else 1.2
        )
    return found


def _tasks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows))


def _columns(count: int, legend: bool) -> int:
    """Panels beside each other, so that no last row holds one alone and a legend finds a free place after the last."""
    if legend:
        return count + 1 if count < COLUMNS else 3 if count in (4, 5, 8) else COLUMNS
    return min(count, 3 if count in (5, 6, 9) else COLUMNS)


def _panels(figure: Any, count: int, *, height: float, legend: Sequence[Any] = (), **options: Any) -> list[Any]:
    """``count`` axes in rows ``height`` inches high; the handles of a legend stand in the place after the last."""
    columns = _columns(count, bool(legend))
    rows = math.ceil((count + bool(legend)) / columns)
    figure.set_size_inches(WIDTH, rows * height)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for spare in axes[count:]:
        spare.set_axis_off()
    if legend:
        axes[count].legend(handles=legend, loc="center left", frameon=False, ncols=1 + (len(legend) > 12))
    return axes[:count]


def _handles(look: Mapping[str, Ink], variants: Sequence[str], **options: Any) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D(
            [], [], label=name,
            **{"color": look[name].color, "marker": look[name].marker, "markersize": 4, "linewidth": look[name].width, **options},
        )
        for name in variants
    ]  # fmt: skip


_DIFFERENCES = (
    "{reference} minus each other variant, at their own best values: right of the line {reference} is ahead. Thin: 95 % interval over "
    "other test rows and other seeds; thick: of these trained models on other test rows. Filled: the sign can be told after "
    "Holm's correction."
)


def _differences(Figure: Any, summary: Summary, look: Mapping[str, Ink]) -> Any:
    pairs = summary["pairs"]
    if not pairs:
        return None
    tasks = _tasks(pairs)
    others = [name for name in summary["study"]["variants"] if any(pair["other"] == name for pair in pairs)]
    figure = Figure(layout="constrained")
    panels = _panels(figure, len(tasks), height=0.75 + 0.2 * len(others), sharey=True)
    for axes, task in zip(panels, tasks, strict=True):
        axes.axvline(0, color=INK, linewidth=0.8)
        for pair in (pair for pair in pairs if pair["task"] == task):
            height = len(others) - 1 - others.index(pair["other"])
            color = look[pair["other"]].color
            axes.plot(pair["interval"], [height] * 2, color=color, linewidth=1)
            axes.plot(pair["interval_of_models"], [height] * 2, color=color, linewidth=3.2, alpha=0.55)
            told = pair["better"] != "cannot be said"
            axes.plot(
                pair["mean"], height, marker="o", markersize=5, color=color,
                markerfacecolor=color if told else GROUND, zorder=3,
            )  # fmt: skip
        axes.set(title=_label(summary, task), ylim=(-0.6, len(others) - 0.4))
        if metrics.find(summary["tasks"].get(task, {}).get("metric")).higher_is_better is False:
            axes.invert_xaxis()
        axes.set_yticks(range(len(others)), others[::-1])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=FAINT, linewidth=0.5)
        axes.set_axisbelow(True)
    return figure


def _label(summary: Summary, task: str) -> str:
    metric = summary["tasks"].get(task, {}).get("metric")
    return f"{task} ({metric})" if metric else task


_PARAMETERS = (
    "Mean over seeds at each variant's best value, with its 95 % interval; equal counts are drawn side by side."
)


def _against_parameters(Figure: Any, summary: Summary, look: Mapping[str, Ink]) -> Any:
    def trained(row: Mapping[str, Any]) -> Any:
        return row.get("parameters", {}).get("trainable")

    counts = [trained(row) for row in summary["rows"] if trained(row)]
    if not counts or max(counts) < 1.05 * min(counts):
        return None
    return _against(Figure, summary, look, trained, "trained parameters", log=True)


_TIME = (
    "Processor time of the training steps alone, not of evaluation; where LoRA is in the study, over LoRA's on the same task. Machines "
    "shared with other work blur it."
)


def _against_time(Figure: Any, summary: Summary, look: Mapping[str, Ink]) -> Any:
    ratio = any("cpu_ratio" in row for row in summary["rows"])
    key, label = ("cpu_ratio", "training time / LoRA's") if ratio else ("cpu_seconds", "processor seconds of training")
    return _against(Figure, summary, look, lambda row: row.get(key), label, log=False)


def _against(Figure: Any, summary: Summary, look: Mapping[str, Ink], x_of: Any, label: str, *, log: bool) -> Any:
    rows = [row for row in summary["rows"] if x_of(row) and row["mean"] is not None]
    tasks = _tasks(rows)
    variants = [name for name in look if any(row["variant"] == name for row in rows)]
    if len(variants) < 2:
        return None
    figure = Figure(layout="constrained")
    panels = _panels(figure, len(tasks), height=2.3, legend=_handles(look, variants, linewidth=0))
    for axes, task in zip(panels, tasks, strict=True):
        of_task = [row for row in rows if row["task"] == task]
        low, high = min(map(x_of, of_task)), max(map(x_of, of_task))
        seen: list[float] = []
        for row in of_task:
            x = x_of(row)
            # Side by side: as many steps of a fiftieth of the width as points stand there already.
            close = sum(abs(math.log(x / other)) < 0.02 for other in seen)
            seen.append(x)
            ink_ = look[row["variant"]]
            if log:
                x *= max(high / low, 2.0) ** (0.03 * close)
            low_error, high_error = (abs(row["mean"] - end) for end in row.get("interval", [row["mean"]] * 2))
            axes.errorbar(
                x, row["mean"], yerr=[[low_error], [high_error]], color=ink_.color, marker=ink_.marker, markersize=5,
                elinewidth=0.8,
            )  # fmt: skip
        axes.set(title=_label(summary, task), xlabel=label)
        if log:
            axes.set_xscale("log")
            ticks = _apart(sorted({x_of(row) for row in of_task}), max(high / low, 2.0) ** 0.2)
            axes.set_xticks(ticks, [_amount(tick) for tick in ticks])
            axes.minorticks_off()
        axes.margins(x=0.15)
        axes.grid(color=FAINT, linewidth=0.5)
        axes.set_axisbelow(True)
    return figure


def _apart(values: Sequence[float], factor: float) -> list[float]:
    """Those of the rising ``values`` that leave at least ``factor`` to the one before."""
    kept: list[float] = []
    for value in values:
        if not kept or value >= factor * kept[-1]:
            kept.append(value)
    return kept


def _amount(number: float) -> str:
    """1,234,567 as 1.2M."""
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{sign}"
    return f"{number:g}"


_SENSITIVITY = (
    "The line and the filled marks are values on validation rows, the hollow ones on test rows of the same runs, a mark for each seed; the line "
    "joins the seeds that chose. Dotted: the chosen value. Grey: {reference}. A cross on the axis: a run that diverged."
)


def _sensitivity(Figure: Any, summary: Summary, look: Mapping[str, Ink], task: str) -> Any:
    variants: dict[str, tuple[str, list[Any]]] = {}
    for variant in look:
        key = _searched(summary, task, variant)
        cells = [
            cell for cell in summary["cells"] if (cell["tags"]["task"], cell["tags"]["variant"]) == (task, variant)
        ]
        if key is not None:
            cells = [cell for cell in cells if is_number(cell["tags"].get(key))]
            if len({cell["tags"][key] for cell in cells}) > 1:
                variants[variant] = key, cells
    if not variants:
        return None
    facts = summary["tasks"].get(task, {})
    metric = facts.get("chosen_by")
    if metric is None:
        return None
    figure = Figure(layout="constrained")
    rows = {row["variant"]: row for row in summary["rows"] if row["task"] == task}
    reference = summary.get("reference")
    every = _panels(figure, len(variants), height=1.75, sharex=True, sharey=True)
    columns = _columns(len(variants), legend=False)
    for number, (axes, (variant, (key, cells))) in enumerate(zip(every, variants.items(), strict=True)):
        if reference in variants and variant != reference and variants[reference][0] == key:
            axes.plot(*_line(summary, key, variants[reference][1], metric), color="#9A9A9A", linewidth=1)
        ink_ = look[variant]
        done = [cell for cell in cells if is_number(cell.get("metrics", {}).get(metric))]
        axes.plot(*_line(summary, key, cells, metric), color=ink_.color, linewidth=1.6)
        axes.plot(
            [cell["tags"][key] for cell in done], [cell["metrics"][metric] for cell in done], marker=ink_.marker,
            linestyle="", markersize=4, color=ink_.color,
        )  # fmt: skip
        tested = [cell for cell in done if is_number(cell.get("test", {}).get(metric))]
        axes.plot(
            [cell["tags"][key] for cell in tested], [cell["test"][metric] for cell in tested], marker=ink_.marker,
            linestyle="", markersize=5, color=ink_.color, markerfacecolor="none", markeredgewidth=0.7, alpha=0.8,
        )  # fmt: skip
        lost = [cell["tags"][key] for cell in cells if cell["status"] == "diverged"]
        crosses = axes.plot(
            lost, [0.04] * len(lost), "x", color=DIVERGED, markersize=6, markeredgewidth=1.6, clip_on=False,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
        for cross in crosses:
            cross.set_in_layout(False)
        if variant in rows and key in rows[variant].get("values", {}):
            axes.axvline(rows[variant]["values"][key], color=INK, linestyle=":", linewidth=0.9)
        axes.set(title=variant, xscale="log" if min(cell["tags"][key] for cell in cells) > 0 else "linear")
        axes.minorticks_off()
        axes.grid(color=FAINT, linewidth=0.5)
        axes.set_axisbelow(True)
        if number % columns == 0:
            axes.set_ylabel(metric)
        if number + columns >= len(variants):  # the lowest of its column
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(key.rpartition(".")[2].replace("_", " "))
    return figure


def _searched(summary: Summary, task: str, variant: str) -> str | None:
    """The key that a sensitivity plot has on its axis: the only one of the search, or the learning rate among several."""
    study = summary["study"]
    for own in (study["variants"][variant], study["tasks"][task]):
        if "search" in own:
            keys = list(own["search"])
            break
    else:
        keys = list(study["search"] or study["space"])
    if "train.learning_rate" in keys:
        return "train.learning_rate"
    return keys[0] if len(keys) == 1 else None


def _line(
    summary: Summary, key: str, cells: Sequence[Mapping[str, Any]], metric: str
) -> tuple[list[float], list[float]]:
    """Mean over the seeds that chose, by search value; broken nowhere, since a diverged run has no value to break at."""
    seeds = summary["study"]["seeds"][: summary["study"]["search_seeds"]]
    found: dict[float, list[float]] = {}
    for cell in cells:
        value = cell.get("metrics", {}).get(metric)
        if cell["tags"]["seed"] in seeds and is_number(value):
            found.setdefault(cell["tags"][key], []).append(value)
    points = sorted((x, sum(values) / len(values)) for x, values in found.items())
    return [x for x, _ in points], [y for _, y in points]


_SETTINGS = (
    "Variants that differ in one number, mean over seeds with its 95 % interval; dashed lines are other variants."
)


def _by_setting(Figure: Any, summary: Summary, look: Mapping[str, Ink]) -> Any:
    key, swept = _swept(summary["study"]["variants"])
    rows = [row for row in summary["rows"] if row["mean"] is not None]
    tasks = _tasks([row for row in rows if row["variant"] in swept])
    if key is None or not tasks:
        return None
    others = [name for name in look if name not in swept and any(row["variant"] == name for row in rows)]
    if len(others) > 4:  # too many lines to tell apart
        others = [name for name in others if name == summary.get("reference")]
    figure = Figure(layout="constrained")
    legend = _handles(look, others, linestyle="--", marker="", linewidth=1)
    for axes, task in zip(_panels(figure, len(tasks), height=2.3, legend=legend), tasks, strict=True):
        of_task = {row["variant"]: row for row in rows if row["task"] == task}
        points = sorted((swept[name], row) for name, row in of_task.items() if name in swept)
        x, means = [value for value, _ in points], [row["mean"] for _, row in points]
        ends = [row.get("interval", [row["mean"]] * 2) for _, row in points]
        axes.plot(x, means, "o-", color=PALETTE[0], markersize=4)
        axes.fill_between(
            x, [low for low, _ in ends], [high for _, high in ends], color=PALETTE[0], alpha=0.15, linewidth=0
        )
        for name in others:
            if name in of_task:
                axes.axhline(of_task[name]["mean"], color=look[name].color, linestyle="--", linewidth=1)
        axes.set(title=_label(summary, task), xlabel=key)
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.grid(color=FAINT, linewidth=0.5)
        axes.set_axisbelow(True)
    return figure


def _swept(variants: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, dict[str, float]]:
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


_LOSS = (
    "Loss on the training batches at each variant's best value, the mean over seeds, smoothed over neighbouring steps."
)


def _losses(Figure: Any, summary: Summary, look: Mapping[str, Ink]) -> Any:
    curves = [curve for curve in summary["curves"] if len(curve["steps"]) > 2]
    tasks = _tasks(curves)
    if not curves:
        return None
    figure = Figure(layout="constrained")
    legend = _handles(look, [name for name in look if any(curve["variant"] == name for curve in curves)])
    for axes, task in zip(_panels(figure, len(tasks), height=2.3, legend=legend), tasks, strict=True):
        for curve in (curve for curve in curves if curve["task"] == task):
            own = look[curve["variant"]]
            axes.plot(
                curve["steps"], curve["loss"], color=own.color, linewidth=own.width, marker=own.marker, markersize=3,
                markevery=max(1, len(curve["steps"]) // 6),
            )  # fmt: skip
        axes.set(title=task, xlabel="step")
        axes.grid(color=FAINT, linewidth=0.5)
        axes.set_axisbelow(True)
    figure.axes[0].set_ylabel("training loss")
    return figure

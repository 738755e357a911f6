"""The plots of a study as pictures: what `duallora.grid.figures` describes, drawn as report.js draws it, and the ranks.

A picture has no button that would show outliers, so none is left out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from duallora.grid import figures
from duallora.plots import FAINT, GROUND, INK

Inks = Mapping[str, Mapping[str, Any]]

WIDTH = 9.2  # inches, of every figure
COLUMNS = 4  # panels beside each other
DIVERGED = "#C62828"
MARKERS = dict(zip(figures.SYMBOLS, "os^DvPX*hp", strict=True))
PLAIN = {"color": "#9A9A9A", "symbol": "circle", "width": 1.0}  # of lines that are no variant's

BESIDE = {  # what pictures have besides
    "tradeoff": " Equal counts of parameters are drawn side by side.",
    "sensitivity": " Grey: {reference}.",
}
RANKS = (
    "Means over the adapted layers of the first seed's chosen run. Bar: effective rank; mark: rank at float32's tolerance. On the data: "
    "of dW C^(1/2), C the second moment of the layer's inputs on held-out rows."
)


class Plot(NamedTuple):
    """A figure with what it shows; ``name`` ends its file's name."""

    name: str
    title: str
    caption: str
    figure: Any


def draw(summary: figures.Summary, Figure: Any, parts: Collection[str] | None = None) -> Iterator[Plot]:
    """Every plot that the summary has the numbers for, or those that ``parts`` name as a page's marks do ("plot_loss").

    ``Figure`` is the class to draw with (`duallora.plots.figures`).
    """
    inks, reference = {ink["name"]: ink for ink in figures.inks(summary)}, summary.get("reference")
    for plot in figures.figures(summary):
        caption = plot["caption"] + BESIDE.get(plot["name"], "").format(reference=reference)
        for name in dict.fromkeys(view["part"] for view in plot["views"]):
            if parts is not None and f"plot_{name}" not in parts:
                continue
            views = [view for view in plot["views"] if view["part"] == name]
            if several := plot["name"] == "sensitivity":
                views = [own for view in views for own in _by_variant(view, reference)]
            figure = Figure(layout="constrained")
            _draw(figure, views, inks, several)
            about = name.removeprefix(f"{plot['name']}-")
            title = plot["title"] if about == plot["name"] else f"{plot['title']}: {about}"
            yield Plot(name, title, caption, figure)
    if summary.get("ranks") and (parts is None or "plot_ranks" in parts):
        figure = Figure(layout="constrained")
        _ranks(figure, summary["ranks"], inks)
        yield Plot("ranks", "Ranks of the update", RANKS, figure)


def _by_variant(view: figures.View, reference: str | None) -> Iterator[figures.View]:
    """A view of each variant, with the reference's line in grey behind."""
    behind = [line for line in view["lines"] if line["variant"] == reference and line["mode"] == "lines"]
    for variant in dict.fromkeys(line["variant"] for line in view["lines"]):
        own = [line for line in view["lines"] if line["variant"] == variant]
        grey = [{**line, "variant": None} for line in behind if variant != reference]
        yield {**view, "title": variant, "lines": grey + own}


def _draw(figure: Any, views: Sequence[figures.View], inks: Inks, several: bool) -> None:
    """``several``: on the same axes."""
    lines = [line for view in views for line in view["lines"]]
    named = not views[0]["y"]  # the lines' names stand on the axis
    rows = len({y for line in lines for y in line["y"]})
    height = 0.9 + 0.2 * rows if named else 1.75 if several else 2.3
    legend = not named and not several
    alike = several and len({view["x"] for view in views}) == 1
    columns = _columns(len(views), legend)
    panels = _panels(figure, len(views), height, legend, sharex=alike, sharey=several or named)
    for number, (axes, view) in enumerate(zip(panels, views, strict=True)):
        _panel(axes, _side_by_side(view) if view["part"] == "parameters" else view, inks)
        if named:
            axes.tick_params(axis="y", length=0)
            axes.set_ylim(-0.6, rows - 0.4)
        if view.get("logx"):
            _ticks(axes, [x for line in (lines if alike else view["lines"]) for x in line["x"]])
        if number % columns == 0 and view["y"] not in view["title"]:
            axes.set_ylabel(view["y"])
        if not alike or number + columns >= len(views):  # the lowest of its column
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(view["x"])
    if legend:
        labeled = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels]
        handles = [*{label: handle for one in labeled for handle, label in one}.values()]
        place = figure.axes[len(views)]
        place.legend(handles=handles, loc="center left", frameon=False, ncols=1 + (len(handles) > 12))


def _panel(axes: Any, view: figures.View, inks: Inks) -> None:
    """The lines of a view and what belongs to its axes."""
    bare = all(line["mode"] == "lines" for line in view["lines"])  # no points that tell the lines apart
    for line in view["lines"]:
        ink, xs, ys = inks.get(line["variant"], PLAIN), line["x"], line["y"]
        own = {"color": ink["color"], "marker": MARKERS[ink["symbol"]], "label": line.get("name", line["variant"])}
        if line["mode"] == "lost":
            low = axes.get_xaxis_transform()
            cross = {"linestyle": "", "marker": "x", "markersize": 6, "markeredgewidth": 1.6, "clip_on": False}
            axes.plot(xs, [0.04] * len(xs), color=DIVERGED, transform=low, **cross)[0].set_in_layout(False)
        elif line["mode"] == "chosen":
            axes.axvline(*xs, color=INK, linestyle=":", linewidth=0.9)
        elif line["mode"] == "lines":
            own |= {"markersize": 3, "markevery": max(1, len(xs) // 6)} if bare else {"marker": ""}
            own |= {"linewidth": 3.2, "alpha": 0.55} if line.get("wide") else {"linewidth": ink["width"]}
            axes.plot(xs, ys, linestyle="--" if line.get("dash") else "-", **own)
        else:
            if "spread" in line:
                (x,), (y,), (less, more) = xs, ys, line["spread"]
                ends = ([x - less, x + more], [y, y]) if line["along"] == "x" else ([x, x], [y - less, y + more])
                axes.plot(*ends, color=ink["color"], linewidth=0.9)
            hollow = {"markersize": 5.5, "markerfacecolor": GROUND, "zorder": 2.5}
            how = {"markersize": 4.5, "zorder": 3} if line.get("filled", True) else hollow
            axes.plot(xs, ys, linestyle="", **own, **how)
    if view.get("turned"):
        axes.invert_xaxis()
    if view.get("zero"):
        axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
    _ground(axes, "both" if view["y"] else "x", title=view["title"])


def _side_by_side(view: figures.View) -> figures.View:
    """Points of equal x so many steps of a thirtieth of the width to the right as stand there already; a front meets them."""
    points = [line for line in view["lines"] if "spread" in line]
    xs = [line["x"][0] for line in points]
    step = max(max(xs) / min(xs), 2.0) ** 0.03
    places = [x * step ** sum(abs(math.log(x / y)) < 0.02 for y in xs[:at]) for at, x in enumerate(xs)]
    lines = [{**line, "x": [place]} for line, place in zip(points, places, strict=True)]
    moved = {(x, line["y"][0]): line["x"] for x, line in zip(reversed(xs), reversed(lines), strict=True)}
    for front in (line for line in view["lines"] if "spread" not in line):
        lines.append({**front, "x": [moved[point][0] for point in zip(front["x"], front["y"], strict=True)]})
    return {**view, "lines": lines}


def _columns(count: int, legend: bool) -> int:
    """Panels beside each other, so that no last row holds one alone and a legend finds a free place after the last."""
    if legend:
        return count + 1 if count < COLUMNS else 3 if count in (4, 5, 8) else COLUMNS
    return min(count, 3 if count in (5, 6, 9) else COLUMNS)


def _panels(figure: Any, count: int, height: float, legend: bool = False, **options: Any) -> list[Any]:
    """Axes in rows ``height`` inches high; a legend has a place after the last."""
    columns = _columns(count, legend)
    rows = math.ceil((count + legend) / columns)
    figure.set_size_inches(WIDTH, rows * height)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for spare in axes[count:]:
        spare.set_axis_off()
    return axes[:count]


def _ground(axes: Any, along: str = "both", **labels: Any) -> None:
    """Faint lines behind what is drawn, and its words."""
    axes.set(**labels)
    axes.grid(axis=along, color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)


def _ranks(figure: Any, rows: Sequence[Mapping[str, Any]], inks: Inks) -> None:
    tasks = figures.tasks_of(rows)
    for axes, task in zip(_panels(figure, len(tasks), height=2.6), tasks, strict=True):
        own = figures.of_task(rows, task)
        places = range(len(own), 0, -1)
        axes.barh(
            places,
            [row["effective_rank"] for row in own],
            color=[inks[row["variant"]]["color"] for row in own],
            height=0.6,
        )
        axes.plot([row["rank_float32"] for row in own], places, "k|", markersize=10)
        axes.set_yticks(places, [f"{row['variant']}: {row['matrix']}" for row in own])
        axes.set(xscale="log", xlim=(1, None))
        _ground(axes, "x", title=task, xlabel="rank")


def _ticks(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with ticks at the values, but for those that would touch the one before."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value >= kept[-1] * (max(values) / min(values)) ** 0.2:
            kept.append(value)
    axes.set_xscale("log")
    axes.set_xticks(kept, [_amount(value) for value in kept])
    axes.minorticks_off()


def _amount(number: float) -> str:
    """1,234,567 as 1.2M."""
    units = {1e9: "G", 1e6: "M", 1e3: "k"}
    return next((f"{number / unit:.3g}{sign}" for unit, sign in units.items() if number >= unit), f"{number:g}")

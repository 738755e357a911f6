"""Plots of analyzed adapters, in the style of the benchmarks'."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duallora.analysis.flips import overall
from duallora.plots import PALETTE, figures, save

MATRICES = {
    "magnitude": "ReLU(B A): which entries move",
    "direction": "Sign(D C): up or down",
    "dW": "dW, their product",
}
TURNED, STRETCHED = "DeltaD: how far the rows turned, 1 - cos", "DeltaM: how much their lengths changed"
Row = Mapping[str, Any]


def draw(tables: Mapping[str, Sequence[Row]], folder: Path) -> list[Path]:
    """Draws each table of `analyze.analyze` that there is; ConfigError where matplotlib is absent."""
    drawers = {"flips": _flips, "rank": _rank, "dynamics": _dynamics}
    with figures() as Figure:
        drawn = {name: drawers[name](Figure(layout="constrained"), rows) for name, rows in tables.items()}
        return [save(figure, folder / f"{name}.svg") for name, figure in drawn.items() if figure is not None]


def _sources(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {
        label: [row for row in rows if row["source"] == label] for label in dict.fromkeys(row["source"] for row in rows)
    }


def _kinds(sources: Mapping[str, Sequence[Row]]) -> list[str]:
    """The kinds of modules that every source has, to compare them by; all, where there is none."""
    own = [dict.fromkeys(row["module"] for row in of) for of in sources.values()]
    every = list(dict.fromkeys(itertools.chain(*own)))
    return [kind for kind in every if all(kind in kinds for kinds in own)] or every


def _flips(figure: Any, rows: Sequence[Row]) -> Any:
    """Share of signs flipped since the start and share of open entries, by step; None for single states."""
    courses = {label: overall([dict(row) for row in of]) for label, of in _sources(rows).items()}
    if all(len(course) < 2 for course in courses.values()):
        return None
    figure.set_size_inches(7.2, 2.6)
    left, right = figure.subplots(1, 2)
    for number, (label, course) in enumerate(courses.items()):
        style: Any = {"color": PALETTE[number % len(PALETTE)], "markersize": 3, "linewidth": 1.3, "label": label}
        steps = [row["step"] for row in course]
        left.plot(steps, [row.get("flipped_open", 0.0) for row in course], "o-", **style)
        right.plot(steps, [row["open"] for row in course], "o-", **style)
    left.set(xlabel="step", title="open entries whose sign has flipped since the first state", ylim=(0, None))
    right.set(xlabel="step", title="entries that ReLU(B A) lets through", ylim=(0, 1.02))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _rank(figure: Any, rows: Sequence[Row]) -> Any:
    """Over min(out, in), of each layer: above the effective rank, at the first and the last state; below the rank at the last,
    at two tolerances. A column a source; in it the kinds of modules side by side, each from the input on.
    """
    sources = _sources(rows)
    kinds = _kinds(sources)
    figure.set_size_inches(max(4.6, 2.0 * len(sources) + 0.6), 4.8)
    panels, ranks = figure.subplots(2, len(sources), squeeze=False, sharey=True, sharex="col")
    named: dict[str, Any] = {}  # of LoRA there is dW alone
    for upper, lower, (label, of) in zip(panels, ranks, sources.items(), strict=True):
        steps = sorted({row["step"] for row in of})
        drawn = [(upper, "effective_rank", step, "-" if step == steps[-1] else ":") for step in steps]
        drawn += [(lower, "rank", steps[-1], "--"), (lower, "rank_float32", steps[-1], "-")]
        for (color, matrix), (axes, name, step, dash) in itertools.product(zip(PALETTE, MATRICES, strict=False), drawn):
            start, middles = 0, {}
            for kind in kinds:
                those = [row for row in of if (row["module"], row["matrix"], row["step"]) == (kind, matrix, step)]
                if those:
                    shares = [row[name] / min(row["out"], row["in"]) for row in those]
                    places = range(start, start + len(those))
                    (named[MATRICES[matrix]],) = axes.plot(places, shares, dash, color=color, linewidth=1.2)
                    middles[start + (len(those) - 1) / 2] = kind
                    start += len(those) + 1
            if middles:
                lower.set_xticks([*middles], middles.values(), rotation=45 if len(middles) > 3 else 0)
        upper.set(title=label, ylim=(0, 1.02))
        lower.tick_params(axis="x", length=0)
        lower.set(xlabel="layer, from the input on")
    panels[0].set_ylabel("effective rank,\nshare of the largest possible")
    ranks[0].set_ylabel("rank,\nshare of the largest possible")
    for axes, lines in (
        (panels[0], (("-", "last state"), (":", "first state"))),
        (ranks[0], (("-", "in float32"), ("--", "in float64"))),
    ):
        for dash, words in lines:
            axes.plot([], [], dash, color="#555555", linewidth=1.2, label=words)
        axes.legend(frameon=False, fontsize=6)
    order = [words for words in MATRICES.values() if words in named]
    figure.legend([named[w] for w in order], order, loc="outside lower center", ncols=1, frameon=False)
    return figure


def _dynamics(figure: Any, rows: Sequence[Row]) -> Any:
    """DeltaM over DeltaD, a point a layer and step, with the line of least squares: a row a module, a panel a source, on the
    row's own axes, so that sources can be compared, logarithmic where one reaches ten times as far as another; layers by color.
    """
    sources = _sources(rows)
    kinds = _kinds(sources)
    figure.set_size_inches(max(4.2, 2.0 * len(sources) + 0.6), 2.2 * len(kinds) + 0.4)
    grid = figure.subplots(len(kinds), len(sources), squeeze=False, sharex="row", sharey="row")
    most = max(
        sum(row["module"] == kind and row["step"] == step for row in of)
        for of in sources.values()
        for kind in kinds
        for step in {row["step"] for row in of}
    )
    reach = [max(row["direction"] for row in of if row["module"] in kinds) for of in sources.values()]
    scale = "log" if max(reach) > 10 * min(reach) > 0 else "linear"
    told = len({tuple(sorted({row["step"] for row in of})) for of in sources.values()}) > 1  # steps, in every panel
    points: Any = None
    for line, kind in zip(grid, kinds, strict=True):
        for axes, (label, of) in zip(line, sources.items(), strict=True):
            chosen_rows = [row for row in of if row["module"] == kind]
            steps = sorted({row["step"] for row in chosen_rows})
            for marker, step in zip("osv^D*PX" * (len(steps) // 8 + 1), steps, strict=False):
                chosen = [row for row in chosen_rows if row["step"] == step]
                turned, stretched = ([row[name] for row in chosen] for name in ("direction", "magnitude"))
                style: Any = {
                    "c": range(len(chosen)),
                    "cmap": "viridis",
                    "s": 9,
                    "clip_on": False,  # a third of the file
                    "linewidths": 0,
                    "vmin": 0,
                    "vmax": max(most - 1, 1),
                }
                points = axes.scatter(turned, stretched, marker=marker, label=step, **style)
            x, y = (np.array([row[name] for row in chosen_rows]) for name in ("direction", "magnitude"))
            if len(chosen_rows) > 2 and np.ptp(x) > 0:
                along = np.geomspace(x.min(), x.max()) if scale == "log" else np.array([x.min(), x.max()])
                axes.plot(along, np.polyval(np.polyfit(x, y, 1), along), color="#999999", linewidth=1)
            axes.set(title=f"{label}, {kind}", xscale=scale, yscale=scale)
            axes.minorticks_off()
            if scale == "linear":
                axes.ticklabel_format(style="sci", scilimits=(-2, 3))
            if len(steps) <= 6 and (told or axes is grid[0][0]):
                axes.legend(title="step", frameon=False, fontsize=6, title_fontsize=6)
    figure.supxlabel(TURNED, fontsize=8)
    figure.supylabel(STRETCHED, fontsize=8)
    if points is not None:
        figure.colorbar(points, ax=grid, label="layer, from the input on", shrink=min(1.0, 2.0 / len(kinds)))
    return figure

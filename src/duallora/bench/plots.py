"""Plots of the docs: time of a layer over its arithmetic floor, and a training step beside LoRA's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duallora import plots
from duallora.bench import methods
from duallora.bench.targets import Results, cells, ratio

COLOURS = {
    methods.EXACT: "#D55E00",
    methods.sampled(0.25): "#E69F00",
    methods.PLAIN: "#999999",
    methods.LORA: "#0072B2",
    methods.DORA: "#009E73",
    methods.FAST_DORA: "#56B4E9",
    methods.HIRA: "#CC79A7",
}  # of plots.PALETTE
FLOOR_COLOUR = "#000000"


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the plots whose results are there; ConfigError where matplotlib is absent."""
    with plots.figures() as Figure:
        figures = {
            "bench-layer.svg": layer(Figure(figsize=(6.6, 2.9), layout="constrained"), results),
            "bench-step.svg": step(Figure(figsize=(6.6, 3.2), layout="constrained"), results),
        }
        return [plots.save(figure, folder / name) for name, figure in figures.items() if figure is not None]


def layer(figure: Any, results: Results) -> Any:
    """Time over the three products by width, n = 2048, r = 16; one panel a dtype. None without such cells."""
    found = [cell for _, cell in cells(results, "layer") if cell["cell"]["rank"] == 16]
    found = sorted((c for c in found if c["cell"]["tokens"] == 2048), key=lambda cell: cell["cell"]["width"])
    if not found:
        return None
    dtypes = [dtype for dtype in ("float32", "bfloat16") if any(c["cell"]["dtype"] == dtype for c in found)]
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        of = [cell for cell in found if cell["cell"]["dtype"] == dtype]
        for name, color in COLOURS.items():
            points = [(cell["cell"]["width"], ratio(cell, name, methods.FLOOR)) for cell in of]
            points = [(width, value) for width, value in points if value is not None]
            if points:
                bold = 2.2 if name == methods.EXACT else 1.1
                axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, linewidth=bold, label=name)
        axes.axhline(1, color=FLOOR_COLOUR, linestyle="--", linewidth=1, label="floor: three GEMMs")
        axes.set(xscale="log", xlabel="width (d = k)", title=f"{dtype}, 2048 tokens")
        axes.set_xticks([cell["cell"]["width"] for cell in of], [str(cell["cell"]["width"]) for cell in of])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("time / time of the three GEMMs")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def step(figure: Any, results: Results) -> Any:
    """Bars of time (fp32, bf16) and of peak memory (fp32) over LoRA's, with the floor of the time as a line."""
    found = {where: cell for where, cell in cells(results, "step") if where in ("fp32", "bf16")}
    if not found:
        return None
    panels: list[tuple[str, dict[str, float], float | None]] = []
    for where, cell in found.items():
        times = {name: ratio(cell, name, methods.LORA) or 0.0 for name in cell["methods"] if name != methods.FLOOR}
        panels.append((f"time / LoRA's, {where}", times, ratio(cell, methods.FLOOR, methods.LORA)))
    for where, cell in found.items():
        peaks = {name: one["peak_ratio_to_lora"] for name, one in cell["methods"].items() if "peak_bytes" in one}
        if peaks:
            peaks.pop(methods.FLOOR, None)
            panels.append((f"peak memory / LoRA's, {where}", peaks, None))
            break
    names = list(dict.fromkeys(name for _, values, _ in panels for name in values))[::-1]
    for axes, (title, values, floor) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        colors = [COLOURS.get(name, "#BBBBBB") for name in names]
        bars = axes.barh(names, [values.get(name, 0.0) for name in names], color=colors)
        axes.bar_label(bars, [f"{values[name]:.2f}" if name in values else "" for name in names], padding=2, fontsize=7)
        if floor is not None:
            axes.axvline(floor, color=FLOOR_COLOUR, linestyle="--", linewidth=1)
            axes.text(floor, len(names) - 0.4, "floor", ha="center", va="bottom", fontsize=7)
        axes.set_title(title, pad=12)
        axes.margins(x=0.15)
    return figure

"""The loss of a run as an SVG in its folder, by nothing that an install may lack, and as a line of a terminal."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[int, float]]

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 40, 40
BLOCKS = "▁▂▃▄▅▆▇█"
FAR = 6.0  # spans of the middle half above it, from which a loss is left out of the range
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#444}.grid{stroke:#ddd}path{fill:none;stroke-width:1.8}.train{stroke:#0072B2}"
    ".held{stroke:#D55E00;stroke-dasharray:5 3}circle{fill:#D55E00}svg{background:#fff}"
    "@media(prefers-color-scheme:dark){svg{background:#14171c}text{fill:#bbb}.grid{stroke:#333}}"
)


def svg(title: str, training: Points, validation: Points) -> str:
    """(step, loss) of the training batches and of the validation rows over steps; losses that are not finite break the line.

    A few losses far above the others are cut at the upper edge, and counted in the title.
    """
    losses = [loss for _, loss in (*training, *validation) if math.isfinite(loss)]
    if not losses:
        return ""
    low, high = min(losses), _top(losses)
    above = sum(loss > high for loss in losses)
    high = high if high > low else low + 1.0
    last = max(step for step, _ in (*training, *validation)) or 1

    def place(step: int, loss: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - (min(loss, high) - low) / (high - low))
        return f"{x:.1f},{y:.1f}"

    said = f"{title}: training (solid) and validation (dashed) loss" + (f", {above} above the edge" if above else "")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(said)}</title>'
    ]
    parts.append(f'<style>{STYLE}</style><text x="{LEFT}" y="22">{escape(said)}</text>')
    for number in range(5):
        value = low + (high - low) * number / 4
        y = place(0, value).split(",")[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        step = round(last * number / 4)
        x = place(step, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - 14}" text-anchor="middle">{step:,}</text>')
    parts += [
        f'<path class="{kind}" d="{_path(points, place)}"/>'
        for kind, points in (("train", training), ("held", validation))
    ]
    circles = (place(step, loss).split(",") for step, loss in validation if math.isfinite(loss))
    parts += [f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in circles]
    return "\n".join(parts) + "\n</svg>\n"


def line(losses: Sequence[float], width: int = 32) -> str:
    """The losses as a row of blocks, at most ``width``: the mean of as many each."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 2:
        return ""
    count = min(width, len(finite))
    borders = [round(len(finite) * at / count) for at in range(count + 1)]
    means = [statistics.fmean(finite[start:end]) for start, end in itertools.pairwise(borders)]
    low, high = min(means), _top(means)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((len(BLOCKS) - 1) * (min(mean, high) - low) / span)] for mean in means)


def _top(losses: Sequence[float]) -> float:
    """The greatest loss that does not stand far above the others."""
    if len(losses) < 5:
        return max(losses)
    low, _, high = statistics.quantiles(losses, n=4)
    inside = [loss for loss in losses if loss <= high + FAR * (high - low)]
    return max(inside) if high > low else max(losses)


def _path(points: Points, place) -> str:
    found, pen = [], "M"
    for step, loss in points:
        if math.isfinite(loss):
            found.append(pen + place(step, loss))
        pen = "L" if math.isfinite(loss) else "M"
    return " ".join(found)

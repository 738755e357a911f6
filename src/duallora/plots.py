"""How every plot of the project looks, and how it is written: SVG whose text stays text, with reproducible bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from duallora.errors import ConfigError
from duallora.store import record

# Okabe and Ito's palette: told apart with any color vision.
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
STYLE: dict[str, Any] = {
    "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "svg.hashsalt": "duallora", "svg.fonttype": "none",
}  # fmt: skip
# Stand for colors of the page until `svg` names them in CSS; on white they are what they look like.
INK, FAINT, GROUND = "#010203", "#d0d1d2", "#fefdfc"
_INLINE = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)


@contextmanager
def figures(*, inline: bool = False) -> Iterator[type]:
    """matplotlib's Figure, in the project's style; ``inline`` for figures that `svg` puts into a page.

    Raises:
        ConfigError: matplotlib is absent.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("the plots need matplotlib: pip install 'duallora[bench]', or --no-plots") from error
    from matplotlib.figure import Figure

    style: Any = STYLE | _INLINE if inline else STYLE
    with matplotlib.rc_context(style):
        yield Figure


def save(figure: Any, path: Path) -> Path:
    """Writes an SVG on white whose bytes depend on what is drawn alone."""
    record.write_text(path, _text(figure, facecolor="white"))
    return path


def svg(figure: Any) -> str:
    """An ``<svg>`` element for a page: its ink is that of the text around, its faint lines ``--faint``, its ground ``--card``."""
    text = _text(figure, facecolor="none", transparent=True)
    head, _, body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL).partition(">")
    text = re.sub(r" (?:width|height)=\"[^\"]*\"", "", head) + ">" + body  # as wide as the page has it
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", text))
    text = re.sub(r" id=\"([\w-]+)\"", lambda match: match[0] if match[1] in used else "", text)
    return text.replace(INK, "currentColor").replace(FAINT, "var(--faint)").replace(GROUND, "var(--card)")


def _text(figure: Any, **options: Any) -> str:
    beside = io.StringIO()
    figure.savefig(beside, format="svg", metadata={"Date": None}, **options)
    # matplotlib leaves blanks at the ends of lines, which changes in the repository would be made of.
    return "\n".join(line.rstrip() for line in beside.getvalue().splitlines()) + "\n"

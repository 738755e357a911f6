"""How every plot of the project looks, and how it is written: SVG whose text stays text, with reproducible bytes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
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
INK, FAINT, GROUND = "#010203", "#d0d1d2", "#fefdfc"


@contextmanager
def figures() -> Iterator[type]:
    """matplotlib's Figure, in the project's style.

    Raises:
        ConfigError: matplotlib is absent.
    """
    backend = os.environ.get("MPLBACKEND", "")
    named = backend.removeprefix("module://").partition(".")[0]
    if "matplotlib" not in sys.modules and "module://" in backend and named.isidentifier() and not find_spec(named):
        # A notebook of another environment sets it for all that it starts, and importing would fail.
        del os.environ["MPLBACKEND"]
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("the plots need matplotlib: pip install 'duallora[report]'") from error
    from matplotlib.figure import Figure

    style: Any = STYLE  # its keys are literals there
    with matplotlib.rc_context(style):
        yield Figure


def save(figure: Any, path: Path) -> Path:
    """Writes an SVG on white whose bytes depend on what is drawn alone."""
    record.write_text(path, _text(figure, facecolor="white"))
    return path


def _text(figure: Any, **options: Any) -> str:
    beside = io.StringIO()
    figure.savefig(beside, format="svg", metadata={"Date": None}, **options)
    # matplotlib leaves blanks at the ends of lines, which changes in the repository would be made of.
    return "\n".join(line.rstrip() for line in beside.getvalue().splitlines()) + "\n"

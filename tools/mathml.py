"""```math fences of the docs as MathML, which browsers show by themselves: no script, no font, no network.

mkdocs.yml names :func:`fence`; `make docs` puts this folder on the path. GitHub renders the same fences with its own means.
"""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def fence(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **kwargs: Any) -> str:
    """The element of one fence, as pymdownx.superfences asks for it."""
    return f'<div class="{css_class}" style="overflow: auto hidden; padding: .5em 0">{convert(source, display="block")}</div>'

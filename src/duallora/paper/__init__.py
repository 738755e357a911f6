"""The paper's tables and figures (arXiv 2512.03402) as studies: a file for each, a function of the scale in each file.

``scale="paper"`` is the paper's own models, data and protocol, as far as they can be known; ``scale="mini"`` is the same
comparison with a built-in model and local data, on two CPU cores. Each value says where it is from: the paper, a named
script, or "ours" where nobody printed it. docs/paper-tables.md tells how to run them.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Literal, get_args

from duallora.errors import ConfigError
from duallora.grid.study import Study

Scale = Literal["mini", "paper"]

# name on the command line -> (module of this package, whose function has the same name, and what it is)
HOME = {
    "table1": ("table1", "commonsense reasoning, LLaMA"),
    "table2": ("table2", "GLUE, RoBERTa and DeBERTa"),
    "table3": ("table3", "gradients of the sign"),
    "table4": ("table4", "E2E, GPT-2"),
    "table5": ("table5", "forms of the update"),
    "table6": ("table6", "functions on the magnitude"),
    "figure2": ("figure2", "shares of the two ranks"),
    "figure3": ("figure3", "rank of the update"),
    "gradient-start": ("gradient_start", "starts from data (ours)"),
    "ablations": ("ablations", "what the paper leaves open (ours)"),
    "binding": ("binding", "where capacity binds (ours)"),
    "start-values": ("start_values", "whether its start values do well elsewhere (ours)"),
    "capacity": ("capacity", "what each form of dW can hold (ours)"),
}


def studies(name: str, scale: str) -> tuple[Study, ...]:
    """The studies of a table or figure, one for each base model.

    Raises:
        ConfigError: no such table, scale, or scale of this one.
    """
    if name not in HOME:
        near = difflib.get_close_matches(name.lower(), HOME, n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown table {name!r}; nearest: {near}. Expected one of {', '.join(HOME)}")
    if scale not in get_args(Scale):
        raise ConfigError(f"--scale {scale!r}: expected {' or '.join(get_args(Scale))}")
    if scale == "paper" and HOME[name][1].endswith("(ours)"):
        raise ConfigError(f"{name} is ours, not the paper's: expected --scale mini, not paper")
    module = HOME[name][0]
    made = getattr(importlib.import_module(f"duallora.paper.{module}"), module)(scale)
    return (made,) if isinstance(made, Study) else tuple(made)

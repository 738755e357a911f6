"""The paper's tables and figures (arXiv 2512.03402) as studies, each a function of the scale.

``scale="paper"`` is the paper's own models, data and protocol, as far as they can be known; ``scale="mini"`` is the same
comparison with a built-in model and local data, on two CPU cores. Each value says where it is from: the paper, a named
script, or "ours" where nobody printed it. docs/paper-tables.md tells how to run them.
"""

from __future__ import annotations

import importlib
from typing import Literal, get_args

from duallora.errors import ConfigError, unknown
from duallora.grid.study import Study

Scale = Literal["mini", "paper"]

# name on the command line, which is that of a function -> (its module of this package, and what it is)
HOME = {
    "table1": ("table1", "commonsense reasoning, LLaMA"),
    "table2": ("table2", "GLUE, RoBERTa and DeBERTa"),
    "table3": ("ablations", "gradients of the sign"),
    "table4": ("table4", "E2E, GPT-2"),
    "table5": ("ablations", "forms of the update"),
    "table6": ("ablations", "functions on the magnitude"),
    "figure2": ("ablations", "shares of the two ranks"),
    "figure3": ("ablations", "rank of the update"),
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
        raise unknown("table", name, HOME)
    if scale not in get_args(Scale):
        raise ConfigError(f"--scale {scale!r}: expected {' or '.join(get_args(Scale))}")
    if scale == "paper" and HOME[name][1].endswith("(ours)"):
        raise ConfigError(f"{name} is ours, not the paper's: expected --scale mini, not paper")
    module = importlib.import_module(f"duallora.paper.{HOME[name][0]}")
    made = getattr(module, name.replace("-", "_"))(scale)
    return (made,) if isinstance(made, Study) else tuple(made)

"""Table 6: the function on the magnitude B A."""

from __future__ import annotations

from duallora.grid.study import Study
from duallora.paper.ablations import study


def table6(scale: str) -> Study:
    """ReLU, absolute value, sigmoid."""
    rank = 16 if scale == "paper" else 8  # 8: as Table 2's mini scale
    functions = ("relu", "abs", "sigmoid")
    return study(scale, "table6", {name: {"adapter.r": rank, "adapter.magnitude": name} for name in functions}, "relu")

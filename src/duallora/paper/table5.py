"""Table 5: other forms of the update.

Setting 1 leaves out ReLU, Setting 2 leaves out the sign, Setting 3 has fixed random signs. The paper gives the first two
r = 32, twice the parameters of the row they ablate; the rows at its own rank are ours. Setting 3 has one group, so r = 32
is as many parameters as r1 = r2 = 16.
"""

from __future__ import annotations

from typing import Any

from duallora.grid.study import Study
from duallora.paper.ablations import study


def table5(scale: str) -> Study:
    """The method and its three forms, at the paper's ranks and at equal parameters."""
    r = 16 if scale == "paper" else 8  # 8: as Table 2's mini scale
    forms: dict[str, dict[str, Any]] = {"duallora": {"adapter.r": r}}
    for label, rank in (("2r", 2 * r), ("r", r)):
        forms[f"setting1-{label}"] = {"adapter.r": rank, "adapter.magnitude": "identity"}
        # 0.02 is ours: D C scales dW here.
        forms[f"setting2-{label}"] = {
            "adapter.r": rank,
            "adapter.direction": "identity",
            "adapter.direction_init_std": 0.02,
        }
    for label, rank in (("2r", 2 * r), ("4r", 4 * r)):
        forms[f"setting3-{label}"] = {"adapter.r": rank, "adapter.direction": "fixed"}
    return study(scale, "table5", forms, "duallora", ["stsb"])

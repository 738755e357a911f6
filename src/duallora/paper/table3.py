"""Table 3: how the sign's gradient is estimated.

The paper prints 1.64 % here, which is r1 = r2 = 32, with the average it prints for r1 = r2 = 16 elsewhere; all three
have 16 here.
"""

from __future__ import annotations

from typing import Any

from duallora.grid.study import Study
from duallora.paper.ablations import study


def table3(scale: str) -> Study:
    """Straight through (Eq. 7), XNOR-Net's and DoReFa-Net's scaled signs."""
    rank = 16 if scale == "paper" else 8  # 8: as Table 2's mini scale
    variants: dict[str, dict[str, Any]] = {"ste": {"adapter.r": rank, "adapter.direction": "ste"}}
    # 0.02 is ours: |D C| scales their dW, which the default would start at next to nothing.
    for name in ("xnor", "dorefa"):
        variants[name] = {"adapter.r": rank, "adapter.direction": name, "adapter.direction_init_std": 0.02}
    return study(scale, "table3", variants, "ste")

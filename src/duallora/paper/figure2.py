"""Figure 2: how the parameters are shared out between the two groups, r1 + r2 fixed.

alpha stays where it is, and the scale is alpha / sqrt(r1 r2) as the paper writes it: 2 at 16 and 16, 4.13 at 2 and 30.
"""

from __future__ import annotations

from typing import Any

from duallora.grid.study import Study
from duallora.paper.ablations import study


def figure2(scale: str) -> Study:
    """r1 from 2 to 30 of 32 (the paper's range; the steps are ours); mini: of 16."""
    total = 32 if scale == "paper" else 16
    first = (2, 4, 8, 12, 16, 20, 24, 28, 30) if scale == "paper" else (1, 2, 4, 8, 12, 14, 15)
    shares: dict[str, dict[str, Any]] = {
        f"r1-{r1}": {"adapter.r1": r1, "adapter.r2": total - r1, "adapter.alpha": float(total)} for r1 in first
    }
    return study(scale, "figure2", shares, f"r1-{total // 2}", ["stsb"])

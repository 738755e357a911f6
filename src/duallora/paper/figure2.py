"""Figure 2: how the parameters are shared out between the two groups, r1 + r2 fixed, beside LoRA, DoRA and HiRA of that rank.

The paper: LLaMA3-8B, r1 = 2, 4, ..., 30 of 32, and the claim that Dual LoRA does better than those three from 6 % to 94 %
of the parameters in the magnitude, which are its first and its last ratio. alpha stays where it is, and the scale is
alpha / sqrt(r1 r2) as the paper writes it: 2 at 16 and 16, 4.13 at 2 and 30.
"""

from __future__ import annotations

from typing import Any

from duallora.grid.study import Study
from duallora.paper.ablations import study


def figure2(scale: str) -> Study:
    """The paper's fifteen ratios and three lines; mini: seven ratios of 16, and the same lines."""
    total = 32 if scale == "paper" else 16
    first = range(2, 31, 2) if scale == "paper" else (1, 2, 4, 8, 12, 14, 15)
    shares: dict[str, dict[str, Any]] = {
        f"r1-{r1}": {"adapter.r1": r1, "adapter.r2": total - r1, "adapter.alpha": float(total)} for r1 in first
    }
    lines = [(name, total) for name in ("lora", "dora", "hira")]
    return study(scale, "figure2", shares, f"r1-{total // 2}", ["stsb"], "llama3-8b", lines)

"""Figure 3: the rank of ReLU(B A), of Sign(D C) and of dW after training.

The study trains; `duallora analyze` measures, on the factors in float64. Which ranks r the paper looks at is not known to
us: those here are ours. Full rank is there at the start already, so the figure tells of the form more than of learning.
"""

from __future__ import annotations

from duallora.grid.study import Study
from duallora.paper.ablations import study


def figure3(scale: str) -> Study:
    """Dual LoRA at five ranks."""
    ranks = (1, 2, 4, 8, 16)
    return study(scale, "figure3", {f"duallora-r{rank}": {"adapter.r": rank} for rank in ranks}, "duallora-r16")

"""Figure 3: the rank of ReLU(B A), of Sign(D C) and of dW after training, beside LoRA's.

The paper: LLaMA2-7B. `duallora reproduce` ends with the ranks of the chosen runs (`ranks.py`), that of dW on held-out data among
them, and `duallora analyze` draws them by layer, both at float32's and at float64's tolerance: at the latter almost every such matrix is
full, at the former the paper's order shows. Full rank is there at the start already, so the figure tells of the form more than of
learning.
"""

from __future__ import annotations

from duallora.grid.study import Study
from duallora.paper.ablations import study


def figure3(scale: str) -> Study:
    """LoRA and Dual LoRA with as many parameters, of Table 1's ranks (mini: Table 2's)."""
    r = 16 if scale == "paper" else 8
    label = f"duallora-r{r}"
    return study(scale, "figure3", {label: {"adapter.r": r}}, label, model="llama2-7b", beside=[("lora", 2 * r)])

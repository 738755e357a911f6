"""What the paper prints (arXiv 2512.03402, Tables 1 to 6), row by row, beside the variant of a study that answers it.

The files in ``paper/`` hold the numbers as printed, misprints included; corrections and origins are notes here.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

FILES = {
    1: "table1_commonsense.csv", 2: "table2_glue.csv", 3: "table3_sign_estimators.csv", 4: "table4_e2e.csv",
    5: "table5_update_forms.csv", 6: "table6_activations.csv",
}  # fmt: skip

# The paper's names -> ours of duallora.methods.
METHODS = {
    "FFT": "full", "LoRA": "lora", "LoRA+": "lora+", "DoRA": "dora", "HiRA": "hira", "RandLoRA": "randlora",
    "VeRA": "vera", "CorDA": "corda", "Delta-LoRA": "delta-lora", "GaLore": "galore", "GaRare": "garare",
    "Adapter-P": "adapter-p", "Adapter-L": "adapter-l", "Prefix": "prefix", "Dual LoRA": "duallora",
}  # fmt: skip

# Rows named by what they change (Tables 3, 5, 6) -> variant.
ABLATIONS = {
    "STE (ours)": "ste", "XNOR-Net": "xnor", "Dorefa-Net": "dorefa",
    "Dual LoRA(r=16)": "duallora", "Setting 1(r=32)": "setting1-2r", "Setting 2(r=32)": "setting2-2r",
    "Setting 3(r=32)": "setting3-2r", "Setting 3(r=64)": "setting3-4r",
    "ReLU (ours)": "relu", "Abs": "abs", "Sigmoid": "sigmoid",
}  # fmt: skip

_LLM_ADAPTERS = "copied from LLM-Adapters' README (loss on prompt and answer)"
_DORA = "copied from DoRA's README (loss on prompt and answer, one run)"
_HIRA = "copied from HiRA's Table 1"
_OTHER_GLUE = "copied; another protocol: other modules, ten epochs, no MNLI start"

# (table, model, method, rank) -> where the row was found printed before; rank "" is every one.
SOURCES = {
    (1, "LLaMA-7B", "Adapter-P", ""): _LLM_ADAPTERS,
    (1, "LLaMA-7B", "LoRA", "32"): _DORA,
    (1, "LLaMA-7B", "DoRA", "32"): _DORA,
    (1, "LLaMA-7B", "DoRA", "64"): _DORA,
    (1, "LLaMA2-7B", "DoRA", "16"): _DORA,
    (1, "LLaMA2-7B", "DoRA", "32"): _DORA,
    (1, "LLaMA3-8B", "DoRA", "16"): _DORA,
    (1, "LLaMA3-8B", "DoRA", "32"): _DORA,
    (1, "LLaMA2-7B", "HiRA", "32"): _HIRA,
    (1, "LLaMA3-8B", "HiRA", "32"): _HIRA,
    **{(2, f"RoBERTa-{size}", name, ""): _OTHER_GLUE for size in ("base", "large") for name in ("VeRA", "RandLoRA")},
    (2, "RoBERTa-base", "CorDA", "128"): f"{_OTHER_GLUE}, all linear layers",
}

_STE = "1.64 % is r1 = r2 = 32, yet the average is that of r1 = r2 = 16 (0.83 %) in Tables 1, 5, 6"
_HALF = "1.64 % is r1 = r2 = 32; the variant here has 16"
_TWICE = "twice the parameters of the row it ablates"

# (table, model, method, rank) -> what is wrong with the row. Columns as printed are kept.
NOTES = {
    (1, "LLaMA3-8B", "DoRA", "16"): "0.35 % is a misprint of 0.36",
    (2, "RoBERTa-base", "LoRA", "8"): "RTE 92.0 contradicts the average 86.1, which needs 82.4: a misprint",
    (2, "RoBERTa-base", "GaLore", "8"): "the figures average 86.1, not 85.9; MRPC is F1 (its author in an issue)",
    (2, "RoBERTa-base", "GaRare", "8"): "MRPC is F1, as GaLore's",
    (2, "RoBERTa-large", "GaLore", "16"): "MRPC is F1 (its author in an issue)",
    (2, "RoBERTa-large", "GaRare", "16"): "MRPC is F1, as GaLore's",
    (2, "RoBERTa-base", "VeRA", ""): "no rank of its scripts gives 0.3 M: r = 1024 has 0.16",
    (2, "DeBERTa-XXL", "DoRA", "32"): "9.4 M is LoRA's count; DoRA's lengths come on top: 9.6 M",
    (3, "", "STE (ours)", ""): _STE,
    (3, "", "XNOR-Net", ""): _HALF,
    (3, "", "Dorefa-Net", ""): _HALF,
    (5, "", "Setting 1(r=32)", ""): _TWICE,
    (5, "", "Setting 2(r=32)", ""): _TWICE,
    (5, "", "Setting 3(r=32)", ""): "0.84 % is DoRA's; one group of r = 32 is 0.83",
}
_INHERITED = "the count is inherited from the LoRA paper; no set of modules gives it"


@dataclass(frozen=True)
class Row:
    """One printed line. ``trainable`` is in percent (Tables 1, 3, 5) or millions (2, 4); values are by column."""

    table: int
    model: str
    method: str
    rank: int | None
    variant: str
    trainable: float | None
    values: dict[str, float] = field(default_factory=dict)
    copied: str = ""
    note: str = ""


def variant(method: str, rank: int | None) -> str:
    """The label of a method's variant in every study of ours: ``lora-r32``; ``full`` where no rank is printed."""
    name = METHODS.get(method, method)
    return name if rank is None else f"{name}-r{rank}"


@cache
def rows(table: int) -> tuple[Row, ...]:
    """The lines of a table, in the paper's order."""
    with (Path(__file__).parent / "tables" / FILES[table]).open(encoding="utf-8", newline="") as file:
        return tuple(_row(table, line) for line in csv.DictReader(file))


def _row(table: int, line: dict[str, str]) -> Row:
    model = line.pop("model", "")
    method = next(line.pop(name) for name in ("method", "estimator", "form", "activation") if name in line)
    rank = line.pop("rank", "")
    trainable = line.pop("trainable_percent", "") or line.pop("trainable_millions", "")
    key, any_rank = (table, model, method, rank), (table, model, method, "")
    note = NOTES.get(key, "")
    if table == 4 and method not in ("FFT", "Adapter-L"):
        note = _INHERITED
    return Row(
        table=table,
        model=model,
        method=method,
        rank=int(rank) if rank else None,
        variant=ABLATIONS[method] if method in ABLATIONS else variant(method, int(rank) if rank else None),
        trainable=float(trainable) if trainable else None,
        values={column: float(value) for column, value in line.items() if value},
        copied=SOURCES.get(key) or SOURCES.get(any_rank, ""),
        note=note,
    )

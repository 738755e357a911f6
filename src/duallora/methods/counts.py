"""Trainable parameters of the methods in the paper's Tables 1, 2 and 4, counted on models without weights.

A percentage is n / (base + n), as PEFT prints it. Heads of classifiers are not counted, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from duallora.methods import MethodSpec, apply, trained


class Row(NamedTuple):
    """One line of a table: the spec that makes it, and what the paper prints (percent, or millions)."""

    table: int
    model: str  # a name of duallora.plan's table of architectures
    method: str
    spec: MethodSpec
    printed: str
    note: str = ""


@dataclass(frozen=True)
class Count:
    """Trainable parameters beside those of the base model."""

    trainable: int
    base: int

    @property
    def percent(self) -> float:
        """n / (base + n), in percent."""
        return 100 * self.trainable / (self.base + self.trainable)

    def shown(self, row: Row) -> str:
        """In the paper's unit, percent in Table 1 and millions in the others, with its digits."""
        digits = len(row.printed.partition(".")[2])
        return f"{self.percent if row.table == 1 else self.trainable / 1e6:.{digits}f}"

    def agrees(self, row: Row) -> bool:
        """Whether the paper's figure is ours, rounded."""
        return float(self.shown(row)) == float(row.printed)


def count(config: Any, spec: MethodSpec) -> Count:
    """Parameters of ``spec`` on the model of a transformers config, on the meta device."""
    causal = config.model_type in ("llama", "gpt2", "mistral", "qwen2")
    factory: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = factory.from_config(config)
    base = sum(p.numel() for p in model.parameters())
    number = sum(p.numel() for p in trained(apply(model, spec).model))
    return Count(number, 0 if spec.name == "full" else base)


def _spec(name: str, r: int | None, targets: Any, **options: Any) -> MethodSpec:
    return MethodSpec(name, r=r, target_modules=targets, task_type=None, options=options)


ALL = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
_TABLE_1 = {
    "llama-7b": [("lora", 32, ".83"), ("dora", 32, ".84"), ("dora", 64, "1.65"), ("duallora", 16, ".83")],
    "llama-13b": [("lora", 32, ".67"), ("dora", 16, ".35"), ("dora", 32, ".68"), ("duallora", 16, ".67")],
    "llama-2-7b": [
        ("lora", 16, ".41"), ("lora", 32, ".83"), ("dora", 16, ".43"), ("dora", 32, ".84"), ("hira", 32, ".83"),
        ("duallora", 16, ".83"),
    ],
    "llama-3-8b": [
        ("randlora", 30, ".70"), ("lora", 16, ".35"), ("lora", 32, ".70"), ("dora", 16, ".35"), ("dora", 32, ".71"),
        ("hira", 32, ".70"), ("duallora", 16, ".70"),
    ],
    "llama-3-70b": [("lora", 16, ".197"), ("dora", 16, ".202"), ("duallora", 8, ".197")],
}  # fmt: skip
_TABLE_2 = {
    "roberta-base": [
        ("full", None, "125.0"), ("delta-lora", 8, ".3"), ("lora", 8, ".3"), ("lora", 16, ".6"), ("lora+", 16, ".6"),
        ("dora", 16, ".6"), ("duallora", 8, ".6"),
    ],
    "roberta-large": [
        ("full", None, "355.0"), ("lora", 8, ".8"), ("lora", 16, "1.6"), ("lora+", 16, "1.6"), ("dora", 16, "1.6"),
        ("duallora", 8, "1.6"),
    ],
    "deberta-v2-xxlarge": [
        ("full", None, "1500.0"), ("lora", 16, "4.7"), ("lora", 32, "9.4"), ("lora+", 32, "9.4"), ("dora", 32, "9.4"),
        ("duallora", 16, "9.4"),
    ],
}  # fmt: skip
_TABLE_4 = {
    "gpt2-medium": [
        ("full", None, "354.92"), ("adapter-l", 224, "11.09"), ("lora", 4, ".35"), ("lora", 8, ".70"), ("lora+", 8, ".70"),
        ("dora", 8, ".71"), ("duallora", 4, ".70"),
    ],
    "gpt2-large": [
        ("full", None, "774.03"), ("adapter-l", 248, "23.00"), ("lora", 4, ".77"), ("lora", 8, "1.54"), ("lora+", 8, "1.54"),
        ("dora", 8, "1.56"), ("duallora", 4, "1.54"),
    ],
}  # fmt: skip
_TRUNK = r"roberta\..*\.(query|key|value|dense)"
_QKV_DENSE = ["query", "key", "value", "dense"]  # as RandLoRA's own scripts: the head's dense layer is one of them
_INHERITED = "printed figure inherited from the LoRA paper; no set of modules gives it"
_EXTRA = [
    Row(1, "llama-7b", "Adapter-P, r 256", _spec("adapter-p", 256, ["up_proj", "down_proj"]), "3.54"),
    Row(2, "roberta-base", "CorDA, r 128", _spec("lora", 128, _TRUNK), "21", "counted as LoRA on every linear layer"),
    Row(2, "roberta-base", "RandLoRA, r 64", _spec("randlora", 64, _QKV_DENSE), ".7", "rank from its own scripts"),
    Row(2, "roberta-large", "RandLoRA, r 100", _spec("randlora", 100, _QKV_DENSE), "1.8", "rank from its own scripts"),
    Row(2, "roberta-base", "VeRA, r 1024", _spec("vera", 1024, _QKV_DENSE), ".3", "rank not printed; not reproduced"),
    Row(2, "roberta-large", "VeRA, r 256", _spec("vera", 256, _QKV_DENSE), ".3", "rank not printed"),
]


def rows() -> Iterator[Row]:
    """Every line the paper prints a count for that a count of trained parameters can meet.

    Left out: GaLore and GaRare (everything is trained; the figure is LoRA's at the same rank) and prefix tuning (number of
    tokens not printed).
    """
    for table, models in ((1, _TABLE_1), (2, _TABLE_2), (4, _TABLE_4)):
        for model, lines in models.items():
            yield from (row for row in _EXTRA if row.model == model)
            for name, r, printed in lines:
                yield _row(table, model, name, r, printed)


def _row(table: int, model: str, name: str, r: int | None, printed: str) -> Row:
    from duallora.methods import get

    targets: Any = {1: ALL, 2: ["query", "value"], 4: ["c_attn"]}[table]
    if model.startswith("deberta"):
        targets = ["query_proj", "value_proj"]
    if name in ("full", "adapter-l"):
        targets = None
    note = ""
    if table == 4 and name not in ("full", "adapter-l"):
        note = _INHERITED if name != "dora" else f"{_INHERITED}; with q and v alone .84 and 1.57"
    if (model, name, r) == ("llama-3-8b", "dora", 16):
        note = "misprint of .36"
    if (model, name, r) == ("deberta-v2-xxlarge", "dora", 32):
        note = "printed as LoRA's; DoRA's lengths come on top"
    if name == "full" and table == 2:
        note = "rounded in the paper"
    if (model, name) == ("gpt2-medium", "full"):
        note = "printed figure inherited from the LoRA paper"
    label = f"{get(name).title}{'' if r is None else f', r {r}'}"
    return Row(table, model, label, _spec(name, r, targets), printed, note)

"""What the pictures of four methods show (docs/analysis.md), as one JSON: results/four_methods.json.

Reads what the commands of that page leave in this folder: runs/four-methods-rates, runs/four-methods, figure3, dora-figure.

    python benchmarks/four_methods.py
"""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

from peft.utils import load_peft_weights, set_peft_model_state_dict

import duallora
from duallora.analysis import dynamics, states
from duallora.store import adapters, record

ROOT = Path(__file__).parents[1]
RUN = Path("runs/four-methods/cells/data-duallora-seed0")
KINDS = ("q_proj", "v_proj")


def trained(cells: Path) -> list[dict[str, Any]]:
    """Rate, steps and validation loss of each run of a grid, with what it ran on."""
    found = []
    for file in sorted(cells.glob("*/metrics.json")):
        facts = json.loads(file.read_text())
        settings, loss = facts["recipe"]["train"], facts["metrics"]
        values = {"learning_rate": settings["learning_rate"], "steps": settings["max_steps"], "loss": loss["loss"]}
        before = {"loss_before": loss["loss_before"]} if "loss_before" in loss else {}
        kept = ("commit", "dirty", "device", "threads", "started", "seeds", "data", "base", "parameters")
        found.append({"cell": file.parent.name, **values, **before, **{name: facts[name] for name in kept}})
    return found


def by_layer(table: Path, keys: tuple[str, ...], values: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a table for the modules that are drawn, a list over the layers for each value."""
    rows = [row for row in csv.DictReader(table.open()) if row["module"] in KINDS]
    found = []
    for at, of in itertools.groupby(
        sorted(rows, key=lambda row: [row[k] for k in keys]), lambda row: [row[k] for k in keys]
    ):
        lists = list(of)
        found.append(
            {**dict(zip(keys, at, strict=True)), **{v: [float(f"{float(r[v]):.6g}") for r in lists] for v in values}}
        )
    return found


def open_start() -> list[dict[str, Any]]:
    """The correlations of Dual LoRA before the first step, had its gate been open: what they owe to the random start."""
    model, _ = adapters.load_adapter(RUN, "generate")
    set_peft_model_state_dict(model, load_peft_weights(str(states.states(RUN)[0].folder), device="cpu"))
    duallora.advance_gate(model.requires_grad_(True), 1000)
    assert duallora.gate(model) == 1
    rows = [
        {"step": 0, "layer": name, "module": states.module(name), **dynamics.change(*dynamics.weights(layer))}
        for name, layer in dynamics.linear_layers(model)
    ]
    return dynamics.correlations(rows)


def main() -> None:
    parts = {name: json.loads(Path(name, "analysis.json").read_text()) for name in ("figure3", "dora-figure")}
    where, value = ("source", "module", "step"), ("rank", "rank_float32", "effective_rank")
    result = {
        "kind": "four methods",
        **record.environment(),
        "analyzed": {name: part["commit"] for name, part in parts.items()},
        "rates": trained(Path("runs/four-methods-rates/cells")),
        "runs": trained(Path("runs/four-methods/cells")),
        "recipes": {label: source["recipe"] for label, source in parts["figure3"]["sources"].items()},
        "correlations": {
            label: [row for row in source["dynamics"] if row["module"] in KINDS]
            for label, source in parts["dora-figure"]["sources"].items()
        },
        "start_with_open_gate": open_start(),
        "rank": by_layer(Path("figure3/rank.csv"), (*where, "matrix"), value),
        "dynamics": by_layer(Path("dora-figure/dynamics.csv"), where, ("direction", "magnitude")),
    }
    record.write_json(ROOT / "results" / "four_methods.json", result)


if __name__ == "__main__":
    main()

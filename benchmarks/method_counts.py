"""The parameter counts of the paper's tables, counted without weights, into a JSON file and the table of docs/methods.md.

python benchmarks/method_counts.py --output results/method_counts.json --page docs/methods.md
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

from duallora import methods, paper
from duallora.paper import cost, reproduce
from duallora.store import record
from duallora.terminal import quiet_libraries

START, END = "<!-- counts: written by benchmarks/method_counts.py -->", "<!-- end of counts -->"

# The paper's models as `duallora plan` calls them.
MODELS = {
    "LLaMA-7B": "llama-7b", "LLaMA-13B": "llama-13b", "LLaMA2-7B": "llama-2-7b", "LLaMA3-8B": "llama-3-8b",
    "LLaMA3-70B-Instruct": "llama-3-70b", "RoBERTa-base": "roberta-base", "RoBERTa-large": "roberta-large",
    "DeBERTa-XXL": "deberta-v2-xxlarge", "GPT2-M": "gpt2-medium", "GPT2-L": "gpt2-large",
}  # fmt: skip
# GaLore's and GaRare's figure is LoRA's at the same rank, for they train everything; a prefix's length is not printed.
UNCOUNTED = ("GaLore", "GaRare", "Prefix")


def measure(models: Container[str] = MODELS) -> list[dict[str, Any]]:
    """One object per printed row, in the paper's order: counted by the train verb's own code (`cost.shape`)."""
    lines = []
    with quiet_libraries():
        for name in ("table1", "table2", "table4"):
            for study in paper.studies(name, "paper"):
                recipes = {cell.tags["variant"]: cell.recipe() for cell in reproduce.Part(study, Path()).first_cells()}
                lines += [
                    _line(row, recipes[row.variant])
                    for row in reproduce.printed_rows(study.name)
                    if row.method not in UNCOUNTED and row.model in models
                ]
    return lines


def _line(row: Any, recipe: Any) -> dict[str, Any]:
    counted, whole = cost.shape(recipe), row.method == "FFT"
    printed = f"{row.trainable:.1f}" if whole and row.trainable % 1 == 0 else f"{row.trainable:g}"
    value = 100 * counted.trained / (counted.base + counted.trained) if row.table == 1 else counted.trained / 1e6
    ours = f"{value:.{len(printed.partition('.')[2])}f}"
    label = methods.get(recipe.adapter.method).title + ("" if whole else f", r {recipe.adapter.r}")
    agrees = float(ours) == row.trainable
    return {
        "table": row.table, "model": MODELS[row.model], "method": label, "trainable": counted.trained,
        "base": 0 if whole else counted.base, "ours": ours, "printed": printed, "agrees": agrees,
        "note": "" if agrees else row.note or "rounded in the paper",
    }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """The rows as a table of the documentation."""
    text = "| table | model | method | trainable parameters | ours | printed | |\n|---|---|---|---:|---:|---:|---|\n"
    for line in lines:
        unit = " %" if line["table"] == 1 else " M"
        remark = "" if line["agrees"] else f"differs: {line['note']}"
        printed = line["printed"] if not line["printed"].startswith(".") else f"0{line['printed']}"
        text += (
            f"| {line['table']} | {line['model']} | {line['method']} | {line['trainable']:,} | {line['ours']}{unit} | "
            f"{printed}{unit} | {remark} |\n"
        )
    return text


def write_page(page: Path, lines: list[dict[str, Any]]) -> None:
    """Puts the table between its two marks."""
    before, rest = page.read_text(encoding="utf-8").split(START)
    record.write_text(page, f"{before}{START}\n\n{table(lines)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    started = time.time()
    lines = measure()
    record.write_json(arguments.output, record.result("method-counts", {}, {"rows": lines}, seeds=[], started=started))
    if arguments.page:
        write_page(arguments.page, lines)


if __name__ == "__main__":
    main()

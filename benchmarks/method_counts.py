"""The parameter counts of the paper's tables, counted without weights, into a JSON file and the table of docs/methods.md.

python benchmarks/method_counts.py --output results/method_counts.json --page docs/methods.md
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from duallora.methods.counts import count, rows
from duallora.plan.architectures import config_of
from duallora.store import record
from duallora.terminal import quiet_libraries

START, END = "<!-- counts: written by benchmarks/method_counts.py -->", "<!-- end of counts -->"


def measure() -> list[dict[str, Any]]:
    """One object per row of the tables, in their order."""
    lines = []
    with quiet_libraries():
        for row in rows():
            found = count(config_of(row.model), row.spec)
            lines.append(
                {
                    "table": row.table, "model": row.model, "method": row.method, "trainable": found.trainable,
                    "base": found.base, "ours": found.shown(row), "printed": row.printed, "agrees": found.agrees(row),
                    "note": "" if found.agrees(row) else row.note,
                }
            )  # fmt: skip
    return lines


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

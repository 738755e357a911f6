"""The table of docs/reliability.md, from results/faults.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def table(record: Mapping[str, Any]) -> str:
    """Markdown: a line for each kind of fault, and what plain Trainer comes to."""
    lines = ["| fault | tried | survived | plain Trainer | sealed |", "|---|---:|---:|---:|---:|"]
    for row in record["metrics"]["rows"]:
        others = [row.get(name) for name in ("plain_trainer", "sealed_trainer")]
        shown = ["{survived} of {tried}".format(**other) if other else "" for other in others]
        lines.append(f"| {row['row']} | {row['tried']:,} | {row['survived']:,} | {' | '.join(shown)} |")
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "transformers", "peft"))
    total = sum(row["tried"] for row in record["metrics"]["rows"])
    how = "make faults-long" if record["recipe"]["long"] else "make faults"
    return "\n".join([*lines, "", f"{total:,} cases of `{how}`, {versions}, commit {record['commit'][:7]}."]) + "\n"


def write(page: Path, record: Mapping[str, Any]) -> None:
    """Puts the table between the page's marks."""
    text = page.read_text(encoding="utf-8")
    new = re.sub(
        r"(<!-- faults -->\n).*?(<!-- /faults -->)", lambda m: m[1] + table(record) + m[2], text, flags=re.DOTALL
    )
    page.write_text(new, encoding="utf-8")

"""What `make stand-ins` found: no cell of results/stand_ins.json failed, and the pages say how many there are."""

from __future__ import annotations

from pathlib import Path

import stand_ins

from duallora.store import record

ROOT = Path(__file__).parents[2]
FOUND = record.read_json(ROOT / "results" / "stand_ins.json")


def test_no_paper_scale_cell_has_failed_on_its_stand_in():
    """The cells of the file are today's, by what they begin from too."""
    assert FOUND["kind"] == "stand_ins"
    assert (len(FOUND["commit"]), FOUND["dirty"]) == (40, False)
    assert [(stand_ins.key(cell), cell["failed"]) for cell in FOUND["cells"] if not cell["ok"]] == []
    today = {stand_ins.key(cell): cell for cell in stand_ins.cells()}
    assert FOUND["metrics"] == {"cells": len(today), "ok": len(today)}
    assert len(FOUND["cells"]) == len(today)
    for cell in FOUND["cells"]:
        own = today[stand_ins.key(cell)]
        assert (cell["model"], cell["after"]) == (own["model"], own["after"])


def test_the_pages_say_how_many():
    said = f"{FOUND['metrics']['ok']} of {FOUND['metrics']['cells']} distinct cells"
    for page in ("fidelity.md", "paper-tables.md"):
        assert said in (ROOT / "docs" / page).read_text(encoding="utf-8"), page

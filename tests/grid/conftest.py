"""Grids of cells that train nothing, so that a test takes no longer than the processes it starts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from study_cells import made_up, run_all, two_tasks

from duallora.grid import run as engine
from duallora.grid.study import Study

FAKE = Path(__file__).with_name("fake_cell.py")


class Fakes:
    """A study in a folder, whose cells end as `ends` says."""

    def __init__(self, folder: Path):
        self.folder, self.ends = folder / "grid", folder / "ends.json"
        self.console = Console(file=io.StringIO(), width=200)
        self.end({})

    def end(self, ends: dict[str, list[str]]) -> None:
        self.ends.write_text(json.dumps(ends))

    def study(self, **changes) -> Study:
        given = {
            "name": "fake", "base": {"task": "cola"}, "tasks": {"cola": {}}, "variants": {"lora": {"method": "lora"}, "own": {}},
            "search": {"learning_rate": [1e-3, 2e-3]}, "seeds": [0], "extend": False,
        }  # fmt: skip
        return Study(**{**given, **changes})

    def run(self, study: Study | None = None, **options):
        return engine.run(study or self.study(), self.folder, console=self.console, **options)

    def starts(self) -> dict[str, int]:
        """How often each cell was started."""
        files = self.folder.glob("cells/*.starts")
        return {file.name.removesuffix(".starts"): len(file.read_text().splitlines()) for file in files}

    @property
    def said(self) -> str:
        return self.console.file.getvalue()


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> Fakes:
    made = Fakes(tmp_path)
    monkeypatch.setattr(engine, "PROGRAM", (str(FAKE),))
    monkeypatch.setattr(engine, "POLL", 0.02)
    monkeypatch.setenv("FAKE_CELLS", str(made.ends))
    return made


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    return run_all(tmp_path_factory.mktemp("grid") / "made-up", two_tasks(), made_up)

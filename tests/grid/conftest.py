"""Grids of cells that train nothing, so that a test takes no longer than the processes it starts."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from study_cells import made_up, run_all, study_of

from duallora.config.recipe import Recipe, fingerprint
from duallora.grid import run as engine
from duallora.grid.study import Study
from duallora.grid.summary import summarize
from duallora.store.run_folder import RunFolder

FAKE = Path(__file__).with_name("fake_cell.py")


class Fakes:
    """A study in a folder, whose cells end as `end` says."""

    def __init__(self, folder: Path):
        self.folder, self.ends = folder / "grid", folder / "ends.json"
        self.console = Console(file=io.StringIO(), width=200)
        self.end({})

    def end(self, ends: dict[str, list[str]]) -> None:
        self.ends.write_text(json.dumps(ends))

    def study(self, **changes) -> Study:
        given = {
            "name": "fake", "base": {"task": "cola"}, "tasks": {"cola": {}}, "variants": {"lora": {"method": "lora"}},
            "search": {"learning_rate": [1e-3, 2e-3]}, "seeds": [0], "extend": False,
        }  # fmt: skip
        return Study(**{**given, **changes})

    def run(self, study: Study | None = None, **options):
        return engine.run(study or self.study(), self.folder, console=self.console, **options)

    def cell(self, name: str, file: str = "") -> Path:
        return self.folder / "cells" / name / file

    def starts(self) -> dict[str, int]:
        """How often each cell was started."""
        files = self.folder.glob("cells/*.starts")
        return {file.name.removesuffix(".starts"): len(file.read_text().splitlines()) for file in files}

    def having(self, part: str) -> set[str]:
        """The cells whose folder has such a part."""
        return {path.parent.name for path in self.folder.glob(f"cells/*/{part}")}

    def when(self, condition: Callable[[], bool], then: Callable[[], None]) -> None:
        """Calls ``then`` from another thread as soon as ``condition`` holds, within a minute."""

        def watch() -> None:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                if condition():
                    return then()
                time.sleep(0.02)

        threading.Thread(target=watch, daemon=True).start()

    def waiting(self, *names: str) -> Callable[[], bool]:
        """Whether these cells, which are told to wait, do so."""
        return lambda: {*names} <= self.having("log.jsonl")

    def stop_by(self, number: int, *names: str) -> None:
        """Sends the grid a signal once these cells wait."""
        self.when(self.waiting(*names), lambda: os.kill(os.getpid(), number))

    @property
    def said(self) -> str:
        return self.console.file.getvalue()


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> Fakes:
    plain = RunFolder.write_recipe

    def write_recipe(place: RunFolder, recipe: Recipe) -> None:
        """Beside it what a cell makes of the recipe, which would take it longer than all it does."""
        plain(place, recipe)
        facts = {"recipe": recipe.model_dump(mode="json"), "fingerprints": {"recipe": fingerprint(recipe)}}
        place.path.with_name(f"{place.path.name}.facts").write_text(json.dumps(facts))

    monkeypatch.setattr(RunFolder, "write_recipe", write_recipe)
    monkeypatch.setattr(engine, "PROGRAM", (str(FAKE),))
    monkeypatch.setattr(engine, "POLL", 0.02)
    return Fakes(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a study of three methods on two tasks whose cells have all run."""
    return run_all(tmp_path_factory.mktemp("grid") / "made-up", study_of("cola", "stsb"), made_up)


@pytest.fixture(scope="session")
def summary(finished):
    """What its report is made of; not to be changed."""
    return summarize(finished, scale="mini", rounds=2000)

"""Each example runs as its docstring prints it, and what it prints at the end holds."""

from __future__ import annotations

import math
import re
import runpy
import sys
from pathlib import Path

import pytest

from duallora.grid.study import Study

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
PAGE = EXAMPLES.parent / "docs" / "examples.md"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its settings in singletons."""
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", SCRIPTS)
def test_learns_opens_the_gate_and_gives_the_same_outputs_reloaded_and_merged(
    script, tiny_causal_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, str(tiny_causal_folder), "out"])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    printed = capsys.readouterr().out
    what, first, last, gate = re.search(r"^(loss|reward) (\S+) -> (\S+), gate (\S+)$", printed, re.MULTILINE).groups()
    assert float(last) < float(first) if what == "loss" else math.isfinite(float(last))  # of drawn answers
    assert float(gate) == 1.0
    assert re.findall(r"largest difference (\S+)$", printed, re.MULTILINE) == ["0.0e+00", "0.0e+00"]
    assert "False" not in printed  # accelerate_loop.py compares the losses after its stop
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size > 10_000


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_shows_the_command_of_each_example(script):
    command = f"python examples/{script}"
    assert command in PAGE.read_text()
    assert command in (EXAMPLES / script).read_text()


@pytest.mark.parametrize("grid", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_cell_of_a_grid_is_a_recipe(grid):
    """Nobody runs them in a test: hours."""
    assert all(cell.recipe().train.max_steps for cell in Study.read(grid).wanted({}))

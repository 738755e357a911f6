"""The drawn loss of a run, and the list of runs: what stands in the files is what is shown."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from duallora import cli, console
from duallora.errors import LockedError
from duallora.store.lock import locked
from duallora.store.run_folder import RunFolder
from duallora.train import curve, runs

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console.results, "_width", 200)  # whatever it was when somebody imported it first
    yield
    console.use_json(False)


def heights(text: str, kind: str) -> list[list[float]]:
    """The y of each stretch of a line."""
    (path,) = (one for one in ElementTree.fromstring(text).iter(f"{SVG}path") if one.get("class") == kind)
    return [
        [float(point.split(",")[1]) for point in part.replace("L", "").split()] for part in path.get("d").split("M")[1:]
    ]


def test_lower_losses_stand_lower_and_what_is_not_finite_breaks_the_line():
    losses = [4.0, 3.0, math.nan, 2.0, math.inf, 1.5, 1.0]
    text = curve.svg("a <b>&", list(enumerate(losses)), [(0, 4.2), (6, 1.1)])
    parts = heights(text, "train")
    assert [len(part) for part in parts] == [2, 1, 2]
    falling = [y for part in parts for y in part]
    assert falling == sorted(falling)  # y counts from above
    assert len({*falling}) == 5
    assert len(heights(text, "held")[0]) == 2
    assert curve.svg("none", [(1, math.nan)], []) == ""


def test_one_loss_far_above_the_others_does_not_flatten_them():
    losses = [1.0 + 0.1 * (at % 5) for at in range(40)]
    plain = heights(curve.svg("a", list(enumerate(losses)), []), "train")[0]
    losses[20] = 1e6
    text = curve.svg("a", list(enumerate(losses)), [])
    (spiked,) = heights(text, "train")
    assert "1 above the edge" in text
    assert max(spiked) - min(spiked) == pytest.approx(max(plain) - min(plain), abs=1)
    assert [y for at, y in enumerate(spiked) if at != 20] == [y for at, y in enumerate(plain) if at != 20]


def test_the_line_of_a_terminal_falls_as_the_loss_does():
    assert curve.line([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert curve.line([8 - at / 100 for at in range(700)], width=7) == "█▇▆▅▃▂▁"
    assert curve.line([1.0]) == curve.line([math.nan, 2.0]) == ""


def write_run(path: str, rate: float, status: str = "done", score: float | None = 60.0) -> None:
    run = RunFolder(path)
    run.path.mkdir(parents=True)
    recipe = {"output": path, "seed": 0, "train": {"learning_rate": rate}}
    result = {"metrics": {"loss": 0.5, "accuracy": score}, "seconds": 75.0, "at_chance": None}
    run.write_facts({"status": status, "recipe": recipe, "steps": 20, "loss_before": 0.75, "started": f"2026-01-0{1 + round(rate)}",
                     **({"result": result} if status == "done" else {})})  # fmt: skip
    if status == "done":
        run.write_metrics({"metrics": result["metrics"], "main_metric": "accuracy"})
    run.log.append(7, {"loss": 0.625, "gate": 1.0})


def test_runs_are_listed_with_what_they_differ_in(capsys):
    write_run("runs/b/one", 1.0)
    write_run("runs/two", 2.0, status="running")
    Path("runs/bad").mkdir()
    Path("runs/bad/run.json").write_text("{")
    assert cli.run(["runs"]) == 0
    out = capsys.readouterr().out
    one, two, bad = (
        next(line for line in out.splitlines() if line.strip().startswith(f"runs/{name}"))
        for name in ("b/one", "two", "bad")
    )
    assert "0.750 → 0.500" in one
    assert "accuracy 60" in one
    assert "1:15" in one
    told = out.partition("differ in:")[2].splitlines()
    assert [" ".join(line.split()) for line in told if "b/one" in line] == ["runs/b/one learning_rate 1.0"]
    assert "7/20" in two
    assert "0.750 → 0.625" in two
    assert "damaged" in bad
    assert cli.run(["runs", "runs/b", "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in payload["runs"]] == ["runs/b/one"]
    assert payload["differing"] == []
    assert cli.run(["runs", "nowhere"]) == 2
    Path("empty").mkdir()
    assert cli.run(["runs", "empty"]) == 2


def test_live_runs_are_shown_anew_until_none_is_running(monkeypatch):
    write_run("runs/one", 1.0)
    write_run("runs/two", 2.0, status="running")
    waits = []

    def wait(seconds):
        waits.append(seconds)
        RunFolder("runs/two").log.append(9 + 2 * len(waits), {"loss": 0.5, "gate": 1.0})
        if len(waits) == 3:
            facts = json.loads(Path("runs/two/run.json").read_text())
            Path("runs/two/run.json").write_text(json.dumps({**facts, "status": "failed"}))

    monkeypatch.setattr(runs.time, "sleep", wait)
    out = Console(file=io.StringIO(), force_terminal=True, width=100)
    found = runs.listed([Path("runs")], out, live=True)["runs"]
    assert len(waits) == 3
    assert [run["status"] for run in found] == ["done", "failed"]
    assert all(step in out.file.getvalue() for step in ("7/20", "11/20", "13/20", "15/20"))


def test_a_run_that_never_began_leaves_no_folder_above_it_either():
    with locked(Path("runs/deep/one")), pytest.raises(LockedError), locked(Path("runs/deep/one")):
        pass
    assert not Path("runs").exists()
    Path("runs").mkdir()
    with locked(Path("runs/deep/one")):
        pass
    assert Path("runs").is_dir()  # which was there before
    assert not Path("runs/deep").exists()

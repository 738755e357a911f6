"""A grid through what happens to it: failures, kills, stops, two at once, a second start; and what it shows meanwhile."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from of_grids import running, when
from rich.console import Console

from duallora import cli
from duallora.errors import ConfigError, GridError, Interrupted, LockedError
from duallora.grid import live, pools
from duallora.grid import run as engine
from duallora.grid.study import Outcome, Study, cell_folder, outcomes
from duallora.store import lock, record


def test_one_failure_neither_stops_the_others_nor_is_tried_again_until_the_next_grid(fakes, monkeypatch):
    """A killed cell is tried once more, a diverged one is a result, one that was refused says why."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    fakes.end(
        {
            "cola-lora-lr0.001-seed0": ["killed", "done"],
            "cola-lora-lr0.002-seed0": ["diverged"],
            "cola-own-lr0.001-seed0": ["refused"],
            "cola-own-lr0.002-seed0": ["memory", "memory", "done"],
        }
    )
    study = fakes.study(seeds=[0, 5])
    found = fakes.run(study, workers=2)
    assert fakes.starts() == {
        "cola-lora-lr0.001-seed0": 2,
        "cola-lora-lr0.002-seed0": 1,
        "cola-own-lr0.001-seed0": 1,
        "cola-own-lr0.002-seed0": 2,
        "cola-lora-lr0.001-seed5": 1,  # the best value's other seed
    }
    assert found["cola-lora-lr0.001-seed0"].status == "done"
    assert found["cola-lora-lr0.002-seed0"].diverged
    assert found["cola-own-lr0.001-seed0"].error == "model.name=m: no such model; expected a folder"
    assert found["cola-own-lr0.002-seed0"].error == "out of memory, 2 times"
    with pytest.raises(GridError, match=r"2 of 5 cells failed:\n  cola-own-lr0.001-seed0: model.name=m: no such model"):
        engine.require_all(found, fakes.folder)
    assert "cola-lora-lr0.001-seed0: ended by SIGKILL; tried again, from its last checkpoint" in fakes.said
    assert "diverged cola-lora-lr0.002-seed0 (NonFiniteError: the loss is nan in step 2)" in fakes.said
    assert (fakes.folder / "cells" / "cola-own-lr0.001-seed0.log").read_text().startswith("loading")
    threads = (fakes.folder / "cells" / "cola-lora-lr0.001-seed0.starts").read_text().split()
    assert threads == ["3", "3"]  # as the environment says

    fakes.end({})  # mended
    again = fakes.run(study, workers=2)
    assert {name for name, count in fakes.starts().items() if count != {**dict.fromkeys(again, 1)}[name]} == {
        "cola-lora-lr0.001-seed0", "cola-own-lr0.001-seed0", "cola-own-lr0.002-seed0",
    }  # fmt: skip
    assert [item.status for item in again.values()].count("done") == len(again) - 1
    engine.require_all(again, fakes.folder)


def test_the_reason_of_a_failure_is_that_of_the_last_start(fakes):
    name, study = "cola-lora-seed0", fakes.study(search={}, variants={"lora": {}})
    fakes.end({name: ["refused", "silent"]})
    assert fakes.run(study)[name].error == "model.name=m: no such model; expected a folder"
    assert fakes.run(study)[name].error == "exit code 1"  # it said nothing, and the line before was of another start


def test_a_finished_grid_starts_nothing_and_other_settings_under_its_names_are_refused(fakes):
    one = {"variants": {"lora": {"method": "lora"}}}
    fakes.run(fakes.study(**one))
    before = fakes.starts()
    assert fakes.run(fakes.study(**one)).keys() == before.keys()
    assert fakes.starts() == before
    with pytest.raises(ConfigError, match=r"train.weight_decay: 0.0 -> 0.5"):
        fakes.run(fakes.study(base={"task": "cola", "weight_decay": 0.5}, **one))
    assert Study.read(fakes.folder) == fakes.study(**one)  # what lies there still says what was run
    grown = fakes.run(fakes.study(seeds=[0, 1], **one))
    assert {name for name in fakes.starts() if name not in before} == {n for n in grown if n.endswith("seed1")}
    assert set(fakes.starts().values()) == {1}


def test_cells_that_began_where_their_study_would_no_longer_begin_are_refused(fakes):
    """A new search value that wins on the first task changes what the second one's cells start from."""
    tasks = {"mnli": {}, "rte": {"after": "mnli", "search": {}}}
    few = fakes.study(tasks=tasks, variants={"lora": {"method": "lora"}}, search={"learning_rate": [2e-3, 4e-3]})
    found = fakes.run(few)
    assert found["rte-lora-seed0"].recipe["adapter"]["init_from"].endswith("mnli-lora-lr0.002-seed0")
    moved = fakes.folder.rename(fakes.folder.with_name("moved"))
    fakes.folder = moved
    assert fakes.run(few).keys() == found.keys()
    more = fakes.study(tasks=tasks, variants={"lora": {"method": "lora"}}, search={"learning_rate": [1e-3, 2e-3, 4e-3]})
    changed = r'adapter.init_from: "mnli-lora-lr0.002-seed0" -> "mnli-lora-lr0.001-seed0"'
    with pytest.raises(ConfigError, match=changed):
        fakes.run(more)
    own = {"tasks": {"own": {}}, "variants": {"lora": {"method": "lora"}}, "search": {}}
    fakes.run(fakes.study(base={"task": "cola", "adapter.init_from": "runs/a"}, **own))
    with pytest.raises(ConfigError, match=r'adapter.init_from: "runs/a" -> "runs/b"'):
        fakes.run(fakes.study(base={"task": "cola", "adapter.init_from": "runs/b"}, **own))


def test_a_search_that_was_decided_on_test_rows_is_said_to_be(fakes):
    study = fakes.study(tasks={"cola": {}, "rte": {"search": {}}})
    console = Console(file=io.StringIO(), width=200)
    for same in (False, True):
        found = {
            cell.name: Outcome(cell.name, "done", metrics={"accuracy": 1.0}, main_metric="accuracy", same_rows=same)
            for cell in study.wanted({})
        }
        assert ("cola: validation and test are the same rows" in console.file.getvalue()) is False
        live.show_best(console, study, found)
    assert "\ncola: validation and test are the same rows" in console.file.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_grid_lets_its_cells_save_and_goes_on_later(number, fakes):
    before = signal.getsignal(signal.SIGINT)
    first, second = "cola-lora-lr0.001-seed0", "cola-lora-lr0.002-seed0"
    fakes.end({first: ["waits", "done"], second: ["waits", "done"]})
    when(running(fakes, first, second), lambda: os.kill(os.getpid(), number))
    study = fakes.study(variants={"lora": {"method": "lora"}})
    with pytest.raises(Interrupted, match="stopped with 0 of 2 cells done; the same command continues") as stop:
        fakes.run(study, workers=2)
    assert stop.value.exit_code == 128 + number
    assert {item.status for item in outcomes(fakes.folder).values()} == {"interrupted"}
    found = fakes.run(study, workers=2)
    assert {item.status for item in found.values()} == {"done"}
    assert fakes.starts() == {first: 2, second: 2}
    assert signal.getsignal(signal.SIGINT) is before


def test_what_another_study_has_run_is_copied_and_everything_else_is_run(fakes, tmp_path):
    """Equal recipes under other names, a diverged one among them; another seed and a failed one are not taken."""
    fakes.end({"cola-lora-lr0.001-seed0": ["diverged"], "cola-own-lr0.001-seed0": ["bad data"]})
    fakes.run()
    first, fakes.folder = fakes.folder, tmp_path / "second"
    fakes.end({})
    study = fakes.study(tasks={"again": {}}, variants={"lora": {"method": "lora"}, "dual": {}}, seeds=[0, 5])
    found = fakes.run(study, reuse=[first])
    assert fakes.starts() == {
        "again-lora-lr0.002-seed5": 1,
        "again-dual-lr0.001-seed0": 1,  # the failed one
        "again-dual-lr0.001-seed5": 1,
    }
    assert found["again-lora-lr0.001-seed0"].diverged
    copied, source = (folder / "cells" / name for folder, name in (
        (fakes.folder, "again-dual-lr0.002-seed0"), (first, "cola-own-lr0.002-seed0"),
    ))  # fmt: skip
    assert (copied / "metrics.json").read_bytes() == (source / "metrics.json").read_bytes()
    assert f"reused   again-dual-lr0.002-seed0: {source}" in fakes.said
    before = fakes.starts()
    fakes.run(study, reuse=[first])
    assert fakes.starts() == before
    with pytest.raises(ConfigError, match=r"reuse: .*nothing holds no study.yaml; expected the folder of a grid"):
        fakes.run(study, reuse=[tmp_path / "nothing"])


def test_a_second_signal_ends_the_cells_at_once(fakes, monkeypatch):
    """A cell that is deep in something does not see the first one."""
    name = "cola-lora-lr0.001-seed0"
    fakes.end({name: ["waits"]})
    monkeypatch.setattr(
        pools.Local, "stop", lambda pool: when(lambda: True, lambda: os.kill(os.getpid(), signal.SIGINT))
    )
    when(running(fakes, name), lambda: os.kill(os.getpid(), signal.SIGINT))
    began = time.monotonic()
    with pytest.raises(Interrupted):
        fakes.run()
    assert time.monotonic() - began < 30
    assert outcomes(fakes.folder)[name].status == "running"  # as after a power cut


def test_two_grids_cannot_share_a_folder(fakes):
    with lock.locked(fakes.folder), pytest.raises(LockedError, match=f"{fakes.folder} is in use"):
        fakes.run()
    assert fakes.starts() == {}
    (fakes.folder / "notes.txt").parent.mkdir()
    (fakes.folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty and holds no study\.yaml"):
        fakes.run()


def test_of_two_that_begin_at_once_the_one_too_late_leaves_the_others_lock_alone(tmp_path, monkeypatch):
    """It saw no lock at first, and found it taken: were it to delete the file, a third one could begin."""
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name != ".lock" and exists(path))
    with lock.locked(tmp_path / "grid", "study.yaml"):
        with pytest.raises(LockedError), lock.locked(tmp_path / "grid", "study.yaml"):
            pass
        assert (tmp_path / "grid" / ".lock").is_file()


def test_a_cell_waits_while_a_process_of_an_earlier_grid_holds_its_folder(fakes, monkeypatch):
    monkeypatch.setattr(engine, "LOCK_EVERY", 0.1)
    name = "cola-lora-seed0"
    with ExitStack() as held:
        held.enter_context(lock.locked(fakes.folder / "cells" / name))
        (fakes.folder / "study.yaml").touch()
        when(lambda: fakes.starts().get(name, 0) > 1, held.close)
        found = fakes.run(fakes.study(search={}, variants={"lora": {}}), retries=0)
    assert found[name].status == "done"
    assert fakes.starts()[name] >= 2  # the first found it locked
    assert f"{name}: a process of an earlier grid still writes to its folder" in fakes.said


def test_adapters_stay_where_they_are_asked_for_and_records_always(fakes, tmp_path):
    def kept(part: str) -> set[str]:
        return {path.parent.name for path in fakes.folder.glob(f"cells/*/{part}")}

    study = fakes.study(seeds=[0, 3], variants={"lora": {"method": "lora"}})
    best = {f"cola-lora-lr0.001-seed{seed}" for seed in (0, 3)}
    every = fakes.run(study, keep="all", workers=2).keys()
    assert kept("adapter") == kept("checkpoints") == set(every)
    fakes.run(study)
    assert kept("adapter") == best
    assert kept("checkpoints") == set()
    fakes.run(study, keep="none")
    assert kept("adapter") == set()
    assert kept("metrics.json") == kept("run.json") == set(every)


def test_an_adapter_that_other_cells_start_from_stays_until_they_are_done(fakes):
    study = fakes.study(tasks={"mnli": {}, "rte": {"after": "mnli"}}, variants={"lora": {"method": "lora"}}, search={})
    first = "mnli-lora-seed0"
    fakes.end({"rte-lora-seed0": ["waits"]})
    when(running(fakes, "rte-lora-seed0"), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        fakes.run(study, keep="none")
    adapters = [path.parent.name for path in fakes.folder.glob("cells/*/adapter")]
    assert adapters == [first]
    recipe = (fakes.folder / "cells" / "rte-lora-seed0" / "recipe.yaml").read_text()
    assert f'init_from: "{(fakes.folder / "cells" / first).resolve()}"' in recipe
    fakes.end({})
    fakes.run(study, keep="none")
    assert not list(fakes.folder.glob("cells/*/adapter"))


def test_each_cell_has_its_share_of_the_cores_and_a_gpu_of_its_own(fakes, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(pools, "cores", lambda: 7)
    fakes.run(fakes.study(variants={"lora": {}}), workers=3)
    told = {file.read_text().strip() for file in fakes.folder.glob("cells/*.starts")}
    assert told <= {"2 3", "2 5"}
    assert len(told) == 2
    fakes.run(fakes.study(variants={"one": {}}, search={}), workers=1)  # two in sight would share out each batch
    assert (fakes.folder / "cells" / "cola-one-seed0.starts").read_text() == "7 3\n"


@pytest.mark.parametrize(("visible", "found"), [("", []), ("3,-1,GPU-7", ["3", "GPU-7"]), (None, ["0", "1"])])
def test_the_gpus_are_those_that_the_environment_names_or_all(visible, found, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert pools.gpus() == found


# -- what is seen -----------------------------------------------------------------------------------------------------


def test_the_table_counts_cells_and_reads_where_the_running_ones_stand(fakes):
    study = fakes.study(seeds=[0, 1])
    cells = study.wanted({})
    under_way, begun = cells[2], cells[3]
    for cell, log in [
        (under_way, '{"step": 3, "loss": 0.5}\n{"step": 6, "loss": 0.125}\n{"step": 7, "eval_loss": 3.0}\n{"st'),
        (begun, None),
    ]:
        place = cell_folder(fakes.folder, cell.name)
        place.write_facts({"status": "running" if log else "interrupted", "steps": 9})
        if log:
            place.log.path.write_text(log)
    found = {cells[0].name: Outcome(cells[0].name, "done", main_metric="accuracy", metrics={"accuracy": 71.25})}
    found[cells[1].name] = Outcome(
        cells[1].name, "failed", "diverged", error="NonFiniteError: the loss is nan in step 2; more"
    )
    console = Console(file=io.StringIO(), width=100, force_terminal=True, legacy_windows=False, color_system=None)
    with live.Show(console, study, fakes.folder, 2, {}) as show:
        for cell in (*cells[:2], under_way, begun):
            show.started(cell)
        show.settled(cells[0], found[cells[0].name])
        show.settled(cells[1], found[cells[1].name])
        show.drawn = 0.0
        show.update(cells, found, {cell.name: cell for cell in (under_way, begun)}, {})
        seen = console.file.getvalue()
    assert "validation accuracy 71.25" in seen
    assert "(NonFiniteError: the loss is nan in step 2)" in seen
    assert "2 queued, 2 running, 1 done, 1 diverged" in seen  # 6 in all: the other seed of each variant is to come
    rows = [line.split() for line in seen.splitlines() if "seed0" in line and "0:00" in line]
    assert [under_way.name, "7/9", "0.125", "0:00"] in rows
    assert [begun.name, "starts", "0:00"] in rows


def test_where_there_is_no_terminal_each_event_is_a_line(fakes):
    fakes.end({"cola-own-lr0.002-seed0": ["bad data"]})
    fakes.run()
    lines = fakes.said.splitlines()
    assert "\x1b" not in fakes.said
    assert lines[0].startswith("grid     fake: 1 task x 2 variants x 1 seed, 4 cells, 0 done, in ")
    assert "starts   cola-lora-lr0.002-seed0" in lines
    assert any(
        line.startswith("done     cola-lora-lr0.001-seed0  validation accuracy 0, test accuracy -1") for line in lines
    )
    assert any("failed   cola-own-lr0.002-seed0: row 3 is empty" in line for line in lines)


def test_the_verb_shows_what_is_best_and_fails_with_a_code_of_its_own(fakes, capsys, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(
        "base: {task: cola}\nvariants: {lora: {method: lora}}\nsearch: {learning_rate: [1e-3, 2e-3]}\nextend: false\nseeds: [0, 4]\n"
    )
    assert cli.run(["grid", "-c", str(file), "--dry-run", "--json", "-o", str(fakes.folder)]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["cells"] == ["data-lora-lr0.001-seed0", "data-lora-lr0.002-seed0"]
    assert payload["expected"] == 3
    assert not fakes.folder.exists()
    fakes.end({"data-lora-lr0.002-seed0": ["bad data", "done"]})
    assert cli.run(["grid", "-c", str(file), "-o", str(fakes.folder), "--json"]) == 10
    payload = json.loads(capsys.readouterr().out)
    assert payload["exit_code"] == 10
    assert "data-lora-lr0.002-seed0: row 3 is empty" in payload["error"]
    assert cli.run(["grid", "-o", str(fakes.folder), "--json"]) == 0  # the folder's own study
    payload = json.loads(capsys.readouterr().out)
    best = payload["best"]["data"]["lora"]
    assert best == {"values": {"train.learning_rate": 1e-3}, "metric": "accuracy", "validation": 0.002, "test": -0.998}
    assert cli.run(["grid"]) == 2


# -- with real cells --------------------------------------------------------------------------------------------------


def test_a_killed_grid_leaves_no_cell_behind_and_goes_on_from_the_cells_checkpoint(tiny_causal_folder, tmp_path):
    """SIGKILL gives the grid no chance to pass anything on: its cell must notice, save a checkpoint and end by itself."""
    rows = "".join(json.dumps({"prompt": f"{n} and {n} is", "completion": f" {2 * n}"}) + "\n" for n in range(31))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "grid.yaml").write_text(
        f"""\
name: killed
base:
  model.name: {tiny_causal_folder}
  data: {{path: {tmp_path}/rows.jsonl, max_length: 32}}
  train: {{max_steps: 2000, batch_size: 2, save_steps: 50, logging_steps: 5, report_to: []}}
  eval.metrics: false
metric: loss
seeds: [7]
"""
    )
    cell = tmp_path / "grid" / "cells" / "data-duallora-seed7"
    options = ["-c", str(tmp_path / "grid.yaml"), "-o", str(tmp_path / "grid")]
    command = [sys.executable, "-m", "duallora.cli", "grid", *options]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: len(log_of(cell)) > 4, first)
    child = record.read_json(cell / "run.json")["pid"]
    assert os.getsid(child) == child  # Ctrl-C in a terminal reaches the grid alone
    first.kill()
    first.wait()
    began = time.monotonic()
    wait_for(lambda: not alive(child))
    assert time.monotonic() - began < 30
    assert record.read_json(cell / "run.json")["status"] == "interrupted"
    stopped_at = max(int(path.name.split("-")[1]) for path in (cell / "checkpoints").glob("checkpoint-*"))
    assert stopped_at < 2000

    second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: record.read_json(cell / "run.json")["resumed"], second)
    wait_for(lambda: log_of(cell)[-1]["step"] > stopped_at, second)
    steps = [line["step"] for line in log_of(cell)]
    assert steps == sorted(set(steps))  # nothing was trained twice
    second.send_signal(signal.SIGINT)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 130
    assert "stopped with 0 of 1 cells done; the same command continues" in said
    run = record.read_json(cell / "run.json")
    assert (run["status"], len(run["resumed"])) == ("interrupted", 1)
    assert not alive(run["pid"])


def log_of(cell) -> list[dict]:
    lines = []
    if (cell / "log.jsonl").exists():
        for line in (cell / "log.jsonl").read_text().splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with suppress(OSError):  # ended, and nobody has waited for it
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def wait_for(condition, process: subprocess.Popen | None = None, within: float = 120.0) -> None:
    end = time.monotonic() + within
    while True:
        with suppress(OSError, ValueError, IndexError):
            if condition():
                return
        assert time.monotonic() < end, "it took too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)

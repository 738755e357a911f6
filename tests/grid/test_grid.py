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
from rich.console import Console

from duallora import cli
from duallora.config.load import assemble
from duallora.errors import ConfigError, GridError, Interrupted, LockedError
from duallora.grid import live, pools
from duallora.grid import run as engine
from duallora.grid.study import Outcome, Study, cell_folder, outcomes
from duallora.store import lock, record
from duallora.train import plugins

TWO = {"lora": {"method": "lora"}, "own": {}}


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
    study = fakes.study(seeds=[0, 5], variants=TWO)
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
    assert fakes.cell("cola-own-lr0.001-seed0.log").read_text().startswith("loading")
    assert fakes.cell("cola-lora-lr0.001-seed0.starts").read_text().split() == ["3", "3"]  # threads, as told

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
    fakes.run()
    before = fakes.starts()
    assert fakes.run().keys() == before.keys()
    assert fakes.starts() == before
    with pytest.raises(ConfigError, match=r"train.weight_decay: 0.0 -> 0.5"):
        fakes.run(fakes.study(base={"task": "cola", "weight_decay": 0.5}))
    assert Study.read(fakes.folder) == fakes.study()  # what lies there still says what was run
    grown = fakes.run(fakes.study(seeds=[0, 1]))
    assert {name for name in fakes.starts() if name not in before} == {n for n in grown if n.endswith("seed1")}
    assert set(fakes.starts().values()) == {1}


def test_a_cell_names_its_plugins_as_its_run_records_them(fakes, monkeypatch, tmp_path):
    """By another name the grid would refuse its own cells as soon as the first one is done."""
    monkeypatch.chdir(tmp_path)
    (cell,) = fakes.study(base={"task": "cola", "plugins": ["mine.py", "a.module"]}, search={}).wanted({})
    named = assemble([{key: (value, "") for key, value in cell.settings.items()}]).model_dump(mode="json")
    recorded = {**named, "plugins": plugins.resolved(named["plugins"])}
    assert recorded["plugins"] == [str(tmp_path / "mine.py"), "a.module"]
    engine.refuse_drift([cell], {cell.name: Outcome(cell.name, "done", recipe=recorded)})


def test_cells_that_began_where_their_study_would_no_longer_begin_are_refused(fakes):
    """A new search value that wins on the first task changes what the second one's cells start from."""
    tasks = {"mnli": {}, "rte": {"after": "mnli", "search": {}}}
    few = fakes.study(tasks=tasks, search={"learning_rate": [2e-3, 4e-3]})
    found = fakes.run(few)
    fakes.folder = fakes.folder.rename(fakes.folder.with_name("moved"))
    assert fakes.run(few).keys() == found.keys()
    more = fakes.study(tasks=tasks, search={"learning_rate": [1e-3, 2e-3, 4e-3]})
    with pytest.raises(ConfigError, match=r'"mnli-lora-lr0.002-seed0" -> "mnli-lora-lr0.001-seed0"'):
        fakes.run(more)
    one = {"tasks": {"own": {}}, "search": {}}
    fakes.run(fakes.study(base={"task": "cola", "adapter.init_from": "runs/a"}, **one))
    with pytest.raises(ConfigError, match=r'adapter.init_from: "runs/a" -> "runs/b"'):
        fakes.run(fakes.study(base={"task": "cola", "adapter.init_from": "runs/b"}, **one))


def test_a_search_that_was_decided_on_test_rows_is_said_to_be(fakes):
    """Of tasks that were searched alone: rte was not."""
    study = fakes.study(tasks={"cola": {}, "rte": {"search": {}}})
    for same in (False, True):
        assert "validation and test are the same rows" not in fakes.said
        facts = {"metrics": {"accuracy": 1.0}, "main_metric": "accuracy", "same_rows": same}
        live.show_best(
            fakes.console, study, {cell.name: Outcome(cell.name, "done", **facts) for cell in study.wanted({})}
        )
    assert "\ncola: validation and test are the same rows" in fakes.said


def test_a_stopped_grid_lets_its_cells_save_and_goes_on_later(fakes):
    before = signal.getsignal(signal.SIGTERM)
    names = [f"cola-lora-lr{rate}-seed0" for rate in ("0.001", "0.002")]
    fakes.end({name: ["waits", "done"] for name in names})
    fakes.stop_by(signal.SIGTERM, *names)
    with pytest.raises(Interrupted, match="stopped with 0 of 2 cells done; the same command continues") as stop:
        fakes.run(workers=2)
    assert stop.value.exit_code == 143
    assert {item.status for item in outcomes(fakes.folder).values()} == {"interrupted"}
    assert {item.status for item in fakes.run(workers=2).values()} == {"done"}
    assert fakes.starts() == dict.fromkeys(names, 2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_another_study_has_run_is_copied_and_everything_else_is_run(fakes, tmp_path):
    """Equal recipes under other names, a diverged one among them; another seed and a failed one are not taken."""
    fakes.end({"cola-lora-lr0.001-seed0": ["diverged"], "cola-own-lr0.001-seed0": ["bad data"]})
    fakes.run(fakes.study(variants=TWO))
    (tmp_path / "a [").mkdir()
    first, fakes.folder = fakes.folder.rename(tmp_path / "a [" / "b]"), tmp_path / "second"  # rich: an end of a style
    fakes.end({})
    study = fakes.study(tasks={"again": {}}, variants={"lora": {"method": "lora"}, "dual": {}}, seeds=[0, 5])
    found = fakes.run(study, reuse=[first])
    assert fakes.starts() == {
        "again-lora-lr0.002-seed5": 1,
        "again-dual-lr0.001-seed0": 1,  # the failed one
        "again-dual-lr0.001-seed5": 1,
    }
    assert found["again-lora-lr0.001-seed0"].diverged
    source, copied = first / "cells" / "cola-own-lr0.002-seed0", fakes.cell("again-dual-lr0.002-seed0")
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
    monkeypatch.setattr(pools.Local, "stop", lambda pool: fakes.stop_by(signal.SIGINT))
    fakes.stop_by(signal.SIGINT, name)
    began = time.monotonic()
    with pytest.raises(Interrupted):
        fakes.run()
    assert time.monotonic() - began < 30
    assert outcomes(fakes.folder)[name].status == "running"  # as after a power cut


def test_two_grids_cannot_share_a_folder(fakes):
    with lock.locked(fakes.folder), pytest.raises(LockedError, match=f"{fakes.folder} is in use"):
        fakes.run()
    assert fakes.starts() == {}
    fakes.folder.mkdir()
    (fakes.folder / "notes.txt").touch()
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
        held.enter_context(lock.locked(fakes.cell(name)))
        (fakes.folder / "study.yaml").touch()
        fakes.when(lambda: fakes.starts().get(name, 0) > 1, held.close)
        found = fakes.run(fakes.study(search={}), retries=0)
    assert found[name].status == "done"
    assert fakes.starts()[name] >= 2  # the first found it locked
    assert f"{name}: a process of an earlier grid still writes to its folder" in fakes.said


def test_adapters_stay_where_they_are_asked_for_and_records_always(fakes):
    study, kept = fakes.study(seeds=[0, 3]), fakes.having
    every = fakes.run(study, keep="all", workers=2).keys()
    assert kept("adapter") == kept("checkpoints") == set(every)
    fakes.run(study)
    assert kept("adapter") == {f"cola-lora-lr0.001-seed{seed}" for seed in (0, 3)}
    assert kept("checkpoints") == set()
    fakes.run(study, keep="none")
    assert kept("adapter") == set()
    assert kept("metrics.json") == kept("run.json") == set(every)


def test_an_adapter_that_other_cells_start_from_stays_until_they_are_done(fakes):
    study = fakes.study(tasks={"mnli": {}, "rte": {"after": "mnli"}}, search={})
    first = "mnli-lora-seed0"
    fakes.end({"rte-lora-seed0": ["waits"]})
    fakes.stop_by(signal.SIGTERM, "rte-lora-seed0")
    with pytest.raises(Interrupted):
        fakes.run(study, keep="none")
    assert fakes.having("adapter") == {first}
    assert f'init_from: "{fakes.cell(first).resolve()}"' in fakes.cell("rte-lora-seed0", "recipe.yaml").read_text()
    fakes.end({})
    fakes.run(study, keep="none")
    assert fakes.having("adapter") == set()


def test_each_cell_has_its_share_of_the_cores_and_a_gpu_of_its_own(fakes, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(pools, "cores", lambda: 7)
    fakes.run(workers=3)
    told = {file.read_text().strip() for file in fakes.folder.glob("cells/*.starts")}
    assert told <= {"2 3", "2 5"}
    assert len(told) == 2
    fakes.run(fakes.study(variants={"one": {}}, search={}), workers=1)  # two in sight would share out each batch
    assert fakes.cell("cola-one-seed0.starts").read_text() == "7 3\n"


@pytest.mark.parametrize(("visible", "found"), [("", []), ("3,-1,GPU-7", ["3", "GPU-7"]), (None, ["0", "1"])])
def test_the_gpus_are_those_that_the_environment_names_or_all(visible, found, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert pools.gpus() == found


# -- what is seen -----------------------------------------------------------------------------------------------------


def test_the_table_counts_cells_and_reads_where_the_running_ones_stand(fakes):
    """Six in all: the other seed of each variant is to come."""
    study = fakes.study(variants=TWO, seeds=[0, 1])
    cells = study.wanted({})
    done, diverged, under_way, begun = (cell.name for cell in cells)
    for name, status in ((under_way, "running"), (begun, "interrupted")):
        cell_folder(fakes.folder, name).write_facts({"status": status, "steps": 9})
    fakes.cell(under_way, "log.jsonl").write_text(
        '{"step": 3, "loss": 0.5}\n{"step": 6, "loss": 0.125}\n{"step": 7, "eval_loss": 3.0}\n{"st'
    )
    error = "NonFiniteError: the loss is nan in step 2; more"
    found = {
        done: Outcome(done, "done", main_metric="accuracy", metrics={"accuracy": 71.25}),
        diverged: Outcome(diverged, "failed", "diverged", error=error),
    }
    console = Console(file=io.StringIO(), width=100, force_terminal=True, legacy_windows=False, color_system=None)
    with live.Show(console, study, fakes.folder, 2, {}) as show:
        for cell in cells:
            show.started(cell)
        for cell in cells[:2]:
            show.settled(cell, found[cell.name])
        show.drawn = 0.0
        show.update(cells, found, {cell.name: cell for cell in cells[2:]}, {})
        seen = console.file.getvalue()
    for words in (
        "validation accuracy 71.25",
        "(NonFiniteError: the loss is nan in step 2)",
        "2 queued, 2 running, 1 done, 1 diverged",
    ):
        assert words in seen
    rows = [line.split() for line in seen.splitlines() if "0:00" in line]
    assert [under_way, "7/9", "0.125", "0:00"] in rows
    assert [begun, "starts", "0:00"] in rows


def test_where_there_is_no_terminal_each_event_is_a_line(fakes):
    fakes.end({"cola-lora-lr0.002-seed0": ["bad data"]})
    fakes.run()
    assert "\x1b" not in fakes.said
    assert fakes.said.startswith("grid     fake: 1 task x 1 variant x 1 seed, 2 cells, 0 done, in ")
    for line in (
        "starts   cola-lora-lr0.002-seed0",
        "done     cola-lora-lr0.001-seed0  validation accuracy 0, test accuracy -1",
        "failed   cola-lora-lr0.002-seed0: row 3 is empty",
    ):
        assert f"\n{line}" in fakes.said


def test_the_verb_shows_what_is_best_and_fails_with_a_code_of_its_own(fakes, capsys, tmp_path):
    def grid(*arguments: str) -> dict:
        code = cli.run(["grid", *arguments, "-o", str(fakes.folder), "--json"])
        payload = json.loads(capsys.readouterr().out)
        assert code == payload["exit_code"]
        return payload

    file = tmp_path / "grid.yaml"
    file.write_text(
        "base: {task: cola}\nvariants: {lora: {method: lora}}\nsearch: {learning_rate: [1e-3, 2e-3]}\nextend: false\nseeds: [0, 4]\n"
    )
    planned = grid("-c", str(file), "--dry-run")
    assert (planned["cells"], planned["expected"]) == (["data-lora-lr0.001-seed0", "data-lora-lr0.002-seed0"], 3)
    assert not fakes.folder.exists()
    fakes.end({"data-lora-lr0.002-seed0": ["bad data", "done"]})
    failed = grid("-c", str(file))
    assert failed["exit_code"] == 10
    assert "data-lora-lr0.002-seed0: row 3 is empty" in failed["error"]
    best = grid()["best"]["data"]["lora"]  # the folder's own study
    assert best == {"values": {"train.learning_rate": 1e-3}, "metric": "accuracy", "validation": 0.002, "test": -0.998}
    assert cli.run(["grid"]) == 2


# -- with real cells --------------------------------------------------------------------------------------------------


def test_a_killed_grid_leaves_no_cell_behind_but_its_checkpoint(tiny_causal_folder, tmp_path):
    """SIGKILL gives the grid no chance to pass anything on: its cell must notice, save a checkpoint and end by itself."""
    rows = "".join(json.dumps({"prompt": f"{n} and {n} is", "completion": f" {2 * n}"}) + "\n" for n in range(31))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "grid.yaml").write_text(
        f"""\
base:
  model.name: {tiny_causal_folder}
  data: {{path: {tmp_path}/rows.jsonl, max_length: 32}}
  train: {{max_steps: 20000, batch_size: 2, save_steps: 20000, logging_steps: 1, report_to: []}}
  eval: {{metrics: false, before: false}}
metric: loss
seeds: [7]
"""
    )
    cell = tmp_path / "grid" / "cells" / "data-duallora-seed7"
    code = "import sys; from duallora.grid import run, study; run.run(study.Study.read(sys.argv[1]), sys.argv[2])"
    line = [sys.executable, "-c", code, str(tmp_path / "grid.yaml"), str(tmp_path / "grid")]
    grid = subprocess.Popen(line, stderr=subprocess.PIPE)
    wait_for(lambda: (cell / "log.jsonl").exists(), grid)
    child = record.read_json(cell / "run.json")["pid"]
    assert os.getsid(child) == child  # Ctrl-C in a terminal reaches the grid alone
    grid.kill()
    grid.wait()
    wait_for(lambda: not alive(child), within=30)
    assert record.read_json(cell / "run.json")["status"] == "interrupted"
    (step,) = (int(path.name.split("-")[1]) for path in (cell / "checkpoints").glob("checkpoint-*"))
    assert 0 < step < 20000


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
    while not condition():
        assert time.monotonic() < end, "it took too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)

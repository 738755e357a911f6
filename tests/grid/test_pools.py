"""A grid on a Ray cluster of this machine, with a worker killed in the middle of a cell, and stopped."""

from __future__ import annotations

import os
import signal
import sys
from types import SimpleNamespace

import pytest

from duallora.errors import ConfigError, Interrupted
from duallora.grid import pools
from duallora.grid import run as engine
from duallora.grid.study import outcomes
from duallora.store import record

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")
NAMES = [f"cola-lora-lr{rate}-seed0" for rate in ("0.001", "0.002", "0.004")]


@pytest.fixture(scope="module")
def address():
    """A cluster that many grids come and go on."""
    head = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    there = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    yield there.address
    there.shutdown()


@pytest.fixture
def go(fakes, address, monkeypatch):
    monkeypatch.setattr(engine, "LOCK_EVERY", 0.2)
    study = fakes.study(search={"learning_rate": [1e-3, 2e-3, 4e-3]})
    return lambda: fakes.run(study, ray=address, workers=2)


def test_of_a_killed_worker_only_its_cell_is_lost_and_is_run_again(fakes, go):
    """The worker cannot say goodbye; its cell ends by itself, and only then can the folder be written to again."""
    fakes.end({NAMES[0]: ["waits", "done"]})
    workers = []

    def kill():
        workers.append(record.read_json(fakes.cell(NAMES[0], "run.json"))["parent"])
        os.kill(workers[-1], signal.SIGKILL)

    fakes.when(fakes.waiting(NAMES[0]), kill)
    found = go()
    assert workers != [os.getpid()]
    assert {item.status for item in found.values()} == {"done"}
    starts = fakes.starts()
    assert starts.pop(NAMES[0]) >= 2
    assert starts == {NAMES[1]: 1, NAMES[2]: 1}
    assert f"lost     {NAMES[0]}: one of its processes is gone; tried again, from its last checkpoint" in fakes.said
    assert not ray.is_initialized()


def test_a_stopped_grid_lets_its_cells_on_the_cluster_save(fakes, go):
    fakes.end({name: ["waits"] for name in NAMES[:2]})
    fakes.stop_by(signal.SIGTERM, *NAMES[:2])
    with pytest.raises(Interrupted) as stop:
        go()
    assert stop.value.exit_code == 143
    statuses = {name: item.status for name, item in outcomes(fakes.folder).items()}
    assert statuses == dict.fromkeys(NAMES[:2], "interrupted")


def test_a_folder_that_a_worker_does_not_have_is_said_plainly(go, monkeypatch):
    monkeypatch.setattr(pools, "Path", SimpleNamespace(cwd=lambda: "/nowhere"))
    with pytest.raises(ConfigError, match=r"could not start its cell \(.*'/nowhere'\): .* at the same place on every"):
        go()
    assert not ray.is_initialized()


def test_cells_of_a_cluster_that_was_closed_are_lost(fakes, tmp_path):
    """As by a second Ctrl-C, while the loop still waits for them."""
    pool = pools.Cluster("local", 1)
    pool.start("a", ["-c", "import time; time.sleep(3)"], tmp_path / "a.log")
    assert pool.ended() == []
    pool.close()
    assert pool.ended() == [("a", 9)]
    assert pool.ended() == []
    assert not ray.is_initialized()


def test_a_cluster_that_does_not_answer_and_ray_not_installed_are_said_plainly(fakes, monkeypatch):
    with pytest.raises(ConfigError, match=r"--ray nowhere: .*expected local, auto or HOST:PORT"):
        fakes.run(ray="nowhere")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'duallora\[ray\]'"):
        fakes.run(ray="local")

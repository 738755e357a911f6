"""Where the cells of a study run: as processes of this machine, or as tasks of a Ray cluster whose machines share its folder."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from duallora.errors import ConfigError, first_line
from duallora.train.launch import PARENT

POLL = 0.2  # seconds
# What the cells' machines have to know of this one's environment.
PASSED_ON = ("DUALLORA_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "PYTHONPATH")


class Pool(Protocol):
    """Where cells run."""

    def free(self) -> bool:
        """Whether another cell may be started now."""

    def start(self, name: str, arguments: Sequence[str], log: Path) -> None:
        """Starts Python with ``arguments``: stderr at the end of ``log``, stdout in a fresh .json file beside it."""

    def ended(self) -> list[tuple[str, int]]:
        """(name, exit code) of the cells that have ended since; -N if signal N did it."""

    def stop(self) -> None:
        """Asks all cells to save a checkpoint and end."""

    def close(self) -> None:
        """Ends what still runs, at once."""


class Local:
    """Cells as processes of this machine, in sessions of their own: Ctrl-C reaches the grid alone, which passes it on."""

    def __init__(self, workers: int):
        self.workers = workers
        self.processes: dict[str, subprocess.Popen] = {}
        self.slots: dict[str, int] = {}
        self.gpus = gpus()
        self.threads = str(max(1, cores() // workers))

    def free(self) -> bool:
        return len(self.processes) < self.workers

    def start(self, name: str, arguments: Sequence[str], log: Path) -> None:
        slot = next(number for number in range(self.workers) if number not in self.slots.values())
        environment = {"OMP_NUM_THREADS": self.threads, **os.environ}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        self.processes[name] = process(arguments, log, environment)
        self.slots[name] = slot

    def ended(self) -> list[tuple[str, int]]:
        codes = [(name, code) for name, held in self.processes.items() if (code := held.poll()) is not None]
        for name, _ in codes:
            del self.processes[name], self.slots[name]
        return codes

    def stop(self) -> None:
        for held in self.processes.values():
            held.terminate()

    def close(self) -> None:
        for held in self.processes.values():
            held.kill()
        for held in self.processes.values():
            held.wait()


def process(arguments: Sequence[str], log: Path, environment: Mapping[str, str], cwd: str | None = None) -> Any:
    """Python with ``arguments``, started as `Pool.start` says; a run in it stops by itself, as after SIGTERM, when this process is gone."""
    with log.open("ab") as said, log.with_suffix(".json").open("wb") as told:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env={**environment, PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=said,
            start_new_session=os.name == "posix",
        )


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """Names of the CUDA devices this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name and name != "-1"]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


class Cluster:
    """Ray runs the cells where it has room, on a GPU each if there are some; a lost worker counts as exit code 9.

    A cell claims as many cores as OMP_NUM_THREADS says, or one. As many are under way as the cluster has room for, or
    ``workers`` if that is more than one: with more than there is room for, Ray queues them, and may ask for machines.

    Raises:
        ConfigError: ray is not installed, or no cluster answers at ``address``.
    """

    def __init__(self, address: str, workers: int):
        try:
            import ray
        except ImportError:
            raise ConfigError("--ray needs Ray: pip install 'duallora[ray]'") from None
        self.ray = ray
        here = address == "local"
        threads = int(os.environ.get("OMP_NUM_THREADS", max(1, cores() // workers) if here else 1))
        options: dict[str, Any] = {}
        if here:  # nothing goes through the object store but a command and an exit code
            options = {"num_cpus": workers * threads, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--ray {address}: {first_line(error)}; expected local, auto or HOST:PORT") from error
        self.workers, self.threads = workers, threads
        self.gpu = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        self.task = ray.remote(num_cpus=threads, num_gpus=self.gpu, max_retries=0)(run_cell)
        self.environment = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
        self.environment["OMP_NUM_THREADS"] = str(threads)
        self.cells: dict[str, Any] = {}

    def free(self) -> bool:
        if self.workers > 1:
            return len(self.cells) < self.workers
        there = self.ray.cluster_resources()
        room = there.get("GPU", 0) if self.gpu else there.get("CPU", 0) // self.threads
        return len(self.cells) < max(1, room)

    def start(self, name: str, arguments: Sequence[str], log: Path) -> None:
        task = self.task.options(name=name)
        self.cells[name] = task.remote(list(arguments), str(log), self.environment, str(Path.cwd()))

    def ended(self) -> list[tuple[str, int]]:
        if not self.ray.is_initialized():  # closed: all are gone with it
            gone, self.cells = [(name, 9) for name in self.cells], {}
            return gone
        if not self.cells:
            return []
        ready, _ = self.ray.wait(list(self.cells.values()), num_returns=len(self.cells), timeout=0)
        return [(name, self._code(self.cells.pop(name))) for name, cell in list(self.cells.items()) if cell in ready]

    def _code(self, cell: Any) -> int:
        exceptions = self.ray.exceptions
        try:
            return self.ray.get(cell)
        except exceptions.TaskCancelledError:
            return 143
        except exceptions.OutOfMemoryError:
            return 8
        except exceptions.RayTaskError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(
                f"a worker could not start its cell ({reason}): the grid's folder, the working folder and this Python must be at "
                "the same place on every machine of the cluster"
            ) from None
        except (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.LocalRayletDiedError):
            return 9

    def stop(self) -> None:
        for cell in self.cells.values():
            self.ray.cancel(cell)

    def close(self) -> None:
        self.ray.shutdown()


def run_cell(arguments: list[str], log: str, environment: Mapping[str, str], folder: str) -> int:
    """On a worker: Python with ``arguments``, waited for; cancelled, it may save a checkpoint first. Its exit code."""
    # Ray cancels by SIGINT, which a grid under nohup passes on ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    running = process(arguments, Path(log), {**os.environ, **environment}, folder)
    try:
        while running.poll() is None:  # wait() would sleep through Ray's way of interrupting
            time.sleep(POLL)
        return running.returncode
    except BaseException:
        running.terminate()
        running.wait()
        raise

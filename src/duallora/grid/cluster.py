"""Cells as tasks of a Ray cluster whose machines share the study's folder."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duallora.errors import ConfigError
from duallora.grid.run import POLL, cores, process

# What the cells' machines have to know of this one's environment.
PASSED_ON = ("DUALLORA_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "PYTHONPATH")


class Cluster:
    """Ray runs the cells where it has room, on a GPU each if there are some; a lost worker counts as exit code 9.

    A cell claims as many cores as OMP_NUM_THREADS says, or one. ``workers`` caps the cells under way if it is more than
    one; on "local" it also is their number.

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
        options: dict[str, Any] = {"num_cpus": workers * threads} if here else {}
        os.environ.setdefault(
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
        )  # a cell without a GPU of its own may still see it
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False if here else None,
                **options,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"--ray {address}: {str(error).splitlines()[0]}; expected local, auto or HOST:PORT"
            ) from error
        self.most = workers if here or workers > 1 else None
        gpu = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        self.task = ray.remote(num_cpus=threads, num_gpus=gpu, max_retries=0)(run_cell)
        self.environment = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
        self.environment["OMP_NUM_THREADS"] = str(threads)
        self.cells: dict[str, Any] = {}

    def free(self) -> bool:
        return self.most is None or len(self.cells) < self.most

    def start(self, name: str, arguments: Sequence[str], log: Path) -> None:
        task = self.task.options(name=name)
        self.cells[name] = task.remote(list(arguments), str(log), self.environment, str(Path.cwd()))

    def ended(self) -> list[tuple[str, int]]:
        if not self.cells:
            return []
        ready, _ = self.ray.wait(list(self.cells.values()), num_returns=len(self.cells), timeout=0)
        codes = []
        for name in [name for name, cell in self.cells.items() if cell in ready]:
            codes.append((name, self._code(self.cells.pop(name))))
        return codes

    def _code(self, cell: Any) -> int:
        exceptions = self.ray.exceptions
        try:
            return self.ray.get(cell)
        except exceptions.TaskCancelledError:
            return 143
        except exceptions.OutOfMemoryError:
            return 8
        except (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.LocalRayletDiedError):
            return 9

    def stop(self) -> None:
        for cell in self.cells.values():
            self.ray.cancel(cell)

    def close(self) -> None:
        self.ray.shutdown()


def run_cell(arguments: list[str], log: str, environment: Mapping[str, str], folder: str) -> int:
    """On a worker: Python with ``arguments``, waited for; cancelled, it may save a checkpoint first. Its exit code."""
    running = process(arguments, Path(log), {**os.environ, **environment}, folder)
    try:
        while running.poll() is None:  # wait() would sleep through Ray's way of interrupting
            time.sleep(POLL)
        return running.returncode
    except BaseException:
        running.terminate()
        running.wait()
        raise

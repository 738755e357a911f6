"""Peak memory of a training step above the resident model, one method in a process of its own.

``python -m duallora.bench.memory SCENE METHOD`` prints one line of JSON; `measured` runs it. A process of its own,
because what one method leaves behind in the allocator would hide what the next one takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from duallora.bench.timing import synchronize
from duallora.errors import DualLoraError

# glibc then hands every tensor of 64 kB back as soon as it is freed, and the peak is what was in use at one moment.
# (With 1 MB, PEFT's LoRA on 128 tokens appears to take 370 MB instead of 232: holes between smaller blocks count.)
ALLOCATOR = {name: str(1 << 16) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")} | {
    "MALLOC_TOP_PAD_": "0"
}
REPEATS = 2
_PROC = Path("/proc/self")


def can_measure(device: torch.device) -> bool:
    """Whether the peak can be read: on CUDA, and on Linux where the kernel lets a process reset its own."""
    return device.type == "cuda" or _reset_peak()


def peak_above(run: Callable[[], object], device: torch.device) -> int:
    """Bytes by which the highest use of memory during ``run()`` lies above the use before it."""
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    if not _reset_peak():
        raise DualLoraError("this system does not let a process reset its peak (/proc/self/clear_refs)")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _reset_peak() -> bool:
    """Sets VmHWM to VmRSS (value 5, proc(5)); False where that has no effect."""
    try:
        (_PROC / "clear_refs").write_text("5")
        return _status("VmHWM") <= _status("VmRSS") + (1 << 20)
    except OSError:
        return False


def _status(name: str) -> int:
    """Bytes of a line such as ``VmRSS:  1234 kB``."""
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def measured(scene: dict[str, Any], method: str) -> dict[str, Any]:
    """`main` of that scene (the fields of `duallora.bench.scene.Scene`) in a fresh process."""
    command = [sys.executable, "-m", "duallora.bench.memory", json.dumps(scene), method]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ALLOCATOR}, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DualLoraError(f"measuring the memory of {method} ended with exit code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def main(scene_json: str, method: str) -> None:
    from duallora.bench.scene import Scene, Stage
    from duallora.terminal import quiet_libraries

    with quiet_libraries():
        stage = Stage(Scene(**json.loads(scene_json)))
        trial = stage.trial(method)
        trial.step()  # optimizer states, thread pools and the libraries' own buffers exist from here on
        peaks = [peak_above(trial.step, stage.device) for _ in range(REPEATS)]
    print(json.dumps({"peak_bytes": int(statistics.median(peaks)), "peaks": peaks, "model_bytes": stage.model_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])

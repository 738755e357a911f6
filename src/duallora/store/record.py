"""What ran, on what, with which code: the facts a result needs before anybody can trust or repeat it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")


def environment() -> dict[str, Any]:
    """Versions, code, device and threads of this process; ``commit`` and ``dirty`` are None outside a checkout."""
    import torch

    versions = {"duallora": _version("duallora"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    return {
        **git_state(Path(__file__).parent),
        "versions": versions,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def git_state(folder: Path) -> dict[str, Any]:
    """``{"commit": sha, "dirty": bool}`` of the checkout that tracks ``folder``, else None for both.

    A package installed into a virtual environment that lies inside some other project's checkout is not tracked by
    it, and that project's commit says nothing about the package. Edits below ``results/`` and ``docs/`` are not meant by
    ``dirty``: they are what measuring writes, not what is measured.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if not git("ls-files", "."):
            return {"commit": None, "dirty": None}
        written = (":(top,exclude)results", ":(top,exclude)docs")
        edits = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *written)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(edits)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def device_name() -> str:
    """The accelerator's name, or the processor's where there is none."""
    import torch  # here and above: who only reads and writes these files need not wait for it

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "mps"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return f"cpu ({line.partition(':')[2].strip()})"
    return f"cpu ({platform.processor() or platform.machine()})"


def now() -> str:
    """This moment in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def result(
    kind: str,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    seeds: Sequence[int],
    started: float,
    data: Mapping[str, str] | None = None,
    base: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One committed result: every value together with what is needed to get it again.

    ``recipe`` is the resolved recipe, ``data`` the fingerprint of each split, ``base`` that of the base weights and
    ``started`` the ``time.time()`` at which the work began. ``more`` holds what only this kind of result has.
    """
    ended = time.time()
    moment = datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds")
    return {
        "kind": kind,
        **environment(),
        "started": moment,
        "seconds": round(ended - started, 1),
        "seeds": list(seeds),
        "data": dict(data or {}),
        "base": base,
        "recipe": dict(recipe),
        "metrics": dict(metrics),
        **more,
    }


def write_json(path: Path | str, payload: Any) -> None:
    """Writes ``payload`` so that a reader sees the old file or the whole new one, never a part."""
    write_text(path, json.dumps(payload, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path | str, text: str) -> None:
    """Atomic text file: written beside, flushed to the disk, renamed. The mode follows the umask."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    fsync_folder(path.parent)


def read_json(path: Path | str) -> Any:
    """What a file holds; ValueError where that is no JSON, or is nested too deeply for any file of ours."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def flush(path: Path) -> None:
    """Forces a finished file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Makes renames inside ``folder`` survive a power cut; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow_umask(folder: Path) -> None:
    """Gives the files of ``folder`` the mode any new file would have: safetensors writes them 0600 whatever the umask."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~umask)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

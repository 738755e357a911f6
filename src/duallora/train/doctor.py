"""Is this machine ready: packages, method, devices, memory, disk, built-in models, data; and the fix for what is not."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from duallora.console import UTF8
from duallora.errors import first_line
from duallora.folders import cache_folder

GIGABYTE = 1e9
ROOM = 2 * GIGABYTE  # a small model, its cache and a few checkpoints
COMMAND_LINE = "command line"  # whose packages a base install lacks


# Releases that mend what a stranger's file could use, by what we read such files with.
FIXED = {
    "torch": ("2.6.0", "CVE-2025-32434: torch.load(weights_only=True) can run code"),
    "jinja2": ("3.1.6", "CVE-2025-27516: a chat template can leave the sandbox"),
    "pyarrow": ("14.0.1", "CVE-2023-47248: a parquet file can run code"),
    "transformers": ("4.53.0", "CVE-2025-5197 and others: patterns that take for ever on a stranger's text"),
}


class Check(NamedTuple):
    """``missing`` makes duallora unusable, ``note`` only a part of it; ``fix`` is a command or setting."""

    name: str
    status: Literal["ok", "note", "missing"]
    found: str
    fix: str = ""


def checks() -> list[Check]:
    """Every check, in the order to read them; a check that fails to run is reported as missing."""
    found: list[Check] = []
    for part in (_python, _packages, _vulnerable, _method, _devices, _memory, _disk, _models, _data):
        found += _guarded(part)
    return found


def usable(found: list[Check]) -> bool:
    return all(check.status != "missing" for check in found)


def _guarded(part: Callable[[], Iterator[Check]]) -> list[Check]:
    try:
        return list(part())
    except Exception as error:  # a broken installation can raise anything at import, and that is the finding
        name = part.__name__.removeprefix("_")
        fix = UTF8 if isinstance(error, UnicodeDecodeError) else "pip install --force-reinstall duallora"
        return [Check(name, "missing", f"{type(error).__name__}: {first_line(error)}", fix)]


def _python() -> Iterator[Check]:
    version = platform.python_version()
    wanted = metadata.metadata("duallora")["Requires-Python"] or ">=3.10"
    from packaging.specifiers import SpecifierSet

    fits = SpecifierSet(wanted).contains(version, prereleases=True)
    where = f"{version}, {platform.system()} {platform.machine()}, {sys.executable}"
    yield Check("python", "ok" if fits else "missing", where, "" if fits else f"use a Python {wanted}")


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    yield Check("duallora", "ok", metadata.version("duallora"))
    absent = []
    for line in metadata.requires("duallora") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": "train"}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            absent.append(requirement.name)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Check(requirement.name, "ok", version)
        else:
            yield Check(requirement.name, "missing", f"{version}, needs {wanted}", f'pip install -U "{wanted}"')
    if absent:
        yield Check(COMMAND_LINE, "missing", f"not installed: {', '.join(absent)}", "pip install 'duallora[train]'")


def _vulnerable() -> Iterator[Check]:
    from packaging.version import Version

    for name, (fixed, advisory) in FIXED.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if Version(version) < Version(fixed):
            yield Check(name, "missing", f"{version} has {advisory}", f'pip install -U "{name}>={fixed}"')


def _method() -> Iterator[Check]:
    import peft

    import duallora

    known = duallora.DualLoraConfig in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.values()
    if known:
        yield Check("method", "ok", "DUALLORA is registered with PEFT")
    else:
        fix = 'pip install --force-reinstall --no-deps duallora; put "import duallora" before PeftModel.from_pretrained'
        yield Check("method", "missing", f"PEFT {peft.__version__} does not know DUALLORA", fix)


def _devices() -> Iterator[Check]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    found = f"{threads} threads on {cores} cores"
    if threads > cores:
        yield Check("cpu", "note", found, f"export OMP_NUM_THREADS={cores}")
    else:
        yield Check("cpu", "ok", found)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield Check(f"cuda:{index}", "ok", f"{device.name}, {device.total_memory / GIGABYTE:.0f} GB")
    elif torch.backends.mps.is_available():
        yield Check("mps", "ok", "Apple GPU")
    else:
        yield Check("gpu", "ok", "none; everything runs on the CPU")


def _memory() -> Iterator[Check]:
    import psutil

    free = psutil.virtual_memory().available
    if free < ROOM:
        fix = "close other programs; lower train.batch_size and data.max_length"
        yield Check("memory", "note", f"{free / GIGABYTE:.1f} GB free", fix)
    else:
        yield Check("memory", "ok", f"{free / GIGABYTE:.1f} GB free")


def _disk() -> Iterator[Check]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder, setting in (
        ("run folder", Path.cwd(), "-o on another disk"),
        ("model cache", cache_folder(), "DUALLORA_CACHE"),
        ("hub cache", Path(HF_HUB_CACHE), "HF_HOME"),
    ):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        found = f"{folder}: {free / GIGABYTE:.1f} GB free"
        if str(folder).startswith("~"):  # no home: the hub's client would make a folder of that name here
            yield Check(name, "note", f"{folder}: no home folder", f"use {setting}")
        elif not os.access(there, os.W_OK):
            yield Check(name, "note", f"{folder}: not writable", f"use {setting}")
        elif free < ROOM:
            yield Check(name, "note", found, f"free some, or use {setting}")
        else:
            yield Check(name, "ok", found)


def _models() -> Iterator[Check]:
    from duallora.errors import ConfigError
    from duallora.store import models

    for name in models.BUILTIN:
        try:
            path = models._package_path(name)
        except ConfigError as error:
            message, _, fix = str(error).rpartition(": ")
            yield Check(name, "note", message, fix)
        else:
            yield Check(name, "ok", str(path))


def _data() -> Iterator[Check]:
    folder = os.environ.get("DUALLORA_DATA")
    if folder and not Path(folder).is_dir():
        yield Check("task data", "note", f"DUALLORA_DATA={folder} is no folder", "set it to the folder with the data")
    elif folder:
        yield Check("task data", "ok", f"DUALLORA_DATA={folder}")
    else:
        yield Check("task data", "ok", "from the hub; --data-dir or DUALLORA_DATA names a local folder")
    from huggingface_hub.constants import HF_HUB_OFFLINE

    from duallora.tasks.hub import reachable

    local = "local folders, built-in and cached models only"
    if HF_HUB_OFFLINE:
        yield Check("hub", "ok", f"switched off by HF_HUB_OFFLINE: {local}")
    elif reachable():
        yield Check("hub", "ok", "reachable")
    else:
        yield Check("hub", "note", f"not reachable: {local}", "export HF_HUB_OFFLINE=1 saves the waiting")

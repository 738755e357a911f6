"""The file of one benchmark: cells of one environment, written one by one, found again by a run that goes on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from duallora.core.equation import Update
from duallora.errors import ConfigError, IntegrityError
from duallora.ops.backends import pick
from duallora.store import record
from duallora.terminal import clock, quiet_libraries, say

PACKAGE = Path(__file__).parents[1]
# What must agree before a cell measured earlier stands beside a new one. Not the commit: one that leaves the package
# alone changes no time, while uncommitted edits change it; ``source`` sees both.
SAME = ("versions", "device", "threads", "platform", "ran_on", "backend", "source")


def default_device(name: str | None) -> torch.device:
    """The device of that name; cuda where there is one, else the CPU, for None. ConfigError for one that is not here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: expected cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: this torch sees no CUDA device; use --device cpu")
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """`duallora.store.record.environment`, the device used, what "auto" is there, a digest of the package's source."""
    factor = torch.zeros(1, 1, device=device)
    backend = pick("auto", Update(factor, factor, factor, factor, 1.0), torch.float32)
    name = backend.__name__.rpartition(".")[2]
    return {**record.environment(), "ran_on": device.type, "backend": name, "source": source_digest()}


def source_digest(package: Path = PACKAGE) -> str:
    """sha256 over every source file but the verbs': the code whose speed was measured."""
    total = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".cpp", ".h") and path.parent.name != "cli":
            total.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return total.hexdigest()


def load_average() -> float | None:
    """Processes that wanted a core during the last minute, this one included; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


class Store:
    """Cells by key in ``path``; what another environment measured is not kept (``dropped`` counts it)."""

    def __init__(self, path: Path, kind: str, device: torch.device, *, seed: int = 0) -> None:
        self.path = path
        facts = environment(device)
        self.content: dict[str, Any] = {"kind": f"bench-{kind}", **facts, "seeds": [seed], "cells": []}
        earlier = read(path)
        cells = earlier.get("cells", [])
        same = all(earlier.get(name) == facts[name] for name in SAME)
        self.dropped = 0 if same else len(cells)
        if same:
            self.content["cells"] = cells

    def measure(
        self,
        keys: Sequence[Mapping[str, Any]],
        measure: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        summary: Callable[[dict[str, Any]], str],
        console: Console | None,
        *,
        is_done: Callable[[dict[str, Any] | None], bool] = lambda cell: cell is not None,
    ) -> dict[str, Any]:
        """Measures every key whose cell is not done, writes each at once, and returns how many."""
        console = console or Console()
        todo = [key for key in keys if not is_done(self.find(key))]
        replaced = f"; {self.dropped} of another machine or other code are replaced" if self.dropped else ""
        say(console, "cells", f"{len(todo)} of {len(keys)} to measure{replaced}")
        for number, key in enumerate(todo, 1):
            begin = time.monotonic()
            with quiet_libraries():
                cell = self.add(key, measure(key))
            say(console, f"{number}/{len(todo)}", f"{summary(cell)}  [dim]{clock(time.monotonic() - begin)}[/]")
        skipped = len(keys) - len(todo)
        return {"output": str(self.path), "measured": len(todo), "skipped": skipped, "dropped": self.dropped}

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        return next((cell for cell in self.content["cells"] if cell["cell"] == dict(key)), None)

    def add(self, key: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        """Puts the cell in the place of one with the same key and writes the file."""
        cell = {"cell": dict(key), "measured": record.now(), "load": load_average(), **found}
        self.content["cells"] = [old for old in self.content["cells"] if old["cell"] != cell["cell"]] + [cell]
        record.write_json(self.path, self.content)
        return cell


def read(path: Path) -> dict[str, Any]:
    """What the file holds, {} where there is none; IntegrityError where it is no JSON object."""
    if not path.exists():
        return {}
    try:
        content = record.read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} is not JSON ({error}); move it away or write elsewhere with -o") from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{path} holds no JSON object; move it away or write elsewhere with -o")
    return content

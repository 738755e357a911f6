"""The runs below a folder, side by side: how they stand, what they reached, and in which settings they differ."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table

from duallora.errors import ConfigError, DualLoraError
from duallora.store.checkpoint import flatten
from duallora.store.run_folder import FACTS, RunFolder
from duallora.terminal import clock

DEEP = 4  # folders below the one that is named
PLACES = ("output", "data.data_dir", "plugins", "train.save_steps", "train.report_to")  # they say nothing of a run
REFRESH = 2.0  # seconds
TAIL = 1 << 14  # bytes of a log that hold its last line


def listed(folders: Sequence[Path], console: Console, live: bool = False) -> dict[str, Any]:
    """Shows the runs in and below ``folders``, the newest last, and returns ``{"runs": [...]}``.

    ``live`` shows them anew every `REFRESH` seconds, in a terminal, until none is running or Ctrl-C.

    Raises:
        ConfigError: a folder does not exist, or holds no run.
    """
    found, differing = _found(folders)
    if not (live and console.is_terminal):
        console.print(_shown(found, differing))
        return {"runs": found, "differing": differing}
    with Live(_shown(found, differing), console=console, auto_refresh=False) as view, suppress(KeyboardInterrupt):
        while any(run["status"] == "running" for run in found):
            time.sleep(REFRESH)
            found, differing = _found(folders)
            view.update(_shown(found, differing), refresh=True)
    return {"runs": found, "differing": differing}


def _found(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """The runs and the settings they differ in."""
    found = [_facts(path) for folder in folders for path in _below(folder)]
    if not found:
        raise ConfigError(
            f"no run in {', '.join(map(str, folders))}, nor {DEEP} folders below; duallora train -o DIR makes one"
        )
    found.sort(key=lambda run: run.get("started") or "")
    return found, _differing([run["recipe"] for run in found if run["recipe"]])


def _shown(found: Sequence[dict[str, Any]], differing: Sequence[str]) -> Group:
    """The table, and below it, where there is the width of the terminal for them, the settings that differ."""
    table = Table(Column("run", overflow="fold"), "status", box=SIMPLE)
    for heading in ("steps", "loss", "score", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    settings = Table.grid(Column(overflow="fold"), "", padding=(0, 2, 0, 0))
    for run in found:
        own = {key: run["recipe"].get(key) for key in differing if run["recipe"].get(key) is not None}
        words = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in own.items())
        loss = " → ".join(f"{value:.3f}" for value in (run["loss_before"], run["loss"]) if value is not None)
        score = "" if run["score"] is None else f"{run['metric']} {run['score']:.4g}"
        status = f"[red]{run['status']}, at chance[/]" if run["at_chance"] else run["status"]
        steps = "" if run["steps"] is None else f"{run['steps']:,}"
        steps = f"{run['step']:,}/{steps}" if steps and run["step"] != run["steps"] else steps
        seconds = "" if run["seconds"] is None else clock(run["seconds"])
        table.add_row(escape(run["run"]), status, steps, loss, score, seconds)
        settings.add_row(f"  {escape(run['run'])}", escape(words))
    return Group(table, "  differ in:", settings) if differing else Group(table)


def _below(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected a run or a folder of runs")
    for place, names, files in os.walk(folder):
        if FACTS in files:
            yield Path(place)
        deep = len(Path(place).relative_to(folder).parts) < DEEP
        names[:] = sorted(name for name in names if deep and FACTS not in files)


def _facts(path: Path) -> dict[str, Any]:
    run = RunFolder(path)
    told: dict[str, Any] = {"run": str(path), "recipe": {}, "metric": None}
    told |= dict.fromkeys(("started", "steps", "step", "loss_before", "loss", "score", "seconds", "at_chance"))
    try:
        facts, metrics = run.facts() or {}, run.metrics()
    except DualLoraError as error:  # one that cannot be read does not hide the others
        return {**told, "status": "damaged", "error": str(error)}
    lines = run.log.lines(TAIL)
    result = facts.get("result") or {}
    scores, name = result.get("metrics", {}), (metrics or {}).get("main_metric")
    last = next((line["loss"] for line in reversed(lines) if "loss" in line), None)
    return {
        **told,
        "status": facts["status"],
        "started": facts.get("started"),
        "recipe": flatten(facts.get("recipe", {})),
        "steps": facts.get("steps"),
        "step": max((line["step"] for line in lines), default=0) if facts["status"] != "done" else facts.get("steps"),
        "loss_before": facts.get("loss_before"),
        "loss": scores.get("loss", last),
        "metric": name,
        "score": scores.get("test", {}).get(name, scores.get(name)) if name != "loss" else None,
        "seconds": result.get("seconds"),
        "at_chance": bool(result.get("at_chance")),
    }


def _differing(recipes: Sequence[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if not key.startswith(PLACES))
    return [key for key in keys if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)]

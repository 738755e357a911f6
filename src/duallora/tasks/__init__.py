"""Data: examples, tasks with their protocols and metrics, and the encoding into tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from duallora.errors import ConfigError, unknown
from duallora.tasks import commonsense, docstrings, e2e, glue, made_up, metrics  # noqa: F401 (each registers its metrics)
from duallora.tasks.encode import IGNORE, Collator, Counts, Encoded, encode, encode_prompt, encode_split, encode_texts
from duallora.tasks.example import Example
from duallora.tasks.files import load_data
from duallora.tasks.local import data_folder
from duallora.tasks.task import LazySplits, Task, hold_out

__all__ = [
    "IGNORE",
    "TASKS",
    "Collator",
    "Counts",
    "Encoded",
    "Example",
    "LazySplits",
    "Task",
    "add",
    "encode",
    "encode_prompt",
    "encode_split",
    "encode_texts",
    "hold_out",
    "load_data",
    "load_task",
    "metrics",
    "names",
]

TASKS: tuple[str, ...] = (*e2e.FORMS, *commonsense.NAMES, *glue.PROTOCOLS, *made_up.NAMES)
_added: dict[str, Callable[[Path | None], Task]] = {}


def names() -> list[str]:
    """Every task's name: ``TASKS`` and those that `add` made known."""
    return [*TASKS, *_added]


def add(name: str, load: Callable[[Path | None], Task]) -> None:
    """Make a task of your own known by its name; ``load`` gets the data folder, or None where none is set.

    Raises:
        ConfigError: the name is taken.
    """
    if name in TASKS:
        raise ConfigError(f"task {name!r} is one of duallora's own: choose another name.")
    _added[name] = load


def load_task(name: str, *, data_dir: str | Path | None = None) -> Task:
    """One of `names` with its protocol, read on first use of a split.

    data_dir: folder of the data sets (default: DUALLORA_DATA). Where one is set only it is read, and a missing file is
        a DataError; where none is, the data come from the hub. Tasks that code makes up read neither.

    Raises ConfigError for an unknown name.
    """
    if name not in names():
        raise unknown("task", name, names())
    folder = data_folder(data_dir)
    if name in _added:
        return _added[name](folder)
    if name in e2e.FORMS:
        return e2e.load(name, folder)
    if name in made_up.NAMES:
        return made_up.load(name)
    return (commonsense if name in commonsense.NAMES else glue).load(name, folder)

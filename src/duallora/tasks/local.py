"""Where a task's files lie on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from duallora.errors import DataError


def data_folder(data_dir: str | Path | None) -> Path | None:
    """The folder given, else DUALLORA_DATA; None where neither is: the data then come from the hub."""
    chosen = data_dir or os.environ.get("DUALLORA_DATA")
    if not chosen:
        return None
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        origin = "data.data_dir" if data_dir else "DUALLORA_DATA"
        raise DataError(f"{origin} is {str(chosen)!r}, which is no folder. Expected the folder of the data sets.")
    return folder


def seek_file(folder: Path, places: Sequence[str], names: Sequence[str]) -> Path | None:
    """The first of ``names`` in ``folder/place`` for the first place that has it, or None."""
    paths = (folder / place / name for place in places for name in names)
    return next((path for path in paths if path.is_file()), None)


def find_file(folder: Path, places: Sequence[str], names: Sequence[str], what: str) -> Path:
    """The first of ``names`` in ``folder/place`` for the first place that has it.

    Raises DataError listing where it was looked for.
    """
    if found := seek_file(folder, places, names):
        return found
    looked = ", ".join(str(folder / place / names[0]) for place in places)
    others = f" (or {', '.join(names[1:])} there)" if len(names) > 1 else ""
    raise DataError(
        f"{what} is missing: no file {looked}{others}. Put it there, or unset data.data_dir and DUALLORA_DATA to load "
        "the data set from the hub."
    )

"""Where this machine keeps what is made once for all runs: compiled kernels, converted models."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """DUALLORA_CACHE, else XDG_CACHE_HOME/duallora, else ~/.cache/duallora; it need not exist yet.

    A process without a home (no HOME, and a user id that the system has no entry for, as in some containers) gets a folder
    of its user's own among the temporary ones, and where another user has taken that one, a fresh one.
    """
    try:
        if own := os.environ.get("DUALLORA_CACHE"):
            return Path(own).expanduser()
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base).expanduser() if base else Path.home() / ".cache") / "duallora"
    except RuntimeError:  # how pathlib says that there is no home
        return _temporary()


def _temporary() -> Path:
    """A folder that nobody else can have put anything into: kernels are loaded from it."""
    if os.name == "posix":
        folder = Path(tempfile.gettempdir()) / f"duallora-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix="duallora-"))

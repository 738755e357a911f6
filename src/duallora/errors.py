"""What can go wrong, and the exit code each failure gives the command line.

Every message names the value seen, what was expected and the remedy.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterable
from typing import Any

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
# What torch's and safetensors' writers say of the same, and torch's allocators of memory, in errors without a number.
DISK_WORDS = (
    "iostream error",
    "PytorchStreamWriter",
    "inline_container",
    "No space left",
    "os error 28",
    "File too large",
)
MEMORY_WORDS = (
    "out of memory",
    "DefaultCPUAllocator",
    "can't allocate memory",
    "Cannot allocate memory",
    "can't start new thread",
)


class DualLoraError(Exception):
    """Base of the errors a user can cause and mend.

    ``exit_code`` is what the command line returns, ``kind`` what the record of a run says of an end by it.
    """

    exit_code = 1
    kind = "failed"


class ConfigError(DualLoraError, ValueError):
    """Settings are unknown, of the wrong type or out of range: ``ConfigError(problem, ...)``."""

    exit_code = 2

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence for each."""
        return self.args

    def __str__(self) -> str:
        """One problem as it is; several as a list under their number."""
        if len(self.problems) == 1:
            return self.problems[0]
        shown = "\n".join(f"  {problem}" for problem in self.problems[:20])
        rest = f"\n  and {len(self.problems) - 20} more" if len(self.problems) > 20 else ""
        return f"{len(self.problems)} problems in the configuration:\n{shown}{rest}"


class DataError(DualLoraError, ValueError):
    """A data file is missing, empty or malformed."""

    exit_code = 3


class IntegrityError(DualLoraError):
    """A file is damaged, or an adapter does not belong to this base model."""

    exit_code = 4


class NonFiniteError(DualLoraError):
    """A loss, gradient or weight is NaN or infinite."""

    exit_code = 5
    kind = "diverged"


class DivergedError(NonFiniteError):
    """The loss of a step is far above the usual, and the recipe says to stop."""

    kind = "diverged"


class LockedError(DualLoraError):
    """Another process is writing to this folder."""

    exit_code = 6


class DiskError(DualLoraError):
    """The disk is full, or a path cannot be written."""

    exit_code = 7


class OutOfMemoryError(DualLoraError):
    """The model or the batch does not fit in memory."""

    exit_code = 8
    kind = "out of memory"


class LostProcessError(DualLoraError):
    """Another process of a run in several processes has ended."""

    exit_code = 9
    kind = "lost"


class GridError(DualLoraError):
    """Cells of a grid have failed for good; the others are done."""

    exit_code = 10


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and did, in a state it can be resumed from; ``exit_code`` is 130 or 143."""

    kind = "stopped"

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number


def unknown(what: str, name: str, known: Iterable[str], more: str = "") -> ConfigError:
    """For a ``name`` that is none of ``known``: the nearest of them, all of them, and ``more``."""
    import difflib

    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
    return ConfigError(f"unknown {what} {name!r}; nearest: {near}. Expected one of {', '.join(known)}{more}")


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def lacking(error: ModuleNotFoundError) -> str:
    """What to say where a package of another is not installed, as in a base install; "" where the module is our own."""
    name = (error.name or "").partition(".")[0]
    if not name or name == "duallora":
        return ""
    return (
        f"this needs the package {name}, which is not installed: pip install 'duallora[train]' brings all that the command line "
        f"needs, pip install {name} what a model or a plug-in asks for beyond that. The method itself (import duallora) works without."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the device has no memory left, by what Python, torch or the system raises."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY_WORDS)
    return said or isinstance(error, (MemoryError, OutOfMemoryError))


def is_disk_failure(error: BaseException) -> bool:
    """Whether a file cannot be written: the disk is full, read-only, not ours or failing."""
    if isinstance(error, OSError):
        return error.errno in DISK
    foreign = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    return (foreign and any(words in str(error) for words in DISK_WORDS)) or isinstance(error, DiskError)


def is_number(value: Any) -> bool:
    """A finite int or float; True and False are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_rank(name: str, value: Any) -> None:
    """Raise ConfigError unless ``value`` is a whole number >= 1."""
    if not is_number(value) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r}: expected a whole number >= 1 (a rank).")


def check_steps(name: str, value: Any) -> None:
    """Raise ConfigError unless ``value`` is a whole number >= 0."""
    if not is_number(value) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name}={value!r}: expected a whole number of optimizer steps >= 0.")


def check_positive(name: str, value: Any) -> None:
    """Raise ConfigError unless ``value`` is a finite number > 0."""
    if not is_number(value) or value <= 0:
        raise ConfigError(f"{name}={value!r}: expected a finite number > 0.")

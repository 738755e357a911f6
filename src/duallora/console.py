"""Where the command line speaks, and which exit code a failure gives.

What a verb has to say goes to stdout (`results`): tables, YAML, the run's progress. With ``--json`` all of that moves to
stderr and stdout holds one line, the JSON object. Errors and notes always go to stderr (`notes`).
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from duallora.errors import DualLoraError

results = Console(highlight=False)
notes = Console(stderr=True, highlight=False)

# typer exports only this subclass; whether click's or its own copy of click is behind it depends on the version.
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "can't allocate memory", "Cannot allocate memory")


def use_json(on: bool) -> None:
    """Keeps stdout for the JSON line, or gives it back to people."""
    results.stderr = on


def print_json(payload: Mapping[str, Any]) -> None:
    """One line on stdout. NaN and infinities, which JSON has no words for, become null."""
    sys.stdout.write(json.dumps(_plain(payload), allow_nan=False, ensure_ascii=True) + "\n")
    sys.stdout.flush()


def print_text(text: str) -> None:
    """Text as it is, whatever brackets it holds and however long its lines are, for pipes and files."""
    results.print(Text(text), soft_wrap=True, end="" if text.endswith("\n") else "\n")


def print_error(message: str, hint: str = "", *, label: str = "error") -> None:
    """``error: message`` in red on stderr; further lines of the message, and the hint, follow plainly."""
    first, _, rest = message.partition("\n")
    text = Text.assemble((f"{label}: ", "bold red"), (first, "red"))
    if rest:
        text.append("\n" + rest)
    if hint:
        text.append("\n" + hint, style="dim")
    notes.print(text, soft_wrap=True)


def exit_code_for(error: BaseException) -> int:
    """The exit code of the command line: see `duallora.errors`; 1 is a fault in this program or a library."""
    if isinstance(error, DualLoraError):
        return error.exit_code
    if isinstance(error, USAGE_ERROR):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "exit_code", 130)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, MemoryError):
        return 8
    if isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY):
        return 8
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return 8
    if isinstance(error, OSError) and error.errno in DISK:
        return 7
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)):
        return 2  # a path in the command is wrong; missing data files raise DataError
    return 1


def explain(error: BaseException, arguments: Sequence[str] = ()) -> tuple[str, str]:
    """(message, remedy) of a failure of this command line. Errors of this package name their remedy themselves."""
    code = exit_code_for(error)
    if isinstance(error, DualLoraError):
        return str(error), ""
    if isinstance(error, USAGE_ERROR):
        path = error.ctx.command_path if error.ctx else "duallora"
        return _with_value(error, arguments), f"{path} --help shows what it takes."
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return (isinstance(error, KeyboardInterrupt) and str(error)) or "nothing is left half-written", ""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if code == 8:
        return (
            f"out of memory: {first}",
            "Lower train.batch_size (and raise train.gradient_accumulation_steps), eval.batch_size or data.max_length, "
            "or set train.gradient_checkpointing=true.",
        )
    if isinstance(error, OSError) and error.filename is not None:
        first = f"{error.filename}: {error.strerror}"
    if code == 7:
        return first, "Free space or permissions are needed there; choose another folder with -o."
    if code == 2:
        return first, ""
    return f"{type(error).__name__}: {first}", "This is a fault in duallora or a library; --debug shows where."


def _with_value(error: Any, arguments: Sequence[str]) -> str:
    """A usage error's message, with the value that was given for the option where typer leaves it out."""
    message = error.format_message().replace("Value error, ", "")
    given = dict(pairwise(arguments))
    for option in getattr(getattr(error, "param", None), "opts", ()):
        if isinstance(error, typer.BadParameter) and option in given:
            message = message.replace(f"Invalid value for '{option}'", f"{option} {given[option]}")
    return message


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if value - value == 0 else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)

"""Where the command line speaks, and which exit code a failure gives.

What a verb has to say goes to stdout (`results`): tables, YAML, the run's progress. With ``--json`` all of that moves to
stderr and stdout holds one line, the JSON object. Errors and notes always go to stderr (`notes`). What an output's encoding
lacks is replaced, never fatal (`replace_unencodable`).
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from duallora.errors import DualLoraError, first_line, is_disk_failure, is_out_of_memory, lacking

results = Console(highlight=False)
notes = Console(stderr=True, highlight=False)

# typer exports only this subclass; whether click's or its own copy of click is behind it depends on the version.
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]

UTF8 = "unset PYTHONUTF8, or export LC_ALL=C.UTF-8"  # the remedy where Python takes every file for ASCII

# How this package's own signs and rich's are written where the output cannot encode them; rich draws boxes and bars in
# ASCII there by itself. The braille patterns are the frames of its spinner.
SIGNS = {
    "…": "...", "•": "*", "²": "^2", "±": "+-", "·": "_", "↵": "\\n", "⇥": "\\t", "␍": "\\r",
    "▲": "^", "▼": "v", "◂": "<", "▸": ">", **dict.fromkeys(map(chr, range(0x2800, 0x2900)), "*"),
}  # fmt: skip


def replace_unencodable() -> None:
    """Makes this process's stdout and stderr write a stand-in for every character that their encoding lacks.

    A sign of this program becomes its like in ASCII (`SIGNS`), anything else its escape, such as ``\\u4f60``.
    """
    codecs.register_error("duallora", _stand_in)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not what a notebook or a test puts there
            stream.reconfigure(errors="duallora")


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """The error handler: (ASCII text, where to go on)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(SIGNS.get(a) or a.encode("ascii", "backslashreplace").decode() for a in letters), error.end


def open_closed() -> None:
    """Opens those of this process's streams that the caller has closed (``>&-``), so that what is written there is lost.

    Else the next file to be opened, such as a checkpoint's, would have their number, and libraries in C would write into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def discard() -> None:
    """Drops what stdout still holds and will be given: Python must not complain while it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def use_json(on: bool) -> None:
    """Keeps stdout for the JSON line, or gives it back to people."""
    results.stderr = on


def print_json(payload: Mapping[str, Any]) -> None:
    """One line on stdout. NaN and infinities, which JSON has no words for, become null."""
    sys.stdout.write(json.dumps(_plain(payload), allow_nan=False, ensure_ascii=True) + "\n")
    sys.stdout.flush()


def print_text(text: str) -> None:
    """YAML or JSON as it is, whatever brackets it holds and however long its lines are, for pipes and files.

    Both are read back as UTF-8. Where the output is anything else it is ASCII: in YAML a letter's escape is the letter.
    """
    if not results.encoding.startswith("utf-8"):
        text = text.encode("ascii", "backslashreplace").decode()
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


def explain(error: BaseException, arguments: Sequence[str] = ()) -> tuple[int, str, str]:
    """(exit code, message, remedy) of a failure of this command line. Errors of this package name their remedy themselves.

    The codes are those of `duallora.errors`; 1 is a fault in this program or a library.
    """
    if isinstance(error, DualLoraError):
        return error.exit_code, str(error), ""
    if isinstance(error, USAGE_ERROR):
        path = error.ctx.command_path if error.ctx else "duallora"
        name = getattr(error, "option_name", "").strip("-").replace("-", "_")
        takes_settings = error.ctx is not None and any("--set" in one.opts for one in error.ctx.command.params)
        setting = f"A setting of the recipe is given as --set {name}=VALUE. " if name and takes_settings else ""
        return 2, _with_value(error, arguments), f"{setting}{path} --help shows what it takes."
    nothing = "nothing is left half-written"
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "exit_code", 130), str(error) or nothing, ""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None), nothing, ""
    first = first_line(error)
    if is_out_of_memory(error):
        remedy = (
            "Lower train.batch_size (and raise train.gradient_accumulation_steps), eval.batch_size or data.max_length, "
            "or set train.gradient_checkpointing=true."
        )
        return 8, f"out of memory: {first}", remedy
    if isinstance(error, OSError) and error.filename is not None:
        first = f"{error.filename}: {error.strerror}"
    if is_disk_failure(error):
        return 7, first, "Free space or permissions are needed there; choose another folder with -o."
    # A path in the command is wrong; missing data files raise DataError.
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)):
        return 2, first, ""
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return 2, first, ""
    if isinstance(error, ModuleNotFoundError) and (what := lacking(error)):
        return 2, what, ""
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib, of a path that begins with ~
        return 2, first, "~ stands for no folder here: set HOME, or write the path in full."
    if isinstance(error, UnicodeDecodeError) and error.encoding == "ascii":
        return 2, first, f"Files are read as ASCII here, which torch cannot be imported with: {UTF8}."
    return 1, f"{type(error).__name__}: {first}", "This is a fault in duallora or a library; --debug shows where."


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

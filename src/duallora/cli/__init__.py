"""The command line: verbs only. Each reads its options, calls one function elsewhere and shows what came back.

Exit codes: 0 done, 1 a fault in the program, 2 configuration or usage, 3 data, 4 integrity, 5 non-finite, 6 locked, 7 disk,
8 memory, 9 a process of several is gone, 10 cells of a grid failed, 130 and 143 interrupted by SIGINT and SIGTERM. With
``--json`` the only line on stdout is a JSON object, also on failure. Torch and its kin are imported inside the verbs: help
and errors in options must not wait for them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from typing import Any, NoReturn

import typer

from duallora import console
from duallora.cli.app import app
from duallora.terminal import quiet_imports

TOLD_BY_FIRST = (9, 130, 143)  # ends of all processes, of which the first one tells
FIRST_WORD = 15.0  # seconds the first one has to report a failure that all share: the launcher then ends the others

THEMES = ("training", "sharing", "machine", "benching", "studies")  # a module of verbs each, in the order of --help
for theme in THEMES:
    import_module(f"duallora.cli.{theme}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The ``duallora`` program; leaves with the exit codes above."""
    console.open_closed()
    console.replace_unencodable()
    if "_DUALLORA_COMPLETE" in os.environ:
        app(prog_name="duallora")  # the shell asks for completions
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Runs one command line, says what came of it, and returns its exit code.

    The command is invoked without typer's own ``main``, which would fold every interrupt into exit code 130.
    """
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    rank = int(os.environ.get("RANK", "0"))  # of several processes only the first one has the word
    as_json = "--json" in options and not rank
    console.use_json("--json" in options)
    quiet_imports()
    try:
        # With --json stdout is the JSON line's alone, whatever a library prints (DeepSpeed does on import).
        aside = redirect_stdout(sys.stderr) if "--json" in options else nullcontext()
        with _sigterm_raises(), aside:
            payload = _invoke(arguments)
        code = payload.pop("exit_code", 0)
        if as_json and payload:
            console.print_json({"status": "done" if code == 0 else "error", "exit_code": code, **payload})
        return code
    except BaseException as error:
        if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):  # rich's SystemExit
            console.discard()  # the reader (head, less) has gone: nothing is wrong
            return 0
        if isinstance(error, typer.Exit):  # --help and --version have done their work
            return error.exit_code
        code, message, hint = console.explain(error, arguments)
        if "--debug" in options or os.environ.get("DUALLORA_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        status = "interrupted" if code in (130, 143) else "error"
        if rank and code not in TOLD_BY_FIRST:
            time.sleep(FIRST_WORD)
        if message and not (rank and code in TOLD_BY_FIRST):
            console.print_error(message, hint, label=f"{status} in process {rank}" if rank else status)
        if as_json:
            try:
                console.print_json({"status": status, "exit_code": code, "error": message})
            except OSError:  # nobody can read it: the exit code is what is left to tell
                console.discard()
        return code


def _invoke(arguments: list[str]) -> dict[str, Any]:
    command: Any = typer.main.get_command(app)
    with command.make_context("duallora", list(arguments), obj=list(arguments)) as context:
        return command.invoke(context) or {}


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C does, so that locks are let go and half-written files removed."""
    came: list[int] = []

    def stop(number: int, frame: object) -> NoReturn:
        came.append(number)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Exception as error:
        if came:  # transformers makes a missing module of whatever ends an import
            raise SystemExit(128 + came[0]) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)

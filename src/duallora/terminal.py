"""Progress a person can see, in a terminal and in a log file, and quiet libraries around it."""

from __future__ import annotations

import logging
import shlex
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

# Where there is no terminal to redraw, a line appears this often (seconds).
LINE_EVERY = 15.0
LABEL_WIDTH = 9


def say(console: Console, label: str, message: str) -> None:
    """One finished step: a short label and what came of it; ``message`` may hold rich markup."""
    if console.is_terminal:
        line = Table.grid()
        line.add_column(width=LABEL_WIDTH, style="bold cyan")
        line.add_column(overflow="fold")
        line.add_row(label, message)
        console.print(line, highlight=False)
    else:
        console.print(f"{label:<{LABEL_WIDTH}}{message}", highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(console: Console, label: str, total: int, *, done: int = 0) -> Iterator[Callable[..., None]]:
    """rich's bar in a terminal, a line every `LINE_EVERY` seconds elsewhere; yields ``update(done, **metrics)``.

    ``done`` counts from 0 to ``total``; ``metrics`` (name=text) stay shown until they are given again.
    """
    columns = (
        TextColumn("[bold cyan]{task.description}[/]"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    here = console.is_terminal
    # The speed is that of the last ten minutes: a step may take longer than rich's half a minute.
    bar = Progress(*columns, console=console, transient=True, disable=not here, speed_estimate_period=600)
    bar.add_task(f"{label:<{LABEL_WIDTH - 1}}", total=total, completed=done, metrics="")
    (task,) = bar.tasks
    spoken = time.monotonic()

    def update(done: int, **metrics: str) -> None:
        nonlocal spoken
        told: dict[str, Any] = (
            {"metrics": "  ".join(f"{name} {value}" for name, value in metrics.items())} if metrics else {}
        )
        bar.update(task.id, completed=done, **told)
        if not here and time.monotonic() - spoken >= LINE_EVERY:
            spoken = time.monotonic()
            left = "" if task.time_remaining is None else f"{clock(task.time_remaining)} left"
            say(console, label, f"{done:,}/{total:,}  {left}  {task.fields['metrics']}".rstrip())

    with bar:
        yield update


def clock(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def amount(count: int) -> str:
    """A number of parameters: ``134.5 M``."""
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count / 1e3:,.1f} k"


def size(count: float) -> str:
    """A file size in decimal units: ``19.6 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def shown(path: Path) -> str:
    """The path as a person would type it here, with rich's markup escaped."""
    return escape(_typed(path))


def command(*words: str | Path, program: str = "duallora") -> str:
    """A command line to paste into a shell, its words quoted where they must be."""
    return shlex.join([program, *(_typed(word) if isinstance(word, Path) else word for word in words)])


def _typed(path: Path) -> str:
    """Relative where it lies below the working folder."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


QUIET = ("accelerate", "peft", "datasets", "bitsandbytes", "torchao", "torch.utils._pytree")


def quiet_imports() -> None:
    """Silences what libraries say of themselves when imported: for the command line, where no `quiet_libraries` is around."""
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' load report and progress bars."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences the load reports, bars and advice of the libraries below, which name things the user never chose.

    What matters among them is checked and said here, as an error or on the console.
    """
    loggers = [logging.getLogger(name) for name in QUIET]
    levels = [logger.level for logger in loggers]
    quiet_imports()
    try:
        with quiet_transformers(), warnings.catch_warnings():
            for module in ("transformers", "peft", "torch", "accelerate", "datasets"):
                warnings.filterwarnings("ignore", module=rf"{module}\b.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

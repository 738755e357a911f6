"""What the verbs share: the program they belong to, the options that several of them take."""

import os
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer import Option

import duallora
from duallora import console
from duallora.config import Dtype as Dtype

F = TypeVar("F", bound=Callable[..., Any])
OUTPUT = "Output"
Json = Annotated[bool, Option("--json", help="One JSON object as the only line on stdout.", rich_help_panel=OUTPUT)]
Debug = Annotated[
    bool, Option("--debug", help="Show the traceback of a failure (or set DUALLORA_DEBUG=1).", rich_help_panel=OUTPUT)
]
ConfigFile = Annotated[
    Path | None, Option("--config", "-c", metavar="FILE", help="Recipe; `duallora config show` writes one.")
]
Overrides = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="Override one setting of the recipe; may be repeated.")
]
Model = Annotated[str | None, Option("--model", metavar="MODEL", help="Hub id, local folder, or builtin:smollm2-135m.")]
Data = Annotated[
    str | None,
    Option("--data", metavar="DATA", help="Your .jsonl, .csv, .parquet file, a hub id, or builtin:docstrings."),
]
TaskName = Annotated[
    str | None, Option("--task", metavar="TASK", help="A task of the paper: e2e, boolq, arc_easy, sst2, ...")
]
DataDir = Annotated[
    Path | None, Option("--data-dir", metavar="DIR", help="Folder with the tasks' data (or DUALLORA_DATA).")
]
Columns = Annotated[
    str | None,
    Option(
        "--columns", metavar="NAME=COLUMN,...", help="What the columns are called: prompt=question,completion=category."
    ),
]
Lenient = Annotated[
    bool, Option("--lenient", help="Accept another base model than the one the adapter was trained on.")
]

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
app = typer.Typer(
    name="duallora",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)


def verb(group: typer.Typer = app, name: str | None = None) -> Callable[[F], F]:
    """Makes a function a command of ``group``, with --json and --debug, which `duallora.cli.run` sees to."""

    def register(function: F) -> F:
        @wraps(function)
        def command(**options: Any) -> Any:
            return function(**{key: value for key, value in options.items() if key not in added})

        own = signature(function).parameters
        more = [
            Parameter("json", Parameter.KEYWORD_ONLY, default=False, annotation=Json),
            Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=Debug),
        ]
        added = {one.name: one.annotation for one in more if one.name not in own}
        command.__signature__ = Signature([*own.values(), *(one for one in more if one.name in added)])  # type: ignore[attr-defined]
        command.__annotations__ = {**function.__annotations__, **added}
        group.command(name)(command)
        return function

    return register


def _version(wanted: bool) -> None:
    if wanted:
        console.results.print(f"duallora {duallora.__version__}")
        raise typer.Exit


@app.callback()
def _duallora(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Fine-tune transformers models with Dual LoRA (arXiv 2512.03402).

    Start with [bold]duallora demo[/], then [bold]duallora train --data mine.jsonl[/].
    """
    if os.environ.get("DUALLORA_PLUGINS"):
        from duallora.train import plugins

        plugins.load()


def refuse_misspelt(source: str) -> None:
    """ConfigError for a name in an existing local folder that is not there: the hub need not be asked for runs/mien."""
    import difflib

    from duallora.errors import ConfigError

    path = Path(source)
    missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), None)
    if missing is None or missing.parent == Path():  # a first part that is not there is an organization on the hub
        return
    found = sorted(entry.name for entry in missing.parent.iterdir()) if missing.parent.is_dir() else []
    near = difflib.get_close_matches(missing.name, found, n=1, cutoff=0.0)
    nearest = missing.parent / near[0] / path.relative_to(missing) if near else None
    hint = f"the nearest name there is {nearest}" if nearest else f"{missing.parent} holds nothing"
    raise ConfigError(f"{source}: {missing.parent} has no {missing.name}; {hint}")


def refuse_unwritable(file: Path) -> None:
    """ConfigError for a folder, DiskError where no file can be written there: said before the work, not after it."""
    import tempfile

    from duallora.errors import ConfigError, DiskError

    if file.is_dir():
        raise ConfigError(f"-o {file} is a folder; -o takes a file such as results.json")
    folder = next(parent for parent in file.absolute().parents if parent.exists())  # what lacks is made on writing
    try:
        with tempfile.TemporaryFile(dir=folder):  # rights alone do not tell: the disk may be full or read-only
            pass
    except OSError as error:
        raise DiskError(
            f"-o {file} cannot be written in {folder}: {error.strerror}; choose another place with -o"
        ) from error

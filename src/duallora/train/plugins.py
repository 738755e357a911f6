"""Your own methods and tasks on the command line: Python files or modules that call `methods.add` or `tasks.add`.

A plug-in is code, so only what the user names is imported: in a recipe of theirs (``plugins: [mine.py]``) or in the
variable DUALLORA_PLUGINS, which every verb reads. What a run folder names was written by whoever made the folder.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from duallora.errors import ConfigError

VARIABLE = "DUALLORA_PLUGINS"  # names with a comma between
_loaded: dict[str, str] = {}


def resolved(names: Iterable[str]) -> list[str]:
    """The names with files as absolute paths, so that they are found from another folder too."""
    return [str(Path(name).expanduser().resolve()) if _is_file(name) else name for name in names]


def load(names: Iterable[str] = ()) -> dict[str, str]:
    """Import each of these, and of what DUALLORA_PLUGINS names, once: name -> sha256 of its code.

    Raises:
        ConfigError: there is no such file or module, or its code fails.
    """
    wanted = resolved([*filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))), *names])
    for name in wanted:
        if name not in _loaded:
            try:
                _loaded[name] = _import(name)
            except Exception as error:
                missing = isinstance(error, ModuleNotFoundError) and error.name == name
                reason = "no such module is installed" if missing else f"{type(error).__name__}: {error}"
                raise ConfigError(
                    f"plug-in {name}: {reason}. Expected a Python file or module that calls duallora.methods.add or "
                    "duallora.tasks.add (docs/extending.md)"
                ) from error
    return {name: _loaded[name] for name in wanted}


def require(names: Iterable[str], where: str | Path) -> None:
    """ConfigError where ``where`` (a run folder) needs plug-ins that the user has not named: they are not run unasked."""
    missing = [name for name in resolved(names) if name not in _loaded]
    if missing:
        raise ConfigError(
            f"{where} was made with the plug-in{'s' if len(missing) > 1 else ''} {', '.join(missing)}, which is code. If "
            f"you trust it, set {VARIABLE}={','.join(missing)}"
        )


def _is_file(name: str) -> bool:
    return name.endswith(".py")


def _import(name: str) -> str:
    if not _is_file(name):
        origin = importlib.import_module(name).__file__
        return hashlib.sha256(Path(origin).read_bytes()).hexdigest() if origin else ""
    code = Path(name).read_bytes()
    digest = hashlib.sha256(code).hexdigest()
    module_name = f"duallora_plugin_{Path(name).stem}_{digest[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return digest

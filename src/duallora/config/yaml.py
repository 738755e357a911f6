"""YAML 1.2 with the place of everything in it, as nodes: nothing is constructed but plain text, numbers and lists."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from duallora.errors import ConfigError
from duallora.terminal import command

MAX_FILE_BYTES = 1 << 16  # a recipe is a page long; a larger file is a mistake, and the YAML reader is slow
MAX_DIGITS = 4300  # of an integer: Python's own limit

Placed = tuple[Any, str]  # a value and where it stands: a file and its line, a flag

_NOT_TEXT = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}  # some in YAML 1.1 only: quoted for others


def read_yaml(path: Path | str, depth: int) -> dict[str, Placed]:
    """A YAML mapping as name -> (value, "file:line"); mappings below it likewise, ``depth`` of them deep, then plain.

    Raises:
        ConfigError: no such file, not YAML, not a mapping; else with every value that is not plain and key set twice.
    """
    values, problems = walk_yaml(Path(path), depth, "of names to values")
    if problems:
        raise ConfigError(*problems)
    return values


def walk_yaml(path: Path, depth: int, expected: str) -> tuple[dict[str, Placed], list[str]]:
    """As `read_yaml`, with the problems beside what could be read; ``expected``: what the mapping is of, in words."""
    problems: list[str] = []

    def placed(mapping: Any, left: int, outer: str = "") -> dict[str, Placed]:
        found: dict[str, Placed] = {}
        for name, key, node in _entries(mapping, str(path), problems):
            where = f"{path}:{_line(key)}"
            if left and node.id == "mapping":
                found[name] = (placed(node, left - 1, f"{outer}{name}."), where)
                continue
            try:
                found[name] = (_plain(node, f"{where}: {outer}{name}"), where)
            except ConfigError as error:
                problems.append(str(error))
        return found

    root = _compose(_text(path), str(path))
    if root is None or _kind(root) == "null":
        return {}, problems
    if root.id != "mapping":
        raise ConfigError(f"{path}:{_line(root)}: expected a mapping {expected}")
    return placed(root, depth), problems


def plain_value(text: str, where: str) -> Any:
    """The value of one line of YAML. Raises ConfigError, which begins with ``where``."""
    try:
        return _plain(_compose(text), where)
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def yaml_value(value: Any) -> str:
    """A value in YAML's flow style. Text is plain where that reads back as the same text, else in double quotes."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(yaml_value(item) for item in value)}]"
    if isinstance(value, dict):
        # "? key : value" would be needed for keys beyond 1024 characters; module patterns are short
        return f"{{{', '.join(f'{_quoted(name)}: {yaml_value(item)}' for name, item in value.items())}}}"
    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*(:[A-Za-z0-9_./-]+)*", value) and value.lower() not in _NOT_TEXT:
        return value
    return _quoted(value)


def show(value: Any) -> str:
    """A value for a message, at most 80 characters."""
    plain = isinstance(value, (str, bool, list, dict, type(None)))
    text = json.dumps(value, ensure_ascii=False) if plain else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _quoted(text: str) -> str:
    plain = json.dumps(text, ensure_ascii=False)
    return re.sub(
        r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd]", lambda found: f"\\U{ord(found.group()):08x}", plain
    )


def _text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        show = f"{command('config', 'show')} > {shlex.quote(str(path))}"
        raise ConfigError(f"{path}: no such file; `{show}` writes one to start from") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{path}: larger than {MAX_FILE_BYTES} bytes; a recipe is a page of YAML. Is this a data file?"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 text (byte {error.start} is {content[error.start]:#04x})"
        ) from None


def _entries(mapping: Any, path: str, problems: list[str]) -> Iterator[tuple[str, Any, Any]]:
    """(name, key node, value node) of a YAML mapping; duplicate and non-text keys become problems."""
    first: dict[str, int] = {}
    for key, value in mapping.value:
        where = f"{path}:{_line(key)}"
        if key.id != "scalar" or _kind(key) == "merge":
            what = "merge keys (<<)" if key.id == "scalar" else "keys that are not text"
            problems.append(f"{where}: {what} are not accepted in a recipe")
        elif key.value in first:
            problems.append(f"{where}: {key.value[:80]} is set twice (first in line {first[key.value]}); keep one")
        else:
            first[key.value] = _line(key)
            yield key.value, key, value


def _line(node: Any) -> int:
    return node.start_mark.line + 1


def _kind(node: Any) -> str:
    return str(node.tag).rpartition(":")[2]


@cache
def _composer() -> Any:
    from ruamel.yaml.composer import Composer, ComposerError
    from ruamel.yaml.events import AliasEvent

    class WithoutAliases(Composer):
        """An alias can hold itself, and a page of them unfold into gigabytes."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.parser.check_event(AliasEvent):
                raise ComposerError(None, None, "aliases (*) are not accepted", self.parser.peek_event().start_mark)
            return super().compose_node(parent, index)

    return WithoutAliases


def _yaml() -> Any:
    from ruamel.yaml import YAML

    reader = YAML(typ="safe", pure=True)
    reader.Composer = _composer()
    return reader


def _compose(text: str, where: str = "") -> Any:
    """The YAML node tree (None for an empty text); nothing is constructed, so tags cannot run code."""
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    place = f"{where}: " if where else ""
    try:
        return _yaml().compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}: " if where and mark else place
        column = f" (column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{place}not valid YAML: {error.problem or error.context}{column}") from None
    except YAMLError as error:
        raise ConfigError(f"{place}not valid YAML: {str(error).partition(chr(10))[0]}") from None
    except RecursionError:
        raise ConfigError(f"{place}not a recipe: nested too deeply") from None


def _plain(node: Any, where: str) -> Any:
    """A node as str, int, float, bool, None, list or dict; any other tag is refused."""
    kind = "null" if node is None else _kind(node)
    match getattr(node, "id", ""), kind:
        case "", _:
            return None
        case "sequence", "seq":
            return [_plain(item, where) for item in node.value]
        case "mapping", "map":
            problems: list[str] = []
            entries = _entries(node, where.partition(":")[0], problems)
            result = {name: _plain(value, where) for name, _, value in entries}
            if problems:
                raise ConfigError(problems[0])
            return result
        case "scalar", "str" | "timestamp":
            return node.value
        case "scalar", "int" | "float" | "bool" | "null":
            try:
                return _yaml().constructor.construct_object(node)
            except ValueError:
                most = f" of at most {MAX_DIGITS} digits" if kind == "int" else ""
                raise ConfigError(f"{where}: {show(node.value)} cannot be read as {kind}{most}") from None
    raise ConfigError(f"{where}: the tag {node.tag} is not accepted; a recipe holds plain text, numbers and lists")

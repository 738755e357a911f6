"""Values as messages show them, and JSON as data files may hold it."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_DECODER = json.JSONDecoder()
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")


def parse_json(text: str) -> Any:
    """The one value that ``text`` is. Raises ValueError as `decode_json` does, and for what stands behind it."""
    value, end = decode_json(text, len(text) - len(text.lstrip()))
    if text[end:].strip():
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def decode_json(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at ``at``, and where it ends.

    Raises ValueError: a JSONDecodeError where it is no JSON, another one where Python or a tokenizer cannot take it.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError:
        raise ValueError("a number of more than 4300 digits; write it as text, or shorter") from None
    if _ESCAPED_HALF.search(text, at, end) and (half := _HALF.search(json.dumps(value, ensure_ascii=False))):
        raise ValueError(f"\\u{ord(half.group()):04x} is half of a character; write both halves, or leave it out")
    return value, end


def absent(value: Any) -> bool:
    """Whether a field stands for nothing: null, NaN, or an empty text, list or object."""
    return value is None or value in ("", [], {}) or (isinstance(value, float) and math.isnan(value))


def shown(value: Any, limit: int = 40) -> str:
    """What kind of value it is, and the value, at most ``limit`` characters."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    text = "null" if value is None else f"{names.get(type(value), type(value).__name__)} ({value!r})"
    return excerpt(text, limit)


def excerpt(text: str, limit: int = 80) -> str:
    """At most ``limit`` characters on one line, control characters made visible."""
    visible = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[: limit + 1])
    return visible if len(visible) <= limit else visible[: limit - 3] + "..."

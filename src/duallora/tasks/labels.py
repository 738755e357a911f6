"""The label column of a table: classes or numbers, and the names and order of classes, whatever file the table is in.

A CSV cell "3", JSON's 3, pandas' 3.0 (an integer column in which a cell was once empty) and a decimal 3.00 are one label.
Whole numbers are classes, numbers of which some have a fraction are targets, and everything else is the name of a class.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any, Literal

from duallora.errors import ConfigError, DataError
from duallora.tasks.example import BadRow
from duallora.tasks.text import shown

LabelKind = Literal["classes", "numbers"]

MANY_CLASSES = 20  # whole numbers: more of them must count up from 0 or 1 to be taken for classes
SHOWN = 8

_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")  # 007 is a name
_WHOLE = re.compile(r"([+-]?)(0|[1-9][0-9]*)(\.0*)?")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_LARGEST = 10**300  # of whole numbers that are taken as such: floats reach little further
_ORDERED = re.compile(r"[+-]?[0-9]+")
_TRUTH = {"true": "True", "false": "False"}
# How tools write an empty cell, or one that overflowed, among numbers.
_NOTHING = {"nan", "na", "n/a", "#n/a", "<na>", "none", "null", "inf", "-inf"}


class Name(str):
    """The name of a class as a data set declares it (a hub's ClassLabel): never a number, whatever it looks like."""

    __slots__ = ()


@dataclass(frozen=True)
class Labels:
    """What the label column holds.

    ``classes``: their names by id, () where the labels are targets; ``note``: that in words, with how to tell otherwise;
    ``nothing``: words that stand for an empty cell among numbers.
    """

    classes: tuple[str, ...]
    note: str
    nothing: frozenset[str] = frozenset()

    @cached_property
    def _ids(self) -> dict[str, int]:
        # Of a run from before whole numbers had one name, "3.0" is class 3.
        named = {class_name(name) or name: index for index, name in enumerate(self.classes)}
        return {**named, **{name: index for index, name in enumerate(self.classes)}}

    def read(self, value: Any) -> int | float:
        """Class id or target of one label. Raises BadRow."""
        if is_missing(value):
            raise BadRow("empty label", "label")
        if isinstance(value, str) and value.strip() in self.nothing:
            raise BadRow(f"{shown(value)} is no label among numbers", "label")
        if not self.classes:
            target = number(value)
            if target is None or not math.isfinite(target):
                raise BadRow(f"expected a finite number, got {shown(value)}", "label")
            return float(target)
        name = class_name(value) or ""
        found = self._ids.get(name, self._ids.get(_TRUTH.get(name.lower(), "")))
        if found is None:
            raise BadRow(f"expected a class name or number, got {shown(value)}", "label")
        return found


def read_labels(values: Sequence[Any], told: LabelKind | None = None) -> Labels:
    """What a column with these labels holds, or what ``told`` says that it holds.

    Raises DataError where fewer than two classes are there, where whole numbers may as well be amounts (years, prices),
    and where numbers are written with a decimal comma.
    """
    labels = [value for value in values if not is_missing(value)]
    texts = {value.strip() for value in labels if isinstance(value, str) and not isinstance(value, Name)}
    commas = {text for text in texts if _DECIMAL_COMMA.fullmatch(text)}
    if commas and told != "classes" and all(_NUMBER.fullmatch(text) for text in texts - commas):
        raise DataError(
            f"the column label holds numbers with a decimal comma, such as {min(commas)}; write them with a point, or set "
            "data.labels=classes where they are names"
        )
    nothing = frozenset(text for text in texts if text.lower() in _NOTHING)
    said = [value for value in labels if not (isinstance(value, str) and value.strip() in nothing)]
    labels, nothing = (said, nothing) if all(number(value) is not None for value in said) else (labels, frozenset())
    found = [value for value in map(number, labels) if value is not None and math.isfinite(value)]
    # One label in ten may be no number: it is a fault of its row, not a sign that 3.8 is the name of a class.
    fractions = any(value % 1 for value in found) and len(found) >= 0.9 * len(labels)
    if told == "numbers" or (told is None and fractions):
        span = f" from {min(found):g} to {max(found):g}" if found else ""
        why = "some have a fraction; --set data.labels=classes to classify" if fractions else "data.labels=numbers"
        return Labels((), f"regression, numbers{span} ({why})")
    names = {name for name in map(class_name, labels) if name is not None}
    if names and {name.lower() for name in names} <= set(_TRUTH):
        names = {_TRUTH[name.lower()] for name in names}
    classes = tuple(sorted(names, key=_order))
    if len(classes) < 2:
        raise DataError(f"the column label holds {len(classes)} class ({', '.join(classes)}); expected at least 2")
    whole = bool(found) and len(found) == len(labels)
    if told is None and whole:
        _refuse_amounts(classes, len(labels))
    why = " (whole-number labels; --set data.labels=numbers to regress)" if whole and told is None else ""
    return Labels(classes, f"classification, {len(classes)} classes {_shown(classes)}{why}", nothing)


def trained_labels(values: Sequence[Any], classes: Sequence[str]) -> Labels:
    """What the label column of rows for a trained model holds: its ``classes``, or numbers where it has none.

    The rows may lack some of the classes. Raises ConfigError naming those that the model does not know.
    """
    numeric = all(number(name) is not None for name in classes)
    texts = {value.strip() for value in values if isinstance(value, str)}
    nothing = frozenset(text for text in texts if numeric and text.lower() in _NOTHING and text not in classes)
    if not classes:
        return Labels((), "regression, as it was trained", nothing)
    found = Labels(tuple(classes), f"classification by its {len(classes)} classes {_shown(classes)}", nothing)
    unknown: set[str] = set()
    for value in values:
        try:
            found.read(value)
        except BadRow:  # missing, or no label at all: a fault of its row
            if not is_missing(value) and (name := class_name(value)) is not None and name not in nothing:
                unknown.add(name)
    if unknown:
        raise ConfigError(
            f"the column label holds the classes {_shown(sorted(unknown, key=_order))}, which the model was not trained on; "
            f"it knows {', '.join(classes)}"
        )
    return found


def class_name(value: Any) -> str | None:
    """A label as the name of a class: text as it stands, but 3, 3.0 and "3.0" are one. None for what is no label."""
    if isinstance(value, Name):
        return str(value)
    if isinstance(value, str):
        text = value.strip()
        if match := _WHOLE.fullmatch(text):
            sign, digits, _ = match.groups()
            return f"-{digits}" if sign == "-" and digits != "0" else digits
        return text
    if isinstance(value, bool | numbers.Integral):
        return str(value)
    if not isinstance(value, numbers.Real | Decimal):
        return None
    amount = float(value)
    if not math.isfinite(amount):
        return None
    return str(int(amount)) if amount % 1 == 0 and abs(amount) < 1e16 else repr(amount)


def number(value: Any) -> int | float | None:
    """A label as a number; None for text that is none, for names and for truth values."""
    if isinstance(value, bool | Name):
        return None
    if isinstance(value, str):
        text = value.strip()
        if not _NUMBER.fullmatch(text):
            return None
        return int(text) if _ORDERED.fullmatch(text) and len(text) < 300 else float(text)
    if isinstance(value, numbers.Integral):
        return whole if abs(whole := int(value)) < _LARGEST else math.inf
    return float(value) if isinstance(value, numbers.Real | Decimal) else None


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: null, NaN, or text of nothing but space."""
    if isinstance(value, str):
        return not value.strip()
    real = isinstance(value, numbers.Real | Decimal) and not isinstance(value, numbers.Integral)
    return value is None or (real and math.isnan(value))


def _order(name: str) -> tuple[bool, float, str]:
    """Numbers by their value, then names by alphabet."""
    if _ORDERED.fullmatch(name) and len(name) < 300:
        return False, int(name), name
    return (False, float(name), name) if _NUMBER.fullmatch(name) else (True, 0, name)


def _refuse_amounts(classes: Sequence[str], rows: int) -> None:
    """More whole numbers than classes commonly are, with gaps, another beginning, or hardly a row each: it must be said."""
    if len(classes) <= MANY_CLASSES:
        return
    low, high = int(float(classes[0])), int(float(classes[-1]))
    counts_up = low in (0, 1) and 2 * len(classes) > high - low
    if not counts_up or rows < 2 * len(classes):
        raise DataError(
            f"the column label holds {len(classes)} different whole numbers from {low} to {high} in {rows} rows: they may be "
            "classes or amounts. Say which: data.labels=numbers (regression) or data.labels=classes"
        )


def _shown(classes: Sequence[str]) -> str:
    if all(_ORDERED.fullmatch(name) and len(name) < 300 for name in classes) and len(classes) > 2:
        low, high = int(classes[0]), int(classes[-1])
        if high - low == len(classes) - 1:
            return f"{low}..{high}"
    more = f", ... {classes[-1]}" if len(classes) > SHOWN else ""
    return ", ".join(classes[:SHOWN]) + more

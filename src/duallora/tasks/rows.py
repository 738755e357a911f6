"""Rows of files and of hub data sets as they stand, their faults named by file and line.

JSON lines and CSV are read here and not through ``datasets``, which accepts missing fields, extra fields and bad
UTF-8 in silence, turns a column of mixed types into JSON, and counts lines from 0.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from duallora.errors import DataError, first_line
from duallora.tasks.hub import load_hub
from duallora.tasks.labels import Name
from duallora.tasks.text import decode_json, excerpt, parse_json, shown

BadRows = Literal["error", "skip"]
Row = tuple[str, Mapping[str, Any], str]  # where ("file:line"), fields, the row as it stands in the file
T = TypeVar("T")

MAX_FAULTS = 20
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
ACCEPTED = """  prompt-completion  prompt, completion
  messages           messages: a list of {"role", "content"}, or ShareGPT's conversations; optional tools, ...
  alpaca             instruction, output, optional input
  classification     label, and text | sentence | text1, text2 | sentence1, sentence2 | premise, hypothesis
  text               text, and no other column; a line each of a .txt file
Columns of other names: --columns prompt=question,completion=answer, or text=review,label=stars"""


class Faults:
    """What is wrong with the rows: kept up to ``MAX_FAULTS``, counted beyond, raised together or skipped."""

    def __init__(self, source: str, bad_rows: BadRows) -> None:
        self.source = source
        self.bad_rows = bad_rows
        self.kept: list[str] = []
        self.count = 0
        self.notes: list[str] = []  # what was read otherwise than the file's name says

    def add(self, where: str, what: str, row: str = "", *, column: str = "") -> None:
        self.count += 1
        if len(self.kept) < MAX_FAULTS:
            place = f"{where}, column {column}" if column else where
            self.kept.append(f"{place}: {what}" + (f": {excerpt(row)}" if row else ""))

    def objects(self, where: str, row: Any, text: str) -> list[Row]:
        """The row that was read as JSON, where it is an object."""
        if isinstance(row, dict):
            return [(where, row, text)]
        self.add(where, f"expected an object {{...}}, got {shown(row)}", text)
        return []

    def close(self, good: int) -> str:
        """Raises DataError where there are faults and they may not be skipped, or nothing is left. A note, or ''."""
        if not self.count:
            if good:
                return ""
            raise DataError(f"{self.source} is empty; expected at least one row. Accepted formats:\n{ACCEPTED}")
        more = f"\n... and {self.count - len(self.kept)} more" if self.count > len(self.kept) else ""
        listing = "\n".join(self.kept) + more
        total = f"{self.count} bad row{'s' if self.count > 1 else ''} of {self.count + good} in {self.source}"
        if self.bad_rows == "error":
            raise DataError(f"{total}:\n{listing}\nMend them, or leave them out with --set data.bad_rows=skip.")
        if not good:
            raise DataError(f"{total}, and no good one is left:\n{listing}")
        return f"{total} skipped, the first: {self.kept[0]}"


def draw(rows: Sequence[T], count: int, seed: int) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """The other rows and ``count`` drawn ones, both in their order; the draw depends on seed and counts alone."""
    held = set(random.Random(seed).sample(range(len(rows)), count))
    rest, drawn = (tuple(row for at, row in enumerate(rows) if (at in held) is inside) for inside in (False, True))
    return rest, drawn


def read_rows(path: Path, faults: Faults, known: Collection[str] = ()) -> Iterator[Row]:
    """Rows of a local file as they stand; what cannot be parsed goes to ``faults``.

    known: columns by which the sign that separates them is told, where it is not the usual one.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(path, faults)
    if suffix == ".json":
        return _read_json(path, faults)
    if suffix == ".txt":
        lines = ((number, line.rstrip("\r\n")) for number, line in _read_lines(path, faults))
        return ((f"{path}:{number}", {"text": line}, line) for number, line in lines if line.strip())
    return _read_csv(path, faults, "\t" if suffix == ".tsv" else ",", known)


_HEAD = 1 << 16  # bytes that tell how a file is written
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _open(path: Path) -> io.BufferedIOBase:
    """The file's bytes as UTF-8 with lines that end in a line feed, whether it was written so or not.

    UTF-16 and UTF-32 are known by their byte order mark, the line ends of old Macs by there being no line feed at all.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    mark, encoding = next((pair for pair in _BYTE_ORDER_MARKS if head.startswith(pair[0])), (b"", "utf-8"))
    if not mark and head.count(0) > len(head) / 8:
        raise DataError(f"{path} looks like UTF-16 without a byte order mark, or is no text: save it as UTF-8")
    if encoding == "utf-8" and b"\n" in head:
        opened = path.open("rb")
        opened.seek(len(mark))
        return opened
    content = path.read_bytes()
    try:
        content = content[len(mark) :] if encoding == "utf-8" else content.decode(encoding).encode()
    except UnicodeError as error:
        raise DataError(f"{path} begins as {encoding.upper()} text does, but is none: {error}") from error
    return io.BytesIO(content if b"\n" in content else content.replace(b"\r", b"\n"))


def _read_lines(path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    """(1-based line number, line with its end); lines with bad UTF-8 or NUL are faults. BOM and CRLF are accepted."""
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            where, text = f"{path}:{number}", raw.decode(errors="replace")
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                what = f"not UTF-8 (byte 0x{raw[error.start]:02x})"
                faults.add(where, what, text, column=str(error.start + 1))
                continue
            if "\0" in text:
                faults.add(where, "holds a NUL character", text, column=str(text.index("\0") + 1))
                continue
            yield number, text


def _read_jsonl(path: Path, faults: Faults) -> Iterator[Row]:
    lines = ((number, line) for number, line in _read_lines(path, faults) if line.strip())
    first = list(itertools.islice(lines, 2))
    if first and first[0][1].lstrip().startswith("[") and not faults.count and _is_list(first):
        faults.notes.append(f"{path.name} is one JSON list and no JSON lines, and was read as that")
        yield from _read_json(path, faults)
        return
    for number, line in itertools.chain(first, lines):
        where, text = f"{path}:{number}", line.rstrip("\r\n")
        try:
            row = parse_json(text)
        except json.JSONDecodeError as error:
            cut = text == line and not text.rstrip().endswith(("}", "]"))  # only the last line can lack its end
            what = f"bad JSON ({error.msg})" + ("; the last line is cut off" if cut else "")
            faults.add(where, what, text, column=str(error.colno))
        except ValueError as error:
            faults.add(where, str(error), text)
        else:
            yield from faults.objects(where, row, text)


def _is_list(first: Sequence[tuple[int, str]]) -> bool:
    """Whether a file whose first line with text begins a list is that list, and not a list a line."""
    try:
        parse_json(first[0][1])
    except ValueError:
        return True
    return len(first) == 1


def _read_json(path: Path, faults: Faults) -> Iterator[Row]:
    text = "".join(line for _, line in _read_lines(path, faults))
    if faults.count:  # with a line gone the list around it no longer parses
        raise DataError(f"{path} cannot be read:\n" + "\n".join(faults.kept))
    if not (begin := text.strip()[:1]):
        return
    if begin != "[":
        hint = "; one object a line? Then name the file .jsonl" if begin == "{" else ""
        raise DataError(f"{path}:1: expected a list [...] of objects{hint}: {excerpt(text.strip())}")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:  # where a bad row ends nobody knows: no row after it can be read
        extra = error.msg == "Extra data"
        what = "text stands behind the list, which would be lost" if extra else f"bad JSON ({error.msg})"
        raw = excerpt(text.split("\n")[error.lineno - 1])
        raise DataError(f"{path}:{error.lineno}, column {error.colno}: {what}: {raw}") from error
    except (ValueError, RecursionError):  # the row that Python cannot take is named below
        pass
    between = re.compile(r"[\s,]*")
    at, line, seen = text.find("[") + 1, 1, 0
    while (at := between.match(text, at).end()) < len(text) and text[at] != "]":  # type: ignore[union-attr]
        line, seen = line + text.count("\n", seen, at), at
        where = f"{path}:{line}"
        try:
            row, end = decode_json(text, at)
        except ValueError as error:
            raise DataError(f"{where}: {error}: {excerpt(text[at:])}") from None
        yield from faults.objects(where, row, text[at:end])
        at = end


def _read_csv(path: Path, faults: Faults, delimiter: str, known: Collection[str]) -> Iterator[Row]:
    source = _read_lines(path, faults)
    csv.field_size_limit(1 << 30)  # a long text is not a fault
    start: list[tuple[int, str]] = []  # the lines up to the first with text in it
    for numbered in source:
        start.append(numbered)
        if numbered[1].strip():
            break
    head = start[-1][1] if start else ""
    taken: list[tuple[int, str]] = []  # the lines of the row at hand: a quoted field may span several

    def columns(sign: str) -> tuple[int, bool]:
        fields = next(csv.reader([head], delimiter=sign), [])
        return len({field.strip() for field in fields} & {*known}), len(fields) > 1

    # What separates the columns: the usual sign, unless another makes more known columns, or columns at all, of the first line.
    if (used := max((delimiter, *DELIMITERS), key=columns)) != delimiter:
        delimiter = used
        faults.notes.append(f"{path.name} is separated by {DELIMITERS[used]}")

    def lines() -> Iterator[str]:
        for number, line in itertools.chain(start, source):
            taken.append((number, line))
            yield line.rstrip("\r\n") + "\n"

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        taken.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            faults.add(f"{path}:{taken[0][0]}", f"bad CSV ({error})", taken[0][1])
            continue
        if not any(field.strip() for field in fields):
            continue
        where, raw = f"{path}:{taken[0][0]}", taken[0][1]
        if not header:
            header = [field.strip() for field in fields]
            if len(set(header)) < len(header):
                raise DataError(f"{where}: a column name occurs twice in the header: {excerpt(raw)}")
        elif len(fields) != len(header):
            faults.add(where, f"expected {len(header)} fields as in the header, got {len(fields)}", raw)
        else:
            yield where, dict(zip(header, fields, strict=True)), raw


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = _declared_names(file.schema_arrow.metadata)
        rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            for column, classes in names.items():
                if isinstance(value := row.get(column), int):
                    row[column] = Name(classes[value]) if 0 <= value < len(classes) else None
            yield f"{path}:row {number}", _without_nulls(row), str(row)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{path} is not a readable parquet file: {first_line(error)}") from error


def _declared_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """{column: class names by id} where the file was written by ``datasets``, which keeps them beside the table."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {column: one["names"] for column, one in features.items() if one.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table with its lists and objects freed of the nulls that Arrow fills them with: there every object of a
    column has the keys of all."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(inner) for key, inner in value.items() if inner is not None}
        return [bare(inner) for inner in value] if isinstance(value, list) else value

    return {column: bare(value) for column, value in row.items()}


def read_hub(name: str, config: str | None) -> dict[str, list[Row]]:
    """The rows of a hub data set by split; class ids become the names that the hub knows, -1 (withheld) null."""
    data = f"{name}:{config}" if config else name
    tables = load_hub(name, config)
    splits: dict[str, list[Row]] = {}
    for split, names in {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}.items():
        table = next((tables[own] for own in names if own in tables), None)
        if table is None:
            continue
        classes = {column: feature for column, feature in table.features.items() if hasattr(feature, "int2str")}
        rows = [{**row} for row in table]
        for row in rows:
            for column, feature in classes.items():
                if isinstance(value := row[column], int):
                    row[column] = Name(feature.int2str(value)) if value >= 0 else None
        if split == "train" or any(row.get("label", "") is not None for row in rows):  # else its labels are withheld
            splits[split] = [(f"{data}:{split}:{n}", _without_nulls(row), str(row)) for n, row in enumerate(rows, 1)]
    if "train" not in splits:
        raise DataError(f"data set {data} has the splits {', '.join(tables)}; expected one called train")
    return splits

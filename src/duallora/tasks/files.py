"""A user's own data: one path or hub id, its format read off its columns, its faults named by file and line.

JSON lines and CSV are read here and not through ``datasets``, which accepts missing fields, extra fields and bad
UTF-8 in silence, turns a column of mixed types into JSON, and counts lines from 0.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import functools
import io
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from duallora.errors import ConfigError, DataError
from duallora.tasks import chats
from duallora.tasks.chats import absent, excerpt, shown
from duallora.tasks.example import BadRow, Example
from duallora.tasks.hub import reachable
from duallora.tasks.labels import LabelKind, Labels, Name, is_missing, read_labels, trained_labels
from duallora.tasks.metrics import OF_KIND
from duallora.tasks.task import Kind, LazySplits, Task

BadRows = Literal["error", "skip"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
LOCAL = f"a local file ({', '.join(SUFFIXES)}) or, for a task, the folder of its data (--data-dir, DUALLORA_DATA)"
MAX_FAULTS = 20
PAIRS = (("text1", "text2"), ("sentence1", "sentence2"), ("premise", "hypothesis"))
SINGLES = ("text", "sentence")

_ACCEPTED = """  prompt-completion  prompt, completion
  messages           messages: a list of {"role", "content"}, or ShareGPT's conversations; optional tools, ...
  alpaca             instruction, output, optional input
  classification     label, and text | sentence | text1, text2 | sentence1, sentence2 | premise, hypothesis"""

FORMATS = ("prompt-completion", "messages", "alpaca", "classification")
LABEL_KINDS = ("classes", "numbers")
_TEXT_COLUMNS = {
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "input", "output"),
    "messages": ("messages", "conversations"),
}
# Columns that say something about a chat; in rows of plain text there is no place for it.
_CHAT_ONLY = (*chats.COLUMNS, "history")
_KNOWN_COLUMNS = {
    "label", *SINGLES, *itertools.chain(*PAIRS, *_TEXT_COLUMNS.values()),
}  # fmt: skip
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}

# The wording of Stanford Alpaca, byte for byte: models tuned on it know it.
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

Row = tuple[str, Mapping[str, Any], str]  # where ("file:line"), fields, the row as it stands in the file


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

    def close(self, good: int) -> str:
        """Raises DataError where there are faults and they may not be skipped, or nothing is left. A note, or ''."""
        if not self.count:
            if good:
                return ""
            raise DataError(f"{self.source} is empty; expected at least one row. Accepted formats:\n{_ACCEPTED}")
        more = f"\n... and {self.count - len(self.kept)} more" if self.count > len(self.kept) else ""
        listing = "\n".join(self.kept) + more
        total = f"{self.count} bad row{'s' if self.count > 1 else ''} of {self.count + good} in {self.source}"
        if self.bad_rows == "error":
            raise DataError(f"{total}:\n{listing}\nMend them, or leave them out with data.bad_rows=skip.")
        if not good:
            raise DataError(f"{total}, and no good one is left:\n{listing}")
        return f"{total} skipped, the first: {self.kept[0]}"


def load_data(
    data: str,
    *,
    eval_data: str | None = None,
    eval_fraction: float = 0.05,
    seed: int = 0,
    format: str | None = None,
    labels: LabelKind | None = None,
    trained: tuple[Kind, Sequence[str]] | None = None,
    bad_rows: BadRows = "error",
    ignore_keys: Sequence[str] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Task:
    """The task in a file, on the hub, or built in.

    data: a path (jsonl, json, csv, tsv, parquet), a hub id "org/name" or "org/name:config", "builtin:docstrings" or
        "builtin:packages".
    eval_data: path or hub id of the validation rows; without it ``eval_fraction`` of the rows (at least one) are set
        aside, drawn with ``seed``, unless the hub has a validation or test split of its own.
    format: one of FORMATS where the columns fit several; None detects it.
    labels: what the label column holds, "classes" or "numbers"; None goes by the labels (`duallora.tasks.labels`).
    trained: what the model that these rows are for was trained to do, and its classes by id: they decide what the label
        column holds, whatever is in it.
    bad_rows: "error" raises on the first 20 faults together; "skip" leaves bad rows out and says so in ``Task.notes``.
    ignore_keys: columns, and keys of a chat's messages, to leave out.
    chat_template_kwargs: what the chat template is given with every chat, such as {"enable_thinking": False}.

    Raises DataError for missing, empty or malformed data, ConfigError for unknown names and fractions outside (0, 1).
    """
    for name, value, known in (("format", format, FORMATS), ("labels", labels, LABEL_KINDS)):
        if value is not None and value not in known:
            near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown data.{name} {value!r}; nearest: {near}. Expected one of {', '.join(known)}")
    if taken := chats.reserved(chat_template_kwargs or {}):
        raise ConfigError(f"data.chat_template_kwargs.{taken[0]} is not the chat template's to know: leave it out")
    if not 0 < eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction is {eval_fraction}; expected a number between 0 and 1, such as 0.05")
    if data.startswith("builtin:"):
        from duallora.tasks import docstrings

        return docstrings.load(data)
    read, notes = _read_all(data, bad_rows)
    if eval_data is not None:
        held, more = _read_all(eval_data, bad_rows)
        # Of a hub set given for evaluation its own held-out rows are meant; a file has only one list of rows.
        read["validation"] = held.get("validation") or held.get("test") or held["train"]
        notes += more
    ignored = frozenset(ignore_keys)
    if ignored:
        read = {
            split: [(where, {key: row[key] for key in row if key not in ignored}, raw) for where, row, raw in rows]
            for split, rows in read.items()
        }
    rows = [row for split in read.values() for row in split]
    chosen = format or _detect(data, rows)
    columns = _columns(rows)
    found = _found_labels(rows, labels, trained) if chosen == "classification" else None
    if labels is not None and found is None:
        raise ConfigError(
            f"data.labels={labels} is for rows with a label, but {data} holds {chosen} rows: leave it out"
        )
    convert = _converter(chosen, columns, found, {"ignore": ignored, "options": chat_template_kwargs})
    kind: Kind = "generate" if found is None else "classify" if found.classes else "regress"
    examples: dict[str, list[Example]] = {}
    for split, split_rows in read.items():
        faults = Faults(f"{eval_data if eval_data and split == 'validation' else data}", bad_rows)
        examples[split] = list(_convert(split_rows, convert, faults))
        if note := faults.close(len(examples[split])):
            notes.append(note)
    if chat_template_kwargs and not any(example.messages for rows in examples.values() for example in rows):
        raise ConfigError(f"data.chat_template_kwargs is for chats, but {data} holds none: leave it out")
    if "validation" not in examples:
        examples |= _split(examples["train"], eval_fraction, seed, data)
    if found is not None:
        notes.insert(0, found.note)
    if unused := [column for column in columns if column not in _used(chosen, columns)]:
        notes.append(f"columns not used: {', '.join(unused)}")
    metrics = OF_KIND[kind]
    return Task(
        name=Path(data).stem if _is_path(data) else data,
        kind=kind,
        splits=LazySplits({split: _constant(rows) for split, rows in examples.items()}),
        format=chosen,
        labels=() if found is None else found.classes,
        metrics=metrics,
        main_metric=metrics.names[0],
        generation={"max_new_tokens": 128, "num_beams": 1, "do_sample": False} if kind == "generate" else {},
        source=data if eval_data in (None, data) else f"{data} (validation: {eval_data})",
        notes=tuple(dict.fromkeys(notes)),
    )


def read_rows(path: Path, faults: Faults) -> Iterator[Row]:
    """Rows of a local file as they stand; what cannot be parsed goes to ``faults``."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path, faults)
    if suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(path, faults)
    if suffix == ".json":
        return _read_json(path, faults)
    return _read_csv(path, faults, "\t" if suffix == ".tsv" else ",")


def _read_all(data: str, bad_rows: BadRows) -> tuple[dict[str, list[Row]], list[str]]:
    """{split: rows} and notes; a file has the one split "train"."""
    if not _is_path(data):
        return _read_hub(data), []
    path = Path(data).expanduser()
    if not path.exists():
        raise DataError(f"no file {data}. Expected a file ({', '.join(SUFFIXES)}) or a hub id such as org/name.")
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir() if entry.suffix in SUFFIXES)
        raise DataError(f"{data} is a folder; expected one of its files: {', '.join(found[:8]) or 'none is readable'}")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{data} has the ending {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    faults = Faults(data, bad_rows)
    rows = list(read_rows(path, faults))
    note = faults.close(len(rows))
    return {"train": rows}, [*faults.notes, *([note] if note else [])]


def _is_path(data: str) -> bool:
    path = Path(data).expanduser()
    return path.exists() or path.suffix.lower() in SUFFIXES or data.startswith((".", "/", "~"))


def _read_hub(data: str) -> dict[str, list[Row]]:
    name, _, config = data.partition(":")
    if name.count("/") != 1:
        raise DataError(
            f"no file {data!r}. Expected a file ({', '.join(SUFFIXES)}), a hub id such as org/name or org/name:config, "
            "builtin:docstrings or builtin:packages."
        )
    tables = load_hub(name, config or None)
    splits: dict[str, list[Row]] = {}
    for split, names in {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}.items():
        table = next((tables[own] for own in names if own in tables), None)
        if table is None:
            continue
        rows = [_with_label_names(row, table.features) for row in table]
        if split == "train" or any(row.get("label", "") is not None for row in rows):  # else its labels are withheld
            splits[split] = [(f"{data}:{split}:{line}", row, str(row)) for line, row in enumerate(rows, 1)]
    if "train" not in splits:
        raise DataError(f"data set {data} has the splits {', '.join(tables)}; expected one called train")
    return splits


def _with_label_names(row: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """Class ids back to the names the hub knows; -1 stands for "withheld"."""
    named = dict(row)
    for column, feature in features.items():
        if hasattr(feature, "int2str") and isinstance(row[column], int):
            named[column] = Name(feature.int2str(row[column])) if row[column] >= 0 else None
    return _without_nulls(named)


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table with its lists and objects freed of the nulls that Arrow fills them with: there every object of a
    column has the keys of all."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(inner) for key, inner in value.items() if inner is not None}
        return [bare(inner) for inner in value] if isinstance(value, list) else value

    return {column: bare(value) for column, value in row.items()}


@functools.lru_cache(maxsize=8)
def load_hub(name: str, config: str | None, revision: str | None = None) -> Any:
    """All splits of a hub data set. Raises DataError where the hub cannot be reached or does not have it."""
    import datasets
    from huggingface_hub import constants

    label = f"{name}:{config}" if config else name
    if not reachable() and not constants.HF_HUB_OFFLINE:
        raise DataError(
            f"data set {label}: the hub cannot be reached from here. Check the network, give {LOCAL}, or set HF_HUB_OFFLINE=1 "
            "to use a copy loaded before."
        )
    try:
        return datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # the hub client, fsspec and datasets raise many kinds; each means "not from the hub"
        offline = " (HF_HUB_OFFLINE is set, so only copies loaded before are found)" if constants.HF_HUB_OFFLINE else ""
        raise DataError(
            f"data set {label} cannot be loaded from the hub{offline}: {_first_line(error)}. Or give {LOCAL}"
        ) from error


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
    with path.open("rb") as file:
        head = file.read(_HEAD)
    mark, encoding = next((pair for pair in _BYTE_ORDER_MARKS if head.startswith(pair[0])), (b"", ""))
    if not mark and head.count(0) > len(head) / 8:
        raise DataError(f"{path} looks like UTF-16 without a byte order mark, or is no text: save it as UTF-8")
    if encoding in ("", "utf-8") and b"\n" in head:
        opened = path.open("rb")
        opened.seek(len(mark))
        return opened
    content = path.read_bytes()
    if encoding in ("", "utf-8"):
        content = content[len(mark) :]
    else:
        try:
            content = content.decode(encoding).encode()
        except UnicodeError as error:
            raise DataError(f"{path} begins as {encoding.upper()} text does, but is none: {error}") from error
    return io.BytesIO(content if b"\n" in content else content.replace(b"\r", b"\n"))


def _read_lines(path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    """(1-based line number, line with its end); lines with bad UTF-8 or NUL are faults. BOM and CRLF are accepted."""
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                faults.add(
                    where,
                    f"not UTF-8 (byte 0x{raw[error.start]:02x})",
                    raw.decode(errors="replace"),
                    column=str(error.start + 1),
                )
                continue
            if "\0" in text:
                faults.add(where, "holds a NUL character", text, column=str(text.index("\0") + 1))
                continue
            yield number, text


def _read_jsonl(path: Path, faults: Faults) -> Iterator[Row]:
    lines = _read_lines(path, faults)
    first = list(itertools.islice(((number, line) for number, line in lines if line.strip()), 2))
    if first and first[0][1].lstrip().startswith("[") and not faults.count and _is_list(first):
        faults.notes.append(f"{path.name} is one JSON list and no JSON lines, and was read as that")
        yield from _read_json(path, faults)
        return
    for number, line in itertools.chain(first, lines):
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            cut = text == line and not text.rstrip().endswith(("}", "]"))  # only the last line can lack its end
            what = f"bad JSON ({error.msg})" + ("; the last line is cut off" if cut else "")
            faults.add(where, what, text, column=str(error.colno))
            continue
        except RecursionError:
            faults.add(where, "JSON nested too deeply", text)
            continue
        if isinstance(row, dict):
            yield where, row, text
        else:
            faults.add(where, f"expected an object {{...}}, got {shown(row)}", text)


def _is_list(first: Sequence[tuple[int, str]]) -> bool:
    """Whether a file whose first line with text begins a list is that list, and not a list a line."""
    if len(first) == 1:
        return True
    try:
        json.loads(first[0][1])
    except (ValueError, RecursionError):
        return True
    return False


def _read_json(path: Path, faults: Faults) -> Iterator[Row]:
    text = "".join(line for _, line in _read_lines(path, faults))
    if faults.count:  # with a line gone the list around it no longer parses
        raise DataError(f"{path} cannot be read:\n" + "\n".join(faults.kept))
    decoder = json.JSONDecoder()
    at, line, seen = _skip_space(text, 0), 1, 0
    if at == len(text):
        return
    if text[at] != "[":
        hint = "; one object a line? Then name the file .jsonl" if text[at] == "{" else ""
        raise DataError(f"{path}:1: expected a list [...] of objects{hint}: {excerpt(text[at:])}")
    at = _skip_space(text, at + 1)
    while text[at : at + 1] != "]":
        line, seen = line + text.count("\n", seen, at), at
        where = f"{path}:{line}"
        try:
            row, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:  # where the bad row ends nobody knows: no row after it can be read
            raise DataError(
                f"{path}:{error.lineno}, column {error.colno}: bad JSON ({error.msg}): "
                f"{excerpt(text.split(chr(10))[error.lineno - 1])}"
            ) from error
        except RecursionError:
            raise DataError(f"{where}: JSON nested too deeply: {excerpt(text[at:])}") from None
        if isinstance(row, dict):
            yield where, row, text[at:end]
        else:
            faults.add(where, f"expected an object {{...}}, got {shown(row)}", text[at:end])
        at = _skip_space(text, end)
        if text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", seen, at)
            found = "the file ends" if at == len(text) else f"found {text[at]!r}"
            raise DataError(
                f"{path}:{line}: bad JSON (expected , or ] after a row, but {found}): {excerpt(text[end:])}"
            )
    if rest := text[at + 1 :].strip():
        line += text.count("\n", seen, at)
        raise DataError(f"{path}:{line}: text stands behind the list, which would be lost: {excerpt(rest)}")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _read_csv(path: Path, faults: Faults, delimiter: str) -> Iterator[Row]:
    lines = dict(_read_lines(path, faults))
    if not lines:
        return
    numbers = sorted(lines)
    csv.field_size_limit(1 << 30)  # a long text is not a fault
    head = next((lines[number] for number in numbers if lines[number].strip()), "")
    if (used := _delimiter(head, delimiter)) != delimiter:
        delimiter = used
        faults.notes.append(f"{path.name} is separated by {DELIMITERS[used]}")
    reader = csv.reader((lines[number].rstrip("\r\n") + "\n" for number in numbers), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        first = reader.line_num  # lines taken so far; a quoted field may span several
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            start = numbers[min(first, len(numbers) - 1)]
            faults.add(f"{path}:{start}", f"bad CSV ({error})", lines[start])
            if "unexpected end of data" in str(error):
                return
            continue
        where = f"{path}:{numbers[first]}"
        raw = lines[numbers[first]]
        if not any(field.strip() for field in fields):
            continue
        if not header:
            header = [field.strip() for field in fields]
            if len(set(header)) < len(header):
                raise DataError(f"{where}: a column name occurs twice in the header: {excerpt(raw)}")
        elif len(fields) != len(header):
            faults.add(where, f"expected {len(header)} fields as in the header, got {len(fields)}", raw)
        else:
            yield where, dict(zip(header, fields, strict=True)), raw


def _delimiter(head: str, usual: str) -> str:
    """What separates the columns: the usual sign, unless another makes more known columns of the first line."""

    def known(delimiter: str) -> int:
        fields = next(csv.reader([head], delimiter=delimiter), [])
        return len({field.strip() for field in fields} & _KNOWN_COLUMNS)

    return max((usual, *DELIMITERS), key=known)


def _read_parquet(path: Path, faults: Faults) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = _declared_names(file.schema_arrow.metadata)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                for column, classes in names.items():
                    if isinstance(value := row.get(column), int):
                        row[column] = Name(classes[value]) if 0 <= value < len(classes) else None
                yield f"{path}:row {number}", _without_nulls(row), str(row)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{path} is not a readable parquet file: {_first_line(error)}") from error


def _declared_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """{column: class names by id} where the file was written by ``datasets``, which keeps them beside the table."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: feature["names"] for column, feature in features.items() if feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}


def _columns(rows: Sequence[Row]) -> list[str]:
    """Every column that some row has, in the order of their appearance."""
    return list(dict.fromkeys(name for _, row, _ in rows for name in row))


def _detect(data: str, rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(name for _, row, _ in rows[:1000] for name in row))
    has = set(columns).issuperset
    if has({"prompt", "completion"}):
        return "prompt-completion"
    if has({"messages"}) or has({"conversations"}):
        return "messages"
    if has({"instruction", "output"}):
        return "alpaca"
    if has({"label"}) and (any(has(pair) for pair in PAIRS) or any(has({single}) for single in SINGLES)):
        return "classification"
    raise DataError(
        f"{data} has the columns {', '.join(columns) or '(none)'}, which fit none of the accepted formats:\n{_ACCEPTED}"
    )


Converter = Callable[[Mapping[str, Any], str], Example]


def _converter(format: str, columns: Sequence[str], labels: Labels | None, of_chats: Mapping[str, Any]) -> Converter:
    """``of_chats``: how chats are read, as `chats.from_messages` takes it."""
    if labels is not None:
        return _labeled(_text_columns(columns), labels)
    if format == "alpaca":
        return _alpaca
    return functools.partial(chats.from_messages if format == "messages" else _prompt_completion, **of_chats)


def _found_labels(rows: Sequence[Row], told: LabelKind | None, trained: tuple[Kind, Sequence[str]] | None) -> Labels:
    values = [row.get("label") for _, row, _ in rows]
    kind, classes = trained or ("generate", ())
    if kind == "classify" and not classes:  # it has classes, but no names for them
        return read_labels(values, "classes")
    return read_labels(values, told) if kind == "generate" else trained_labels(values, classes)


def _text_columns(columns: Sequence[str]) -> tuple[str, ...]:
    pair: tuple[str, ...] = next((pair for pair in PAIRS if set(pair) <= {*columns}), ())
    return pair or next(((single,) for single in SINGLES if single in columns), (SINGLES[0],))


def _used(format: str, columns: Sequence[str]) -> set[str]:
    """The columns that rows of this format are made of."""
    if format == "classification":
        return {"label", *_text_columns(columns)}
    if format == "messages":
        return {"messages" if "messages" in columns else "conversations", *chats.COLUMNS, *chats.MEDIA}
    return {*_TEXT_COLUMNS[format], *_CHAT_ONLY, *chats.MEDIA}


def _convert(rows: Iterable[Row], convert: Converter, faults: Faults) -> Iterator[Example]:
    for where, row, raw in rows:
        try:
            yield convert(row, where)
        except BadRow as error:
            faults.add(where, str(error), raw, column=error.column)


def _text(row: Mapping[str, Any], column: str, *, optional: bool = False) -> str:
    value = row.get(column)
    if value is None:
        if optional:
            return ""
        raise BadRow("missing field", column)
    if not isinstance(value, str):
        raise BadRow(f"expected text, got {shown(value)}", column)
    return value


def _prompt_completion(row: Mapping[str, Any], where: str, **of_chats: Any) -> Example:
    if any(_is_chat(row.get(column)) for column in ("prompt", "completion")):
        return chats.from_prompt_completion(row, where, **of_chats)
    _refuse_chat_columns(row)
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    if not prompt.strip() and not completion.strip():
        raise BadRow("prompt and completion are both empty", "completion")
    _refuse_empty(completion, "completion")
    return Example(prompt=prompt, answer=completion, references=(completion,), where=where)


def _is_chat(value: Any) -> bool:
    """Whether a prompt or completion is a list of messages, or such a list in a CSV cell."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)
    return isinstance(value, list)


def _alpaca(row: Mapping[str, Any], where: str) -> Example:
    _refuse_chat_columns(row)
    instruction, output = _text(row, "instruction"), _text(row, "output")
    extra = _text(row, "input", optional=True)
    if not instruction.strip() and not output.strip():
        raise BadRow("instruction and output are both empty", "output")
    _refuse_empty(output, "output")
    template = _ALPACA_INPUT if extra else _ALPACA
    prompt = template.format_map({"instruction": instruction, "input": extra})
    return Example(prompt=prompt, answer=output, references=(output,), where=where)


def _refuse_chat_columns(row: Mapping[str, Any]) -> None:
    """Tools or a system prompt beside plain text would be dropped."""
    for column in (*_CHAT_ONLY, *chats.MEDIA):
        if not absent(row.get(column)):
            raise BadRow(
                f"has no place in a row of plain text; write it into the text, use messages, or set "
                f"data.ignore_keys=[{column}]",
                column,
            )


def _refuse_empty(answer: str, column: str) -> None:
    """A cell left blank is a missing answer; trained on, it would teach the model to stop at once."""
    if not answer.strip():
        raise BadRow("empty answer", column)


def _labeled(texts: tuple[str, ...], labels: Labels) -> Converter:
    def convert(row: Mapping[str, Any], where: str) -> Example:
        if "label" not in row:
            raise BadRow("missing field", "label")
        return Example(texts=_texts(row, texts), label=labels.read(row["label"]), where=where)

    return convert


def _texts(row: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[str, ...]:
    # A CSV file cannot tell an empty cell from an empty text, so no file does.
    texts = tuple("" if column in row and is_missing(row[column]) else _text(row, column) for column in columns)
    if not any(text.strip() for text in texts):
        raise BadRow("empty text", columns[0])
    return texts


def _split(examples: Sequence[Example], fraction: float, seed: int, data: str) -> dict[str, list[Example]]:
    """Train and validation rows in file order, at least one of each; the draw depends on seed and count alone."""
    if len(examples) < 2:
        raise DataError(
            f"{data} has {len(examples)} row; expected at least 2, one to train on and one to validate on. "
            "Give the validation rows with data.eval_path."
        )
    count = min(len(examples) - 1, max(1, round(fraction * len(examples))))
    held = set(random.Random(seed).sample(range(len(examples)), count))
    return {
        "train": [example for index, example in enumerate(examples) if index not in held],
        "validation": [example for index, example in enumerate(examples) if index in held],
    }


def _constant(rows: Sequence[Example]) -> Callable[[], Sequence[Example]]:
    return lambda: rows


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

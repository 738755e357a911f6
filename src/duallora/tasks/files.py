"""A user's own data: one path or hub id, its format read off its columns, its faults named by file and line.

JSON lines and CSV are read here and not through ``datasets``, which accepts missing fields, extra fields and bad
UTF-8 in silence, turns a column of mixed types into JSON, and counts lines from 0.
"""

from __future__ import annotations

import csv
import difflib
import functools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from duallora.errors import ConfigError, DataError
from duallora.tasks import metrics
from duallora.tasks.example import Example
from duallora.tasks.hub import reachable
from duallora.tasks.task import Kind, LazySplits, Metrics, Task

BadRows = Literal["error", "skip"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
LOCAL = f"a local file ({', '.join(SUFFIXES)}) or, for a task, the folder of its data (--data-dir, DUALLORA_DATA)"
MAX_FAULTS = 20
EXCERPT = 80
ROLES = ("system", "user", "assistant", "tool", "developer")
PAIRS = (("text1", "text2"), ("sentence1", "sentence2"), ("premise", "hypothesis"))
SINGLES = ("text", "sentence")

_ACCEPTED = """  prompt-completion  prompt, completion
  messages           messages: a list of {"role", "content"}
  alpaca             instruction, output, optional input
  classification     label, and text | sentence | text1, text2 | sentence1, sentence2 | premise, hypothesis"""

FORMATS = ("prompt-completion", "messages", "alpaca", "classification")

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

_SCORES: dict[Kind, tuple[Metrics, str]] = {
    "generate": (metrics.generation, "bleu"),
    "classify": (metrics.classification, "accuracy"),
    "regress": (metrics.regression, "pearson"),
}

Row = tuple[str, Mapping[str, Any], str]  # where ("file:line"), fields, the row as it stands in the file


class Faults:
    """What is wrong with the rows: kept up to ``MAX_FAULTS``, counted beyond, raised together or skipped."""

    def __init__(self, source: str, bad_rows: BadRows) -> None:
        self.source = source
        self.bad_rows = bad_rows
        self.kept: list[str] = []
        self.count = 0

    def add(self, where: str, what: str, excerpt: str = "", *, column: str = "") -> None:
        self.count += 1
        if len(self.kept) < MAX_FAULTS:
            place = f"{where}, column {column}" if column else where
            self.kept.append(f"{place}: {what}" + (f": {_excerpt(excerpt)}" if excerpt else ""))

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
    bad_rows: BadRows = "error",
) -> Task:
    """The task in a file, on the hub, or built in.

    data: a path (jsonl, json, csv, tsv, parquet), a hub id "org/name" or "org/name:config", "builtin:docstrings" or
        "builtin:packages".
    eval_data: path or hub id of the validation rows; without it ``eval_fraction`` of the rows (at least one) are set
        aside, drawn with ``seed``, unless the hub has a validation or test split of its own.
    format: one of FORMATS where the columns fit several; None detects it.
    bad_rows: "error" raises on the first 20 faults together; "skip" leaves bad rows out and says so in ``Task.source``.

    Raises DataError for missing, empty or malformed data, ConfigError for unknown names and fractions outside (0, 1).
    """
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(str(format), FORMATS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown data.format {format!r}; nearest: {near}. Expected one of {', '.join(FORMATS)}")
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
    rows = [row for split in read.values() for row in split]
    chosen = format or _detect(data, rows)
    convert, kind, labels = _converter(chosen, rows)
    examples: dict[str, list[Example]] = {}
    for split, split_rows in read.items():
        faults = Faults(f"{eval_data if eval_data and split == 'validation' else data}", bad_rows)
        examples[split] = list(_convert(split_rows, convert, faults))
        if note := faults.close(len(examples[split])):
            notes.append(note)
    if "validation" not in examples:
        examples |= _split(examples["train"], eval_fraction, seed, data)
    score, main_metric = _SCORES[kind]
    source = data if eval_data in (None, data) else f"{data} (validation: {eval_data})"
    return Task(
        name=Path(data).stem if _is_path(data) else data,
        kind=kind,
        splits=LazySplits({split: _constant(rows) for split, rows in examples.items()}),
        format=chosen,
        labels=labels,
        metrics=score,
        main_metric=main_metric,
        generation={"max_new_tokens": 128, "num_beams": 1, "do_sample": False} if kind == "generate" else {},
        source="\n".join([source, *dict.fromkeys(notes)]),
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
    return {"train": rows}, [note] if note else []


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
            named[column] = feature.int2str(row[column]) if row[column] >= 0 else None
    return named


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


def _read_lines(path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    """(1-based line number, line with its end); lines with bad UTF-8 or NUL are faults. BOM and CRLF are accepted."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
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
    for number, line in _read_lines(path, faults):
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
            faults.add(where, f"expected an object {{...}}, got {_type(row)}", text)


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
        raise DataError(f"{path}:1: expected a list [...] of objects{hint}: {_excerpt(text[at:])}")
    at = _skip_space(text, at + 1)
    while text[at : at + 1] != "]":
        line, seen = line + text.count("\n", seen, at), at
        where = f"{path}:{line}"
        try:
            row, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:  # where the bad row ends nobody knows: no row after it can be read
            excerpt = _excerpt(text.split("\n")[error.lineno - 1])
            raise DataError(
                f"{path}:{error.lineno}, column {error.colno}: bad JSON ({error.msg}): {excerpt}"
            ) from error
        except RecursionError:
            raise DataError(f"{where}: JSON nested too deeply: {_excerpt(text[at:])}") from None
        if isinstance(row, dict):
            yield where, row, text[at:end]
        else:
            faults.add(where, f"expected an object {{...}}, got {_type(row)}", text[at:end])
        at = _skip_space(text, end)
        if text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", seen, at)
            found = "the file ends" if at == len(text) else f"found {text[at]!r}"
            raise DataError(
                f"{path}:{line}: bad JSON (expected , or ] after a row, but {found}): {_excerpt(text[end:])}"
            )


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
                raise DataError(f"{where}: a column name occurs twice in the header: {_excerpt(raw)}")
        elif len(fields) != len(header):
            faults.add(where, f"expected {len(header)} fields as in the header, got {len(fields)}", raw)
        else:
            yield where, dict(zip(header, fields, strict=True)), raw


def _read_parquet(path: Path, faults: Faults) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", row, str(row)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{path} is not a readable parquet file: {_first_line(error)}") from error


def _detect(data: str, rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(name for _, row, _ in rows[:1000] for name in row))
    has = set(columns).issuperset
    if has({"prompt", "completion"}):
        return "prompt-completion"
    if has({"messages"}):
        return "messages"
    if has({"instruction", "output"}):
        return "alpaca"
    if has({"label"}) and (any(has(pair) for pair in PAIRS) or any(has({single}) for single in SINGLES)):
        return "classification"
    raise DataError(
        f"{data} has the columns {', '.join(columns) or '(none)'}, which fit none of the accepted formats:\n{_ACCEPTED}"
    )


Converter = Callable[[Mapping[str, Any], str], Example]


class _BadRow(Exception):
    """What is wrong with one row; caught where the row's place is known."""

    def __init__(self, what: str, column: str = "") -> None:
        super().__init__(what)
        self.column = column


def _converter(format: str, rows: Sequence[Row]) -> tuple[Converter, Kind, tuple[str, ...]]:
    if format == "prompt-completion":
        return _prompt_completion, "generate", ()
    if format == "messages":
        return _messages, "generate", ()
    if format == "alpaca":
        return _alpaca, "generate", ()
    columns = {name for _, row, _ in rows[:1000] for name in row}
    texts: tuple[str, ...] = next((pair for pair in PAIRS if columns.issuperset(pair)), ())
    texts = texts or next(((single,) for single in SINGLES if single in columns), (SINGLES[0],))
    values = [row["label"] for _, row, _ in rows if row.get("label") not in (None, "")]
    if _are_targets(values):
        return _regression(texts), "regress", ()
    labels = _label_names(values)
    if len(labels) < 2:
        raise DataError(f"the column label holds {len(labels)} class ({', '.join(labels)}); expected at least 2")
    return _classification(texts, labels), "classify", labels


def _convert(rows: Iterable[Row], convert: Converter, faults: Faults) -> Iterator[Example]:
    for where, row, raw in rows:
        try:
            yield convert(row, where)
        except _BadRow as error:
            faults.add(where, str(error), raw, column=error.column)


def _text(row: Mapping[str, Any], column: str, *, optional: bool = False) -> str:
    value = row.get(column)
    if value is None:
        if optional:
            return ""
        raise _BadRow("missing field", column)
    if not isinstance(value, str):
        raise _BadRow(f"expected text, got {_type(value)}", column)
    return value


def _prompt_completion(row: Mapping[str, Any], where: str) -> Example:
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):  # TRL's chat form of it
        return _messages({"messages": [*row["prompt"], *row["completion"]]}, where)
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    if not prompt.strip() and not completion.strip():
        raise _BadRow("prompt and completion are both empty", "completion")
    _refuse_empty(completion, "completion")
    return Example(prompt=prompt, answer=completion, references=(completion,), where=where)


def _alpaca(row: Mapping[str, Any], where: str) -> Example:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    extra = _text(row, "input", optional=True)
    if not instruction.strip() and not output.strip():
        raise _BadRow("instruction and output are both empty", "output")
    _refuse_empty(output, "output")
    template = _ALPACA_INPUT if extra else _ALPACA
    prompt = template.format_map({"instruction": instruction, "input": extra})
    return Example(prompt=prompt, answer=output, references=(output,), where=where)


def _refuse_empty(answer: str, column: str) -> None:
    """A cell left blank is a missing answer; trained on, it would teach the model to stop at once."""
    if not answer.strip():
        raise _BadRow("empty answer", column)


def _messages(row: Mapping[str, Any], where: str) -> Example:
    messages = row.get("messages")
    if messages is None:
        raise _BadRow("missing field", "messages")
    if isinstance(messages, str):  # a CSV cell
        try:
            messages = json.loads(messages)
        except ValueError:
            raise _BadRow("expected a JSON list of messages", "messages") from None
    if not isinstance(messages, list) or not messages:
        raise _BadRow(f"expected a list of at least one message, got {_type(messages)}", "messages")
    turns = []
    for index, message in enumerate(messages):
        column = f"messages[{index}]"
        if not isinstance(message, dict):
            raise _BadRow(f'expected {{"role", "content"}}, got {_type(message)}', column)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            near = difflib.get_close_matches(str(role), ROLES, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise _BadRow(f"unknown role {role!r}; expected one of {', '.join(ROLES)}{hint}", f"{column}.role")
        if not isinstance(content, str):
            raise _BadRow(f"expected text, got {_type(content)}", f"{column}.content")
        turns.append({"role": role, "content": content})
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise _BadRow("no assistant turn, so there is nothing to train on", "messages")
    return Example(messages=tuple(turns), references=(answers[-1],), where=where)


def _classification(texts: tuple[str, ...], labels: tuple[str, ...]) -> Converter:
    ids = {name: index for index, name in enumerate(labels)}

    def convert(row: Mapping[str, Any], where: str) -> Example:
        label = row.get("label")
        if label is None or label == "":
            raise _BadRow("missing field", "label")
        if not isinstance(label, str | int | float) or str(label) not in ids:
            raise _BadRow(f"expected a class name or number, got {_type(label)}", "label")
        return Example(texts=_texts(row, texts), label=ids[str(label)], where=where)

    return convert


def _regression(texts: tuple[str, ...]) -> Converter:
    def convert(row: Mapping[str, Any], where: str) -> Example:
        if row.get("label") in (None, ""):
            raise _BadRow("missing field", "label")
        target = _number(row["label"])
        if target is None or not math.isfinite(target):
            raise _BadRow(f"expected a finite number, got {_type(row['label'])}", "label")
        return Example(texts=_texts(row, texts), label=target, where=where)

    return convert


def _texts(row: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[str, ...]:
    texts = tuple(_text(row, column) for column in columns)
    if not any(text.strip() for text in texts):
        raise _BadRow("empty text", columns[0])
    return texts


def _are_targets(values: Sequence[Any]) -> bool:
    """Whether the labels are numbers, at least one with a fraction: 3.8 is a target, 3 is a class.

    One label in ten may be no number: it is a fault of its row, not a sign that 3.8 is the name of a class.
    """
    numbers = [number for number in map(_number, values) if number is not None]
    fraction = any(isinstance(value, float) for value in values) or any(number % 1 for number in numbers)
    return fraction and len(numbers) >= 0.9 * len(values)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _is_integer(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def _label_names(values: Sequence[Any]) -> tuple[str, ...]:
    """Class names in a fixed order: numbers by value, names by alphabet. 0, 1, 2 keep their own ids."""
    names = {str(value) for value in values if isinstance(value, str | int | float)}
    numeric = all(_is_integer(name) for name in names)
    return tuple(sorted(names, key=int) if numeric else sorted(names))


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


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    text = "null" if value is None else f"{names.get(type(value), type(value).__name__)} ({value!r})"
    return _excerpt(text, 40)


def _excerpt(text: str, limit: int = EXCERPT) -> str:
    """At most ``limit`` characters on one line, control characters made visible."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

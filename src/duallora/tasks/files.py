"""A user's own data: one path or hub id, its format read off its columns, brought to examples with their labels."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from duallora.errors import ConfigError, DataError, unknown
from duallora.tasks import chats, commonsense
from duallora.tasks.example import BadRow, Example
from duallora.tasks.hub import SUFFIXES
from duallora.tasks.labels import LabelKind, Labels, is_missing, read_labels, trained_labels
from duallora.tasks.metrics import OF_KIND, Metrics
from duallora.tasks.rows import ACCEPTED, BadRows, Faults, Row, draw, read_hub, read_rows
from duallora.tasks.task import Kind, LazySplits, Task
from duallora.tasks.text import absent, parse_json, shown

FORMATS = ("prompt-completion", "messages", "alpaca", "classification", "text")
# Of rows with a label; a pair goes before a single text.
_TEXTS: tuple[tuple[str, ...], ...] = (
    ("text1", "text2"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("text",), ("sentence",),
)  # fmt: skip
_TEXT_COLUMNS = {
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "input", "output"),
    "messages": ("messages", "conversations"),
    "text": ("text",),
}
# Columns that say something about a chat; in rows of plain text there is no place for it.
_CHAT_ONLY = (*chats.COLUMNS, "history", *chats.MEDIA)
_KNOWN_COLUMNS = {"label", *itertools.chain(*_TEXTS, *_TEXT_COLUMNS.values())}

# The wording of Stanford Alpaca, byte for byte: models tuned on it know it.
_ALPACA = (
    "Below is an instruction that describes a task{}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)

Converter = Callable[[Mapping[str, Any], str], Example]

ANSWERS = ("completion", "output", "label")  # columns that rows to be answered need not have
FEW = 5  # rows of a class on average: with fewer, any class may well have one
RARE = 8  # classes with hardly a row that are named
WORDS = 4  # of an answer that BLEU, which counts four words in a row, can say something about


def load_data(
    data: str,
    *,
    eval_data: str | None = None,
    eval_fraction: float = 0.05,
    format: str | None = None,
    labels: LabelKind | None = None,
    trained: tuple[Kind, Sequence[str]] | None = None,
    bad_rows: BadRows = "error",
    ignore_keys: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Task:
    """The task in a file, on the hub, or built in.

    data: a path (jsonl, json, csv, tsv, parquet, txt), a hub id "org/name" or "org/name:config", "builtin:docstrings",
        "builtin:packages" or "builtin:reference".
    eval_data: path or hub id of the validation rows; without it ``eval_fraction`` of the rows (at least one) are set
        aside, the same ones for every seed of a run, unless the hub has a validation or test split of its own.
    format: one of FORMATS where the columns fit several; None detects it.
    labels: what the label column holds, "classes" or "numbers"; None goes by the labels (`duallora.tasks.labels`).
    trained: what the model that these rows are for was trained to do, and its classes by id: they decide what the label
        column holds, whatever is in it.
    bad_rows: "error" raises on the first 20 faults together; "skip" leaves bad rows out and says so in ``Task.notes``.
    ignore_keys: columns, and keys of a chat's messages, to leave out.
    columns: {name of a format's column: the one it has in the data}, such as {"prompt": "question"}.
    chat_template_kwargs: what the chat template is given with every chat, such as {"enable_thinking": False}.

    Raises DataError for missing, empty or malformed data, ConfigError for unknown names and fractions outside (0, 1).
    """
    for name, value, known in (("format", format, FORMATS), ("labels", labels, ("classes", "numbers"))):
        if value is not None and value not in known:
            raise unknown(f"data.{name}", str(value), known)
    if taken := chats.reserved(chat_template_kwargs or {}):
        raise ConfigError(f"data.chat_template_kwargs.{taken[0]} is not the chat template's to know: leave it out")
    if not 0 < eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction is {eval_fraction}; expected a number between 0 and 1, such as 0.05")
    if data.startswith("builtin:"):
        from duallora.tasks import docstrings

        return docstrings.load(data)
    renamed = Renamed(columns or {})
    read, notes = _read(data, eval_data, bad_rows, frozenset(ignore_keys), renamed)
    rows = [row for split in read.values() for row in split]
    there = _names(row for _, row, _ in rows)
    chosen = format or _detect(data, rows, renamed)
    found = _labels(rows, labels, trained) if chosen == "classification" else None
    if labels is not None and found is None:
        raise ConfigError(
            f"data.labels={labels} is for rows with a label, but {data} holds {chosen} rows: leave it out"
        )
    of_chats = {"ignore": frozenset(ignore_keys), "options": chat_template_kwargs}
    convert = _converter(chosen, _text_columns([*renamed.columns, *there]), found, of_chats)
    examples: dict[str, Sequence[Example]] = {}
    for split, split_rows in read.items():
        faults = Faults(eval_data if eval_data and split == "validation" else data, bad_rows)
        examples[split] = _convert(split_rows, convert, faults, renamed)
        notes.append(faults.close(len(examples[split])))
    if chat_template_kwargs and not any(example.messages for rows in examples.values() for example in rows):
        raise ConfigError(f"data.chat_template_kwargs is for chats, but {data} holds none: leave it out")
    if "validation" not in examples:
        examples |= _split(examples["train"], eval_fraction, data)
    unused = [column for column in there if column not in _used(chosen, there)]
    notes += [f"columns not used: {', '.join(unused)}"] * bool(unused)
    notes.insert(0, renamed.note)
    if found is not None and trained is None and len(examples["train"]) >= FEW * len(found.classes) > 0:
        seen = Counter(example.label for example in examples["train"])
        rare = [f"{name} ({seen[number]})" for number, name in enumerate(found.classes) if seen[number] < 2]
        more = ", ..." if len(rare) > RARE else ""
        notes += [f"classes of hardly any training row: {', '.join(rare[:RARE])}{more}"] * bool(rare)
    if chosen == "alpaca" and any(_is_commonsense(row) for _, row, _ in rows):
        notes.append("rows as in LLM-Adapters' commonsense files: in the prompt of that protocol (docs/evaluation.md)")
    kind: Kind = "generate" if found is None else "classify" if found.classes else "regress"
    metrics = _metrics(chosen, kind, examples)
    return Task(
        name=Path(data).stem if _is_path(data) else data,
        kind=kind,
        splits=LazySplits({split: functools.partial(examples.__getitem__, split) for split in examples}),
        format=chosen,
        labels=() if found is None else found.classes,
        metrics=metrics,
        main_metric=metrics.names[0] if metrics.names else "loss",
        generation={"max_new_tokens": 128, "num_beams": 1, "do_sample": False} if kind == "generate" else {},
        source=data if eval_data in (None, data) else f"{data} (validation: {eval_data})",
        notes=tuple(dict.fromkeys(note for note in (found.note if found else "", *notes) if note)),
    )


class Renamed:
    """Rows whose columns have the names of a format's; ``columns``: {that name: the one in the file}.

    Raises:
        ConfigError: no format has a column of that name.
    """

    def __init__(self, columns: Mapping[str, str]):
        self.columns = dict(columns)
        known = sorted({*_KNOWN_COLUMNS, *chats.COLUMNS})
        for name in self.columns:
            if name not in known:
                more = ", as in --columns prompt=question,completion=answer"
                raise unknown("name in data.columns", name, known, more)
        said = ", ".join(f"{name} is {own}" for name, own in self.columns.items())
        self.note = f"columns as told: {said}" if said else ""

    def require(self, data: str, there: Sequence[str]) -> None:
        """DataError where the data lack one of the columns."""
        if missing := [name for name, own in self.columns.items() if own not in there]:
            raise DataError(
                f"{data} has no column {self.columns[missing[0]]!r} (data.columns); it has {', '.join(there)}. Say which of "
                f"them is the {missing[0]}: --columns {missing[0]}=COLUMN"
            )

    def row(self, row: Mapping[str, Any], ignored: Set[str] = frozenset()) -> Mapping[str, Any]:
        """One row but for the ``ignored`` columns; what had a name that was given to another column is left out."""
        if not (self.columns or ignored):
            return row
        taken = {*self.columns, *self.columns.values()}
        rest = {name: value for name, value in row.items() if name not in taken}
        told = {name: row[own] for name, own in self.columns.items() if own in row}
        return {name: value for name, value in (told | rest).items() if name not in ignored}

    def place(self, column: str) -> str:
        """The file's name of a column, for messages."""
        return self.columns.get(column, column)


def _read(
    data: str, eval_data: str | None, bad_rows: BadRows, ignored: frozenset[str], renamed: Renamed
) -> tuple[dict[str, list[Row]], list[str]]:
    """{split: rows} without the ignored columns, and notes."""
    known = {*_KNOWN_COLUMNS, *renamed.columns.values()}
    read, notes = _read_all(data, bad_rows, known)
    if eval_data is not None:
        held, more = _read_all(eval_data, bad_rows, known)
        # Of a hub set given for evaluation its own held-out rows are meant; a file has only one list of rows.
        read["validation"] = held.get("validation") or held.get("test") or held["train"]
        notes += more
    for split, rows in read.items():
        renamed.require(eval_data if eval_data and split == "validation" else data, _names(row for _, row, _ in rows))
        rows[:] = [(where, renamed.row(row, ignored), raw) for where, row, raw in rows]
    return read, notes


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns of all rows, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _read_all(data: str, bad_rows: BadRows, known: set[str]) -> tuple[dict[str, list[Row]], list[str]]:
    """{split: rows} and notes; a file has the one split "train"."""
    if not _is_path(data):
        name, _, config = data.partition(":")
        if name.count("/") != 1:
            raise DataError(
                f"no file {data!r}. Expected a file ({', '.join(SUFFIXES)}), a hub id such as org/name or org/name:config, "
                "builtin:docstrings or builtin:packages."
            )
        return read_hub(name, config or None), []
    faults = Faults(data, bad_rows)
    rows = list(read_rows(_file(data), faults, known))
    note = faults.close(len(rows))
    return {"train": rows}, [*faults.notes, note]


def _file(data: str) -> Path:
    """The local file of that name; DataError where there is none that can be read."""
    path = Path(data).expanduser()
    if not path.exists():
        raise DataError(f"no file {data}. Expected a file ({', '.join(SUFFIXES)}) or a hub id such as org/name.")
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir() if entry.suffix in SUFFIXES)
        raise DataError(f"{data} is a folder; expected one of its files: {', '.join(found[:8]) or 'none is readable'}")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{data} has the ending {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    return path


def _is_path(data: str) -> bool:
    path = Path(data).expanduser()
    return path.exists() or path.suffix.lower() in SUFFIXES or data.startswith((".", "/", "~"))


def _detect(data: str, rows: Sequence[Row], renamed: Renamed, kind: Kind | None = None) -> str:
    """The format of the rows; what columns were renamed to goes before what else is there.

    ``kind``: that of a model which is to predict what the rows may lack.
    """
    columns = _names(row for _, row, _ in rows[:1000])
    found = _fits({*renamed.columns}, kind) or _fits({*columns}, kind)
    if found is None and kind is None and set(columns) == {"text"}:  # beside other columns it may lack its label
        found = "text"
    if found is not None:
        return found
    asked = "" if kind is None else f", of which a model that was trained to {kind} needs the question alone"
    raise DataError(
        f"{data} has the columns {', '.join(columns) or '(none)'}, which fit none of the accepted formats{asked}:\n{ACCEPTED}"
    )


def _fits(columns: set[str], kind: Kind | None) -> str | None:
    has = columns.__ge__
    texts = any(has({*texts}) for texts in _TEXTS)
    if kind in ("classify", "regress"):
        return "classification" if texts else None
    if has({"prompt", "completion"} if kind is None else {"prompt"}):
        return "prompt-completion"
    if has({"messages"}) or has({"conversations"}):
        return "messages"
    if has({"instruction", "output"} if kind is None else {"instruction"}):
        return "alpaca"
    if kind == "generate":
        return "text" if has({"text"}) else None
    return "classification" if has({"label"}) and texts else None


def _metrics(format: str, kind: Kind, examples: Mapping[str, Sequence[Example]]) -> Metrics:
    """Of plain text the loss is all there is; of answers of a word or three exact match says more than BLEU."""
    if format == "text":
        return Metrics()
    answers = [example.references[0] for example in examples["train"] if example.references]
    short = sum(len(answer.split()) < WORDS for answer in answers)
    return Metrics("exact_match", "bleu") if kind == "generate" and 2 * short > len(answers) else OF_KIND[kind]


def _labels(rows: Sequence[Row], told: LabelKind | None, trained: tuple[Kind, Sequence[str]] | None) -> Labels:
    values = [row.get("label") for _, row, _ in rows]
    kind, classes = trained or ("generate", ())
    if kind == "classify" and not classes:  # it has classes, but no names for them
        return read_labels(values, "classes")
    return read_labels(values, told) if kind == "generate" else trained_labels(values, classes)


def _text_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns with the texts of rows with a label."""
    return next((texts for texts in _TEXTS if {*texts} <= {*columns}), ("text",))


def _used(format: str, columns: Sequence[str]) -> set[str]:
    """The columns that rows of this format are made of."""
    if format == "classification":
        return {"label", *_text_columns(columns)}
    if format == "messages":
        return {*_TEXT_COLUMNS[format], *chats.COLUMNS, *chats.MEDIA}
    return {*_TEXT_COLUMNS[format], *_CHAT_ONLY}


def _converter(format: str, texts: tuple[str, ...], labels: Labels | None, of_chats: Mapping[str, Any]) -> Converter:
    """``texts``: columns of rows with a label; ``of_chats``: how chats are read, as `chats.from_messages` takes it."""
    if labels is not None:
        return functools.partial(_labeled, texts=texts, labels=labels)
    if format in ("alpaca", "text"):
        return _alpaca if format == "alpaca" else _plain_text
    return functools.partial(chats.from_messages if format == "messages" else _prompt_completion, **of_chats)


class Questions:
    """The rows of a local file that a model is to answer, read anew, a row at a time, whenever they are asked for.

    They may hold answers or labels, which are not looked at. Every row is read once at the beginning, so that a bad one
    is told before anything is loaded.

    Args:
        file: its path; of a .json list the whole text is held in memory, of every other kind a row.
        kind: what the model was trained to do.
        reading: how the rows are read, as `load_data` takes it.

    Raises:
        ConfigError, DataError: as `load_data` does.
    """

    def __init__(self, file: str, kind: Kind, **reading: Any):
        self.path, self.renamed = _file(file), Renamed(reading.get("columns") or {})
        self.ignored, self.bad_rows = frozenset(reading.get("ignore_keys") or ()), reading.get("bad_rows", "error")
        faults = Faults(file, "skip")
        head = [row for _, row, _ in itertools.islice(self._rows(faults), 1000)]
        if not head:
            faults.close(0)
        there = _names(head)
        told = self.renamed.columns.items()
        self.renamed = Renamed({name: own for name, own in told if name not in ANSWERS or own in there})
        self.renamed.require(file, there)
        asked = [self.renamed.row(row, self.ignored) for row in head]
        self.format = reading.get("format") or _detect(file, [("", row, "") for row in asked], self.renamed, kind)
        of_chats = {"ignore": self.ignored, "options": reading.get("chat_template_kwargs")}
        texts = _text_columns([*self.renamed.columns, *_names(asked)])
        self.convert = functools.partial(_question, format=self.format, texts=texts, of_chats=of_chats)
        faults, names = Faults(file, self.bad_rows), dict[str, None]()
        self.count = 0
        for row, _ in self._read(faults):
            names |= dict.fromkeys(row)
            self.count += 1
        self.columns = list(names)
        self.notes = list(filter(None, [self.renamed.note, *faults.notes, faults.close(self.count)]))

    def __iter__(self) -> Iterator[tuple[Mapping[str, Any], Example]]:
        """(the row as it stands in the file, what of it is asked)."""
        return self._read(Faults(str(self.path), "skip"))

    def _rows(self, faults: Faults) -> Iterator[Row]:
        return read_rows(self.path, faults, {*_KNOWN_COLUMNS, *self.renamed.columns.values()})

    def _read(self, faults: Faults) -> Iterator[tuple[Mapping[str, Any], Example]]:
        for where, row, raw in self._rows(faults):
            try:
                example = self.convert(self.renamed.row(row, self.ignored), where)
            except BadRow as error:
                faults.add(where, str(error), raw, column=self.renamed.place(error.column))
            else:
                yield row, example


def _question(
    row: Mapping[str, Any], where: str, *, format: str, texts: tuple[str, ...], of_chats: Mapping[str, Any]
) -> Example:
    """What a row asks, without its answer."""
    if format == "classification":
        return Example(texts=_texts(row, texts), where=where)
    if format == "messages" or (format == "prompt-completion" and _is_chat(row.get("prompt"))):
        return chats.question(row, where, "prompt" if format == "prompt-completion" else "", **of_chats)
    column = {"alpaca": "instruction", "text": "text"}.get(format, "prompt")
    _refuse_chat_only(row)
    if not _text(row, column).strip():
        raise BadRow("empty", column)
    if format == "alpaca":
        told = row["output"] if _is_commonsense(row) else "-"
        return replace(_alpaca({**row, "output": told}, where), answer="", references=())
    return Example(prompt=row[column], where=where)


def _convert(rows: Iterable[Row], convert: Converter, faults: Faults, renamed: Renamed) -> list[Example]:
    examples = []
    for where, row, raw in rows:
        try:
            examples.append(convert(row, where))
        except BadRow as error:
            faults.add(where, str(error), raw, column=renamed.place(error.column))
    return examples


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise BadRow("missing field", column)
    if not isinstance(value, str):
        raise BadRow(f"expected text, got {shown(value)}", column)
    return value


def _plain_example(row: Mapping[str, Any], where: str, question: str, answer: str, prompt: str) -> Example:
    """A row of plain text; ``question`` and ``answer`` are its columns.

    A blank answer is a missing one: trained on, it would teach the model to stop at once. Tools or a system prompt beside
    plain text would be dropped.
    """
    _refuse_chat_only(row)
    asked, said = _text(row, question), _text(row, answer)
    if not said.strip():
        raise BadRow("empty answer" if asked.strip() else f"{question} and {answer} are both empty", answer)
    return Example(prompt=prompt or asked, answer=said, references=(said,), where=where)


def _refuse_chat_only(row: Mapping[str, Any]) -> None:
    for column in _CHAT_ONLY:
        if not absent(row.get(column)):
            raise BadRow(
                f"has no place in a row of plain text; write it into the text, use messages, or set "
                f"data.ignore_keys=[{column}]",
                column,
            )


def _plain_text(row: Mapping[str, Any], where: str) -> Example:
    _refuse_chat_only(row)
    text = _text(row, "text")
    if not text.strip():
        raise BadRow("empty text", "text")
    return Example(answer=text, references=(text,), where=where)


def _prompt_completion(row: Mapping[str, Any], where: str, **of_chats: Any) -> Example:
    if any(_is_chat(row.get(column)) for column in ("prompt", "completion")):
        return chats.from_prompt_completion(row, where, **of_chats)
    return _plain_example(row, where, "prompt", "completion", "")


def _is_chat(value: Any) -> bool:
    """Whether a prompt or completion is a list of messages, or such a list in a CSV cell."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except ValueError:
            return False
        return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)
    return isinstance(value, list)


def _is_commonsense(row: Mapping[str, Any]) -> bool:
    """Whether a row is one of LLM-Adapters' commonsense files, whose prompt is that of the evaluation."""
    return isinstance(row.get("answer"), str) and row.get("output") == f"the correct answer is {row['answer']}"


def _alpaca(row: Mapping[str, Any], where: str) -> Example:
    extra = "" if row.get("input") is None else _text(row, "input")
    if _is_commonsense(row):
        instruction = "\n".join(filter(None, (_text(row, "instruction"), extra)))
        prompt = commonsense.PROMPT.format_map({"instruction": instruction})
    elif extra:
        more = ", paired with an input that provides further context"
        prompt = _ALPACA.format(more, row.get("instruction"), f"### Input:\n{extra}\n\n")
    else:
        prompt = _ALPACA.format("", row.get("instruction"), "")
    return _plain_example(row, where, "instruction", "output", prompt)


def _labeled(row: Mapping[str, Any], where: str, *, texts: tuple[str, ...], labels: Labels) -> Example:
    if "label" not in row:
        raise BadRow("missing field", "label")
    return Example(texts=_texts(row, texts), label=labels.read(row["label"]), where=where)


def _texts(row: Mapping[str, Any], texts: tuple[str, ...]) -> tuple[str, ...]:
    # A CSV file cannot tell an empty cell from an empty text, so no file does.
    found = tuple("" if column in row and is_missing(row[column]) else _text(row, column) for column in texts)
    if not any(text.strip() for text in found):
        raise BadRow("empty text", texts[0])
    return found


def _split(examples: Sequence[Example], fraction: float, data: str) -> dict[str, Sequence[Example]]:
    """Train and validation rows, at least one of each."""
    if len(examples) < 2:
        raise DataError(
            f"{data} has {len(examples)} row; expected at least 2, one to train on and one to validate on. "
            "Give the validation rows with data.eval_path."
        )
    count = min(len(examples) - 1, max(1, round(fraction * len(examples))))
    train, validation = draw(examples, count, 0)
    return {"train": train, "validation": validation}

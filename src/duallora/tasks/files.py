"""A user's own data: one path or hub id, its format read off its columns, brought to examples with their labels."""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from duallora.errors import ConfigError, DataError
from duallora.tasks import chats, commonsense
from duallora.tasks.example import BadRow, Example
from duallora.tasks.hub import SUFFIXES
from duallora.tasks.labels import LabelKind, Labels, is_missing, read_labels, trained_labels
from duallora.tasks.metrics import OF_KIND
from duallora.tasks.rows import ACCEPTED, BadRows, Faults, Row, draw, read_hub, read_rows
from duallora.tasks.task import Kind, LazySplits, Task
from duallora.tasks.text import absent, parse_json, shown

FORMATS = ("prompt-completion", "messages", "alpaca", "classification")
PAIRS = (("text1", "text2"), ("sentence1", "sentence2"), ("premise", "hypothesis"))
SINGLES = ("text", "sentence")
_TEXT_COLUMNS = {
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "input", "output"),
    "messages": ("messages", "conversations"),
}
# Columns that say something about a chat; in rows of plain text there is no place for it.
_CHAT_ONLY = (*chats.COLUMNS, "history", *chats.MEDIA)
_KNOWN_COLUMNS = {"label", *SINGLES, *itertools.chain(*PAIRS, *_TEXT_COLUMNS.values())}

# The wording of Stanford Alpaca, byte for byte: models tuned on it know it.
_ALPACA = (
    "Below is an instruction that describes a task{}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)

Converter = Callable[[Mapping[str, Any], str], Example]


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
    for name, value, known in (("format", format, FORMATS), ("labels", labels, ("classes", "numbers"))):
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
    read, notes = _read(data, eval_data, bad_rows, frozenset(ignore_keys))
    rows = [row for split in read.values() for row in split]
    columns = list(dict.fromkeys(name for _, row, _ in rows for name in row))
    chosen = format or _detect(data, rows)
    found = _labels(rows, labels, trained) if chosen == "classification" else None
    if labels is not None and found is None:
        raise ConfigError(
            f"data.labels={labels} is for rows with a label, but {data} holds {chosen} rows: leave it out"
        )
    of_chats = {"ignore": frozenset(ignore_keys), "options": chat_template_kwargs}
    convert = _converter(chosen, _text_columns(columns), found, of_chats)
    examples: dict[str, Sequence[Example]] = {}
    for split, split_rows in read.items():
        faults = Faults(eval_data if eval_data and split == "validation" else data, bad_rows)
        examples[split] = _convert(split_rows, convert, faults)
        notes.append(faults.close(len(examples[split])))
    if chat_template_kwargs and not any(example.messages for rows in examples.values() for example in rows):
        raise ConfigError(f"data.chat_template_kwargs is for chats, but {data} holds none: leave it out")
    if "validation" not in examples:
        examples |= _split(examples["train"], eval_fraction, seed, data)
    unused = [column for column in columns if column not in _used(chosen, columns)]
    notes += [f"columns not used: {', '.join(unused)}"] * bool(unused)
    if chosen == "alpaca" and any(_is_commonsense(row) for _, row, _ in rows):
        notes.append("rows as in LLM-Adapters' commonsense files: in the prompt of that protocol (docs/evaluation.md)")
    kind: Kind = "generate" if found is None else "classify" if found.classes else "regress"
    metrics = OF_KIND[kind]
    return Task(
        name=Path(data).stem if _is_path(data) else data,
        kind=kind,
        splits=LazySplits({split: functools.partial(examples.__getitem__, split) for split in examples}),
        format=chosen,
        labels=() if found is None else found.classes,
        metrics=metrics,
        main_metric=metrics.names[0],
        generation={"max_new_tokens": 128, "num_beams": 1, "do_sample": False} if kind == "generate" else {},
        source=data if eval_data in (None, data) else f"{data} (validation: {eval_data})",
        notes=tuple(dict.fromkeys(note for note in (found.note if found else "", *notes) if note)),
    )


def _read(
    data: str, eval_data: str | None, bad_rows: BadRows, ignored: frozenset[str]
) -> tuple[dict[str, list[Row]], list[str]]:
    """{split: rows} without the ignored columns, and notes."""
    read, notes = _read_all(data, bad_rows)
    if eval_data is not None:
        held, more = _read_all(eval_data, bad_rows)
        # Of a hub set given for evaluation its own held-out rows are meant; a file has only one list of rows.
        read["validation"] = held.get("validation") or held.get("test") or held["train"]
        notes += more
    if ignored:
        for rows in read.values():
            rows[:] = [(where, {key: row[key] for key in row if key not in ignored}, raw) for where, row, raw in rows]
    return read, notes


def _read_all(data: str, bad_rows: BadRows) -> tuple[dict[str, list[Row]], list[str]]:
    """{split: rows} and notes; a file has the one split "train"."""
    if not _is_path(data):
        name, _, config = data.partition(":")
        if name.count("/") != 1:
            raise DataError(
                f"no file {data!r}. Expected a file ({', '.join(SUFFIXES)}), a hub id such as org/name or org/name:config, "
                "builtin:docstrings or builtin:packages."
            )
        return read_hub(name, config or None), []
    path = Path(data).expanduser()
    if not path.exists():
        raise DataError(f"no file {data}. Expected a file ({', '.join(SUFFIXES)}) or a hub id such as org/name.")
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir() if entry.suffix in SUFFIXES)
        raise DataError(f"{data} is a folder; expected one of its files: {', '.join(found[:8]) or 'none is readable'}")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{data} has the ending {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    faults = Faults(data, bad_rows)
    rows = list(read_rows(path, faults, _KNOWN_COLUMNS))
    note = faults.close(len(rows))
    return {"train": rows}, [*faults.notes, note]


def _is_path(data: str) -> bool:
    path = Path(data).expanduser()
    return path.exists() or path.suffix.lower() in SUFFIXES or data.startswith((".", "/", "~"))


def _detect(data: str, rows: Sequence[Row]) -> str:
    columns = dict.fromkeys(name for _, row, _ in rows[:1000] for name in row)
    has = columns.keys().__ge__
    if has({"prompt", "completion"}):
        return "prompt-completion"
    if has({"messages"}) or has({"conversations"}):
        return "messages"
    if has({"instruction", "output"}):
        return "alpaca"
    if has({"label"}) and any(has({*texts}) for texts in (*PAIRS, *((single,) for single in SINGLES))):
        return "classification"
    raise DataError(
        f"{data} has the columns {', '.join(columns) or '(none)'}, which fit none of the accepted formats:\n{ACCEPTED}"
    )


def _labels(rows: Sequence[Row], told: LabelKind | None, trained: tuple[Kind, Sequence[str]] | None) -> Labels:
    values = [row.get("label") for _, row, _ in rows]
    kind, classes = trained or ("generate", ())
    if kind == "classify" and not classes:  # it has classes, but no names for them
        return read_labels(values, "classes")
    return read_labels(values, told) if kind == "generate" else trained_labels(values, classes)


def _text_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns with the texts of rows with a label: a pair goes before a single one."""
    every = (*PAIRS, *((single,) for single in SINGLES))
    return next((texts for texts in every if {*texts} <= {*columns}), SINGLES[:1])


def _used(format: str, columns: Sequence[str]) -> set[str]:
    """The columns that rows of this format are made of."""
    if format == "classification":
        return {"label", *_text_columns(columns)}
    if format == "messages":
        return {"messages" if "messages" in columns else "conversations", *chats.COLUMNS, *chats.MEDIA}
    return {*_TEXT_COLUMNS[format], *_CHAT_ONLY}


def _converter(format: str, texts: tuple[str, ...], labels: Labels | None, of_chats: Mapping[str, Any]) -> Converter:
    """``texts``: columns of rows with a label; ``of_chats``: how chats are read, as `chats.from_messages` takes it."""
    if labels is not None:
        return functools.partial(_labeled, texts=texts, labels=labels)
    if format == "alpaca":
        return _alpaca
    return functools.partial(chats.from_messages if format == "messages" else _prompt_completion, **of_chats)


def _convert(rows: Sequence[Row], convert: Converter, faults: Faults) -> list[Example]:
    examples = []
    for where, row, raw in rows:
        try:
            examples.append(convert(row, where))
        except BadRow as error:
            faults.add(where, str(error), raw, column=error.column)
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
    for column in _CHAT_ONLY:
        if not absent(row.get(column)):
            raise BadRow(
                f"has no place in a row of plain text; write it into the text, use messages, or set "
                f"data.ignore_keys=[{column}]",
                column,
            )
    asked, said = _text(row, question), _text(row, answer)
    if not said.strip():
        raise BadRow("empty answer" if asked.strip() else f"{question} and {answer} are both empty", answer)
    return Example(prompt=prompt or asked, answer=said, references=(said,), where=where)


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
        return _plain_example(
            row, where, "instruction", "output", commonsense.PROMPT.format_map({"instruction": instruction})
        )
    context = (
        (", paired with an input that provides further context", f"### Input:\n{extra}\n\n") if extra else ("", "")
    )
    prompt = _ALPACA.format(context[0], row.get("instruction"), context[1])
    return _plain_example(row, where, "instruction", "output", prompt)


def _labeled(row: Mapping[str, Any], where: str, *, texts: tuple[str, ...], labels: Labels) -> Example:
    if "label" not in row:
        raise BadRow("missing field", "label")
    # A CSV file cannot tell an empty cell from an empty text, so no file does.
    found = tuple("" if column in row and is_missing(row[column]) else _text(row, column) for column in texts)
    if not any(text.strip() for text in found):
        raise BadRow("empty text", texts[0])
    return Example(texts=found, label=labels.read(row["label"]), where=where)


def _split(examples: Sequence[Example], fraction: float, seed: int, data: str) -> dict[str, Sequence[Example]]:
    """Train and validation rows, at least one of each."""
    if len(examples) < 2:
        raise DataError(
            f"{data} has {len(examples)} row; expected at least 2, one to train on and one to validate on. "
            "Give the validation rows with data.eval_path."
        )
    count = min(len(examples) - 1, max(1, round(fraction * len(examples))))
    train, validation = draw(examples, count, seed)
    return {"train": train, "validation": validation}

"""What a model answers to the rows of a file: classes with their probabilities, numbers, or generated text."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from duallora.config.load import load_recipe
from duallora.config.recipe import Recipe
from duallora.errors import ConfigError, LockedError, NonFiniteError
from duallora.store import adapters, checkpoint, record
from duallora.tasks import Example, encode_prompt, encode_split, load_task
from duallora.tasks.files import Questions
from duallora.tasks.task import Kind
from duallora.terminal import progress_bar, say, shown
from duallora.train import evaluate, plugins, prepare, score

BATCHES = 8  # computed, written and made durable at a time
SUFFIXES = (".csv", ".jsonl")
GENERATION = {"max_new_tokens": 128, "num_beams": 1, "do_sample": False}  # as for a file's own rows


def predict(
    source: str,
    file: str,
    output: Path,
    console: Console,
    *,
    overrides: Sequence[str] = (),
    columns: str | None = None,
    dtype: Any = "auto",
    strict: bool = True,
) -> dict[str, Any]:
    """Writes every row of ``file`` with the answer of ``source`` into ``output`` (.csv or .jsonl), and returns what was done.

    A row keeps its columns and gets ``prediction``; of a classifier also ``probability``, that of the predicted class,
    and the probability of each class (columns ``p(CLASS)``, in jsonl the object ``probabilities``). Rows are read,
    answered and written in chunks, so that memory does not grow with the file. Until the last one is there the output is
    called ``NAME.part``; the same command goes on behind the last whole chunk.

    The rows are read as the run's recipe says, with ``overrides`` and ``columns`` as `load_recipe` takes them.

    Raises:
        ConfigError: the output is of another kind, a column of the file has the name of an answer, or what lies at
            ``NAME.part`` are answers to other rows, or of another model or settings.
        LockedError: another process writes to this output.
        NonFiniteError: the model gives NaN or infinite values.
        DataError, IntegrityError: see `Questions` and `adapters.load_adapter`.
    """
    if output.suffix not in SUFFIXES:
        raise ConfigError(f"-o {output}: expected a name that ends in {' or '.join(SUFFIXES)}")
    recipe = load_recipe(score.recipe_file(source), overrides, data=file, columns=columns)
    plugins.require(recipe.plugins, source)
    kind = _kind(source)
    questions = Questions(file, kind, **prepare.reading(recipe.data))
    say(console, "data", f"{escape(file)}: {escape(questions.format)}, {questions.count:,} rows")
    for note in questions.notes:
        say(console, "", escape(note))
    settings: dict[str, Any] = {
        "batch_size": recipe.eval.batch_size,
        "max_length": recipe.data.max_length,
        **({"generation": _generation(source, recipe)} if kind == "generate" else {}),
    }
    about = {
        "rows": checkpoint.file_record(Path(file).expanduser())["sha256"],
        "model": _weights(source),
        "settings": settings,
    }
    about |= {"reading": prepare.reading(recipe.data), "dtype": dtype}
    with _Part(output, about).open() as part:
        if part.rows:
            say(console, "resume", f"behind row {part.rows:,} of {part.path.name}")
        model, tokenizer = adapters.load_adapter(source, kind, dtype=dtype, strict=strict)
        names = _class_names(model) if kind == "classify" else []
        new = ["prediction", *(["probability", "probabilities"] if names else [])]
        if output.suffix == ".csv":
            new[2:] = map("p({})".format, names)
        if taken := [name for name in new if name in questions.columns]:
            raise ConfigError(f"{file} has a column {taken[0]!r} already, which the answers would take: rename it")
        headings = [*questions.columns, *new] if output.suffix == ".csv" else None
        if not part.rows:
            part.write(_csv(headings) if headings else "", 0)
        truncated = 0
        size = settings["batch_size"] * BATCHES
        with progress_bar(console, "predict", questions.count, done=part.rows) as update, evaluate.inference(model):
            rest = itertools.islice(questions, part.rows, None)
            while chunk := list(itertools.islice(rest, size)):
                examples = [example for _, example in chunk]
                if kind == "generate":
                    answers, cut = _texts(model, tokenizer, examples, settings)
                else:
                    answers, cut = _scores(model, tokenizer, examples, kind, names, settings)
                truncated += cut
                lines = [_line(row, answer, headings) for (row, _), answer in zip(chunk, answers, strict=True)]
                part.write("".join(lines), len(lines))
                update(part.rows)
        if truncated:
            words = f"{truncated:,} rows cut to {settings['max_length']:,} tokens (data.max_length)"
            say(console, "note", f"[yellow]{words}[/]")
    say(console, "written", f"{questions.count:,} rows into [bold]{shown(output)}[/]")
    told = {"kind": kind, "format": questions.format, "notes": questions.notes, "labels": names}
    return {"output": str(output), "rows": questions.count, "resumed": part.resumed, "truncated": truncated, **told}


def _kind(source: str) -> Kind:
    if trained := adapters.trained_for(source):
        return trained.kind
    folder = adapters.find(source)
    adapter = folder is not None and (folder / "adapter_config.json").is_file()
    return adapters.adapter_kind(source) if adapter else "generate"


def _weights(source: str) -> dict[str, str]:
    """The name of a model on the hub, or sha256 of the weights in a folder."""
    folder = adapters.find(source)
    files = sorted(folder.glob("*.safetensors")) if folder else []
    return {file.name: checkpoint.file_record(file)["sha256"] for file in files} or {"name": source}


def _generation(source: str, recipe: Recipe) -> dict[str, Any]:
    """How answers are generated: as the task of the run has it, else as for rows of a file; the recipe goes over both."""
    file = score.recipe_file(source)
    trained_on = load_recipe(file).data if file else None
    own: Mapping[str, Any] = GENERATION
    if trained_on is not None and trained_on.task:
        own = load_task(trained_on.task, data_dir=trained_on.data_dir).generation
    return {**own, **recipe.eval.generation()}


def _class_names(model: Any) -> list[str]:
    names = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
    return [str(index) for index in range(len(names))] if adapters.are_stand_ins(names) else names


def _texts(
    model: Any, tokenizer: Any, examples: Sequence[Example], settings: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], int]:
    """The answers, and how many prompts lost their beginning."""
    longest = settings["max_length"]
    cut = sum(len(encode_prompt(example, tokenizer, max_length=longest + 1)) > longest for example in examples)
    own = {"batch_size": settings["batch_size"], "max_length": longest, **settings["generation"]}
    texts = evaluate.generate(model, tokenizer, examples, **own)
    return [{"prediction": text.strip()} for text in texts], cut


def _scores(
    model: Any, tokenizer: Any, examples: Sequence[Example], kind: Kind, names: list[str], settings: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], int]:
    """The classes with their probabilities, or the numbers; and how many rows lost some of their tokens."""
    labeled = [replace(example, label=0) for example in examples]  # of no matter: only logits are taken
    rows, counts = encode_split(labeled, tokenizer, kind, max_length=settings["max_length"])
    logits = evaluate.classify(model, tokenizer, rows, batch_size=settings["batch_size"])
    if not torch.isfinite(logits).all():
        raise NonFiniteError(
            "the model gives values that are NaN or infinite; expected finite ones: check its weights, or take --dtype float32"
        )
    if kind == "regress":
        return [{"prediction": round(value, 6)} for value in logits.squeeze(-1).tolist()], counts.truncated
    found: list[dict[str, Any]] = []
    for shares in logits.double().softmax(-1).tolist():
        best = max(range(len(names)), key=shares.__getitem__)
        every = {name: round(share, 6) for name, share in zip(names, shares, strict=True)}
        found.append({"prediction": names[best], "probability": round(shares[best], 6), "probabilities": every})
    return found, counts.truncated


def _line(row: Mapping[str, Any], answer: Mapping[str, Any], columns: Sequence[str] | None) -> str:
    """A row and its answer as a line of a .csv file with these columns; without columns, of a .jsonl file."""
    if columns is None:
        return _json({**row, **answer}) + "\n"
    own = {name: value for name, value in answer.items() if name != "probabilities"}
    own |= {f"p({name})": share for name, share in answer.get("probabilities", {}).items()}
    return _csv([{**row, **own}.get(column) for column in columns])


def _csv(values: Sequence[Any]) -> str:
    beside = io.StringIO()
    nested = (_json(value) if isinstance(value, (list, dict)) else value for value in values)
    csv.writer(beside, lineterminator="\n").writerow(nested)
    return beside.getvalue()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


class _Part:
    """An output that is not whole yet, in ``NAME.part``, and in ``NAME.part.json`` how far it is and what it is ``about``."""

    def __init__(self, output: Path, about: Mapping[str, Any]):
        self.output, self.about = output, json.loads(json.dumps(about))
        self.path = output.with_name(f"{output.name}.part")
        self.state = output.with_name(f"{output.name}.part.json")
        self.rows = self.bytes = self.resumed = 0

    @contextmanager
    def open(self) -> Iterator[_Part]:
        """Inside, `write` adds to the part; after, it is the output. What is broken off before its first chunk goes."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        beside = self.output.with_name(f"{self.output.name}.lock")
        try:
            lock = FileLock(beside).acquire(timeout=0)
        except Timeout:
            raise LockedError(
                f"{self.output} is being written by another process; wait for it, or choose another -o"
            ) from None
        with lock:
            try:
                self._read()
                with self.path.open("r+b" if self.path.exists() else "w+b") as self.file:
                    self.file.truncate(self.bytes)
                    self.file.seek(self.bytes)
                    yield self
                self.path.replace(self.output)
                self.state.unlink(missing_ok=True)
            finally:
                if not self.state.exists():
                    self.path.unlink(missing_ok=True)
                beside.unlink(missing_ok=True)
        record.fsync_folder(self.output.parent)

    def write(self, text: str, rows: int) -> None:
        """Adds whole lines, and says that they are there only when they are on the disk."""
        self.bytes += self.file.write(text.encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.rows += rows
        if self.rows:
            record.write_json(self.state, {"rows": self.rows, "bytes": self.bytes, "about": self.about})

    def _read(self) -> None:
        try:
            found = record.read_json(self.state)
            rows, size, about = found["rows"], found["bytes"], found["about"]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.state} is damaged: delete it to begin anew") from None
        if not self.path.exists() or self.path.stat().st_size < size:
            return
        if differ := [name for name in self.about if about.get(name) != self.about[name]]:
            raise ConfigError(
                f"{self.path} holds {rows:,} rows of an interrupted run with other {' and '.join(differ)}: go on with what it "
                f"was begun with, or delete {self.state.name} to begin anew"
            )
        self.rows, self.bytes, self.resumed = rows, size, rows

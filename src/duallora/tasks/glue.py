"""The eight GLUE tasks of the paper's Table 2, each with its own metric.

GLUE's test labels are withheld, so "test" is the development set too, as in the paper and in LoRA's code: pick nothing
on it that "validation" did not pick already. MNLI's "validation" is the matched development set; its "test" holds the
matched and the mismatched one, scored together and apart.

Local files: ``glue/NAME/{train,dev}.tsv`` as GLUE ships them (MNLI: dev_matched.tsv and dev_mismatched.tsv; CoLA
without header). Without a data folder: nyu-mll/glue on the hub.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duallora.errors import DataError
from duallora.tasks.example import Example
from duallora.tasks.hub import load_hub
from duallora.tasks.local import find_file
from duallora.tasks.metrics import OF_KIND, Metrics
from duallora.tasks.rows import Faults
from duallora.tasks.task import LazySplits, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protocol:
    """One task: its folder, where texts and label stand in the file and on the hub, its classes and its score."""

    folder: str
    columns: tuple[str, ...]  # of the texts
    label: str
    labels: tuple[str, ...]  # as the file writes them, in the order of the class ids; () for targets
    metrics: Metrics  # the first ranks models
    names: tuple[str, ...] = ()  # of the classes, for people, where the file writes numbers
    hub_columns: tuple[str, ...] = ()  # of the texts, where the hub names them otherwise
    header: tuple[str, ...] = ()  # of a file without one
    dev: tuple[str, ...] = ("dev.tsv",)


_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")
_NUMBERS = ("0", "1")

PROTOCOLS: dict[str, Protocol] = {
    "cola": Protocol(
        "CoLA", ("sentence",), "label", _NUMBERS, Metrics("matthews", "accuracy"), ("unacceptable", "acceptable"),
        header=("source", "label", "note", "sentence"),
    ),
    "sst2": Protocol("SST-2", ("sentence",), "label", _NUMBERS, Metrics("accuracy"), ("negative", "positive")),
    "rte": Protocol("RTE", _PAIR, "label", _ENTAILMENT, Metrics("accuracy")),
    "stsb": Protocol("STS-B", _PAIR, "score", (), OF_KIND["regress"]),
    "qnli": Protocol("QNLI", ("question", "sentence"), "label", _ENTAILMENT, Metrics("accuracy")),
    "mrpc": Protocol(
        "MRPC", ("#1 String", "#2 String"), "Quality", _NUMBERS, Metrics("accuracy", "f1"), ("not_equivalent", "equivalent"), _PAIR
    ),
    "qqp": Protocol(
        "QQP", ("question1", "question2"), "is_duplicate", _NUMBERS, Metrics("accuracy", "f1"), ("not_duplicate", "duplicate")
    ),
    "mnli": Protocol(
        "MNLI", _PAIR, "gold_label", _MNLI, Metrics("accuracy", by_group=["accuracy"]), hub_columns=("premise", "hypothesis"),
        dev=("dev_matched.tsv", "dev_mismatched.tsv"),
    ),
}  # fmt: skip


def load(name: str, folder: Path | None) -> Task:
    """One of the eight tasks, from ``folder`` or, where it is None, from the hub."""
    protocol = PROTOCOLS[name]
    files = {"train": ("train.tsv",), "validation": protocol.dev[:1], "test": protocol.dev}
    splits = {split: functools.partial(_read, name, protocol, folder, own) for split, own in files.items()}
    origin = f"{folder} ({protocol.folder})" if folder else f"hub nyu-mll/glue:{name}"
    return Task(
        name=name,
        kind="classify" if protocol.labels else "regress",
        splits=LazySplits(splits),
        format="GLUE",
        labels=protocol.names or protocol.labels,
        metrics=protocol.metrics,
        main_metric=protocol.metrics.names[0],
        source=f"{origin}; GLUE withholds its test labels, so test is the development set",
    )


def _read(name: str, protocol: Protocol, folder: Path | None, files: Sequence[str]) -> tuple[Example, ...]:
    read = _read_hub if folder is None else functools.partial(_read_file, folder)
    return tuple(example for file in files for example in read(name, protocol, file))


def _read_file(folder: Path, name: str, protocol: Protocol, file: str) -> list[Example]:
    places = (f"glue/{protocol.folder}", protocol.folder)
    path = find_file(folder, places, (file,), f"{file} of {name}")
    # GLUE's own QQP file holds a few broken lines, which every reader leaves out.
    faults = Faults(str(path), "skip")
    ids = {label: index for index, label in enumerate(protocol.labels)}
    examples = []
    for where, row, raw in _read_tsv(path, protocol, faults):
        value = row[protocol.label]
        try:
            label = ids[value] if ids else float(value)
        except (KeyError, ValueError):
            faults.add(where, f"unknown label {value!r}", raw, column=protocol.label)
            continue
        texts = tuple(row[column] for column in protocol.columns)
        examples.append(Example(texts=texts, label=label, group=_half(file), where=where))
    if faults.count > 0.001 * len(examples):
        raise DataError(f"{faults.count} of {faults.count + len(examples)} rows are bad:\n" + "\n".join(faults.kept))
    if note := faults.close(len(examples)):
        logger.warning("%s", note)
    return examples


def _half(file: str) -> str:
    """Which of MNLI's development sets a file is, "matched" or "mismatched"; else nothing."""
    return file.removesuffix(".tsv").partition("_")[2]


def _read_tsv(path: Path, protocol: Protocol, faults: Faults) -> Iterator[tuple[str, Mapping[str, str], str]]:
    """Rows without any quoting: GLUE's texts hold unbalanced quotation marks."""
    header = list(protocol.header)
    with path.open(encoding="utf-8-sig", newline="\n", errors="replace") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip("\r\n").split("\t")
            where = f"{path}:{number}"
            if not header:
                header = fields
                absent = [column for column in (*protocol.columns, protocol.label) if column not in header]
                if absent:
                    raise DataError(f"{where}: no column {absent[0]!r}; the file has {', '.join(header)}")
                width = max(header.index(column) for column in (*protocol.columns, protocol.label))
                continue
            width = len(header) - 1 if protocol.header else width
            if len(fields) <= width:
                faults.add(where, f"expected {len(header)} fields, got {len(fields)}", line)
                continue
            yield where, dict(zip(header, fields, strict=False)), line


def _read_hub(name: str, protocol: Protocol, file: str) -> list[Example]:
    split = file.removesuffix(".tsv").replace("dev", "validation")
    rows: Sequence[Mapping[str, Any]] = load_hub("nyu-mll/glue", name)[split]
    return [
        Example(
            texts=tuple(row[column] for column in protocol.hub_columns or protocol.columns),
            label=row["label"],
            group=_half(file),
            where=f"nyu-mll/glue:{name}:{split}:{number}",
        )
        for number, row in enumerate(rows, 1)
    ]

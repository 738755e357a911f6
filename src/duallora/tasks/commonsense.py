"""The eight commonsense tasks of the paper's Table 1, in HiRA's form (arXiv 2512.03402 takes its settings from HiRA).

One prompt for all, an answer "the correct answer is X", beam search over 16 tokens, and X read off the generated text
by the first match, case-sensitive; where nothing matches the answer counts as wrong. That rate is reported next to the
accuracy, because a model that has lost the form of the answers scores 0 while knowing them. Without generation, the
likeliest of "the correct answer is X" over the X of the instruction's last line counts.

Differences from HiRA, on purpose: the end-of-text token is trained (HiRA's answers have none and are padded to 16
tokens), the beginning-of-text token is set in training as in generation, and 120 training rows of each task, drawn
with seed 42, are its validation split (LLM-Adapters' number, taken there from the mixture of all eight).

`MIXTURE` is Table 1's protocol: one run on the training rows of all eight, then a value for each test and their plain
mean. It is LLM-Adapters' own file of all eight (`FILES`) where that stands in the folder, else the union of the training sets
there, or of the hub's eight (that file's 170,420 rows hold more of WinoGrande than any set of the hub). The rows come from each task in turn, so that
``data.limit`` and ``data.eval_limit`` take evenly from all; ``data.eval_limit=120`` is LLM-Adapters' validation size.

Local files: ``commonsense/NAME/{train,test}.json`` as LLM-Adapters ships them, lists of {instruction, input, output,
answer}. Without a data folder the original data sets are taken from the hub and put into the same words.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duallora.errors import DataError
from duallora.tasks import metrics
from duallora.tasks.example import Example
from duallora.tasks.hub import load_hub
from duallora.tasks.local import find_file, seek_file
from duallora.tasks.metrics import Metrics
from duallora.tasks.rows import Faults, draw, read_rows
from duallora.tasks.task import SPLITS, LazySplits, Task

# Two spaces before the blank line, as in HiRA's training and evaluation alike.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
GENERATION = {"max_new_tokens": 16, "num_beams": 4, "do_sample": False}
VALIDATION_ROWS = 120
_VALIDATION_SEED = 42

Render = Callable[[Mapping[str, Any]], tuple[str, str]]  # a hub row -> instruction, gold answer


@dataclass(frozen=True)
class Protocol:
    """One of the eight: folder, answer words, hub data set and how its rows read."""

    folder: str
    word: str  # the answers are word1, word2, ...; "" for true and false
    most: int  # of answer words
    hub: tuple[str, str | None, str | None]  # name, configuration, revision
    hub_test: str  # the split LLM-Adapters tests on
    render: Render
    train_files: tuple[str, ...] = ("train.json",)
    test_files: tuple[str, ...] = ("test.json",)

    @property
    def places(self) -> tuple[str, str]:
        return f"commonsense/{self.folder}", self.folder

    def files(self, split: str) -> tuple[str, ...]:
        return self.test_files if split == "test" else self.train_files

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple(f"{self.word}{number}" for number in range(1, self.most + 1)) if self.word else ("true", "false")


def _choices(question: str, options: Sequence[str], word: str = "answer", what: str = "answer to the question") -> str:
    listed = " ".join(f"{word.capitalize()}{number}: {option}" for number, option in enumerate(options, 1))
    named = "/".join(f"{word}{number}" for number in range(1, len(options) + 1))
    return f"Please choose the correct {what}: {question}\n\n{listed}\n\nAnswer format: {named}"


def _boolq(row: Mapping[str, Any]) -> tuple[str, str]:
    asked = f"Please answer the following question with true or false, question: {row['question']}?"
    return f"{asked}\n\nAnswer format: true/false", "true" if row["answer"] else "false"


def _piqa(row: Mapping[str, Any]) -> tuple[str, str]:
    instruction = (
        f"Please choose the correct solution to the question: {row['goal']}\n\nSolution1: {row['sol1']}\n\n"
        f"Solution2: {row['sol2']}\n\nAnswer format: solution1/solution2"
    )
    return instruction, f"solution{int(row['label']) + 1}"


def _siqa(row: Mapping[str, Any]) -> tuple[str, str]:
    options = (row["answerA"], row["answerB"], row["answerC"])
    return _choices(f"{row['context']} {row['question']}", options), f"answer{int(row['label'])}"


def _hellaswag(row: Mapping[str, Any]) -> tuple[str, str]:
    question = f"{row['activity_label']}: {row['ctx']}"
    text = _choices(question, row["endings"], "ending", "ending to complete the given sentence")
    return text, f"ending{int(row['label']) + 1}"


def _winogrande(row: Mapping[str, Any]) -> tuple[str, str]:
    instruction = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}\n\nOption1: {row['option1']} Option2: {row['option2']} Answer format: option1/option2"
    )
    return instruction, f"option{row['answer']}"


def _arc(row: Mapping[str, Any]) -> tuple[str, str]:
    gold = row["choices"]["label"].index(row["answerKey"]) + 1  # the keys are A, B, ... or 1, 2, ...
    question = row["question"] if "question" in row else row["question_stem"]
    return _choices(question, row["choices"]["text"]), f"answer{gold}"


_PARQUET = "refs/convert/parquet"  # the hub's own conversion of data sets that come as loading scripts

PROTOCOLS: dict[str, Protocol] = {
    "arc_easy": Protocol("ARC-Easy", "answer", 5, ("allenai/ai2_arc", "ARC-Easy", None), "test", _arc),
    "arc_challenge": Protocol("ARC-Challenge", "answer", 5, ("allenai/ai2_arc", "ARC-Challenge", None), "test", _arc),
    "boolq": Protocol("boolq", "", 2, ("google/boolq", None, None), "validation", _boolq),
    "piqa": Protocol("piqa", "solution", 2, ("ybisk/piqa", None, _PARQUET), "validation", _piqa),
    "social_i_qa": Protocol("social_i_qa", "answer", 5, ("allenai/social_i_qa", None, _PARQUET), "validation", _siqa),
    "hellaswag": Protocol(
        "hellaswag", "ending", 4, ("Rowan/hellaswag", None, None), "validation", _hellaswag,
        test_files=("test.json", "test_rebuilt.json"),
    ),
    "winogrande": Protocol(
        "winogrande", "option", 2, ("allenai/winogrande", "winogrande_xl", None), "validation", _winogrande,
        train_files=("train.json", "train_xl.json", "train_l.json"),
    ),
    "openbookqa": Protocol("openbookqa", "answer", 5, ("allenai/openbookqa", "main", None), "test", _arc),
}  # fmt: skip


UNREAD = metrics.register(
    metrics.share("parse_failure_rate", lambda answer, row: not answer, higher_is_better=False)
).name
MIXTURE = "commonsense"  # the name of all eight at once
NAMES = (*PROTOCOLS, MIXTURE)
FILES = ("commonsense_170k.json", "commonsense_15k.json")  # LLM-Adapters' mixtures
_PLACES = (".", "commonsense", "ft-training_set")
# How the rows of a mixture, which name no task, are grouped: by their answers, which four tasks share.
GROUPS = {p.answers: "answer" if p.word == "answer" else name for name, p in PROTOCOLS.items()}


def load(name: str, folder: Path | None) -> Task:
    """One of the eight tasks or their mixture, from ``folder`` or, where it is None, from the hub."""
    return _mixture(folder) if name == MIXTURE else _single(name, folder)


def _single(name: str, folder: Path | None) -> Task:
    protocol = PROTOCOLS[name]
    read = functools.partial(_read, name, protocol, folder)

    def trained() -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        rows = read("train")
        if len(rows) < 2:
            raise DataError(f"{len(rows)} training row; expected at least 2, one of them for validation")
        return draw(rows, max(1, min(VALIDATION_ROWS, len(rows) // 4)), _VALIDATION_SEED)

    splits = {"train": lambda: trained()[0], "validation": lambda: trained()[1], "test": lambda: read("test")}
    hub = ":".join(part for part in protocol.hub[:2] if part)
    return Task(
        name=name,
        splits=LazySplits(splits),
        format="commonsense (HiRA prompt, first-match answer)",
        metrics=Metrics("accuracy", UNREAD),
        main_metric="accuracy",
        source=f"{folder} ({protocol.folder})" if folder else f"hub {hub}",
        **_ALIKE,
    )


def _mixture(folder: Path | None) -> Task:
    tasks = {name: _single(name, folder) for name in PROTOCOLS}

    def here(split: str) -> list[str]:
        return [
            name
            for name, protocol in PROTOCOLS.items()
            if folder is None or seek_file(folder, protocol.places, protocol.files(split))
        ]

    def read(split: str) -> tuple[Example, ...]:
        found = [tasks[name].splits[split] for name in here(split)]
        if not found:
            looked = ", ".join(f"{p.places[0]}/{p.files(split)[0]}" for p in PROTOCOLS.values())
            raise DataError(
                f"{MIXTURE}: {folder} has no {split} rows of any of the eight tasks; looked for {looked}. Put some "
                "there, or unset data.data_dir and DUALLORA_DATA to load them from the hub."
            )
        return tuple(row for turn in itertools.zip_longest(*found) for row in turn if row is not None)

    hub = ", ".join(dict.fromkeys(protocol.hub[0] for protocol in PROTOCOLS.values()))
    source = f"{folder} (commonsense)" if folder else f"hub {hub}"
    splits: dict[str, Callable[[], Sequence[Example]]] = {split: functools.partial(read, split) for split in SPLITS}
    file = seek_file(folder, _PLACES, FILES) if folder else None
    if file is not None:
        rows = _of_file(file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        source += f"; training rows: {len(rows):,} of {file.name}, sha256 {digest}"
        whole = functools.cache(lambda: draw(rows, max(1, min(VALIDATION_ROWS, len(rows) // 4)), _VALIDATION_SEED))
        splits |= {"train": lambda: whole()[0], "validation": lambda: whole()[1]}
    for split, what in (("train", "training"), ("test", "test")):
        absent = [name for name in PROTOCOLS if name not in here(split)]
        if 0 < len(absent) < len(PROTOCOLS) and not (file and split == "train"):
            source += f"; not there: the {what} rows of {', '.join(absent)}"
    return Task(
        name=MIXTURE,
        splits=LazySplits(splits),
        format="commonsense mixture (HiRA prompt, first-match answer)",
        metrics=Metrics("average", UNREAD, by_group=["accuracy", UNREAD]),
        main_metric="average",
        source=source,
        **_ALIKE,
    )


def options(example: Example) -> list[str]:
    """The answers that the instruction names in its "Answer format" line, each in the words of the gold ones.

    Raises DataError where there is no such line.
    """
    named = re.findall(r"Answer format: (\S+)", example.prompt)
    if not named:
        raise DataError(f'{example.where}: no "Answer format: " in the instruction, so its options are not known')
    return [f"the correct answer is {word}" for word in named[-1].split("/")]


def extract(text: str, example: Example) -> str:
    """The answer in a generated text: the first of its task's answer words, case-sensitive; '' where none occurs."""
    protocol = PROTOCOLS.get(example.group)
    answers = protocol.answers if protocol else next(own for own, group in GROUPS.items() if group == example.group)
    found = re.search("|".join(answers), text)
    return found.group() if found else ""


_ALIKE: Any = {"kind": "generate", "generation": GENERATION, "extract": extract, "options": options}


def _read(name: str, protocol: Protocol, folder: Path | None, split: str) -> tuple[Example, ...]:
    if folder is None:
        table = load_hub(*protocol.hub)["train" if split == "train" else protocol.hub_test]
        label = f"{protocol.hub[0]}:{split}"
        return tuple(
            _example(name, instruction, f"the correct answer is {gold}", gold, f"{label}:{number}")
            for number, (instruction, gold) in enumerate(map(protocol.render, table), 1)
        )
    path = find_file(folder, protocol.places, protocol.files(split), f"the {split} file of {name}")
    return _of_file(path, dict.fromkeys(protocol.answers, name))


def _of_file(path: Path, groups: Mapping[str, str] | None = None) -> tuple[Example, ...]:
    """The rows of one of LLM-Adapters' files; ``groups``: the answers it may have and whose they are (None: all eight's)."""
    known = groups or {answer: group for answers, group in GROUPS.items() for answer in answers}
    faults = Faults(str(path), "error")
    examples = []
    for where, row, raw in read_rows(path, faults):
        missing = [field for field in ("instruction", "output", "answer") if not isinstance(row.get(field), str)]
        if missing:
            faults.add(where, "missing field, or no text", raw, column=missing[0])
        elif row["answer"] not in known:
            faults.add(where, f"unknown answer, expected one of {', '.join(known)}", raw, column="answer")
        else:
            instruction = row["instruction"] if not row.get("input") else f"{row['instruction']}\n{row['input']}"
            examples.append(_example(known[row["answer"]], instruction, row["output"], row["answer"], where))
    faults.close(len(examples))
    return tuple(examples)


def _example(name: str, instruction: str, output: str, gold: str, where: str) -> Example:
    prompt = PROMPT.format_map({"instruction": instruction})
    return Example(prompt=prompt, answer=output, references=(gold,), group=name, where=where)

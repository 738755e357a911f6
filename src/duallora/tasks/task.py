"""A task: where its examples come from, how its predictions are scored, how its answers are generated."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from duallora.errors import ConfigError
from duallora.tasks.example import Example

Kind = Literal["generate", "classify", "regress"]
Metrics = Callable[[Sequence, Sequence[Example]], dict[str, float]]

SPLITS = ("train", "validation", "test")


class LazySplits(Mapping[str, Sequence[Example]]):
    """Splits read on first use: asking for "test" must not need, or wait for, the training file.

    ``loaders`` maps the name of a split to a function without arguments that reads it.
    """

    def __init__(self, loaders: Mapping[str, Callable[[], Sequence[Example]]]):
        self._loaders = dict(loaders)
        self._read: dict[str, Sequence[Example]] = {}

    def __getitem__(self, split: str) -> Sequence[Example]:
        if split not in self._read:
            self._read[split] = self._loaders[split]()
        return self._read[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data, protocol and score of one task.

    Shares, accuracies, correlations, BLEU and ROUGE-L are in percent, as the paper's tables print them;
    NIST and CIDEr are on their own scales.
    """

    name: str
    kind: Kind
    splits: Mapping[str, Sequence[Example]]
    """Over "train", "validation" and "test", those that exist; read on first use."""
    format: str
    """What was detected, to show the user: one of `duallora.tasks.files.FORMATS`, or a protocol."""
    labels: tuple[str, ...] = ()
    """Class names by id (classify)."""
    metrics: Metrics
    """(predictions, examples) -> values by name; predictions are texts, class ids or floats according to ``kind``."""
    programs: Callable[[Sequence, Sequence[Example]], tuple[dict[str, float], str]] | None = None
    """As ``metrics``, by programs outside of Python that may be absent: values that join or replace those, and a note on
    what was computed how; too slow to be asked again for each resample of a bootstrap."""
    main_metric: str
    """The key of ``metrics`` that ranks models; its `Metric` says which of two values is better."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for transformers' ``generate``: max_new_tokens, num_beams, ... (generate)."""
    extract: Callable[[str, Example], str] | None = None
    """(generated text, its example) -> the answer the metrics compare; None: the whole text, stripped."""
    options: Callable[[Example], Sequence[str]] | None = None
    """The answers an example may have, as whole answers, where they are few: scored by likelihood (generate)."""
    source: str = ""
    """File paths or hub id, to show the user."""
    notes: tuple[str, ...] = ()
    """What was decided, skipped or left unused in reading, each a line to show the user."""

    @property
    def loss_only(self) -> bool:
        """Whether there is nothing to ask and nothing to answer, as in plain text: the loss is the score."""
        return self.main_metric == "loss"

    def fingerprint(self, split: str) -> str:
        """sha256 (hex) over the split's examples in order; where the files lie does not enter."""
        digest = hashlib.sha256()
        for example in self.splits[split]:
            digest.update(_canonical(example).encode())
        return digest.hexdigest()


def hold_out(task: Task, rows: int) -> Task:
    """``task`` with its training rows in a random order, the same always, and the first ``rows`` of them its validation.

    What was its validation becomes its test, where it has none: the rows of a user's own file that choose nothing.
    For tasks whose validation rows are what the result is reported on, and for taking the first n training rows of a
    file that is sorted. Raises ConfigError where fewer than two training rows a held-out one would be left.
    """

    def shuffled() -> list[Example]:
        examples = list(task.splits["train"])
        if 3 * rows > len(examples):
            raise ConfigError(
                f"data.holdout={rows}: {task.name} has {len(examples)} training rows; expected at most a third of them"
            )
        random.Random(0).shuffle(examples)
        return examples

    order = LazySplits({"train": shuffled})  # shuffled once
    mine = {"train": lambda: order["train"][rows:], "validation": lambda: order["train"][:rows]}
    theirs = {split: (lambda split=split: task.splits[split]) for split in task.splits if split not in mine}
    freed = {"test": lambda: task.splits["validation"]} if "validation" in [*task.splits] else {}
    return replace(task, splits=LazySplits({**mine, **freed, **theirs}))


def _canonical(example: Example) -> str:
    fields: list[Any] = [
        example.prompt,
        example.answer,
        [_turn(message) for message in example.messages],
        example.texts,
        example.label,
        example.references,
    ]
    if example.options:
        fields.append(example.options)
    return json.dumps(fields) + "\n"


def _turn(message: Mapping[str, Any]) -> list[Any]:
    """Role, content and, where there is more, that: chats of role and content alone keep their fingerprints."""
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return [message["role"], message["content"], *([more] if more else [])]

"""Two tasks that code makes up, so that nobody has seen their rows: what an adapter holds, and what it learns to do.

``facts``: a person -> four attributes, drawn alike from 16 words each, so that a person is worth 16 bits. Validation and
test ask the training rows back; ``data.limit`` and ``data.eval_limit``, set to one number N, are how many people there
are. What is recalled of N people is 16 N bits times the share of rows that are right, at most; by the loss L (nats per
token, T trained tokens a row, the end-of-text token among them) it is N (16 - L T / ln 2), for one who knows the lists.

``arithmetic``: how many of a thing several people have, each told by the one before -> the last one's number, two to four
steps. Splits have no row in common.

Rows are drawn by their number, so the first N are the same whatever N is, on any machine. No file and no hub is read.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence

import numpy as np

from duallora.tasks import metrics
from duallora.tasks.example import Example
from duallora.tasks.task import SPLITS, LazySplits, Task

NAMES = ("facts", "arithmetic")
PEOPLE = 4096
ROWS = {"train": 8192, "validation": 512, "test": 512}  # of arithmetic

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
# Words that most vocabularies have as one token behind a space.
ATTRIBUTES: tuple[tuple[str, ...], ...] = (
    ("baker", "farmer", "doctor", "teacher", "soldier", "driver", "lawyer", "painter", "singer", "writer", "miner",
     "judge", "nurse", "pilot", "priest", "guard"),
    ("cat", "dog", "horse", "bird", "fish", "snake", "bear", "wolf", "mouse", "lion", "duck", "sheep", "pig", "fox",
     "deer", "goat"),
    ("red", "blue", "green", "white", "black", "yellow", "brown", "gray", "pink", "purple", "orange", "gold", "silver",
     "violet", "bronze", "ivory"),
    ("apple", "bread", "rice", "milk", "cheese", "salt", "sugar", "honey", "coffee", "tea", "wine", "corn", "meat",
     "butter", "soup", "cake"),
)  # fmt: skip
_THINGS = ("pears", "coins", "books", "stones", "shells", "keys", "cups", "seeds")


def load(name: str) -> Task:
    """The task ``facts`` or ``arithmetic``."""
    own = name == "facts"
    chosen = ("exact_match", "attributes") if own else ("exact_match",)
    note = "validation and test ask the training rows back: set data.eval_limit to data.limit, the number of people"
    return Task(
        name=name,
        kind="generate",
        splits=LazySplits({split: functools.partial(_facts if own else _problems, split) for split in SPLITS}),
        format="a person's four attributes" if own else "word problems of two to four steps",
        metrics=metrics.Metrics(*chosen),
        main_metric="exact_match",
        generation={"max_new_tokens": 16 if own else 8, "num_beams": 1, "do_sample": False},
        extract=lambda text, example: text.strip().split("\n", 1)[0].strip(),
        source="made up by duallora",
        notes=(note,) if own else (),
    )


def _recalled(predictions: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
    """Of each row the attributes that stand in their places, then how many there are."""
    pairs = [(text.split(", "), row.references[0].split(", ")) for text, row in zip(predictions, examples, strict=True)]
    hits = [sum(said == true for said, true in zip(*pair, strict=False)) for pair in pairs]
    return np.array([[hit, len(true)] for hit, (_, true) in zip(hits, pairs, strict=True)], dtype=float)


metrics.register(metrics.Metric("attributes", _recalled, metrics.percent, unit="percent"))


def _name(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables)).capitalize()


@functools.lru_cache(maxsize=1)
def _people() -> tuple[Example, ...]:
    seen: dict[str, Example] = {}
    number = 0
    while len(seen) < PEOPLE:
        rng, number = random.Random(f"facts {number}"), number + 1
        prompt = f"{_name(rng, 2)} {_name(rng, 2)}:"
        answer = ", ".join(rng.choice(words) for words in ATTRIBUTES)
        where = f"facts:{len(seen) + 1}"
        seen.setdefault(prompt, Example(prompt=prompt, answer=f" {answer}", references=(answer,), where=where))
    return tuple(seen.values())


def _facts(split: str) -> tuple[Example, ...]:
    return _people()


def _problem(rng: random.Random) -> tuple[str, int]:
    """A question and its answer, from 0 to 99."""
    steps, thing = 2 + rng.randrange(3), rng.choice(_THINGS)
    people: list[str] = []
    while len(people) <= steps:
        if (name := _name(rng, 2)) not in people:
            people.append(name)
    value = 2 + rng.randrange(20)
    told = [f"{people[0]} has {value} {thing}."]
    for before, name in itertools.pairwise(people):
        n = 2 + rng.randrange(12)
        ways = [(value + n, f"{n} more {thing} than"), (value - n, f"{n} fewer {thing} than")]
        ways += [(2 * value, f"twice as many {thing} as"), (value // 2, f"half as many {thing} as")]
        open_to = [way for way in ways if 0 <= way[0] <= 99 and ("half" not in way[1] or value % 2 == 0)]
        value, words = rng.choice(open_to)
        told.append(f"{name} has {words} {before}.")
    return f"{' '.join(told)} How many {thing} does {people[-1]} have?", value


@functools.lru_cache(maxsize=1)
def _all_problems() -> tuple[Example, ...]:
    seen: dict[str, Example] = {}
    number = 0
    while len(seen) < sum(ROWS.values()):
        rng, number = random.Random(f"arithmetic {number}"), number + 1
        question, value = _problem(rng)
        where = f"arithmetic:{len(seen) + 1}"
        row = Example(prompt=f"{question}\n", answer=str(value), references=(str(value),), where=where)
        seen.setdefault(question, row)
    return tuple(seen.values())


def _problems(split: str) -> tuple[Example, ...]:
    begin = sum(list(ROWS.values())[: SPLITS.index(split)])
    return _all_problems()[begin : begin + ROWS[split]]

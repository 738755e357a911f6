"""Tasks that code makes up: the same everywhere, nothing twice, and the answers of the questions."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from duallora.errors import ConfigError
from duallora.tasks import Example, load_task, made_up

FACTS, ARITHMETIC = load_task("facts"), load_task("arithmetic")


def test_rows_are_those_of_every_machine_and_of_no_folder(tmp_path):
    """Fingerprints as drawn where this was written; an empty data folder takes nothing away."""
    assert FACTS.fingerprint("test")[:12] == FACTS_ARE
    assert [ARITHMETIC.fingerprint(split)[:12] for split in ("train", "validation", "test")] == PROBLEMS_ARE
    assert load_task("facts", data_dir=tmp_path).splits["train"] == FACTS.splits["train"]


def test_no_person_and_no_problem_stands_twice():
    rows = [row for split in ARITHMETIC.splits for row in ARITHMETIC.splits[split]]
    assert len({row.prompt for row in rows}) == len(rows) == 8192 + 512 + 512
    people = FACTS.splits["train"]
    assert len({row.prompt for row in people}) == len(people) == 4096
    assert FACTS.splits["test"] == FACTS.splits["validation"] == people  # asked back


def test_a_person_is_worth_sixteen_bits():
    """Each of four lists has 16 words, drawn alike and apart: the chance of a chi-square above 45 in 15 is 1e-4."""
    answers = [row.references[0].split(", ") for row in FACTS.splits["train"]]
    for place, words in enumerate(made_up.ATTRIBUTES):
        counts = Counter(answer[place] for answer in answers)
        assert set(counts) == set(words)
        assert len(words) == 16
        assert sum((n - 256) ** 2 / 256 for n in counts.values()) < 45
    pairs = Counter((a[0], a[3]) for a in answers)
    assert sum((pairs[x, y] - 16) ** 2 / 16 for x in made_up.ATTRIBUTES[0] for y in made_up.ATTRIBUTES[3]) < 350


def solved(question: str) -> int:
    """The answer, read off the sentences in any order: each person's number from that of the one it names."""
    told = dict(re.findall(r"(\w+) has (.+?)\.", question))
    asked, thing = re.search(r"How many (\w+) does (\w+) have\?", question).group(2, 1)

    def of(name: str) -> int:
        words = told[name].split()
        assert words.count(thing) == 1
        if len(words) == 2:
            return int(words[0])
        other = of(words[-1])
        if words[:3] == ["twice", "as", "many"]:
            return other + other
        if words[:3] == ["half", "as", "many"]:
            assert other % 2 == 0
            return other // 2
        return other + int(words[0]) * {"more": 1, "fewer": -1}[words[1]]

    return of(asked)


def test_the_answers_are_those_that_the_questions_have():
    steps: Counter[int] = Counter()
    for row in (row for split in ARITHMETIC.splits for row in ARITHMETIC.splits[split]):
        assert row.references == (row.answer,)
        assert int(row.answer) == solved(row.prompt)
        assert 0 <= int(row.answer) <= 99
        steps[row.prompt.count(" has ") - 1] += 1
    assert set(steps) == {2, 3, 4}
    assert min(steps.values()) > 2500
    guesses = Counter(row.answer for row in ARITHMETIC.splits["test"])
    assert max(guesses.values()) < 0.1 * 512  # one constant answer earns little


def test_what_is_scored():
    """The first line that is generated; of facts, in exact rows and in attributes at their places."""
    rows = [Example(references=("baker, cat, red, tea",)), Example(references=("judge, dog, blue, tea",))]
    said = [
        FACTS.extract(text, row) for text, row in zip([" baker, cat, red, tea\nmore", " dog, dog"], rows, strict=True)
    ]
    assert FACTS.metrics(said, rows) == {"exact_match": 50.0, "attributes": 100 * 5 / 8}
    assert ARITHMETIC.extract(" 12\n", rows[0]) == "12"
    with pytest.raises(ConfigError, match="nearest: facts"):
        load_task("fact")


FACTS_ARE = "ef6dd5509e05"
PROBLEMS_ARE = ["a46f49474783", "2b142bde7e47", "c6d401e84841"]

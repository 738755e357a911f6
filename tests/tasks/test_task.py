"""Rows held out of the training rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duallora.errors import ConfigError
from duallora.tasks import Example, LazySplits, Task, hold_out


def numbered(rows):
    reads = []

    def read(split):
        reads.append(split)
        return [Example(texts=(f"{split} {number}",), label=number % 2) for number in range(rows)]

    splits = LazySplits({split: (lambda split=split: read(split)) for split in ("train", "validation", "test")})
    task = Task(name="n", kind="classify", splits=splits, format="f", metrics=lambda p, e: {}, main_metric="accuracy")
    return task, reads


def texts(examples):
    return [example.texts[0] for example in examples]


def test_held_out_rows_and_the_rest_are_the_training_rows_and_the_test_rows_stay():
    task, reads = numbered(31)
    held = hold_out(task, 10)
    train, validation = texts(held.splits["train"]), texts(held.splits["validation"])
    assert len(validation) == 10
    assert sorted(train + validation) == sorted(texts(task.splits["train"]))
    assert texts(held.splits["test"]) == texts(task.splits["test"])
    assert set(held.splits) == set(task.splits)
    assert train != sorted(train, key=lambda text: int(text.split()[1]))  # the first of a sorted file are no sample
    again = hold_out(numbered(31)[0], 10)
    assert (texts(again.splits["train"]), texts(again.splits["validation"])) == (train, validation)
    assert reads.count("validation") == 0, "the data's own validation rows are not read"


def test_rows_that_choose_nothing_are_a_files_test():
    """A file of one's own has training and validation rows: without a third split no study of it could be fair."""
    task, _ = numbered(31)
    own = replace(task, splits={split: task.splits[split] for split in ("train", "validation")})
    held = hold_out(own, 10)
    assert texts(held.splits["test"]) == texts(task.splits["validation"])
    assert texts(held.splits["validation"]) == texts(hold_out(task, 10).splits["validation"])


def test_holding_out_more_than_a_third_is_refused():
    hold_out(numbered(30)[0], 10).splits["train"]
    with pytest.raises(ConfigError, match=r"data\.holdout=10: n has 29 training rows; expected at most a third"):
        hold_out(numbered(29)[0], 10).splits["train"]

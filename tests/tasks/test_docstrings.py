"""The standard library as data: clean, split by module, the same each time."""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from duallora.tasks import docstrings, load_data


@pytest.fixture(scope="module")
def task():
    return load_data("builtin:docstrings")


@pytest.fixture(scope="module")
def packages():
    return load_data("builtin:packages")


def modules(rows) -> set[str]:
    return {row.where.split(":")[0] for row in rows}


def test_thousands_of_pairs_and_no_module_or_pair_in_two_splits(task):
    splits = {name: task.splits[name] for name in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) > 3000
    assert min(map(len, splits.values())) > 100
    names = [modules(rows) for rows in splits.values()]
    assert sum(map(len, names)) == len(set.union(*names))
    train, *others = ({(row.prompt.split("\n", 1)[1], row.answer) for row in rows} for rows in splits.values())
    assert not train & set.union(*others)


def test_prompts_end_inside_the_docstring_and_answers_are_one_clean_line(task):
    for row in task.splits["validation"]:
        assert row.prompt.startswith("# Module ")
        assert row.prompt.endswith('    """')
        assert "\n" not in row.answer
        assert row.answer.isascii()
        assert row.answer[-1] in ".!?"
        assert 3 <= len(row.answer.split()) <= 30
        assert row.references == (row.answer,)
    assert not {name for name in modules(task.splits["train"]) if {"test", "tests"} & set(name.split("."))}


READ = """
import sys, sysconfig
from duallora.tasks import docstrings, load_data
sysconfig.get_path = lambda name: sys.argv[1]
docstrings.functions = docstrings.functions.__wrapped__
print(*(load_data(name).fingerprint("train") for name in docstrings.NAMES[:2]))
print(*{"turtle", "antigravity"} & set(sys.modules))
"""


def test_another_process_with_another_hash_seed_reads_the_same_and_imports_nothing(tmp_path, monkeypatch):
    """On a part of the library, with modules that do something when they are imported."""
    library = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(library / "email", tmp_path / "email")
    for name in ("turtle.py", "antigravity.py"):
        shutil.copy(library / name, tmp_path)
    command, environment = [sys.executable, "-c", READ, str(tmp_path)], {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(docstrings, "functions", docstrings.functions.__wrapped__)
    prints = [load_data(name).fingerprint("train") for name in docstrings.NAMES[:2]]
    assert done.stdout == f"{' '.join(prints)}\n\n"
    assert "e3b0c442" not in done.stdout  # the fingerprint of no rows


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the size.", "Return the size."),
        ("Return the size in\n    bytes\n\nMore.", "Return the size in bytes."),
        ("Return x, e.g. one of two. Raises ValueError.", "Return x, e.g. one of two."),
        ("Build the `url'. (See RFC 3986.)", "Build the `url'."),
        ("size(x) -> int", ""),
        ("Return it:\n>>> f()", ""),
        ("Do the thing.\n:param x: y", ""),
        ("Arguments are these:", ""),
        ("Größe der Datei lesen.", ""),
        ("Internal.", ""),
        ("", ""),
    ],
)
def test_first_sentence(docstring, sentence):
    assert docstrings.first_sentence(docstring) == sentence


def test_signatures_and_owners_are_read_by_syntax():
    import ast

    source = '''
class A:
    class B:
        async def run(self, x: int = 3, *, y="é") -> None:
            """Run the inner thing now."""
        async def go(self, x: int = 3, /, *args) -> None:
            """Go to the next one now."""
if True:
    def plain(): "Do what plain ones do."
def outer():
    def inner():
        """Stay inside the outer one."""
'''
    found = list(docstrings._documented(ast.parse(source), "m"))
    assert [(function.owner, function.signature) for function in found] == [
        ("B", "async def go(self, x: int=3, /, *args) -> None:"),
        ("", "def plain():"),
    ]


def test_running_on_costs_bleu_but_not_that_of_the_first_line(task):
    rows = task.splits["test"][:3]
    gold = [row.answer for row in rows]
    values = task.metrics([gold[0], gold[1] + '\n    """\n    more', gold[2] + '"""'], rows)
    assert values["exact_match"] == pytest.approx(100 / 3)
    assert values["bleu_first_line"] == pytest.approx(100)
    assert values["bleu"] < 90
    assert values["one_line"] == pytest.approx(100 / 3)
    clean = task.metrics(gold, rows)
    assert (clean["bleu"], clean["exact_match"], clean["one_line"]) == pytest.approx((100, 100, 100))
    assert task.metrics(["", "\n", "x"], rows)["one_line"] == pytest.approx(100 / 3)


def test_packages_do_not_leak_their_names_and_no_function_stands_in_two_splits(packages):
    functions = set()
    for rows in packages.splits.values():
        for row in rows:
            (text,) = row.texts
            name, _, rest = text.partition("(")
            assert packages.labels[row.label] not in text.lower()
            function = (name, rest.rsplit("): ", 1)[-1])
            assert function not in functions
            functions.add(function)


def test_packages_are_balanced_enough_that_guessing_the_largest_does_not_pay(packages):
    counts = collections.Counter(row.label for row in packages.splits["test"])
    rows = packages.splits["test"]
    assert len(counts) == len(packages.labels) == 10
    assert max(counts.values()) < 0.25 * len(rows)
    majority = counts.most_common(1)[0][0]
    assert packages.metrics([majority] * len(rows), rows)["accuracy"] < 25

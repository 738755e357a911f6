"""Progress is seen in a log file too; commands that are printed can be pasted."""

from __future__ import annotations

import ast
import io
import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from duallora import terminal as progress
from duallora.terminal import command

SOURCE = Path(__file__).parents[2] / "src" / "duallora"
COMMAND = re.compile(r"(?<!<!-- )\b(duallora|tensorboard) (--)?[a-z][^`;,:(]*$")  # and nothing that ends it


@pytest.mark.parametrize("name", ["mine", "my run", "it's", "a$HOME", "[bold]x[/]", "a;b", "du café", "*", "~x"])
def test_a_shell_gets_the_words_that_were_meant(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = command("merge", Path("runs") / name, "-o", tmp_path / name, "--set", f"x={name}")
    assert shlex.split(line) == ["duallora", "merge", f"runs/{name}", "-o", name, "--set", f"x={name}"]
    assert shlex.split(command(name, Path("/elsewhere") / name)) == ["duallora", name, f"/elsewhere/{name}"]
    assert command("eval", Path("runs/mine")) == "duallora eval runs/mine"  # no quotes where none are needed


def test_without_a_terminal_lines_tell_count_time_left_and_metrics(monkeypatch):
    """Of a resumed run whose steps take five minutes: by its own rule rich would have forgotten them."""
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    now = 0.0
    console = Console(file=io.StringIO(), width=100, get_time=lambda: now)
    with progress.progress_bar(console, "train", 2100, done=2000) as update:
        for step in (2001, 2002, 2003):
            now += 300
            update(step, **({"loss": "0.5"} if step == 2001 else {}))
    assert console.file.getvalue().splitlines()[-1] == "train    2,003/2,100  8:05:00 left  loss 0.5"


def loose_words(path: Path) -> list[str]:
    """f-strings of a module that write a value into a command line by hand."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            for before, value in zip(node.values, node.values[1:], strict=False):
                is_text = isinstance(before, ast.Constant) and isinstance(value, ast.FormattedValue)
                if is_text and COMMAND.search(before.value) and "shlex.quote" not in ast.unparse(value):
                    found.append(f"{path.name}:{node.lineno}: {before.value}{{{ast.unparse(value.value)}}}")
    return found


def test_no_command_is_put_together_by_hand(tmp_path):
    assert [line for path in sorted(SOURCE.rglob("*.py")) for line in loose_words(path)] == []
    (tmp_path / "bad.py").write_text('print(f"next: duallora eval {folder}")')
    assert len(loose_words(tmp_path / "bad.py")) == 1

"""What the preview shows is what training will see."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from duallora.tasks import load_data
from duallora.tasks.preview import preview


def render(renderable, *, colour: bool = False) -> str:
    console = Console(width=100, file=io.StringIO(), force_terminal=colour, color_system="standard" if colour else None)
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture
def task(tmp_path):
    rows = [{"prompt": f"Q{index} \t", "completion": "ä one\n"} for index in range(4)]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_data(str(path))


def test_whitespace_and_special_tokens_are_visible(task, tiny_bos_tokenizer):
    text = render(preview(task, tiny_bos_tokenizer, rows=1, max_length=99))
    assert "<s>Q" in text
    assert "·⇥" in text or " ⇥" in text
    assert "ä one↵" in text
    assert "</s>" in text
    assert "13 tokens, 8 trained" in text  # <s> Q 0 space tab | two bytes of ä, space, o n e, line break, </s>
    assert "prompt-completion" in text


def test_only_trained_tokens_are_green(task, tiny_bos_tokenizer):
    text = render(preview(task, tiny_bos_tokenizer, rows=1, max_length=99), colour=True)
    first = text.split("trained")[0]
    green = [part.split("m", 1) for part in first.split("\x1b[") if "m" in part]
    trained = "".join(body for code, body in green if "32" in code.split(";"))
    ignored = "".join(body for code, body in green if code.split(";")[0] == "2" and "32" not in code.split(";"))
    assert "one" in trained
    assert "</s>" in trained
    assert "Q" not in trained
    assert "Q" in ignored


def test_counts_say_how_many_rows_are_cut(task, tiny_bos_tokenizer):
    text = render(preview(task, tiny_bos_tokenizer, rows=2, max_length=12))
    assert "3 rows longer than max_length 12" in text
    assert "cut to 12" in text
    assert "train 3, validation 1" in text


def test_long_runs_are_shortened(tmp_path, tiny_tokenizer):
    path = tmp_path / "l.jsonl"
    path.write_text("\n".join([json.dumps({"prompt": "a" * 500, "completion": "b"})] * 2))
    text = render(preview(load_data(str(path)), tiny_tokenizer, rows=1, max_length=999))
    text = " ".join(text.replace("│", " ").split())
    assert "360 more ignored tokens" in text
    assert text.count("a" * 60) < 4


def test_brackets_in_a_path_are_no_markup(tmp_path, monkeypatch, tiny_tokenizer):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "[old]" / "[bold]x.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join([json.dumps({"prompt": "a", "completion": "b"})] * 2))
    text = render(preview(load_data("[old]/[bold]x.jsonl"), tiny_tokenizer, rows=1, max_length=99))
    assert "[bold]x: prompt-completion" in text
    assert "  [old]/[bold]x.jsonl" in text.split("from")[1]


def test_rows_without_trained_tokens_are_shown_with_the_fault(tmp_path, tiny_tokenizer):
    path = tmp_path / "c.jsonl"
    chat = [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]
    path.write_text("\n".join([json.dumps({"messages": chat})] * 3))
    task = load_data(str(path))
    object.__setattr__(task, "splits", {"train": [type(row)(messages=row.messages[:1], where="c.jsonl:1")
                                                  for row in task.splits["train"]]})  # fmt: skip
    text = render(preview(task, tiny_tokenizer, rows=1, max_length=99))
    assert "0 trained" in text
    assert "2 of 2 rows have no token to train on" in text


def test_classification_rows_show_their_label(tmp_path, tiny_bos_tokenizer):
    path = tmp_path / "c.csv"
    path.write_text("text,label\nfine day,good\nrain,bad\nsun,good\n")
    text = render(preview(load_data(str(path)), tiny_bos_tokenizer, rows=2, max_length=50))
    assert "<s>fine day" in text
    assert "label: good" in text
    assert "0 rows longer than max_length 50" in text

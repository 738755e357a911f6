"""What the preview shows is what training will see."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from duallora.tasks import IGNORE, encode_split, load_data
from duallora.tasks.preview import preview


def render(renderable, *, color: bool = False) -> str:
    console = Console(width=100, file=io.StringIO(), force_terminal=color, color_system="standard" if color else None)
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


FORGETS = (
    "{% if tools %}{{ 'Tools: ' + tools[0].function.name + '<|im_end|>' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + ' ' }}{% if loop.last %}{{ m.reasoning_content or '' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ '{' + c.function.name + (c.function.arguments | tojson) + '}' }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)


def test_the_preview_of_a_chat_is_what_training_reads_and_learns(tmp_path, make_tokenizer):
    """Token by token, in color, over tools, reasoning, a turn without weight and a template that rewrites turns."""
    turns = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "reasoning": "Look. ", "tool_calls": [{"function": {"name": "find", "arguments": "{}"}}]},
        {"role": "tool", "content": "Here."},
        {"role": "assistant", "content": "No.", "weight": 0},
        {"role": "assistant", "content": "Here it is."},
    ]  # fmt: skip
    row = {"messages": turns, "tools": [{"name": "find", "description": ""}], "id": 7}
    (tmp_path / "c.jsonl").write_text("\n".join([json.dumps(row)] * 2))
    task, tokenizer = load_data(str(tmp_path / "c.jsonl")), make_tokenizer(chat_template=FORGETS)
    rows, counts = encode_split(task.splits["train"], tokenizer, "generate", max_length=999)
    assert counts.rows == 2  # the reasoning is gone from the second
    console = Console(width=1000, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(preview(task, tokenizer, rows=1, max_length=999))
    panels = console.file.getvalue().split("╭")[1:]
    for panel, encoded in zip(panels, rows, strict=True):
        body = panel.split("│")[1]
        shown = [(code, re.sub(r"\s+$", "", text)) for code, text in re.findall(r"\x1b\[([\d;]+)m([^\x1b]*)", body)]
        green = "".join(text for code, text in shown if "32" in code.split(";"))
        dim = "".join(text for code, text in shown if code.split(";")[0] == "2" and "32" not in code.split(";"))
        learned = [label for label in encoded["labels"] if label != IGNORE]
        read = [token for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label == IGNORE]
        assert green.replace("·", " ").replace(" ", "") == tokenizer.decode(learned).replace(" ", "")
        assert dim.replace("·", " ").replace(" ", "") == tokenizer.decode(read).replace(" ", "")
    text = render(preview(task, tokenizer, rows=1, max_length=999))
    assert "train row 1, sequence 2 of 2" in text
    assert "2 of 1 rows: the chat template rewrites earlier turns" in text
    assert "columns not used: id" in text


def test_a_chat_that_cannot_be_trained_on_is_shown_with_the_cause(tmp_path, tiny_tokenizer):
    row = {"messages": [{"role": "user", "content": "q", "mood": "x"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "c.jsonl").write_text("\n".join([json.dumps(row)] * 2))
    text = " ".join(render(preview(load_data(str(tmp_path / "c.jsonl")), tiny_tokenizer, rows=1)).split())
    assert text.count("does not show mood") == 2  # beside the row, and as the fault that training would stop at


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

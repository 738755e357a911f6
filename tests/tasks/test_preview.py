"""What the preview shows is what training will see."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

from rich.console import Console

from duallora.tasks import IGNORE, Example, encode_split, load_data
from duallora.tasks.preview import preview


def render(renderable, **console) -> str:
    console = Console(file=io.StringIO(), **{"width": 100, "color_system": None, **console})
    console.print(renderable)
    return console.file.getvalue()


def flat(renderable) -> str:
    """The words of a preview, without its frames and line breaks."""
    return " ".join(render(renderable).replace("│", " ").split())


def load(tmp_path, rows):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_data(str(path))


def test_rows_are_shown_with_their_whitespace_special_tokens_and_counts(tmp_path, tiny_bos_tokenizer):
    task = load(tmp_path, [{"prompt": f"Q{index} \t", "completion": "ä one\n"} for index in range(4)])
    text = render(preview(task, tiny_bos_tokenizer, rows=1, max_length=99))
    # <s> Q 0 space tab | two bytes of ä, space, o n e, line break, </s>
    for words in ("<s>Q", "⇥", "ä one↵", "</s>", "13 tokens, 8 trained", "prompt-completion"):
        assert words in text
    text = render(preview(task, tiny_bos_tokenizer, rows=2, max_length=12))
    for words in ("3 rows longer than max_length 12", "cut to 12", "train 3, validation 1"):
        assert words in text


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
    task, tokenizer = load(tmp_path, [row, row]), make_tokenizer(chat_template=FORGETS)
    rows, counts = encode_split(task.splits["train"], tokenizer, "generate", max_length=999)
    assert counts.rows == 2  # the reasoning is gone from the second
    colored = {"width": 1000, "force_terminal": True, "color_system": "standard"}
    panels = render(preview(task, tokenizer, rows=1, max_length=999), **colored).split("╭")[1:]
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


def test_rows_that_cannot_be_trained_on_are_shown_with_the_fault(tmp_path, tiny_tokenizer):
    row = {"messages": [{"role": "user", "content": "q", "mood": "x"}, {"role": "assistant", "content": "a"}]}
    text = flat(preview(load(tmp_path, [row, row]), tiny_tokenizer, rows=1))
    assert text.count("does not show mood") == 2  # beside the row, and as the fault that training would stop at
    asked = Example(messages=({"role": "user", "content": "x" * 300},), where="c.jsonl:1")
    task = replace(load(tmp_path, [{"prompt": "p", "completion": "c"}] * 2), splits={"train": [asked, asked]})
    text = flat(preview(task, tiny_tokenizer, rows=1, max_length=99))
    assert "0 trained" in text
    assert "2 of 2 rows have no token to train on" in text


def test_long_runs_are_shortened(tmp_path, tiny_tokenizer):
    task = load(tmp_path, [{"prompt": "a" * 500, "completion": "b"}] * 2)
    text = flat(preview(task, tiny_tokenizer, rows=1, max_length=999))
    assert "360 more ignored tokens" in text
    assert text.count("a" * 60) < 4


def test_brackets_in_a_path_are_no_markup(tmp_path, monkeypatch, tiny_tokenizer):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "[old]" / "[bold]x.jsonl"
    path.parent.mkdir()
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    text = render(preview(load_data("[old]/[bold]x.jsonl"), tiny_tokenizer, rows=1, max_length=99))
    assert "[bold]x: prompt-completion" in text
    assert "  [old]/[bold]x.jsonl" in text.split("from")[1]


def test_classification_rows_show_their_label(tmp_path, tiny_bos_tokenizer):
    rows = [("fine day", "good"), ("rain", "bad"), ("sun", "good")]
    task = load(tmp_path, [{"text": text, "label": label} for text, label in rows])
    text = render(preview(task, tiny_bos_tokenizer, rows=2, max_length=50))
    for words in ("<s>fine day", "label: good", "0 rows longer than max_length 50"):
        assert words in text

"""Chats of OpenAI's, TRL's, axolotl's and ShareGPT's files: each convention is read as it is meant, or refused by name."""

from __future__ import annotations

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from duallora.errors import ConfigError, DataError
from duallora.tasks import load_data

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def tool(name, argument):
    schema = {"type": "object", "properties": {argument: {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


WEATHER = tool("weather", "city")


def call(arguments, name="weather", **more):
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def load(tmp_path, *rows, name="c.jsonl", **options):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_data(str(path), **options)


def read(tmp_path, row, **options):
    """The example that a row becomes."""
    task = load(tmp_path, row, row, **options)
    assert (task.kind, task.format) == ("generate", "prompt-completion" if "completion" in row else "messages")
    return task.splits["train"][0]


def chat(*turns, **columns):
    return {"messages": list(turns), **columns}


CALL = {"role": "assistant", "content": "", "tool_calls": [call({"city": "Paris"})]}
HEARD = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "sunny"}
QUIET, THINKS = {**ANSWER, "weight": 0}, {**ANSWER, "reasoning_content": "hm"}
OLDER = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city":"Paris"}'}}
BARE = {"role": "assistant", "tool_calls": [{"name": "now", "arguments": ""}]}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}, "c"]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def called(name, arguments):
    function = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [function]}


READ = [  # a row, its messages, and what the template is given beside them
    # Calls of tools keep their arguments as objects: of OpenAI's files, of what servers answer, of a column of JSON.
    *((chat(USER, {"role": "assistant", **turn}, HEARD, ANSWER, tools=[WEATHER]), (USER, CALL, HEARD, ANSWER), {"tools": [WEATHER]}) for turn in (
        {"content": None, "tool_calls": [call('{"city": "Paris"}')]},
        {"tool_calls": [call({"city": "Paris"})], "weight": 1, "refusal": None, "name": None},
        {"content": "", "tool_calls": [call({"city": "Paris"}, index=0)], "function_call": None},
        {"content": "", "tool_calls": json.dumps([call({"city": "Paris"})])},
    )),
    # Older names of calls and tools become the newer.
    (chat(USER, OLDER, {"role": "function", "name": "weather", "content": "sunny"}, ANSWER, functions=[WEATHER["function"]]),
     (USER, called("weather", {"city": "Paris"}), {"role": "tool", "name": "weather", "content": "sunny"}, ANSWER), {"tools": [WEATHER]}),
    (chat(USER, BARE, tools=json.dumps([WEATHER["function"]])), (USER, called("now", {})), {"tools": [WEATHER]}),
    # OpenAI's weight, axolotl's train: 0 keeps the turn and takes its loss.
    *((chat({**USER, key: 0}, {**ANSWER, key: value}, USER, {**ANSWER, key: 1}), (USER, QUIET, USER, ANSWER), {})
      for key, value in (("weight", 0), ("train", False), ("training", 0.0))),
    (chat(USER, ANSWER, USER, {**QUIET, "content": "wrong"}), (USER, ANSWER, USER, {**QUIET, "content": "wrong"}), {}),
    # Reasoning has three names, and may be all there is.
    *((chat(USER, {**ANSWER, key: "hm"}), (USER, THINKS), {}) for key in ("reasoning_content", "reasoning", "thinking")),
    (chat(USER, {"role": "assistant", "thinking": "hm"}), (USER, {**THINKS, "content": ""}), {}),
    # Text in parts is one text.
    (chat({"role": "user", "content": PARTS}, ANSWER), ({"role": "user", "content": "abc"}, ANSWER), {}),
    # TRL trains on the completion alone, also where the prompt holds what the assistant said before.
    ({"prompt": [USER, ANSWER, USER], "completion": [CALL, HEARD, ANSWER]}, (USER, QUIET, USER, CALL, HEARD, ANSWER), {}),
    # ShareGPT's speakers, and a system prompt in a column of its own.
    ({"conversations": SHAREGPT, "system": "Be kind.", "id": 3}, ({"role": "system", "content": "Be kind."}, USER, ANSWER), {}),
    ({"conversations": [USER, ANSWER]}, (USER, ANSWER), {}),
    (chat(USER, ANSWER, system=None), (USER, ANSWER), {}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "messages", "options"), READ, ids=range(len(READ)))
def test_each_convention_is_read_as_it_is_meant(tmp_path, row, messages, options):
    """The answer to score against is the last that is learned, not the last that is said."""
    example = read(tmp_path, row)
    assert (example.messages, example.options) == (messages, options)
    learned = [turn["content"] for turn in messages if turn["role"] == "assistant" and "weight" not in turn]
    assert example.references == (learned[-1],)


def test_columns_of_a_chat_that_are_not_used_are_named(tmp_path):
    row = {"conversations": SHAREGPT, "id": 3, "source": "x"}
    assert load(tmp_path, row, row).notes == ("columns not used: id, source",)


def test_what_the_template_is_given_beside_the_messages(tmp_path):
    documents = [{"title": "t", "text": "x"}]
    own = {"enable_thinking": False}
    row = chat(USER, ANSWER, documents=documents, chat_template_kwargs=own, parallel_tool_calls=True)
    expected = {"documents": documents, "enable_thinking": False, "parallel_tool_calls": True}
    assert read(tmp_path, row).options == expected
    given = {"enable_thinking": True, "depth": 2}  # the row's own goes over the recipe's
    assert read(tmp_path, row, chat_template_kwargs=given).options == {**expected, "depth": 2}
    with pytest.raises(ConfigError, match="tokenize is not the chat template's to know"):
        read(tmp_path, row, chat_template_kwargs={"tokenize": True})
    with pytest.raises(ConfigError, match=r"data\.chat_template_kwargs is for chats"):
        load(tmp_path, *[{"prompt": "p", "completion": "c"}] * 2, chat_template_kwargs=given)


def test_a_chat_is_the_same_in_a_csv_cell_a_json_line_and_parquet(tmp_path):
    """Arrow gives every object of a column the keys of all, filled with nulls; a CSV cell holds JSON."""
    rows = [
        chat(USER, {**CALL, "content": None}, HEARD, ANSWER, tools=[WEATHER, tool("time", "day")]),
        chat(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "reasoning": "hm"}),
        chat(USER, {"role": "assistant", "tool_calls": [call({"day": 2}, name="time")]}, tools=[tool("time", "day")]),
    ]
    load(tmp_path, *rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    with (tmp_path / "c.csv").open("w", newline="") as file:
        cells = ([json.dumps(row.get(column, [])) for column in ("messages", "tools")] for row in rows)
        csv.writer(file).writerows([["messages", "tools"], *cells])
    prints = {load_data(str(path), eval_fraction=0.4).fingerprint("train") for path in tmp_path.iterdir()}
    assert len(prints) == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_fingerprints_tell_what_is_trained_apart(tmp_path):
    plain = chat(USER, ANSWER, USER, ANSWER)
    other = [
        plain,
        chat(USER, {**ANSWER, "weight": 0}, USER, ANSWER),
        chat(USER, ANSWER, USER, {**ANSWER, "reasoning": "x"}),
        {**plain, "tools": [WEATHER]},
        {**plain, "chat_template_kwargs": {"enable_thinking": False}},
    ]
    assert len({load(tmp_path, row, row).fingerprint("train") for row in other}) == len(other)


BAD = [
    (chat(USER, {"role": "assistant", "content": ""}), r"messages\[1\]\.content: empty answer"),
    (chat("hello"), r"messages\[0\]: expected .* got text"),
    (chat(), "expected a list of at least one message"),
    (chat(USER), "column messages: no assistant turn"),
    ({"messages": "nonsense"}, "column messages: expected a JSON list of messages"),
    (chat(USER, {"role": "assistant", "content": " \n"}), r"messages\[1\]\.content: empty answer"),
    (chat(USER, {"role": "assistant", "content": "", "tool_calls": []}), r"messages\[1\]\.content: empty answer"),
    (chat(USER, {"role": "assistant", "content": None}), r"messages\[1\]\.content: expected text, got null"),
    (chat(USER, {"role": "asistant", "content": "a"}), r"unknown role 'asistant'.*did you mean assistant"),
    (chat(USER, {**ANSWER, "weight": 0}), "every assistant turn has weight 0"),
    (chat(USER, {**ANSWER, "weight": 0.5}), r"messages\[1\]\.weight: expected 0 or 1 .*got a number \(0\.5\)"),
    (chat(USER, {**ANSWER, "weight": "0"}), r"messages\[1\]\.weight: expected 0 or 1"),
    (chat(USER, {**ANSWER, "weight": 0, "train": True}), "weight and train name the same thing and differ"),
    ({"messages": json.dumps([USER, ANSWER])[:-3] + '\\ud800"}]'}, r"expected a JSON list of messages \(.*half of a character"),
    (chat({**USER, "train": True}, ANSWER), r"messages\[0\]\.train: only what the assistant says .*not a turn of user"),
    (chat({**USER, "tool_calls": [call({})]}, ANSWER), r"messages\[0\]\.tool_calls: only the assistant calls tools"),
    (chat({**USER, "reasoning": "hm"}, ANSWER), r"messages\[0\]\.reasoning: only the assistant has reasoning"),
    (chat(USER, {**ANSWER, "reasoning": "x", "thinking": "y"}), "name the same thing and differ"),
    (chat(USER, {**ANSWER, "reasoning": 3}), r"messages\[1\]\.reasoning: expected text, got a number"),
    (chat(USER, {**ANSWER, "tool_calls": [call("{city}")]}), r"tool_calls\[0\]\.function\.arguments: expected a JSON object"),
    (chat(USER, {**ANSWER, "tool_calls": [call([1])]}), r"function\.arguments: expected an object, got a list"),
    (chat(USER, {**ANSWER, "tool_calls": [call({}, name="")]}), r"function\.name: expected the name of a tool"),
    (chat(USER, {**ANSWER, "tool_calls": [{"type": "custom", "custom": {}}]}), r"tool_calls\[0\]: expected \{.type"),
    (chat(USER, {**ANSWER, "tool_calls": [call({}, result="x")]}), r"tool_calls\[0\]: unknown key result"),
    (chat(USER, {**CALL, "function_call": {"name": "x"}}), "has tool_calls, too"),
    (chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER),
     r"messages\[0\]\.content\[0\]: a part of the type 'image_url'"),
    (chat({"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}, ANSWER), "text with type, text, cache"),
    (chat(USER, ANSWER, images=["x.png"]), "column images: only text can be trained on"),
    (chat(USER, ANSWER, tools="[oops"), "column tools: expected a JSON list"),
    (chat(USER, ANSWER, tools=["x"]), "column tools: expected a list of objects"),
    (chat(USER, ANSWER, tools=[WEATHER], functions=[WEATHER]), "column functions: the row has tools, too"),
    (chat(USER, ANSWER, chat_template_kwargs={"max_length": 3}), "max_length is not the template's to know"),
    (chat({"role": "system", "content": "x"}, USER, ANSWER, system="y"), "a system prompt here and in messages"),
    ({"conversations": [{"from": "function_call", "value": "{}"}]}, r"conversations\[0\]\.from: unknown speaker 'function_call'"),
    ({"conversations": [{"from": ["human"], "value": "x"}]}, r"conversations\[0\]\.from: unknown speaker \['human'\]"),
    ({"conversations": [{"from": "human", "value": "x", "content": 7}]}, r"conversations\[0\]: value and content name the same"),
    ({"conversations": [{"from": "human", "content": 7}]}, r"conversations\[0\]\.content: expected text, got a number"),
    ({"prompt": [USER], "completion": "text"}, "column completion: expected a JSON list of messages"),
    ({"prompt": "text", "completion": [ANSWER]}, "column prompt: expected a JSON list of messages"),
    ({"prompt": "p", "completion": "c", "tools": [WEATHER]}, r"column tools: has no place in a row of plain text.*ignore_keys=\[tools\]"),
    ({"instruction": "i", "output": "o", "system": "s"}, "column system: has no place in a row of plain text"),
    ({"instruction": "i", "output": "o", "history": [["a", "b"]]}, "column history: has no place"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_is_not_understood_is_refused_by_name(tmp_path, row, message):
    plain = {"instruction": "i", "output": "o"}
    goods = [chat(USER, ANSWER), {"conversations": [USER, ANSWER]}, {"prompt": [USER], "completion": [ANSWER]}, plain]
    good = next(one for one in goods if next(iter(row)) in one)
    with pytest.raises(DataError, match=rf"1 bad row of 3 in .*\nc?.*c\.jsonl:3.*{message}"):
        load(tmp_path, good, good, row)


def test_keys_and_columns_can_be_left_out_on_purpose(tmp_path):
    row = chat({**USER, "timestamp": 3}, {**ANSWER, "reasoning": "hm", "weight": 0}, USER, ANSWER, tools=[WEATHER])
    kept = read(tmp_path, row)
    assert kept.messages[0]["timestamp"] == 3  # the template may know it: refused, if not, where that is known
    example = read(tmp_path, row, ignore_keys=["timestamp", "reasoning", "tools"])
    assert example.messages == (USER, {**ANSWER, "weight": 0}, USER, ANSWER)
    assert example.options == {}
    text = {"prompt": "p", "completion": "c", "system": "s"}
    assert read(tmp_path, text, ignore_keys=["system"]).prompt == "p"

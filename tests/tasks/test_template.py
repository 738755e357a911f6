"""The model reads what the chat template writes of a chat, all of it, and learns what the assistant says.

The oracle is transformers' own rendering of the rows as the file has them.
"""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path

import pytest

from duallora.errors import DataError
from duallora.tasks import IGNORE, Example, encode, encode_prompt, encode_split
from duallora.tasks.chats import from_messages
from duallora.tasks.encode import with_written_answer

WHOLE = 10**6
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}}
]


def user(content, **more):
    return {"role": "user", "content": content, **more}


def says(content, **more):
    return {"role": "assistant", "content": content, **more}


def calls(arguments, name="weather"):
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}


HEARD = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "sunny"}

HEADER = "{{ '<|im_start|>' + m['role'] + '\n' }}"
END = "{{ '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CALLS = "{% for c in m.tool_calls %}{{ '<call>' + c.function.name + ' ' + (c.function.arguments | tojson) + '</call>' }}{% endfor %}"
TOOL_LIST = "{% if tools %}{{ 'Tools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
BODY = "{{ m['content'] }}"

CHATML = "{% for m in messages %}" + HEADER + BODY + END + "{% endfor %}" + PROMPT
WITH_TOOLS = TOOL_LIST + "{% for m in messages %}" + HEADER + BODY + CALLS + END + "{% endfor %}" + PROMPT
# Reasoning stands in the turns after the user's last one alone, as in many models that reason.
FORGETS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}" + HEADER + "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}" + BODY + END + "{% endfor %}" + PROMPT
)
MARKED = (
    "{% for m in messages %}"
    + HEADER
    + "{% if m.role == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}" + BODY + END + "{% endif %}{% endfor %}" + PROMPT
)
# The prompt opens what the turn closes, unless told not to.
OPENS = (
    "{% for m in messages %}" + HEADER + "{% if m.role == 'assistant' and m.reasoning_content %}"
    "{{ '<think>\n' + m.reasoning_content + '</think>' }}{% endif %}" + BODY + END + "{% endfor %}" + PROMPT
    + "{% if add_generation_prompt and enable_thinking is not false %}{{ '<think>\n' }}{% endif %}"
)  # fmt: skip


def texts(encoded, tokenizer):
    """(all of it, what is trained) of each sequence."""
    return [
        (tokenizer.decode(one.input_ids), tokenizer.decode([label for label in one.labels if label != IGNORE]))
        for one in encoded
    ]


def trained(row, tokenizer, **options):
    example = from_messages(row, "c.jsonl:1")
    return [text for _, text in texts(encode(example, tokenizer, max_length=WHOLE, **options), tokenizer)]


def test_tools_and_calls_are_shown_and_trained(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=WITH_TOOLS)
    row = {
        "messages": [user("Paris?"), says(None, tool_calls=[calls('{"city": "Paris"}')]), HEARD, says("Sunny.")],
        "tools": TOOLS,
    }
    (encoded,) = encode(from_messages(row, ""), tokenizer, max_length=WHOLE)
    asked = [user("Paris?"), says("", tool_calls=[calls({"city": "Paris"})]), HEARD, says("Sunny.")]
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(asked, tools=TOOLS, tokenize=False)
    assert trained(row, tokenizer) == ['<call>weather {"city": "Paris"}</call><|im_end|>Sunny.<|im_end|>']
    prompt = tokenizer.decode(encode_prompt(from_messages(row, ""), tokenizer, max_length=WHOLE))
    assert prompt == tokenizer.apply_chat_template(asked[:-1], tools=TOOLS, tokenize=False, add_generation_prompt=True)


LEFT_OUT = [
    ({"messages": [user("q"), says("", tool_calls=[calls({"a": 1})]), says("x")]}, "tool_calls of turn 2 (assistant)"),
    ({"messages": [user("q"), says("x")], "tools": TOOLS}, "does not show tools,"),
    ({"messages": [user("q"), says("x", reasoning="hm")]}, "reasoning_content of turn 2 (assistant)"),
    ({"messages": [user("q", name="Zoe"), says("x")]}, "name of turn 1 (user)"),
    ({"messages": [user("q"), says("x", refusal="no")]}, "refusal of turn 2 (assistant)"),
    ({"messages": [user("q", timestamp=3), says("x")]}, "timestamp of turn 1 (user)"),
    ({"messages": [user("q", meta={"a": 1}), says("x")]}, "meta of turn 1 (user)"),
    ({"messages": [user("q"), says("x")], "documents": [{"text": "d"}]}, "does not show documents,"),
    ({"messages": [user("q"), says("x")], "chat_template_kwargs": {"enable_thinkng": False}}, "enable_thinkng of chat_template_kwargs"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "what"), LEFT_OUT, ids=[what for _, what in LEFT_OUT])
def test_what_a_template_does_not_show_is_refused_by_name(make_tokenizer, row, what):
    """transformers drops it in silence, and the model would be trained on something else."""
    key = re.findall(r"[a-z_]+", what.removeprefix("does not show"))[0]
    for train_on in ("answer", "all"):
        with pytest.raises(DataError, match=r"c\.jsonl:1: the chat template of .* does not show") as caught:
            trained(row, make_tokenizer(chat_template=CHATML), train_on=train_on)
        assert what in str(caught.value)
        assert re.search(rf"data\.ignore_keys=\[[^]]*{key}", str(caught.value))


def test_a_key_that_no_convention_names_is_the_templates_to_know(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=CHATML.replace(BODY, "{{ (m.mood or '') + m['content'] }}"))
    assert trained({"messages": [user("q"), says("x", mood="glad ")]}, tokenizer) == ["glad x<|im_end|>"]
    tokenizer = make_tokenizer(chat_template=CHATML.replace(BODY, "{{ m['content'] }}{% if m.loud %}!{% endif %}"))
    assert trained({"messages": [user("q"), says("x", loud=True)]}, tokenizer) == ["x!<|im_end|>"]


def test_content_that_the_template_skips_or_cuts_off_is_refused(make_tokenizer):
    """Some templates keep of an answer what follows </think>, also where all of it is to be learned."""
    skips = make_tokenizer(chat_template=CHATML.replace("in messages %}", "in messages if m.role != 'tool' %}"))
    with pytest.raises(DataError, match=r"does not show content of turn 3 \(tool\)"):
        trained({"messages": [user("q"), says("a"), HEARD, says("x")]}, skips)
    unread = {"messages": [user("q"), says("a"), HEARD]}  # what follows the last answer
    assert trained(unread, skips) == ["a<|im_end|>"]
    cuts = make_tokenizer(chat_template=CHATML.replace(BODY, "{{ m['content'].split('</think>')[-1] }}"))
    with pytest.raises(DataError, match=r"does not show content of turn 2 \(assistant\)"):
        trained({"messages": [user("q"), says("hm</think>x")]}, cuts)
    assert trained({"messages": [user("q"), says("x")]}, cuts) == ["x<|im_end|>"]


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("(c.function.arguments | tojson)", "c.function.arguments"),
        ("(c.function.arguments | tojson)", "(c.function.arguments | string)"),
        (BODY, "{% if 'content' in m %}{{ m.content }}{% else %}{{ 'none' }}{% endif %}"),
        (BODY + CALLS, "{% if 'content' in m %}{{ m.content }}{% else %}" + CALLS + "{% endif %}"),
        (BODY, "{% for part in m.content %}{{ part.text }}{% endfor %}"),
    ],
    ids=["concatenates text", "prints Python", "empty content", "no content", "parts"],
)
def test_a_chat_is_handed_over_in_the_form_the_template_takes(make_tokenizer, part, other):
    row = {"messages": [user("q"), says(None, tool_calls=[calls('{"day": 1, "no": null}')])], "tools": TOOLS}
    tokenizer = make_tokenizer(chat_template=WITH_TOOLS.replace(part, other))
    assert trained(row, tokenizer) == ['<call>weather {"day": 1, "no": null}</call><|im_end|>']


def test_turns_that_the_template_rewrites_are_trained_as_generation_sees_them(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=FORGETS)
    turns = [user("q1"), says("a1", reasoning_content="r1"), user("q2"), says("a2", reasoning_content="r2"), HEARD, says("a3")]  # fmt: skip
    chat = from_messages({"messages": turns}, "")
    encoded = encode(chat, tokenizer, max_length=WHOLE)
    found = texts(encoded, tokenizer)
    assert [learned for _, learned in found] == [
        "<think>r1</think>a1<|im_end|>",
        "<think>r2</think>a2<|im_end|><think></think>a3<|im_end|>",
    ]
    for (text, _), asked, upto in zip(found, (1, 3), (2, 6), strict=True):  # what generation would have started from
        assert text == tokenizer.apply_chat_template(turns[:upto], tokenize=False)
        assert text.startswith(tokenizer.apply_chat_template(turns[:asked], tokenize=False, add_generation_prompt=True))
    rows, counts = encode_split([chat, Example(prompt="p", answer="a"), chat], tokenizer, "generate", max_length=WHOLE)
    assert [row["labels"] for row in rows[:2]] == [one.labels for one in encoded]
    assert (counts.rows, list(counts.examples)) == (5, [0, 0, 1, 2, 2])


def test_a_turn_without_weight_is_read_and_not_learned(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=CHATML)
    turns = [user("q1"), says("bad", weight=0), user("q2"), says("good"), user("q3"), says("worse", weight=0)]
    row = {"messages": turns}
    (encoded,) = encode(from_messages(row, ""), tokenizer, max_length=WHOLE)
    plain = [{key: turn[key] for key in ("role", "content")} for turn in turns]
    # What follows the last trained turn cannot be learned from.
    assert texts([encoded], tokenizer) == [(tokenizer.apply_chat_template(plain[:4], tokenize=False), "good<|im_end|>")]
    (whole,) = encode(from_messages(row, ""), tokenizer, max_length=WHOLE, train_on="all")
    text, learned = texts([whole], tokenizer)[0]
    assert text == tokenizer.apply_chat_template(plain, tokenize=False)
    assert learned == text[len("<|im_start|>") :].replace("bad<|im_end|>\n", "").replace("worse<|im_end|>\n", "")
    prompt = tokenizer.decode(encode_prompt(from_messages(row, ""), tokenizer, max_length=WHOLE))
    assert prompt.endswith("q2<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(DataError, match=r"turn 2, which has weight 0.*data\.train_on=answer"):
        trained(row, make_tokenizer(chat_template=FORGETS), train_on="all")


def test_what_the_template_marks_as_generated_is_what_is_trained(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=MARKED)
    turns = [user("q1"), says("a1"), user("q2"), says("a2")]
    (encoded,) = encode(from_messages({"messages": turns}, ""), tokenizer, max_length=WHOLE)
    written = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded.input_ids == written["input_ids"]
    assert [label != IGNORE for label in encoded.labels] == [bool(mark) for mark in written["assistant_masks"]]
    begins = "{% if m.role == 'assistant' %}{% generation %}"
    wide = MARKED.replace(HEADER + begins, begins + HEADER).replace("{% else %}", "{% else %}" + HEADER)
    # What the prompt has said is not the model's to say, though it is marked.
    assert trained({"messages": turns}, make_tokenizer(chat_template=wide)) == ["a1<|im_end|>a2<|im_end|>"]
    half = make_tokenizer(chat_template=MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last"))
    assert trained({"messages": turns[:2]}, half) == ["a1<|im_end|>"]
    nothing = make_tokenizer(chat_template=MARKED.replace("m.role == 'assistant'", "m.role == 'nobody'"))
    with pytest.raises(DataError, match="marks what is generated, but nothing of turn 2"):
        trained({"messages": turns}, nothing)


def test_an_answer_that_begins_otherwise_than_its_prompt_is_refused_with_the_remedy(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=OPENS)
    row = {"messages": [user("q"), says("a")]}
    with pytest.raises(
        DataError, match=r"start from '<think>\\n', but the turn reads 'a<\|im_end\|>.*enable_thinking=false"
    ):
        trained(row, tokenizer)
    assert trained({**row, "chat_template_kwargs": {"enable_thinking": False}}, tokenizer) == ["a<|im_end|>"]
    assert trained({"messages": [user("q"), says("a", reasoning="r")]}, tokenizer) == ["r</think>a<|im_end|>"]
    assert trained({"messages": [user("q"), says("<think>\nr</think>a")]}, tokenizer) == ["r</think>a<|im_end|>"]


@pytest.mark.parametrize("end", [[], [{"role": "assistant", "content": ""}]])
def test_a_chat_that_ends_with_a_question_is_continued_as_it_stands(make_tokenizer, end):
    """What a server is asked; a template that takes no empty turn is not shown one."""
    tokenizer = make_tokenizer(
        chat_template=CHATML.replace(BODY, "{{ m.content if m.content else raise_exception('empty') }}")
    )
    asked = [user("q1"), says("a1"), user("q2")]
    ids = encode_prompt(Example(messages=(*asked, *end)), tokenizer, max_length=WHOLE)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    skips = make_tokenizer(chat_template=CHATML.replace(BODY, "{{ m.content if m.role != 'user' or not loop.last }}"))
    with pytest.raises(DataError, match=r"does not show content of turn 3 \(user\)"):
        encode_prompt(Example(messages=(*asked, *end)), skips, max_length=WHOLE)


def test_a_chat_that_begins_with_the_assistant_needs_a_prompt_or_no_weight(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=CHATML)
    turns = [says("Welcome."), user("q"), says("a")]
    with pytest.raises(DataError, match=r'begins with the assistant.*"weight": 0'):
        trained({"messages": turns}, tokenizer)
    assert trained({"messages": [{**turns[0], "weight": 0}, *turns[1:]]}, tokenizer) == ["a<|im_end|>"]


def test_a_turn_without_an_end_mark_is_closed_once_and_a_special_token_inside_ends_none(make_tokenizer):
    """Only the mark that ends a turn does; what stands behind another is learned as well."""
    tokenizer = make_tokenizer(chat_template="{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
                                             "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")  # fmt: skip
    turns = [user("q"), says("first"), user("q"), says("a<|im_end|>b")]
    assert trained({"messages": turns}, tokenizer) == ["first\na<|im_end|>b\n</s>"]


def test_the_rows_that_cannot_be_trained_on_are_named_together(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=CHATML)
    # One without a fault, 28 with the same one, 30 with one each.
    keys = [{}, *[{"mood": "x"}] * 28, *({f"key{line}": "x"} for line in range(30))]
    rows = [from_messages({"messages": [user("q"), says("a", **key)]}, f"c.jsonl:{n}") for n, key in enumerate(keys, 1)]
    with pytest.raises(DataError, match=r"58 of 59 rows cannot be trained on:\nc\.jsonl:2: ") as caught:
        encode_split(rows, tokenizer, "generate", max_length=99)
    lines = str(caught.value).splitlines()
    assert lines[2] == "  and so c.jsonl:3, c.jsonl:4, c.jsonl:5, c.jsonl:6, c.jsonl:7, ..."
    assert len(lines) == 1 + 2 + 19 + 1  # the first reason has two lines, nineteen others follow, and there are more
    assert lines[-2].startswith("c.jsonl:48: ")
    assert lines[-1] == "..."


def test_what_the_model_is_to_write_is_what_it_is_scored_against(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=WITH_TOOLS)
    row = {"messages": [user("q"), says("", tool_calls=[calls({"a": 1})])], "tools": TOOLS}
    assert with_written_answer(from_messages(row, ""), tokenizer).references == ('<call>weather {"a": 1}</call>',)
    plain = from_messages({"messages": [user("q"), says(" a ")]}, "")
    assert with_written_answer(plain, tokenizer) is plain
    text = Example(prompt="p", answer="a", references=("a", "b"))
    assert with_written_answer(text, tokenizer) is text


# -- templates of released models, as TRL keeps them ------------------------------------------------------------------

CHATS = {
    "one turn": {"messages": [user("Hi"), says("Hello!")]},
    "two turns": {"messages": [user("Hi"), says("Hello!"), user("1+1?"), says("Two.")]},
    "reasoning": {"messages": [user("Hi"), says("Hello!", reasoning_content="They greet."),
                               user("1+1?"), says("Two.", reasoning_content="A sum.")]},
    "tools": {"messages": [user("Paris?"), says(None, tool_calls=[calls('{"city": "Paris"}')]), HEARD, says("Sunny there.")],
              "tools": TOOLS},
    "without weight": {"messages": [user("Hi"), says("Hello!", weight=0), user("1+1?"), says("Two.")]},
}  # fmt: skip
# Their prompts open a thought that a plain answer does not close.
WANT_A_THOUGHT = {
    "deepseek_r1_distill",
    "deepseekv3",
    *(f"nemotron_3_{name}" for name in ("5_lightning", "nano", "super", "ultra")),
}

TAKE_PARTS = {"idefics3", "smolvlm", "llava_next"}


# One of each family; DUALLORA_SLOW=1 takes all.
SOME = {
    "cohere2_training", "deepseek_r1_distill", "deepseek_r1_distill_training", "gemma3_training", "gemma4_v5",
    "glm4moe_training", "gptoss", "gptoss_training", "idefics3", "lfm2_2_5",
    "lfm2_v2", "llama3_1", "llava_next", "muse_glimmer", "nemotron_3_nano",
    "nemotron_3_nano_training", "phi3", "qwen2_5_training", "qwen3", "qwen3_training",
    "qwen3_5_think", "qwen3_5_nothink", "qwen3_8", "smolvlm_training",
}  # fmt: skip


def released() -> list[Path]:
    trl = pytest.importorskip("trl")
    paths = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    return paths if os.environ.get("DUALLORA_SLOW") else [path for path in paths if path.stem in SOME]


def test_templates_of_released_models_train_what_they_write_or_refuse(make_tokenizer):
    """Of each, five chats: what is read is what transformers renders, what is learned is what the assistant says."""
    paths = released()
    if not paths:
        pytest.skip("this release of TRL keeps no templates")
    learned = refused = 0
    for path in paths:
        template = path.read_text()
        tokenizer = make_tokenizer(chat_template=template)
        marks = sorted(set(re.findall(r"<[^\s\w'\"]?[^\W\d]+[^\s\w'\"]?>", template)) - {"<think>", "<tool_call>"})
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        for name, row in CHATS.items():
            example = from_messages(row, f"{path.stem}, {name}")
            try:
                encoded = encode(example, tokenizer, max_length=WHOLE)
            except DataError as error:
                if path.stem not in WANT_A_THOUGHT and name not in ("reasoning", "tools"):
                    raise
                refused += f"{path.stem}, {name}: the chat template" in str(error)
                continue
            learned += 1
            found = texts(encoded, tokenizer)
            turns = [{key: value for key, value in turn.items() if key != "weight"} for turn in row["messages"]]
            for turn in turns:
                if "reasoning_content" in turn:  # transformers gives it this name, too, from its fifth version on
                    turn["thinking"] = turn["reasoning_content"]
                for one in turn.get("tool_calls", ()):
                    turn |= {"content": turn["content"] or "", "tool_calls": [calls(json.loads(one["function"]["arguments"]))]}  # fmt: skip
            if path.stem.removesuffix("_training") in TAKE_PARTS:
                turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
            render = partial(tokenizer.apply_chat_template, tools=row.get("tools"))
            written = {render(turns[: end + 1], tokenize=False) for end in range(1, len(turns))}
            assert {text.removesuffix("</s>") for text, _ in found} <= {text.removesuffix("</s>") for text in written}
            said = "".join(text for _, text in found)
            for turn in example.messages:
                weighs = turn["role"] == "assistant" and not (name == "without weight" and turn["content"] == "Hello!")
                for text in (turn["content"], turn.get("reasoning_content")):
                    assert not text or (text in said) == weighs, (path.stem, name, text)
            assert ("Paris" in said) == (name == "tools")
            if "generation %}" in template and len(found) == 1 and name != "without weight":
                marked = render(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
                theirs = [bool(mark) for mark in marked["assistant_masks"]]
                assert encoded[0].input_ids[: len(theirs)] == marked["input_ids"]
                asked = set()  # what stands in a prompt is never generated, though some templates mark it
                for end in range(1, len(turns)):
                    starts = (render(turns[:end], tokenize=False, add_generation_prompt=asks) for asks in (False, True))
                    asked |= {*range(*(len(tokenizer(text)["input_ids"]) for text in starts))}
                for at, (token, label, their) in enumerate(
                    zip(marked["input_ids"], encoded[0].labels, theirs, strict=False)
                ):
                    mine = label != IGNORE
                    assert mine == their or at in asked or tokenizer.decode([token]) == "\n", (path.stem, name, at)
    assert learned > 1.5 * refused > 0
    assert learned + refused == len(CHATS) * len(paths)


@pytest.mark.pretrained
def test_smollm2s_own_template_and_tokens(pretrained_packages):
    from duallora.store.models import load_tokenizer

    tokenizer = load_tokenizer("builtin:smollm2-135m")
    turns = [
        user("Où?\n\n 1+1"),
        says("Here \u2013 \u2018now\u2019.\n\n"),
        user(" and\tthen? "),
        says("Nothing, naïve."),
    ]
    (encoded,) = encode(from_messages({"messages": turns}, ""), tokenizer, max_length=WHOLE)
    assert encoded.input_ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert texts([encoded], tokenizer)[0][1] == "".join(f"{turn['content']}<|im_end|>" for turn in turns[1::2])
    # A prompt ends where it ends: the line break before an answer that begins with space is not joined to that space.
    (encoded,) = encode(from_messages({"messages": [user("q"), says("  a")]}, ""), tokenizer, max_length=WHOLE)
    prompt = tokenizer.apply_chat_template([user("q")], tokenize=True, return_dict=True, add_generation_prompt=True)
    assert encoded.input_ids[: len(prompt["input_ids"])] == prompt["input_ids"]
    with pytest.raises(DataError, match="does not show tool_calls of turn 2"):
        trained({"messages": [user("q"), says("", tool_calls=[calls({})])], "tools": TOOLS}, tokenizer)

"""Chats as files write them, in the conventions of OpenAI, TRL, axolotl and ShareGPT, brought to one form.

That form is the one transformers' chat templates read: messages with "role" and "content"; "tool_calls" whose arguments
are objects; "reasoning_content"; ``"weight": 0`` for an assistant turn without loss. Keys that no convention names stay
as they are: whether the model's template reads them is known only where it is at hand (`duallora.tasks.template`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence, Set
from typing import Any

from duallora.tasks.example import BadRow, Example
from duallora.tasks.text import absent, parse_json, shown

ROLES = ("system", "user", "assistant", "tool", "developer")
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
            "tool": "tool", "observation": "tool"}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "train", "training")  # OpenAI's; axolotl's
COLUMNS = ("tools", "functions", "documents", "chat_template_kwargs", "parallel_tool_calls", "system")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")

# Arguments of transformers' apply_chat_template: a row may not set them by chat_template_kwargs.
_RESERVED = {
    "conversation", "messages", "chat_template", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip

_NONE: frozenset[str] = frozenset()


def trained(message: Mapping[str, Any]) -> bool:
    """Whether the loss is on this turn."""
    return message["role"] == "assistant" and message.get("weight") != 0


def last_trained(messages: Sequence[Mapping[str, Any]]) -> int | None:
    """The place of the last turn that the loss is on."""
    return next((at for at in reversed(range(len(messages))) if trained(messages[at])), None)


def calls_tools(example: Example) -> bool:
    """Whether the answer is a call of tools."""
    last = last_trained(example.messages)
    return last is not None and "tool_calls" in example.messages[last]


def from_messages(
    row: Mapping[str, Any], where: str, *, ignore: Set[str] = _NONE, options: Mapping[str, Any] | None = None
) -> Example:
    """A row with "messages" (or ShareGPT's "conversations"); keys in ``ignore`` are left out of the messages, and the
    row's own chat_template_kwargs go over ``options``. Raises BadRow."""
    column = "conversations" if row.get("messages") is None and row.get("conversations") is not None else "messages"
    return _example(_turns(row, column, ignore), row, where, column, options)


def from_prompt_completion(
    row: Mapping[str, Any], where: str, *, ignore: Set[str] = _NONE, options: Mapping[str, Any] | None = None
) -> Example:
    """TRL's form of a chat: the loss is on the assistant's turns of the completion alone. Otherwise as `from_messages`."""
    prompt = [{"weight": 0, **turn} if turn["role"] == "assistant" else turn for turn in _turns(row, "prompt", ignore)]
    return _example([*prompt, *_turns(row, "completion", ignore)], row, where, "completion", options)


def question(
    row: Mapping[str, Any],
    where: str,
    column: str = "",
    *,
    ignore: Set[str] = _NONE,
    options: Mapping[str, Any] | None = None,
) -> Example:
    """A chat to be gone on with, in ``column`` or where `from_messages` finds it; a last turn of the assistant is left out."""
    column = column or ("messages" if row.get("messages") is not None else "conversations")
    messages = _parsed(row, column)
    answered = isinstance(messages, list) and bool(messages) and _is_answer(messages[-1])
    if answered and len(messages) > 1:  # it may be empty: it is not looked at
        row = {**row, column: messages[:-1]}
    turns = _turns(row, column, ignore)
    if answered and len(messages) == 1:
        raise BadRow("nothing is asked: the chat is a turn of the assistant alone", column)
    silent = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in turns]
    return _example(silent, row, where, column, options, answered=False)


def reserved(options: Mapping[str, Any]) -> list[str]:
    """Those of chat_template_kwargs that are not the template's to know."""
    return sorted(_RESERVED & set(options))


def _example(
    turns: list[dict[str, Any]],
    row: Mapping[str, Any],
    where: str,
    column: str,
    options: Mapping[str, Any] | None,
    *,
    answered: bool = True,
) -> Example:
    for media in MEDIA:
        if not absent(row.get(media)):
            raise BadRow("only text can be trained on here", media)
    if not absent(system := row.get("system")):
        if not isinstance(system, str):
            raise BadRow(f"expected text, got {shown(system)}", "system")
        if turns[0]["role"] == "system":
            raise BadRow(f"the row has a system prompt here and in {column}[0]: keep one", "system")
        turns = [{"role": "system", "content": system}, *turns]
    if (last := last_trained(turns)) is None and answered:
        said = any(turn["role"] == "assistant" for turn in turns)
        what = "every assistant turn has weight 0" if said else "no assistant turn"
        raise BadRow(f"{what}, so there is nothing to train on", column)
    turns = [{key: value for key, value in turn.items() if key != "weight" or value == 0} for turn in turns]
    given = {**(options or {}), **_options(row)}
    references = () if last is None else (turns[last]["content"],)
    return Example(messages=tuple(turns), options=given, references=references, where=where)


def _options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the template is given beside the messages."""
    options: dict[str, Any] = {}
    tools, functions = (_objects(row, column) for column in ("tools", "functions"))
    if tools and functions:
        raise BadRow("the row has tools, too, which is the newer name: keep one", "functions")
    if tools or functions:  # OpenAI's older form, and many data sets, leave the wrapping out
        options["tools"] = [
            tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
            for tool in tools or functions
        ]
    if documents := _objects(row, "documents"):
        options["documents"] = documents
    if row.get("parallel_tool_calls") is not None:
        options["parallel_tool_calls"] = row["parallel_tool_calls"]
    if not absent(more := _parsed(row, "chat_template_kwargs")):
        if not isinstance(more, Mapping):
            raise BadRow(f"expected an object, got {shown(more)}", "chat_template_kwargs")
        if taken := reserved(more):
            raise BadRow(f"{taken[0]} is not the template's to know", "chat_template_kwargs")
        options |= {key: value for key, value in more.items() if value is not None}
    return options


def _objects(row: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    value = _parsed(row, column)
    if absent(value):
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise BadRow(f"expected a list of objects, got {shown(value)}", column)
    return value


def _parsed(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column; text (a CSV cell, or TRL's way with tools) is read as JSON."""
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        try:
            return parse_json(value)
        except ValueError as error:
            raise BadRow(f"expected a JSON list{' of messages' * (column not in COLUMNS)} ({error})", column) from None
    return value


def _is_answer(message: Any) -> bool:
    """Whether a message, in either convention, is a turn of the assistant."""
    if not isinstance(message, dict):
        return False
    role = message.get("role", message.get("from"))
    return role == "assistant" or ("role" not in message and role == "gpt")


def _turns(row: Mapping[str, Any], column: str, ignore: Set[str]) -> list[dict[str, Any]]:
    messages = _parsed(row, column)
    if messages is None:
        raise BadRow("missing field", column)
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"expected a list of at least one message, got {shown(messages)}", column)
    return [_turn(message, f"{column}[{index}]", ignore) for index, message in enumerate(messages)]


def _turn(message: Any, at: str, ignore: Set[str]) -> dict[str, Any]:
    """One message, brought to the form above; ``at`` names it: messages[2]."""
    if not isinstance(message, dict):
        raise BadRow(f'expected {{"role", "content"}}, got {shown(message)}', at)
    more = {key: value for key, value in message.items() if key not in ignore}
    if "role" not in more and "from" in more:
        role, content, value = _sharegpt_role(more.pop("from"), at), more.pop("content", None), more.pop("value", None)
        if None not in (content, value) and content != value:
            raise BadRow("value and content name the same thing and differ: keep one", at)
        content = content if value is None else value
    else:
        role, content = more.pop("role", None), more.pop("content", None)
    if role == "function":  # OpenAI's older name for the answer of a tool
        role = "tool"
    if role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadRow(f"unknown role {role!r}; expected one of {', '.join(ROLES)}{hint}", f"{at}.role")
    key, weight = _one_of(more, WEIGHTS, at)
    if weight not in (0, 1, None):
        raise BadRow(f"expected 0 or 1 (false or true), got {shown(weight)}", f"{at}.{key}")
    if weight == 1 and role != "assistant":
        raise BadRow(f"only what the assistant says can be trained on, not a turn of {role}", f"{at}.{key}")
    more = {key: value for key, value in more.items() if not absent(value)}
    calls = _tool_calls(more, role, at)
    key, reasoning = _one_of(more, REASONING, at)
    if not isinstance(reasoning, str | None):
        raise BadRow(f"expected text, got {shown(reasoning)}", f"{at}.{key}")
    if reasoning and role != "assistant":
        raise BadRow(f"only the assistant has {key}, not {role}", f"{at}.{key}")
    if content is None and (calls or reasoning):
        content = ""
    content = _content(content, at)
    if role == "assistant" and weight != 0 and not (content.strip() or calls or reasoning):
        raise BadRow("empty answer", f"{at}.content")
    turn = {"role": role, "content": content, **more}
    if reasoning:
        turn["reasoning_content"] = reasoning
    if calls:
        turn["tool_calls"] = calls
    if weight is not None and role == "assistant":
        turn["weight"] = int(weight)
    return turn


def _sharegpt_role(name: Any, at: str) -> str:
    if not isinstance(name, str) or name not in SHAREGPT:
        raise BadRow(f"unknown speaker {name!r}; expected one of {', '.join(SHAREGPT)}", f"{at}.from")
    return SHAREGPT[name]


def _one_of(more: dict[str, Any], names: Sequence[str], at: str) -> tuple[str, Any]:
    """The name and value of a field that has several names, taken out of ``more``; None where it is absent."""
    found = {key: more.pop(key) for key in names if key in more}
    found = {key: value for key, value in found.items() if not absent(value)}
    key, first = next(iter(found.items()), ("", None))
    if any(value != first for value in found.values()):
        raise BadRow(f"{' and '.join(found)} name the same thing and differ: keep one", at)
    return key, first


def _content(content: Any, at: str) -> str:
    if isinstance(content, list) and content:
        return "".join(_part(part, f"{at}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise BadRow(f"expected text, got {shown(content)}", f"{at}.content")
    return content


def _part(part: Any, at: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadRow(f'expected {{"type": "text", "text"}}, got {shown(part)}', at)
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") != "text" or not isinstance(part.get("text"), str) or len(part) > 2:
        kind = part.get("type") if part.get("type") != "text" else f"text with {', '.join(part)}"
        raise BadRow(f"a part of the type {kind!r}: only parts of text can be trained on here", at)
    return part["text"]


def _tool_calls(more: dict[str, Any], role: str, at: str) -> list[dict[str, Any]]:
    """The calls with their arguments as objects, taken out of ``more``."""
    calls = more.pop("tool_calls", None)
    if "function_call" in more:  # OpenAI's older form: one call, without an id
        if calls:
            raise BadRow("the message has tool_calls, too, which is the newer name: keep one", f"{at}.function_call")
        calls = [{"type": "function", "function": more.pop("function_call")}]
    if not calls:
        return []
    if role != "assistant":
        raise BadRow(f"only the assistant calls tools, not {role}", f"{at}.tool_calls")
    if isinstance(calls, str):
        calls = _parsed({"tool_calls": calls}, "tool_calls")
    if not isinstance(calls, list):
        raise BadRow(f"expected a list of calls, got {shown(calls)}", f"{at}.tool_calls")
    return [_tool_call(call, f"{at}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: Any, at: str) -> dict[str, Any]:
    if isinstance(call, dict) and "function" not in call and "name" in call:
        call = {"function": call}
    call = {"type": "function", **call} if isinstance(call, dict) else call
    if not isinstance(call, dict) or call["type"] != "function" or not isinstance(call.get("function"), dict):
        raise BadRow(f'expected {{"type": "function", "function": {{"name", "arguments"}}}}, got {shown(call)}', at)
    function = {key: value for key, value in call["function"].items() if value is not None}
    arguments = function.pop("arguments", {})
    name = function.pop("name", None)
    if not isinstance(name, str) or not name:
        raise BadRow(f"expected the name of a tool, got {shown(name)}", f"{at}.function.name")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else {}
        except ValueError:
            raise BadRow(f"expected a JSON object, got {shown(arguments)}", f"{at}.function.arguments") from None
    if not isinstance(arguments, dict):
        raise BadRow(f"expected an object, got {shown(arguments)}", f"{at}.function.arguments")
    unknown = [*function, *(key for key in call if key not in ("type", "function", "id", "index"))]
    if unknown and not absent((function | call)[unknown[0]]):
        raise BadRow(f"unknown key {unknown[0]}; expected name, arguments and an id", at)
    kept = {key: call[key] for key in ("type", "id") if not absent(call.get(key))}
    return {**kept, "function": {"name": name, "arguments": arguments}}

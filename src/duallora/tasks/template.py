"""A chat as the tokenizer's own template writes it: which of the text the loss is on, and that nothing of it is lost.

* The trained text of a turn is what the template marks with ``{% generation %}`` or, where it marks nothing, what the
  turn adds to the prompt that generation starts from (the turns before it and the generation prompt).
* Some templates rewrite earlier turns: they show reasoning in the last one alone, say. A turn whose text does not
  continue the sequence so far begins a sequence of its own, so that each is trained after what generation will see.
* What a template does not read it drops in silence. The first chat of each shape is therefore rendered once more with a
  sign in every field, and what does not show is an error.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from duallora.errors import DataError, IntegrityError
from duallora.tasks.chats import REASONING, last_trained, trained
from duallora.tasks.example import Example

Messages = Sequence[Mapping[str, Any]]
T = TypeVar("T")


SECONDS = 2.0  # of the processor, for one rendering; those in use need milliseconds
MEMORY = 1 << 30  # bytes beyond what the process holds


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raises TimeoutError or MemoryError where a stranger's template renders without end.

    Only where the system has such limits, and in the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread() or not Path("/proc/self/statm").exists():
        yield
        return
    import resource

    began = time.thread_time()

    def stop(*_: Any) -> None:
        left = SECONDS - (time.thread_time() - began)
        if left <= 0:
            raise TimeoutError
        signal.setitimer(signal.ITIMER_VIRTUAL, max(left, 1e-3))  # it counts the time of all threads

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = [limit for limit in (held + MEMORY, soft, hard) if limit != resource.RLIM_INFINITY]
    with contextlib.ExitStack() as after:  # all of it, also where the time ends in the midst of it
        after.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
        after.callback(signal.signal, signal.SIGVTALRM, signal.signal(signal.SIGVTALRM, stop) or signal.SIG_DFL)
        after.callback(signal.setitimer, signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield


class Segment(NamedTuple):
    """A piece of a row's text. ``answer``: the model is to say it; ``muted``: no loss may be on it, in no mode."""

    text: str
    answer: bool
    muted: bool = False


class _Form(NamedTuple):
    """How a chat is handed over, since templates differ in what they take.

    A call's arguments are JSON text instead of an object; a turn that only calls tools has no content instead of an
    empty one; content is a list of parts instead of text.
    """

    json_arguments: bool = False
    no_content: bool = False
    parts: bool = False


class _Sign(NamedTuple):
    """A mark set behind one text of a chat, to see whether the template shows it."""

    sign: str
    text: str
    key: str
    place: str


_SAID = ("content", "reasoning_content", "tool_calls")
_LINKS = {"tool_call_id"}  # tie turns together; most templates go by the order of turns
_OWN = {"role", "content", "weight", "tool_calls", "reasoning_content", *_LINKS}  # all other keys are free ones
_SIGNED_OPTIONS = ("tools", "documents")
_SILENT_OPTIONS = {"parallel_tool_calls"}  # a wish to OpenAI's server; a template that knows it gets it

_forms: dict[tuple[Any, ...], _Form] = {}  # by template and shape of chat
_FORMS_KEPT = 4096


def sequences(example: Example, tokenizer: Any) -> list[list[Segment]]:
    """The sequences to train on where the loss is on the answers: one, or several where the template rewrites turns.

    Each ends with a trained turn, if there is one. Raises DataError where the template refuses the chat, leaves out part
    of it, or cannot say which text is the assistant's.
    """
    chat = _Chat(example, tokenizer)
    found: list[list[Segment]] = []
    rendered, at = "", 0  # the text of the sequence so far, and up to where it is in segments
    for index, message in enumerate(example.messages):
        if not trained(message):
            continue
        text, spans = chat.answer(index)
        if not found or not text.startswith(rendered) or spans[0][0] < len(rendered):
            _close(found, rendered[at:])
            found.append([])
            at = 0
        for start, end in spans:
            found[-1] += [Segment(text[at:start], False), Segment(text[start:end], True)]
            at = end
        rendered = text
    _close(found, rendered[at:])
    return found or [[Segment(chat.text(len(example.messages)), False)]]


def whole(example: Example, tokenizer: Any) -> list[Segment]:
    """The whole chat as one sequence, for a loss on every token but those of turns with weight 0.

    Raises DataError as `sequences` does, and where a turn with weight 0 cannot be told apart.
    """
    chat = _Chat(example, tokenizer, whole=True)
    full = chat.text(len(example.messages))
    segments: list[Segment] = []
    at = 0
    for index, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        muted = not trained(message)
        if not muted and (lost := chat.unsaid(full, index)):
            chat.refuse_loss(lost)
        before = chat.text(index, generation=True) if index else ""
        after = chat.text(index + 1)
        if index and full.startswith(after) and after.startswith(before) and len(before) >= at:
            segments += [Segment(full[at : len(before)], False), Segment(after[len(before) :], True, muted)]
            at = len(after)
        elif muted:
            raise DataError(
                f"{chat.where}: the chat template of {chat.name} does not let turn {index + 1}, which has weight 0, be told "
                "apart from the others. Use data.train_on=answer, where it is context alone, or leave the turn out."
            )
    return [*segments, Segment(full[at:], False)] if full[at:] else segments


def prompt(example: Example, tokenizer: Any) -> str:
    """What the model continues in generation: everything before the last answer or, where no answer is known, all of it."""
    messages = example.messages
    said = messages[-1]["role"] != "assistant" or any(messages[-1].get(key) for key in _SAID)
    if not said and len(messages) > 1:  # it stands for the answer to come
        messages, last = messages[:-1], None
    else:
        last = last_trained(messages) if example.references or messages[-1]["role"] == "assistant" else None
    chat = _Chat(replace(example, messages=messages), tokenizer, whole=last is None)
    return chat.text(len(messages) if last is None else last, generation=True)


def answer(example: Example, tokenizer: Any) -> str:
    """The text of the last trained turn."""
    last = last_trained(example.messages)
    if last is None:
        return ""
    text, spans = _Chat(example, tokenizer).answer(last)
    return "".join(text[start:end] for start, end in spans)


def _close(found: list[list[Segment]], rest: str) -> None:
    if found and rest:
        found[-1].append(Segment(rest, False))


class _Chat:
    """An example's turns, as the template writes the first so many of them.

    ``whole``: all turns count; else those up to the last trained one, since nothing is learned from what follows it.
    """

    def __init__(self, example: Example, tokenizer: Any, *, whole: bool = False) -> None:
        self.tokenizer, self.messages, self.options = tokenizer, example.messages, example.options
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        self.where = example.where or "a row"
        if not tokenizer.chat_template:
            raise DataError(
                f"{self.where}: chat rows (messages) need a chat template, and {self.name} has none. "
                "Use an instruction-tuned model, or prompt-completion rows."
            )
        self.template = tokenizer.get_chat_template(tools=self.options.get("tools"))
        self.marks = bool(re.search(r"\{%[-+]?\s*generation\b", self.template))
        last = last_trained(self.messages)
        self.form = self._form(self.messages if whole or last is None else self.messages[: last + 1], whole)

    def text(self, count: int, *, generation: bool = False) -> str:
        """The first ``count`` turns and, where ``generation``, the prompt for another one."""
        return self._render(self.messages[:count], self.form, generation=generation)

    def answer(self, index: int) -> tuple[str, list[tuple[int, int]]]:
        """The turns up to ``index``, and where in that text is what the assistant says in this one."""
        if not index:
            raise DataError(
                f"{self.where}: the chat begins with the assistant, so no prompt leads to its first turn. Put a turn of "
                'user or system before it, or give it "weight": 0, which makes it context.'
            )
        before = self.text(index, generation=True)
        if not self.marks:
            after = self.text(index + 1)
            if not after.startswith(before):
                self._refuse_prompt(before, after, index)
            spans = [(len(before), len(after))]
        else:
            after, marked = self._marked(index + 1)
            common = _common(before, after)
            prompted = common if common == len(before) else 0  # generation begins behind the prompt
            spans = [(max(start, prompted), end) for start, end in marked if end > common]
            if not spans:
                raise DataError(
                    f"{self.where}: the chat template of {self.name} marks what is generated, but nothing of turn {index + 1}. "
                    'Give the turn "weight": 0, or use a template that marks it.'
                )
        said = "".join(after[start:end] for start, end in spans)
        if self.unsaid(said, index):  # the prompt may say the first of it, such as <think>
            start = _common(self.text(index), after)
            if lost := self.unsaid(after[start : spans[0][0]] + said, index):
                self.refuse_loss(lost)
        return after, spans

    def unsaid(self, text: str, index: int) -> list[tuple[str, str]]:
        """What ``text`` lacks of what the assistant says in this turn: (key, place)."""
        message = self.messages[index]
        said = {key: message.get(key, "") for key in ("content", "reasoning_content")}
        said |= {"tool_calls": "".join(call["function"]["name"] for call in message.get("tool_calls", ())[:1])}
        return [(key, self._place(index)) for key, value in said.items() if not _shows(text, value)]

    def _marked(self, count: int) -> tuple[str, list[tuple[int, int]]]:
        """The first ``count`` turns, and the stretches that the template marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = self.messages[:count]
        found: Any = self._safely(
            lambda: render_jinja_template(
                conversations=[_dressed(messages, self.form)],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.options},
            ),
            messages,
        )
        (text,), (spans,) = found
        return text, sorted((start, end) for start, end in spans if start < end)

    def _render(
        self, messages: Messages, form: _Form, options: Mapping[str, Any] | None = None, *, generation: bool = False
    ) -> str:
        return self._safely(
            lambda: self.tokenizer.apply_chat_template(
                _dressed(messages, form),
                tokenize=False,
                add_generation_prompt=generation,
                **(self.options if options is None else options),
            ),
            messages,
        )

    def _safely(self, render: Callable[[], T], messages: Messages) -> T:
        try:
            with _bounded():
                return render()
        except (MemoryError, TimeoutError) as error:
            raise IntegrityError(
                f"{self.where}: the chat template of {self.name} needs more than {SECONDS:g} s or {MEMORY >> 20} MiB for one "
                "chat; do not use this template"
            ) from error
        except Exception as error:  # whatever its Jinja code raises; the row is what the user can mend
            roles = " ".join(message["role"] for message in messages)
            raise DataError(
                f"{self.where}: the chat template of {self.name} refuses this chat (roles: {roles}): {error}"
            ) from error

    def _form(self, messages: Messages, whole: bool) -> _Form:
        """The first form that the template takes and shows all of."""
        shape = tuple((message["role"], bool(message["content"]), *sorted(message)) for message in messages)
        weights = tuple(message.get("weight") for message in messages)
        key = (self.template, shape, weights, tuple(sorted(self.options)), whole)
        if key in _forms:
            return _forms[key]
        refusal: DataError | None = None
        least: list[tuple[str, str]] | None = None
        for form in _possible_forms(messages):
            try:
                lost = self._lost(messages, form, whole)
            except DataError as error:
                refusal = refusal or error
                continue
            if not lost:
                if len(_forms) >= _FORMS_KEPT:
                    _forms.clear()
                _forms[key] = form
                return form
            least = lost if least is None or len(lost) < len(least) else least
        if least:
            self.refuse_loss(least)
        assert refusal is not None
        raise refusal

    def _lost(self, messages: Messages, form: _Form, whole: bool) -> list[tuple[str, str]]:
        """(key, place) of all that the template does not show of the chat. Raises DataError where it refuses it."""
        ends = [] if whole else [at + 1 for at, one in enumerate(messages[:-1]) if one["role"] == "assistant"]
        ends.append(len(messages))
        signed, options, signs = self._signed(messages)
        try:
            shown = "\0".join(self._render(signed[:end], form, options) for end in ends)
        except DataError:  # some look at the text itself; then what it says must show, if not the sign behind it
            shown = "\0".join(self._render(messages[:end], form) for end in ends)
            lost = [(sign.key, sign.place) for sign in signs if not _shows(shown, sign.text)]
        else:
            lost = [(sign.key, sign.place) for sign in signs if not _well_shown(shown, sign)]
        for option in set(self.options) - {*_SIGNED_OPTIONS, *_SILENT_OPTIONS}:
            if not re.search(rf"\b{re.escape(option)}\b", self.template):
                lost.append((option, "chat_template_kwargs"))
        for index, message in enumerate(messages):
            for name in _free_keys(message):
                if not isinstance(message[name], str):
                    without = [*messages]
                    without[index] = {key: value for key, value in message.items() if key != name}
                    if all(self._render(messages[:end], form) == self._render(without[:end], form) for end in ends):
                        lost.append((name, self._place(index)))
        return list(dict.fromkeys(lost))

    def _signed(self, messages: Messages) -> tuple[list[dict[str, Any]], dict[str, Any], list[_Sign]]:
        """The chat and its options with a sign behind every text that says something."""
        signs: list[_Sign] = []

        def sign(text: str, key: str, place: str) -> str:
            signs.append(_Sign(f"zq{len(signs)}qz", text, key, place))
            return text + signs[-1].sign

        signed = []
        for index, message in enumerate(messages):
            place = self._place(index)
            texts = [key for key in ("content", "reasoning_content", *_free_keys(message)) if message.get(key)]
            own: dict[str, Any] = {
                key: sign(message[key], key, place) for key in texts if isinstance(message[key], str)
            }
            if calls := message.get("tool_calls"):
                own["tool_calls"] = []
                for call in calls:
                    name = sign(call["function"]["name"], "tool_calls", place)
                    pair = sign("", _ARGUMENTS, place)
                    function = {"name": name, "arguments": {**call["function"]["arguments"], pair: pair}}
                    own["tool_calls"].append({**call, "function": function})
            signed.append({**message, **own})
        options = dict(self.options)
        if "tools" in options:
            options["tools"] = [_signed_tool(tool, lambda text: sign(text, "tools", "")) for tool in options["tools"]]
        if "documents" in options:
            options["documents"] = [
                {key: sign(value, "documents", "") if isinstance(value, str) else value for key, value in one.items()}
                for one in options["documents"]
            ]
        return signed, options, signs

    def _place(self, index: int) -> str:
        return f"turn {index + 1} ({self.messages[index]['role']})"

    def refuse_loss(self, lost: Sequence[tuple[str, str]]) -> NoReturn:
        """Raises DataError: the template does not show these (key, place)."""
        lost = [(key, place) for key, place in lost if key != _ARGUMENTS or ("tool_calls", place) not in lost]
        what = ", ".join(f"{key} of {place}" if place else key for key, place in lost[:4])
        keys = ", ".join(dict.fromkeys(key.removeprefix("the arguments of ") for key, _ in lost))
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        removable = [key for key in keys.split(", ") if key != "content"]
        remedy = f", or leave them out with data.ignore_keys=[{', '.join(removable)}]" if removable else ""
        raise DataError(
            f"{self.where}: the chat template of {self.name} does not show {what}{more}, so the model would be trained on "
            f"something else. Use a model whose template does, write it into the content of a turn it shows{remedy}."
        )

    def _refuse_prompt(self, before: str, after: str, index: int) -> NoReturn:
        common = _common(before, after)
        raise DataError(
            f"{self.where}: the chat template of {self.name} writes turn {index + 1} in another way than it asks for it: "
            f"generation would start from {_end(before[common:])}, but the turn reads {_end(after[common:])}, so the "
            "assistant's text cannot be told apart. Give the turn its reasoning_content, or the template what it asks for "
            "(such as data.chat_template_kwargs.enable_thinking=false); or use a template that marks what is generated, or "
            "prompt-completion rows."
        )


_ARGUMENTS = "the arguments of tool_calls"


def _possible_forms(messages: Messages) -> Iterator[_Form]:
    calls = any("tool_calls" in message for message in messages)
    empty = any(message["role"] == "assistant" and not message["content"] for message in messages)
    for parts, json_arguments, no_content in itertools.product((False, True), repeat=3):
        if calls >= json_arguments and empty >= no_content:
            yield _Form(json_arguments, no_content, parts)


def _dressed(messages: Messages, form: _Form) -> list[dict[str, Any]]:
    """The messages as the template is to have them."""
    dressed = []
    for message in messages:
        own = {key: value for key, value in message.items() if key != "weight"}
        if own.get("reasoning_content"):  # templates know it by one of three names
            own |= dict.fromkeys(REASONING, own["reasoning_content"])
        if form.no_content and own["role"] == "assistant" and not own["content"]:
            del own["content"]
        elif form.parts:
            own["content"] = [{"type": "text", "text": own["content"]}]
        if form.json_arguments and "tool_calls" in own:
            own["tool_calls"] = [
                {
                    **call,
                    "function": {
                        **call["function"],
                        "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                    },
                }
                for call in own["tool_calls"]
            ]
        dressed.append(own)
    return dressed


def _free_keys(message: Mapping[str, Any]) -> list[str]:
    """Keys of a message that a template may or may not know; the name of a tool is a link to its call."""
    return [key for key in message if key not in _OWN and not (key == "name" and message["role"] == "tool")]


def _signed_tool(tool: Mapping[str, Any], sign: Callable[[str], str]) -> dict[str, Any]:
    inner = tool.get("function", tool)
    if not isinstance(inner, Mapping):
        return dict(tool)
    texts = {key: sign(inner[key]) for key in ("name", "description") if isinstance(inner.get(key), str) and inner[key]}
    return {**tool, "function": {**inner, **texts}} if "function" in tool else {**tool, **texts}


def _well_shown(shown: str, sign: _Sign) -> bool:
    if sign.key == _ARGUMENTS:  # neither as a Python dict nor as text within text
        return sign.sign in shown and f"'{sign.sign}': '" not in shown and f'\\"{sign.sign}\\"' not in shown
    return sign.sign in shown


def _shows(shown: str, text: str) -> bool:
    """Whether a text is there, white space aside, which many templates trim or lay out anew."""
    return text.strip() in shown or "".join(text.split()) in "".join(shown.split())


def _common(one: str, other: str) -> int:
    """The length of what both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (mine, theirs) in pairs if mine != theirs), min(len(one), len(other)))


def _end(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")

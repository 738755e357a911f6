"""Examples to token ids: what the model reads, and which tokens the loss is on.

Rules, the same for every causal task:

* prompt and answer are tokenised on their own and concatenated, so that the answer starts at a token boundary in
  training exactly as it does in generation;
* the loss is on the answer and the end-of-text token (``train_on="answer"``), or on everything but the
  beginning-of-text token (``train_on="all"``);
* too long: untrained tokens before the first trained one go first, from the left; the answer loses its end only when
  it does not fit on its own. The end-of-text token goes with it: a cut answer must not teach the model to stop;
* a beginning-of-text token is set only where the tokenizer sets one by itself;
* chats are rendered by the tokenizer's own template; the trained text is what each assistant turn adds to the
  rendering of the turns before it (up to and including its end mark).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from duallora.errors import ConfigError, DataError
from duallora.tasks.example import Example
from duallora.tasks.task import Kind

IGNORE = -100  # the label torch's cross entropy skips

TrainOn = Literal["answer", "all"]
Segment = tuple[str, bool]  # text, whether the loss is on it


@dataclass(frozen=True)
class Encoded:
    """Token ids [length] and labels [length] of one row; untrained tokens carry the label ``IGNORE``."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


@dataclass(frozen=True)
class Counts:
    """What encoding a split gave. ``trained_tokens`` is 0 for classification and regression."""

    rows: int
    tokens: int
    trained_tokens: int
    truncated: int


def encode(example: Example, tokenizer, *, max_length: int, train_on: TrainOn = "answer") -> Encoded:
    """Token ids and labels of one row of a generation task, at most ``max_length`` tokens.

    Raises DataError where the tokenizer's chat template cannot say which tokens the assistant wrote, and ConfigError
    where ``max_length`` leaves no room or the tokenizer has no end-of-text token.
    """
    marks = _marks(tokenizer, max_length)
    segments = _segments(example, tokenizer)
    pieces = _tokenize([text for text, _ in segments], tokenizer)
    return _fit(example, segments, pieces, marks, max_length, train_on)


def encode_prompt(example: Example, tokenizer, *, max_length: int) -> list[int]:
    """Token ids the model continues in generation: everything before the (last) answer, cut from the left."""
    if example.messages:  # the template writes its own beginning-of-text token
        bos, text = [], _render(_before_last_answer(example.messages), tokenizer, example, generation=True)
    else:
        bos, text = _marks(tokenizer, max_length).bos, example.prompt
    ids = _tokenize([text], tokenizer)[0]
    return [*bos, *ids[max(0, len(ids) - (max_length - len(bos))) :]]


def encode_texts(example: Example, tokenizer, *, max_length: int) -> dict[str, Any]:
    """Input of a classifier: input_ids, attention_mask, token_type_ids where the tokenizer gives them, and labels.

    A pair that is too long loses tokens from its longer text first.
    """
    if not 1 <= len(example.texts) <= 2:
        raise DataError(f"{_name(example)}: expected one text or a pair, got {len(example.texts)}")
    row = dict(tokenizer(*example.texts, truncation=True, max_length=max_length))
    if example.label is not None:
        row["labels"] = example.label
    return row


def encode_split(
    examples: Sequence[Example],
    tokenizer,
    task_kind: Kind,
    *,
    max_length: int,
    train_on: TrainOn = "answer",
) -> tuple[list[dict[str, Any]], Counts]:
    """Every row of a split, ready for `Collator`, with the counts to print.

    Raises DataError naming the rows without a trained token (generate) or without a label (classify, regress).
    """
    if task_kind != "generate":
        return _encode_classification(examples, tokenizer, max_length)
    marks = _marks(tokenizer, max_length)
    planned = [_segments(example, tokenizer) for example in examples]
    pieces = iter(_tokenize([text for segments in planned for text, _ in segments], tokenizer))
    rows: list[dict[str, Any]] = []
    empty: list[str] = []
    truncated = trained = 0
    for example, segments in zip(examples, planned, strict=True):
        own = [next(pieces) for _ in segments]
        encoded = _fit(example, segments, own, marks, max_length, train_on)
        row_trained = sum(label != IGNORE for label in encoded.labels)
        if row_trained == 0:
            empty.append(_name(example))
        trained += row_trained
        truncated += encoded.truncated
        rows.append({"input_ids": encoded.input_ids, "labels": encoded.labels})
    if empty:
        raise DataError(
            f"{len(empty)} of {len(rows)} rows have no token to train on: {_first(empty)}\n"
            "Expected an answer (an assistant turn in a chat) in each row. Remove these rows, fill in their answers, "
            "or train on the whole text with data.train_on=all."
        )
    return rows, Counts(len(rows), sum(len(row["input_ids"]) for row in rows), trained, truncated)


class Collator:
    """Pads a batch of rows to its longest, on the right unless ``side="left"`` (generation).

    Labels that are lists become int64 [batch, length] padded with ``IGNORE``; scalar labels become [batch], int64 for
    class ids and float32 for targets. ``pad_to_multiple_of`` rounds the length up (8 suits tensor cores).
    """

    def __init__(
        self, tokenizer, *, pad_to_multiple_of: int | None = None, side: Literal["right", "left"] = "right"
    ) -> None:
        pad = tokenizer.pad_token_id
        if pad is None:
            pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
        self.fill = {
            "input_ids": pad,
            "attention_mask": 0,
            "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
            "labels": IGNORE,
        }
        self.pad_to_multiple_of = pad_to_multiple_of
        self.side = side

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            key: self._pad([row[key] for row in rows], length, self.fill[key])
            for key in ("input_ids", "token_type_ids")
            if key in rows[0]
        }
        masks = [row.get("attention_mask") or [1] * len(row["input_ids"]) for row in rows]
        batch["attention_mask"] = self._pad(masks, length, 0)
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            if isinstance(labels[0], int | float):
                whole = all(isinstance(label, int) for label in labels)
                batch["labels"] = torch.tensor(labels, dtype=torch.int64 if whole else torch.float32)
            else:
                batch["labels"] = self._pad(labels, length, IGNORE)
        return batch

    def _pad(self, values: Sequence[Sequence[int]], length: int, fill: int) -> torch.Tensor:
        padded = torch.full((len(values), length), fill, dtype=torch.int64)
        for row, value in zip(padded, values, strict=True):
            span = slice(length - len(value), length) if self.side == "left" else slice(len(value))
            row[span] = torch.tensor(value, dtype=torch.int64)
        return padded


def _encode_classification(examples: Sequence[Example], tokenizer, max_length: int) -> tuple[list[dict], Counts]:
    unlabelled = [_name(example) for example in examples if example.label is None]
    if unlabelled:
        raise DataError(f"{len(unlabelled)} of {len(examples)} rows have no label: {_first(unlabelled)}")
    rows = [encode_texts(example, tokenizer, max_length=max_length) for example in examples]
    truncated = sum(
        # Only a row that fills max_length can have lost something; only those are tokenised a second time.
        len(row["input_ids"]) == max_length and len(tokenizer(*example.texts, verbose=False)["input_ids"]) > max_length
        for row, example in zip(rows, examples, strict=True)
    )
    return rows, Counts(len(rows), sum(len(row["input_ids"]) for row in rows), 0, truncated)


def _segments(example: Example, tokenizer) -> list[Segment]:
    """The row's text in order, each piece with whether it is trained."""
    if example.messages:
        return _chat_segments(example, tokenizer)
    return [(example.prompt, False), (example.answer, True)]


def _chat_segments(example: Example, tokenizer) -> list[Segment]:
    messages = example.messages
    segments: list[Segment] = []
    rendered = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:index], tokenizer, example, generation=True)
        after = _render(messages[: index + 1], tokenizer, example)
        if not before.startswith(rendered) or not after.startswith(before):
            raise DataError(
                f"{_name(example)}: the chat template of {_tokenizer_name(tokenizer)} renders earlier turns differently "
                f"once turn {index + 1} is added, so the assistant's tokens cannot be told apart. Expected a template "
                "whose rendering of a chat begins with the rendering of its first turns (and a chat that does not "
                "begin with the assistant). Use prompt-completion rows, or a tokenizer with such a template."
            )
        segments += [(before[len(rendered) :], False), (after[len(before) :], True)]
        rendered = after
    whole = _render(messages, tokenizer, example)
    rest = whole[len(rendered) :] if whole.startswith(rendered) else ""
    return [*segments, (rest, False)] if rest else segments


def _render(messages: Sequence[Mapping[str, str]], tokenizer, example: Example, *, generation: bool = False) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            f"{_name(example)}: chat rows (messages) need a chat template, and {_tokenizer_name(tokenizer)} has none. "
            "Use an instruction-tuned model, or prompt-completion rows."
        )
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=generation
        )
    except Exception as error:  # templates raise whatever their Jinja code raises; the row is what the user can mend
        roles = " ".join(message["role"] for message in messages)
        raise DataError(
            f"{_name(example)}: the chat template of {_tokenizer_name(tokenizer)} refuses this chat "
            f"(roles: {roles}): {error}"
        ) from error


def _before_last_answer(messages: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _tokenize(texts: list[str], tokenizer) -> list[list[int]]:
    distinct = list(dict.fromkeys(texts))  # the same prompt with many answers, or one system message, are common
    if not distinct:
        return []
    # verbose=False: the only warning it hides is "longer than the model's maximum", and rows are cut right after.
    encoded = tokenizer(distinct, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids = dict(zip(distinct, encoded["input_ids"], strict=True))
    return [ids[text] for text in texts]


@dataclass(frozen=True)
class _Marks:
    """Special tokens: those a tokenizer sets before a text by itself, the end of text, and all that can end a turn."""

    bos: list[int]
    eos: int
    special: frozenset[int]


def _marks(tokenizer, max_length: int) -> _Marks:
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{_tokenizer_name(tokenizer)} has no end-of-text token, so a trained model would never stop. "
            "Set tokenizer.eos_token and save it with the model."
        )
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    # [bos] for LLaMA, nothing for GPT-2 or SmolLM2; what is set after the text does not matter here.
    starts = [start for start in range(len(full)) if full[start : start + len(plain)] == plain]
    bos = list(full[: starts[0]]) if starts else []
    if max_length <= len(bos):
        raise ConfigError(f"max_length is {max_length}; expected more than the {len(bos)} leading special token(s)")
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return _Marks(bos, tokenizer.eos_token_id, frozenset({*special, *tokenizer.all_special_ids}))


def _fit(
    example: Example,
    segments: Sequence[Segment],
    pieces: Sequence[list[int]],
    marks: _Marks,
    max_length: int,
    train_on: TrainOn,
) -> Encoded:
    """Joins the pieces, closes the last answer with the end-of-text token, and cuts to ``max_length``."""
    bos = [] if example.messages else marks.bos
    ids: list[int] = []
    answer: list[bool] = []  # whether the token belongs to an answer
    for index, ((_, is_answer), piece) in enumerate(zip(segments, pieces, strict=True)):
        # A template writes its own end mark, often with a line break behind it that generation never reaches.
        ends = [at for at, token in enumerate(piece) if token in marks.special] if example.messages else []
        if is_answer and not ends and index == len(segments) - 1:
            piece = [*piece, marks.eos]
        reached = ends[-1] + 1 if ends else len(piece)
        ids += piece
        answer += [is_answer and at < reached for at in range(len(piece))]
    room = max_length - len(bos)
    excess = max(0, len(ids) - room)
    left = min(excess, answer.index(True) if True in answer else excess)
    ids, answer = [*bos, *ids[left : left + room]], [False] * len(bos) + answer[left : left + room]
    labels = [token if is_answer or train_on == "all" else IGNORE for token, is_answer in zip(ids, answer, strict=True)]
    labels[: max(1, len(bos))] = [IGNORE] * max(1, len(bos))  # nothing stands before the first token to predict it from
    return Encoded(ids, labels, excess > 0)


def _tokenizer_name(tokenizer) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _name(example: Example) -> str:
    return example.where or "a row"


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")

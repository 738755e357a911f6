"""Examples to token ids: what the model reads, and which tokens the loss is on.

Rules, the same for every causal task:

* the answer starts at a token boundary, in training exactly as in generation: no token holds the end of the prompt and
  the beginning of the answer;
* the loss is on the answer and the end-of-text token (``train_on="answer"``), or on everything but the
  beginning-of-text token (``train_on="all"``);
* too long: untrained tokens before the first trained one go first, from the left; the answer loses its end only when
  it does not fit on its own. The end-of-text token goes with it: a cut answer must not teach the model to stop;
* a beginning-of-text token is set only where the tokenizer sets one by itself;
* chats are written by the tokenizer's own template (`duallora.tasks.template`), each assistant turn trained up to and
  including its end mark.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from duallora.errors import ConfigError, DataError
from duallora.tasks import template
from duallora.tasks.chats import last_trained
from duallora.tasks.example import Example
from duallora.tasks.task import Kind
from duallora.tasks.template import Segment

IGNORE = -100  # the label torch's cross entropy skips
_SHOWN = 20  # reasons why rows cannot be trained on

TrainOn = Literal["answer", "all"]


@dataclass(frozen=True)
class Encoded:
    """Token ids [length] and labels [length] of one sequence; untrained tokens carry the label ``IGNORE``."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


@dataclass(frozen=True)
class Counts:
    """What encoding a split gave. ``trained_tokens`` is 0 for classification and regression.

    ``examples``: the example that each row is of, as some chats take several rows.
    """

    rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    examples: Sequence[int] = ()


def encode(example: Example, tokenizer, *, max_length: int, train_on: TrainOn = "answer") -> list[Encoded]:
    """Token ids and labels of one row of a generation task, at most ``max_length`` tokens.

    One sequence, or several of a chat whose template rewrites earlier turns (`duallora.tasks.template`).

    Raises DataError where the chat template leaves out part of the chat or cannot say which tokens the assistant wrote,
    and ConfigError where ``max_length`` leaves no room or the tokenizer has no end-of-text token.
    """
    marks = _marks(tokenizer, max_length)
    planned = _sequences(example, tokenizer, train_on)
    tokens = _tokenize(planned, tokenizer, max_length)
    return [
        _fit(bool(example.messages), segments, own, tokenizer, marks, max_length, train_on)
        for segments, own in zip(planned, tokens, strict=True)
    ]


def encode_prompt(example: Example, tokenizer, *, max_length: int) -> list[int]:
    """Token ids the model continues in generation: everything before the (last) answer, cut from the left."""
    if example.messages:  # the template writes its own beginning-of-text token
        bos, text = [], template.prompt(example, tokenizer)
    else:
        bos, text = _marks(tokenizer, max_length).bos, example.prompt
    ids = _tokenize([[Segment(text, False)]], tokenizer, max_length)[0][0]
    return [*bos, *ids[max(0, len(ids) - (max_length - len(bos))) :]]


def with_written_answer(example: Example, tokenizer) -> Example:
    """The example with its reference as the model is to write it: reasoning and calls of tools are the template's to write.

    Examples whose answer is text alone stay as they are.
    """
    last = last_trained(example.messages)
    if last is None or not example.messages[last].keys() & {"tool_calls", "reasoning_content"}:
        return example
    text = template.answer(example, tokenizer)
    ids = _tokenize([[Segment(text, True)]], tokenizer)[0][0]
    return replace(example, references=(tokenizer.decode(ids, skip_special_tokens=True).strip(),))


def encode_texts(example: Example, tokenizer, *, max_length: int) -> dict[str, Any]:
    """Input of a classifier: input_ids, attention_mask, token_type_ids where the tokenizer gives them, and labels.

    A pair that is too long loses tokens from its longer text first.
    """
    if not 1 <= len(example.texts) <= 2:
        raise DataError(f"{_name(example)}: expected one text or a pair, got {len(example.texts)}")
    texts = _cut_pair(example.texts, tokenizer, max_length)
    row = dict(tokenizer(*texts, truncation=True, max_length=max_length))
    if texts is not example.texts and len(row["input_ids"]) < max_length:  # it has fewer tokens than its length says
        row = dict(tokenizer(*example.texts, truncation=True, max_length=max_length))
    if example.label is not None:
        row["labels"] = example.label
    return row


def encode_split(
    examples: Sequence[Example], tokenizer, task_kind: Kind, *, max_length: int, train_on: TrainOn = "answer"
) -> tuple[list[dict[str, Any]], Counts]:
    """Every row of a split, ready for `Collator`, with the counts to print.

    Raises DataError naming the rows without a trained token (generate) or without a label (classify, regress).
    """
    if task_kind != "generate":
        return _encode_classification(examples, tokenizer, max_length)
    marks = _marks(tokenizer, max_length)
    planned: list[tuple[int, list[Segment]]] = []
    refused: dict[str, list[str]] = {}  # by the reason, which many rows have in common
    for index, example in enumerate(examples):
        try:
            planned += [(index, segments) for segments in _sequences(example, tokenizer, train_on)]
        except DataError as error:
            refused.setdefault(str(error).removeprefix(f"{_name(example)}: "), []).append(_name(example))
    if refused:
        count = sum(map(len, refused.values()))
        lines = [
            f"{names[0]}: {reason}" + (f"\n  and so {_first(names[1:])}" if names[1:] else "")
            for reason, names in refused.items()
        ]
        head = [f"{count} of {len(examples)} rows cannot be trained on:"] if count > 1 else []
        raise DataError("\n".join([*head, *lines[:_SHOWN], *(["..."] if len(lines) > _SHOWN else [])]))
    tokens = _tokenize([segments for _, segments in planned], tokenizer, max_length)
    rows: list[dict[str, Any]] = []
    empty: list[str] = []
    truncated = trained = 0
    for (index, segments), own in zip(planned, tokens, strict=True):
        example = examples[index]
        encoded = _fit(bool(example.messages), segments, own, tokenizer, marks, max_length, train_on)
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
    total = sum(len(row["input_ids"]) for row in rows)
    return rows, Counts(len(rows), total, trained, truncated, [index for index, _ in planned])


class Collator:
    """Pads a batch of rows to its longest, on the right unless ``side="left"`` (generation).

    Labels that are lists become int64 [batch, length] padded with ``IGNORE``; scalar labels become [batch], int64 for
    class ids and float32 for targets.
    """

    def __init__(self, tokenizer, *, side: Literal["right", "left"] = "right") -> None:
        pad = next((own for own in (tokenizer.pad_token_id, tokenizer.eos_token_id) if own is not None), 0)
        types = getattr(tokenizer, "pad_token_type_id", 0)
        self.fill = {"input_ids": pad, "attention_mask": 0, "token_type_ids": types, "labels": IGNORE}
        self.side = side

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        columns = {key: [row[key] for row in rows] for key in self.fill if key in rows[0]}
        columns.setdefault("attention_mask", [[1] * len(ids) for ids in columns["input_ids"]])
        batch = {}
        for key, values in columns.items():
            if isinstance(values[0], int | float):
                whole = all(isinstance(value, int) for value in values)
                batch[key] = torch.tensor(values, dtype=torch.int64 if whole else torch.float32)
            else:
                tensors = [torch.tensor(value, dtype=torch.int64) for value in values]
                batch[key] = pad_sequence(tensors, True, self.fill[key], padding_side=self.side)
        return batch


def _encode_classification(examples: Sequence[Example], tokenizer, max_length: int) -> tuple[list[dict], Counts]:
    unlabeled = [_name(example) for example in examples if example.label is None]
    if unlabeled:
        raise DataError(f"{len(unlabeled)} of {len(examples)} rows have no label: {_first(unlabeled)}")
    rows = [encode_texts(example, tokenizer, max_length=max_length) for example in examples]

    def is_cut(texts: tuple[str, ...]) -> bool:
        cut = _cut_pair(texts, tokenizer, max_length)
        return cut is not texts or len(tokenizer(*texts, verbose=False)["input_ids"]) > max_length

    # Only a row that fills max_length can have lost something; only those are tokenized a second time.
    full = (len(row["input_ids"]) == max_length for row in rows)
    truncated = sum(fills and is_cut(example.texts) for fills, example in zip(full, examples, strict=True))
    total = sum(len(row["input_ids"]) for row in rows)
    return rows, Counts(len(rows), total, 0, truncated, range(len(rows)))


def _sequences(example: Example, tokenizer, train_on: TrainOn) -> list[list[Segment]]:
    """The row's text in order, as one sequence or more."""
    if not example.messages:
        return [[Segment(example.prompt, False), Segment(example.answer, True)]]
    if train_on == "all":
        return [template.whole(example, tokenizer)]
    return template.sequences(example, tokenizer)


def _tokenize(planned: Sequence[Sequence[Segment]], tokenizer, max_length: int | None = None) -> list[list[list[int]]]:
    """Token ids of each segment of each sequence: what generation reads and is to write, border by border.

    Segments are tokenized on their own. Where the tokenizer sets a space before every text it is given (SentencePiece's
    do), that would put spaces into the middle; there the whole sequence is tokenized, and cut at the borders. Of a text
    far beyond ``max_length`` only the end that can be kept is tokenized.
    """
    short = [_cut_texts(segments, max_length) for segments in planned] if max_length else list(planned)
    found = _tokenize_all(short, tokenizer)
    for at, (segments, cut) in enumerate(zip(planned, short, strict=True)):
        if max_length and any(
            mine is not whole and len(ids) <= max_length + _MARGIN
            for mine, whole, ids in zip(cut, segments, found[at], strict=True)
        ):  # it has fewer tokens than its length says
            found[at] = _tokenize_all([segments], tokenizer)[0]
    return found


_PER_TOKEN = 16  # characters; common text has three to five
_MARGIN = 16  # tokens that a cut may change, beside it
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")  # no token holds the end of a word and the beginning of the next


def _cut_texts(segments: Sequence[Segment], max_length: int) -> Sequence[Segment]:
    """The segments with overlong texts cut between words: the end of what stands before the first answer is kept, and the
    beginning of the rest, as `_fit` cuts the tokens."""
    reach = _PER_TOKEN * (max_length + _MARGIN)
    if all(len(segment.text) <= 2 * reach for segment in segments):
        return segments
    first = next((at for at, segment in enumerate(segments) if segment.answer), len(segments))
    return [
        segment if len(segment.text) <= 2 * reach else segment._replace(text=_cut_text(segment.text, reach, at < first))
        for at, segment in enumerate(segments)
    ]


def _cut_pair(texts: tuple[str, ...], tokenizer, max_length: int) -> tuple[str, ...]:
    """The same for a classifier's text. Of a pair the longer text loses tokens first, so both are needed whole."""
    reach = _PER_TOKEN * (max_length + _MARGIN)
    if len(texts) > 1 or len(texts[0]) <= 2 * reach:
        return texts
    return (_cut_text(texts[0], reach, tokenizer.truncation_side == "left"),)


def _cut_text(text: str, reach: int, from_left: bool) -> str:
    """``reach`` to twice as many characters of the end (``from_left``) or beginning; all, where no two words meet there."""
    if from_left:
        found = _BETWEEN_WORDS.search(text, len(text) - 2 * reach, len(text) - reach)
        return text[found.start() :] if found else text
    found = _BETWEEN_WORDS.search(text, reach, 2 * reach)
    return text[: found.start()] if found else text


def _tokenize_all(planned: Sequence[Sequence[Segment]], tokenizer) -> list[list[list[int]]]:
    # The same prompt with many answers, or one system message, are common.
    distinct = list(dict.fromkeys(segment.text for segments in planned for segment in segments))
    if not distinct:
        return [[] for _ in planned]
    if _sets_space(tokenizer):
        return _tokenize_whole(planned, tokenizer)
    ids = dict(zip(distinct, _ids(distinct, tokenizer)["input_ids"], strict=True))
    return [[ids[segment.text] for segment in segments] for segments in planned]


def _ids(texts: Sequence[str], tokenizer, **options: Any) -> Any:
    # verbose=False: the only warning it hides is "longer than the model's maximum", and rows are cut right after.
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False, **options)


def _sets_space(tokenizer) -> bool:
    """Whether a text's tokens differ by whether it stands at the start."""
    break_, letter, both = _ids(["\n", "a", "\na"], tokenizer)["input_ids"]
    return both[: len(break_)] == break_ and both[len(break_) :] != letter


def _tokenize_whole(planned: Sequence[Sequence[Segment]], tokenizer) -> list[list[list[int]]]:
    texts = ["".join(segment.text for segment in segments) for segments in planned]
    if not tokenizer.is_fast:
        return [_tokenize_inside(segments, tokenizer) for segments in planned]
    found = _ids(texts, tokenizer, return_offsets_mapping=True)
    rows = []
    for segments, ids, offsets in zip(planned, found["input_ids"], found["offset_mapping"], strict=True):
        borders = list(itertools.accumulate(len(segment.text) for segment in segments))
        if any(start < border < end for start, end in offsets for border in borders):
            rows.append(_tokenize_inside(segments, tokenizer))
            continue
        pieces: list[list[int]] = [[] for _ in segments]
        for token, (start, end) in zip(ids, offsets, strict=True):
            # A token without text of its own, such as a space that was set, goes with what follows it.
            pieces[min(bisect.bisect_right(borders, start if end > start else end), len(pieces) - 1)].append(token)
        rows.append(pieces)
    return rows


def _tokenize_inside(segments: Sequence[Segment], tokenizer) -> list[list[int]]:
    """Each segment on its own, all but the first as if text stood before it: where a token would lie across a border."""
    texts = [segment.text if at == 0 else "\n" + segment.text for at, segment in enumerate(segments)]
    head, *found = _ids(["\n", *texts], tokenizer)["input_ids"]
    return [ids if at == 0 else ids[len(head) :] for at, ids in enumerate(found)]


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
    is_chat: bool,
    segments: Sequence[Segment],
    pieces: Sequence[list[int]],
    tokenizer,
    marks: _Marks,
    max_length: int,
    train_on: TrainOn,
) -> Encoded:
    """Joins the pieces, closes the last answer with the end-of-text token, and cuts to ``max_length``."""
    bos = [] if is_chat else marks.bos
    ids: list[int] = []
    labels: list[int] = []
    first: int | None = None  # where the first answer begins
    for index, (segment, piece) in enumerate(zip(segments, pieces, strict=True)):
        end = _end_of_turn(segment.text, piece, tokenizer, marks) if is_chat and segment.answer else None
        if segment.answer and end is None and index == len(segments) - 1:
            piece = [*piece, marks.eos]
        said = (len(piece) if end is None else end) if segment.answer else 0
        if said and first is None:
            first = len(ids)
        learned = 0 if segment.muted else len(piece) if train_on == "all" else said
        ids += piece
        labels += [*piece[:learned], *[IGNORE] * (len(piece) - learned)]
    room = max_length - len(bos)
    excess = max(0, len(ids) - room)
    left = excess if first is None else min(excess, first)
    ids, labels = [*bos, *ids[left : left + room]], [*[IGNORE] * len(bos), *labels[left : left + room]]
    labels[:1] = [IGNORE] * len(labels[:1])  # nothing stands before the first token to predict it from
    return Encoded(ids, labels, excess > 0)


def _end_of_turn(text: str, piece: Sequence[int], tokenizer, marks: _Marks) -> int | None:
    """How many tokens there are up to the mark that ends the turn: often a line break follows it, which generation never
    reaches. None where no mark ends it; a special token with text behind it is none."""
    last = next((at for at in reversed(range(len(piece))) if piece[at] in marks.special), None)
    if last is None or text.rpartition(tokenizer.convert_ids_to_tokens(piece[last]))[2].strip():
        return None
    return last + 1


def _tokenizer_name(tokenizer) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _name(example: Example) -> str:
    return example.where or "a row"


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")

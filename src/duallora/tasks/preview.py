"""What the model will see: rows with their trained and ignored tokens in color, and the counts of the split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from duallora.errors import DataError
from duallora.tasks.encode import IGNORE, TrainOn, encode, encode_split, encode_texts
from duallora.tasks.example import Example
from duallora.tasks.task import Task

TRAINED = "bold green"
IGNORED = "dim"  # and not gray, to be read on any background
# Every other trained token is underlined, so that the borders between them show.
_ALTERNATING = {True: (TRAINED, f"{TRAINED} underline"), False: (IGNORED, IGNORED)}

_COUNTED_ROWS = 2000  # enough for the shares; a large split would take a minute
_LONGEST_RUN = {False: 140, True: 400}  # tokens of one kind shown before the middle is left out: ignored, trained


def preview(
    task: Task,
    tokenizer: Any,
    *,
    split: str = "train",
    rows: int = 3,
    max_length: int = 512,
    train_on: TrainOn = "answer",
) -> RenderableType:
    """A renderable for ``rich.print``: the first ``rows`` rows of a split as tokens, a legend, and counts.

    Rows without a trained token are shown, too; the counts then carry the error that training would raise.
    """
    examples = task.splits[split]
    show = _generation_row if task.kind == "generate" else _classification_row
    panels = []
    for number, example in enumerate(examples[:rows], 1):
        for part, body, note in show(task, example, tokenizer, max_length, train_on):
            title = Text(f"{split} row {number}{part}", style="bold")
            edges: Any = {"title_align": "left", "subtitle_align": "right", "border_style": "dim"}
            panels.append(Panel(body, title=title, subtitle=note, **edges))
    return Group(*panels, _legend(task), _counts(task, examples, tokenizer, max_length, train_on))


_Shown = tuple[str, RenderableType, Text]  # which part of the row, its tokens, what is to say of them


def _generation_row(
    task: Task, example: Example, tokenizer: Any, max_length: int, train_on: TrainOn
) -> Iterator[_Shown]:
    try:
        found = encode(example, tokenizer, max_length=max_length, train_on=train_on)
    except DataError as error:
        yield "", Text(str(error), style="bold red"), Text(_place(example), style="dim")
        return
    for number, encoded in enumerate(found, 1):
        flags = [label != IGNORE for label in encoded.labels]
        note = Text(f"{len(flags)} tokens, ")
        note.append(f"{sum(flags)} trained", style=TRAINED if any(flags) else "bold red")
        if encoded.truncated:
            note.append(f", cut to {max_length}", style="yellow")
        note.append(f"  {_place(example)}", style="dim")
        part = f", sequence {number} of {len(found)}" if len(found) > 1 else ""
        yield part, _tokens(encoded.input_ids, flags, tokenizer), note


def _tokens(ids: Sequence[int], flags: Sequence[bool], tokenizer: Any) -> Text:
    """The text of the tokens, in color by whether they are trained; the middle of a long run is left out."""
    body = Text()
    special = set(tokenizer.all_special_ids)
    for trained, group in itertools.groupby(
        zip(ids, _pieces(ids, tokenizer), flags, strict=True), key=lambda one: one[2]
    ):
        run = list(group)
        keep, styles = _LONGEST_RUN[trained] // 2, _ALTERNATING[trained]
        for at, (token, piece, _) in enumerate(run):
            if len(run) > 2 * keep and keep <= at < len(run) - keep:
                if at == keep:
                    kind = "trained" if trained else "ignored"
                    body.append(f" ... {len(run) - 2 * keep} more {kind} tokens ... ", style="cyan")
            elif token in special:
                name = piece.strip() or piece  # word-piece decoders set a space before [SEP]
                body.append(piece[: piece.index(name)]).append(name, style=f"{styles[0]} reverse")
            else:
                # At an edge: nothing of this kind, or a special token, stands beside it.
                edge = any(not 0 <= beside < len(run) or run[beside][0] in special for beside in (at - 1, at + 1))
                body.append(_visible(piece, edge), style=styles[at % 2])
    body.rstrip()  # a line break at the end is shown by its sign
    return body


def _classification_row(
    task: Task, example: Example, tokenizer: Any, max_length: int, train_on: TrainOn
) -> Iterator[_Shown]:
    ids = encode_texts(example, tokenizer, max_length=max_length)["input_ids"]
    body = _tokens(ids, [False] * len(ids), tokenizer)
    label: object = "none"
    if example.label is not None:
        label = task.labels[int(example.label)] if task.labels else example.label
    body.append("\n").append(f"{'label' if task.labels else 'target'}: {label}", style=TRAINED)
    yield "", body, Text(f"{len(ids)} tokens  {_place(example)}", style="dim")


def _place(example: Example) -> str:
    """File name and line: a whole path would be cut at the end, where the line number stands."""
    return Path(example.where).name


def _pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text each token adds. Half a character (byte-level tokens) adds nothing until its last byte is there."""
    pieces: list[str] = []
    before = ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):
            pieces.append("")
        elif text.startswith(before):
            pieces.append(text[len(before) :])
            before = text
        else:  # a decoder that changes earlier text (word pieces do, around punctuation)
            pieces.append(tokenizer.convert_ids_to_tokens(int(ids[end - 1])))
            before = text
    return pieces


def _visible(piece: str, edge: bool) -> str:
    """Line breaks and tabs as signs; spaces as dots where they are easily overlooked: at the edges of a run."""
    text = piece.replace("\r", "␍").replace("\t", "⇥").replace("\n", "↵\n")
    return text.replace(" ", "·") if edge else text


def _legend(task: Task) -> Text:
    legend = Text()
    if task.kind == "generate":
        legend.append("trained", style=TRAINED).append(" (the loss is on it)   ", style="dim")
        legend.append("ignored", style=IGNORED).append("   ")
    else:
        legend.append("label" if task.labels else "target", style=TRAINED).append("   ")
    legend.append("special token", style="reverse dim").append(
        "   ↵ line break  ⇥ tab  · space at an edge", style="dim"
    )
    return legend


def _counts(task: Task, examples: Sequence[Example], tokenizer: Any, max_length: int, train_on: TrainOn):
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    # As Text: the name of a file may hold brackets, which rich would read as a style and drop.
    table.add_row("data", Text(f"{task.name}: {task.format}"))
    table.add_row("from", Text(task.source))
    for note in task.notes:
        table.add_row("note", Text(note))
    table.add_row("rows", Text(", ".join(f"{name} {size}" for name, size in _sizes(task))))
    counted = examples[:_COUNTED_ROWS]
    try:
        _, counts = encode_split(counted, tokenizer, task.kind, max_length=max_length, train_on=train_on)
    except DataError as error:
        table.add_row("fault", Text(str(error), style="bold red"))
        return table
    if counts.rows > len(counted):
        why = "the chat template rewrites earlier turns, so each is trained as generation will see it"
        table.add_row("sequences", Text(f"{counts.rows:,} of {len(counted):,} rows: {why}"))
    scope = f" (first {len(counted):,} rows)" if len(counted) < len(examples) else ""
    mean = counts.tokens / max(1, counts.rows)
    table.add_row("tokens", f"{counts.tokens:,}, {mean:.1f} a row{scope}")
    if task.kind == "generate":
        share = 100 * counts.trained_tokens / max(1, counts.tokens)
        table.add_row("trained", Text(f"{counts.trained_tokens:,} tokens, {share:.1f} %{scope}", style=TRAINED))
    style = "yellow" if counts.truncated else ""
    table.add_row("cut", Text(f"{counts.truncated:,} rows longer than max_length {max_length}{scope}", style=style))
    return table


def _sizes(task: Task) -> list[tuple[str, str]]:
    sizes = []
    for name in task.splits:
        try:
            sizes.append((name, f"{len(task.splits[name]):,}"))
        except DataError:  # a split whose file is absent is no fault of the split on show
            sizes.append((name, "absent"))
    return sizes

"""One row of data, whatever file or hub it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its answer, or a chat, or texts with a label; the unused fields stay empty."""

    prompt: str = ""
    """Text before the answer; the loss ignores it."""
    answer: str = ""
    """Text the loss is on. Prompt and answer are joined as they stand: a space between them belongs to one of them."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """Chat form, each message with "role", "content" and whatever else the chat template is to read (tool_calls, ...);
    ``"weight": 0`` marks an assistant turn without loss. Prompt and answer are then empty."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template is given beside the messages: "tools", "documents", "enable_thinking", ..."""
    texts: tuple[str, ...] = ()
    """Classification and regression: one text or a pair."""
    label: int | float | None = None
    """Class id (classify) or target (regress); None where the split has no gold label."""
    references: tuple[str, ...] = ()
    """Every accepted answer, for the metrics; at least ``answer`` in generation tasks."""
    group: str = ""
    """Part of the task the row belongs to, where parts are scored apart; it does not enter the fingerprint."""
    where: str = ""
    """``file:line``, for messages about this row."""


class BadRow(Exception):
    """What is wrong with one row, and in which column; caught where the row's place is known."""

    def __init__(self, what: str, column: str = "") -> None:
        super().__init__(what)
        self.column = column

"""One row of data, whatever file or hub it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its answer, or a chat, or texts with a label; the unused fields stay empty."""

    prompt: str = ""
    """Text before the answer; the loss ignores it."""
    answer: str = ""
    """Text the loss is on. Prompt and answer are joined as they stand: a space between them belongs to one of them."""
    messages: tuple[Mapping[str, str], ...] = ()
    """Chat form, each message with "role" and "content"; prompt and answer are then empty."""
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

"""Regular expressions from strangers, which Python's ``re`` and the tokenizers match without a limit of time."""

from __future__ import annotations

import re

MOST = 6  # ``.*`` on one way through a pattern: each multiplies the time by the length of the name
LONGEST = 1 << 15  # characters of a pattern; those in use have some hundreds
_MANY = r"[*+]|\{\d*,\}"


def can_take_for_ever(pattern: str) -> bool:
    r"""Whether a group is repeated without bound that itself holds an unbounded repeat or alternatives, as ``(a+)+``.

    The time of such a pattern can double with each letter; it may be harmless, but few in use have it. The same is said
    of a pattern with more than ``MOST`` repeats of any letter, of one with comments, which can hide brackets, and of one
    that is longer than ``LONGEST``. Parts of a name, as in ``(\w+\.)*``, end each at its dot, and what a look-ahead finds is
    not tried in other ways: both are taken.
    """
    if len(pattern) > LONGEST or re.search(r"\(\?(#|[a-zA-Z]*x)", pattern):
        return True
    left = re.sub(r"\\w[*+]\\\.(?![?*+{])", "x", pattern)
    left = re.sub(r"\\([pP]\{\w+\}|.)", "x", left, flags=re.DOTALL)
    while left != (left := re.sub(r"\[[^\[\]]*\]", "x", left)):  # classes, in which brackets nest
        pass
    while group := re.search(rf"\(([^()]*)\)({_MANY})?", left):  # an innermost group; \0: it matches in several ways
        several = bool(re.search(rf"[|\0]|{_MANY}", group[1]))
        if several and group[2]:
            return True
        several = several and re.match(r"\?<?[=!]", group[1]) is None
        inside = ("\0" if several or group[2] else "x") + "\1" * _repeats(group[1])
        left = left[: group.start()] + inside + left[group.end() :]
    return _repeats(left) > MOST


def _repeats(text: str) -> int:
    r"""The ``.*`` of the alternative that has most; \1 stands for one of a group."""
    return max(len(re.findall(r"\.[*+]|\x01", part)) for part in text.split("|"))

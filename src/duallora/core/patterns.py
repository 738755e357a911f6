"""Regular expressions from strangers, which Python's ``re`` and the tokenizers match without a limit of time."""

from __future__ import annotations

import re

MOST = 6  # ``.*`` in one pattern: each multiplies the time by the length of the name


def can_take_for_ever(pattern: str) -> bool:
    """Whether a group is repeated without bound that itself holds an unbounded repeat or alternatives, as ``(a+)+``.

    The time of such a pattern can double with each letter; it may be harmless, but none in use has it. The same is said
    of a pattern with more than ``MOST`` repeats of any letter.
    """
    left = re.sub(r"\\([pP]\{\w+\}|.)", "x", pattern, flags=re.DOTALL)
    while left != (left := re.sub(r"\[[^\[\]]*\]", "x", left)):  # classes, in which brackets nest
        pass
    if len(re.findall(r"\.[*+]", left)) > MOST:
        return True
    many = r"[*+]|\{\d*,\}"
    while group := re.search(rf"\(([^()]*)\)({many})?", left):  # an innermost group; \0: it matches in several ways
        several = re.search(rf"[|\0]|{many}", group[1])
        if several and group[2]:
            return True
        left = left[: group.start()] + ("\0" if several or group[2] else "x") + left[group.end() :]
    return False

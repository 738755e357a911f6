"""What the tables compare: methods as variants of a study, under the labels of `printed.variant`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from duallora.paper.printed import variant

Variant = dict[str, Any]

# What Dual LoRA starts from in the mini studies, which began before start-values: transformers' usual width throughout.
PLAIN_START: Variant = {"adapter.init_std": 0.02, "adapter.direction_init_std": 0.02}


def methods(
    rows: Sequence[tuple[str, int | None]],
    targets: Any,
    settings: Mapping[str, Any] | None = None,
    dual: Mapping[str, Any] | None = None,
) -> dict[str, Variant]:
    """``(name, rank)`` pairs as variants on the modules ``targets``; full fine-tuning has none of the settings, and
    Dual LoRA alone has ``dual``.

    alpha is left at each method's own, which is 2 r for LoRA, DoRA and Dual LoRA: LoRA's GLUE scripts (16 at r = 8, 32
    at 16) and DoRA's (64 at 32) agree on it, and HiRA has none.
    """
    found = {}
    for name, rank in rows:
        own: Variant = {"adapter.method": name}
        if name != "full":
            own |= {"adapter.target_modules": targets, **(settings or {})}
        if name == "duallora":
            own |= dual or {}
        if rank is not None:
            own["adapter.r"] = rank
        found[variant(name, rank)] = own
    return found


def duallora(targets: Any, variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Variant]:
    """Variants of Dual LoRA itself: label -> what it changes."""
    return {label: {"adapter.target_modules": targets, **own} for label, own in variants.items()}

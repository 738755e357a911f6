"""Ours: forms of the update where an adapter's capacity binds, and beside it where it may not.

The short runs of the paper's tables at mini scale tell no method from LoRA, because they bind none. Here N made-up people are to
be said back word for word from one layer of SmolLM2 (``facts``), and word problems, E2E over a thousand steps and docstrings
over several passes are to be learned; SST-2 and QNLI stand beside them. In a study everyone trains as many parameters as LoRA of the rank R that its
variants name (DoRA its lengths on top): Dual LoRA has r1 = r2 = R / 2. Six rates half a decade apart for everyone. LOG.md has the rule that
decides, which was written before the first run. Every value is ours.

The sizes are those of half a day on two cores. ``--set train.max_steps=...`` makes a run of any length, such as one pass of
4,210 steps over SST-2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from duallora.grid.study import Study
from duallora.paper import table4
from duallora.paper.table2 import MINI_BASE, MINI_HEAD, MINI_TARGETS, MINI_TASKS
from duallora.paper.variants import Variant, methods

_SEARCH = {"train.learning_rate": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]}
_FORMS: dict[str, Variant] = {
    "duallora": {},  # the paper's
    "identity-tanh": {"adapter.magnitude": "identity", "adapter.direction": "tanh"},
    "relu-tanh": {"adapter.direction": "tanh"},
    "lora-start": {"adapter.init": "lora", "adapter.magnitude": "identity", "adapter.warmup": "none"},
    "loha-form": {"adapter.magnitude": "identity", "adapter.direction": "identity"},  # B A . D C
}
_DECIDING = ("lora", "duallora", "identity-tanh", "lora-start")
_PEOPLE = 32


def _variants(rank: int, targets: Sequence[str], chosen: Sequence[str] = (), **settings: Any) -> dict[str, Variant]:
    """The methods and forms of ``chosen`` (all where it is empty) with as many parameters as LoRA of ``rank``."""
    found: dict[str, Variant] = {}
    for name in ("lora", "dora", "hira"):
        (found[name],) = methods([(name, rank)], targets, settings).values()
    found["rslora"] = {**found["lora"], "adapter.options": {"use_rslora": True}}
    (form,) = methods([("duallora", max(1, rank // 2))], targets, settings).values()
    found |= {name: {**form, **own} for name, own in _FORMS.items()}
    return {f"{name}-R{rank}": found[name] for name in chosen or found}


def binding(scale: str) -> tuple[Study, ...]:
    """One study for each model and set of variants."""
    # Ranks 2 and 8 of LoRA; at 1, of which no pair of groups is the half, LoRA alone.
    one_layer = (
        _variants(1, ["down_proj"], ["lora"]) | _variants(2, ["down_proj"]) | _variants(8, ["down_proj"], _DECIDING)
    )
    few, attention = ("lora", "hira", "duallora", "identity-tanh"), table4.MINI_BASE["adapter.target_modules"]
    return (
        _causal(
            "facts", {"data.task": "facts", "data.limit": _PEOPLE, "data.eval_limit": _PEOPLE, "data.max_length": 32},
            one_layer, "lora-R2", steps=60 * _PEOPLE // 8, rows=8,
            more={"adapter.layers_to_transform": [24], "eval.batch_size": _PEOPLE, "eval.max_new_tokens": 16},
        ),
        _causal(
            "arithmetic", {"data.task": "arithmetic", "data.eval_limit": 128}, _variants(8, attention, _DECIDING), "lora-R8",
            steps=50, rows=8, more={"eval.max_new_tokens": 8},
        ),
        _causal("e2e", {"data.task": "e2e"}, _variants(8, attention, few), "lora-R8", steps=1000, rows=1),
        _causal(
            "docstrings", {"data.path": "builtin:docstrings", "data.limit": 128}, _variants(8, attention, few), "lora-R8",
            steps=4 * 128 // 8, rows=8,
        ),
        _glue(),
    )  # fmt: skip


def _causal(
    task: str,
    data: dict[str, Any],
    variants: dict[str, Variant],
    reference: str,
    *,
    steps: int,
    rows: int,
    more: Mapping[str, Any] | None = None,
) -> Study:
    """``steps`` of ``rows`` with SmolLM2; the loss on validation rows chooses the rate."""
    base = {
        **table4.MINI_BASE,
        "train.max_steps": steps,
        "train.batch_size": rows,
        "train.save_steps": 1000,
        **(more or {}),
    }
    return Study(f"binding-{task}", base, {task: data}, variants, search=_SEARCH, metric="loss", reference=reference)


def _glue() -> Study:
    """MiniLM as in Table 2's mini scale, which LoRA of rank 16 has learned."""
    tasks = {
        "sst2": {**MINI_TASKS["sst2"], "train.max_steps": 300},
        "qnli": {"data.task": "qnli", "data.holdout": 500, "train.max_steps": 150, "data.eval_limit": 1500},
    }
    base = {**MINI_BASE, "train.eval_steps": None}
    variants = _variants(8, MINI_TARGETS, _DECIDING, **MINI_HEAD)
    return Study("binding-glue", base, tasks, variants, search=_SEARCH, reference="lora-R8")

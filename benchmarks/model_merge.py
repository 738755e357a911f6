"""Merging and unmerging a whole model beside one copy of its weights: ``python benchmarks/model_merge.py``; five minutes."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duallora.bench import methods
from duallora.bench.store import Store, default_device
from duallora.bench.timing import Subject, figures, interleave
from duallora.store.models import load_model

COPY = "copy of the weights"
VERBS = ("merge", "unmerge", "merge_and_unload")


def bench(output: Path, device: str | None, rounds: int, seconds: float, **key: Any) -> dict[str, Any]:
    """Measures what ``output`` lacks: merging in fp32 and bf16; ``key`` is {"model", "rank"}."""
    where = default_device(device)
    keys: list[dict[str, Any]] = [{**key, "what": "merge", "dtype": dtype} for dtype in ("float32", "bfloat16")]
    store = Store(output, "merge", where)
    return store.measure(keys, lambda key: merging(key, where, rounds=rounds, seconds=seconds), summary, None)


def summary(cell: dict[str, Any]) -> str:
    key, found = cell["cell"], cell["methods"]
    ratios = [f"{verb} {found[f'{methods.EXACT}: {verb}']['ratio_to_copy']['median']:.2f}" for verb in VERBS]
    return f"{key['dtype']}: {', '.join(ratios)} x one copy"


def _base(key: Mapping[str, Any], device: torch.device) -> Any:
    model, _ = load_model(key["model"], "generate", dtype=key["dtype"])
    return model.to(device).requires_grad_(False)


def _adapters(key: Mapping[str, Any]) -> dict[str, methods.Method]:
    known = methods.methods(key["rank"], "all-linear", getattr(torch, key["dtype"]))
    return {name: known[name] for name in (methods.EXACT, methods.LORA)}


def merging(key: Mapping[str, Any], device: torch.device, *, rounds: int, seconds: float) -> dict[str, Any]:
    """merge_adapter, unmerge_adapter and merge_and_unload of all linear layers, and a copy of the same weights."""
    base = _base(key, device)
    subjects: dict[str, Subject] = {}
    weights: list[Tensor] = []
    for name, method in _adapters(key).items():
        model = methods.adapt(copy.deepcopy(base), method).eval()
        weights = weights or [layer.get_base_layer().weight.data for layer in _layers(model)]
        subjects |= {f"{name}: {verb}": subject for verb, subject in _verbs(model).items()}
    room = [torch.empty_like(weight) for weight in weights]

    def copied() -> None:
        for weight, place in zip(weights, room, strict=True):
            place.copy_(weight)

    times = interleave({COPY: Subject(copied), **subjects}, device, rounds=rounds, seconds=seconds)
    return {
        "layers": len(weights),
        "weight_bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "methods": figures(times, {"copy": COPY}),
    }


def _layers(model: Any) -> list[Any]:
    """The adapted layers."""
    return [module for module in model.modules() if hasattr(module, "get_base_layer") and hasattr(module, "merge")]


def _verbs(model: Any) -> dict[str, Subject]:
    def unmerged() -> None:
        if _layers(model)[0].merged:
            model.unmerge_adapter()

    def merged() -> None:
        if not _layers(model)[0].merged:
            model.merge_adapter()

    spent: list[Any] = []  # merge_and_unload uses its model up

    def fresh() -> None:
        unmerged()
        spent[:] = [copy.deepcopy(model)]

    return {
        "merge": Subject(lambda: model.merge_adapter(), before=unmerged),
        "unmerge": Subject(lambda: model.unmerge_adapter(), before=merged),
        "merge_and_unload": Subject(lambda: spent.pop().merge_and_unload(), before=fresh),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/bench/merge.json"))
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--rank", type=int, default=8, help="Dual LoRA's r; LoRA has 2 r")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=90.0, help="after which no further round of a cell is begun")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    bench(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()

"""Time and peak memory of a training step of SmolLM2-135M, all linear layers adapted, against PEFT's methods."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from duallora.bench import memory, methods
from duallora.bench.scene import Scene, Stage
from duallora.bench.store import Store, default_device
from duallora.bench.timing import Subject, figures, interleave, replayed

DTYPES = ("float32", "bfloat16")


def scenes(
    dtypes: Sequence[str] = (), *, checkpointing: bool = False, masked: bool = False, full: bool = False, **sizes: Any
) -> list[Scene]:
    """The scenes asked for; without a wish the four of the docs; with ``full`` all eight."""
    if full:
        wanted = list(itertools.product(DTYPES, (False, True), (False, True)))
    elif dtypes or checkpointing or masked:
        wanted = [(dtype, checkpointing, masked) for dtype in dtypes or DTYPES]
    else:
        wanted = [(dtype, False, False) for dtype in DTYPES] + [("float32", True, False), ("float32", False, True)]
    return [Scene(dtype=dtype, checkpointing=again, masked=mask, **sizes) for dtype, again, mask in wanted]


def bench(
    output: Path,
    chosen: Sequence[Scene],
    *,
    rounds: int = 15,
    seconds: float = 240.0,
    with_memory: bool = True,
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures every scene that ``output`` lacks: about ``seconds`` of rounds, then each method's memory by itself.

    Memory is not asked for on masked batches, whose shape is an accident of the rows drawn.
    """
    where = default_device(device)
    store = Store(output, "step", where)
    with_memory = with_memory and memory.can_measure(where)

    def is_whole(cell: dict[str, Any] | None) -> bool:
        asked = with_memory and cell is not None and not cell["cell"]["masked"]
        return cell is not None and (not asked or "peak_bytes" in cell["methods"][methods.LORA])

    def one(key: Mapping[str, Any]) -> dict[str, Any]:
        scene = Scene(**key, device=str(where))
        cell = store.find(key) or store.add(key, measure(scene, rounds=rounds, seconds=seconds))
        peaks = with_memory and not scene.masked
        return {**cell, "methods": with_peaks(asdict(scene), cell["methods"])} if peaks else cell

    keys = [{name: value for name, value in asdict(scene).items() if name != "device"} for scene in chosen]
    return store.measure(keys, one, summary, console, is_done=is_whole)


def summary(cell: dict[str, Any]) -> str:
    key, exact = cell["cell"], cell["methods"][methods.EXACT]
    kind = f"{key['dtype']}{', checkpointing' if key['checkpointing'] else ''}{', masked' if key['masked'] else ''}"
    lora = cell["methods"][methods.LORA]["median_s"]
    ratio = exact["ratio_to_lora"]["median"]
    return f"{kind}: duallora {ratio:.2f} x LoRA's {lora:.2f} s, {exact['rounds']} rounds"


def measure(scene: Scene, *, rounds: int, seconds: float) -> dict[str, Any]:
    """One cell, times only: ``batch`` (its shape and shares) and ``methods`` -> figures; on a GPU ``graph`` holds those of
    the whole step as a CUDA graph that is replayed, and ``skipped`` says what cannot be captured."""
    stage = Stage(scene)
    trials = {name: stage.trial(name) for name in stage.names()}
    subjects = {name: Subject(trial.step) for name, trial in trials.items()}
    times = interleave(subjects, stage.device, rounds=rounds, seconds=seconds)
    over = {"lora": methods.LORA, "gemms": methods.FLOOR, "dora": methods.DORA}
    found = figures(times, over)
    on_gpu = trials if stage.device.type == "cuda" else ()
    steps = {name: Subject(stage.trial(name, capturable=True).step) for name in on_gpu}
    graphs, why = replayed(steps, stage.device, over, rounds=rounds, seconds=seconds)
    facts: dict[str, dict[str, Any]] = {name: {"parameters": trials[name].parameters, **found[name]} for name in trials}
    for name, graph in graphs.items():
        facts[name]["graph"] = graph
    return {
        "batch": stage.facts(),
        "model_bytes": stage.model_bytes(),
        "methods": facts,
        **({"skipped": why} if why else {}),
    }


def with_peaks(scene: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The methods with ``peak_bytes`` (above the resident model) and ``peak_ratio_to_lora``."""
    # On a GPU the allocator counts for each process apart; on a CPU the system's pages are common to all.
    at_once = 1 if str(scene["device"]) == "cpu" else 4
    with ThreadPoolExecutor(at_once) as pool:
        measured = pool.map(lambda name: memory.measured(scene, name)["peak_bytes"], found)
        peaks = dict(zip(found, measured, strict=True))
    lora = peaks[methods.LORA]
    return {
        name: {**facts, "peak_bytes": peaks[name], "peak_ratio_to_lora": peaks[name] / lora}
        for name, facts in found.items()
    }

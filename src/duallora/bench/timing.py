"""Times of competitors that take turns in one process, and the figures made from them."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from duallora.errors import first_line

LEAST_ROUNDS = 3


class Subject(NamedTuple):
    """One competitor: ``run`` is timed, ``before`` puts the scene in order ahead of each run and is not.

    With ``times`` > 1 that many runs follow one another before the clock is read, ``before`` in between, as steps of a
    training do: on a GPU the host prepares the next run while the device works on this one.
    """

    run: Callable[[], object]
    before: Callable[[], object] | None = None
    times: int = 1


def interleave(
    subjects: Mapping[str, Subject],
    device: torch.device,
    *,
    rounds: int = 15,
    seconds: float = math.inf,
    drop: int = 1,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds of each subject in each round. A round runs every subject once, in an order drawn anew.

    The first ``drop`` rounds warm up and are forgotten. Then at most ``rounds``, and no new one once ``seconds`` have
    been spent on them and `LEAST_ROUNDS` are in.
    """
    order, draw = list(subjects), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in subjects}
    gc.collect()
    gc.freeze()  # collections between rounds then look at the rounds' own garbage alone
    gc.disable()
    try:
        for _ in range(drop):
            for name in order:
                timed(subjects[name], device)
        begin = time.perf_counter()
        for done in range(rounds):
            if done >= LEAST_ROUNDS and (time.perf_counter() - begin) * (done + 1) / done > seconds:
                break
            gc.collect()
            draw.shuffle(order)
            for name in order:
                times[name].append(timed(subjects[name], device))
    finally:
        gc.enable()
        gc.unfreeze()
    return times


def timed(subject: Subject, device: torch.device) -> float:
    """Seconds a run, from an idle device to an idle device."""
    run, before, times = subject
    if before is not None:
        before()
    synchronize(device)
    begin = time.perf_counter()
    for number in range(times):
        if number and before is not None:
            before()
        run()
    synchronize(device)
    return (time.perf_counter() - begin) / times


def captured(subject: Subject) -> Subject:
    """The subject as a CUDA graph that is replayed: what the device does, without the host that launches it.

    Raises RuntimeError where it cannot be captured: it waits for the device, say.
    """
    run, before, times = subject
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and settles what is allocated
            if before is not None:
                before()
            run()
    torch.cuda.current_stream().wait_stream(stream)
    if before is not None:
        before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return Subject(graph.replay, times=times)


def replayed(
    subjects: Mapping[str, Subject], device: torch.device, over: Mapping[str, str], *, rounds: int, seconds: float
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """`figures` of those that can be captured, and "graph of NAME" -> why the others cannot; nothing but on a GPU."""
    found, why = {}, {}
    for name, subject in subjects.items() if device.type == "cuda" else ():
        try:
            found[name] = captured(subject)
        except RuntimeError as error:
            why[f"graph of {name}"] = first_line(error)[:200]
    return figures(interleave(found, device, rounds=rounds, seconds=seconds), over) if found else {}, why


def back_to_back(device: torch.device) -> int:
    """``Subject.times`` for what takes a GPU about as long as the host needs to launch it."""
    return 20 if device.type == "cuda" else 1


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(values: Sequence[float], over: Sequence[float]) -> dict[str, Any]:
    """Ratio of the medians, and the quartiles of the ratio round by round: a slow spell hits both alike and cancels."""
    by_round = [value / other for value, other in zip(values, over, strict=True)]
    return {"median": statistics.median(values) / statistics.median(over), "quartiles": quartiles(by_round)}


def quartiles(values: Sequence[float]) -> list[float]:
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def figures(times: Mapping[str, Sequence[float]], over: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Per subject: median and quartiles in seconds, the number of rounds, and ``ratio_to_<key>`` for each key -> subject in ``over``."""
    found = {}
    for name, values in times.items():
        ratios = {f"ratio_to_{key}": ratio(values, times[base]) for key, base in over.items() if base in times}
        own = {"median_s": statistics.median(values), "quartiles_s": quartiles(values), "rounds": len(values)}
        found[name] = {**own, **ratios}
    return found

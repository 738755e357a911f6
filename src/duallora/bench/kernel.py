"""The two passes over W of each backend on this device: first whether they are right, then how fast they are.

A backend is a module with `supports`, `build_weight` and `weight_and_gradients` (see `duallora.ops.recompute`). Its
results are held against the formula in float64; where they are further off than `LIMITS`, no time of it is reported.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from duallora.bench.store import Store, default_device
from duallora.bench.timing import Subject, back_to_back, figures, interleave
from duallora.core.equation import Update
from duallora.errors import IntegrityError
from duallora.ops import recompute
from duallora.ops.backends import kernel
from duallora.terminal import say

WIDTHS, RANKS, DTYPES = (576, 1024, 2048, 4096), (16,), ("float32", "bfloat16")
# |found - exact| / |exact| over all elements: a few roundings of float32 sums; rounding W' to bfloat16 alone gives 1e-3.
LIMITS = {"float32": 1e-6, "bfloat16": 4e-3}
TOKENS = 2048  # rows of x in the product that the passes are held against
MEMCPY, GEMM = "memcpy", "GEMM"


def available(device: torch.device) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The backends of this device, and why another one is not among them."""
    found, absent = {"recompute": recompute}, {}
    name = "triton" if device.type == "cuda" else "cpu"
    try:
        found[name] = kernel(name)
    except RuntimeError as error:
        absent[name] = str(error)
    return found, absent


def bench(
    output: Path,
    *,
    widths: Sequence[int] = WIDTHS,
    ranks: Sequence[int] = RANKS,
    dtypes: Sequence[str] = DTYPES,
    rounds: int = 15,
    seconds: float = 10.0,
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Checks and times every backend on every cell that ``output`` lacks.

    Raises:
        IntegrityError: a backend's results are wrong; the file then holds its errors and no time of it.
    """
    console = console or Console()
    where = default_device(device)
    backends, absent = available(where)
    for name, reason in absent.items():
        say(console, name, f"not here: {reason}")
    store = Store(output, "kernel", where)
    store.content["absent"] = absent
    grid = itertools.product(widths, ranks, dtypes, (False, True))
    keys = [dict(zip(("width", "rank", "dtype", "dora"), cell, strict=True)) for cell in grid]
    one = partial(measure, backends, device=where, rounds=rounds, seconds=seconds)
    done = store.measure(keys, one, summary, console, is_done=lambda cell: red(cell) == {})
    wrong = [
        f"{name} at {_words(key)}: {', '.join(f'{what} {error:.1e}' for what, error in errors.items())}"
        for key in keys
        for name, errors in (red(store.find(key)) or {}).items()
    ]
    if wrong:
        raise IntegrityError(
            f"wrong results; relative errors of at most {LIMITS} were expected, so no time is reported for\n"
            + "\n".join(wrong)
        )
    return done


def red(cell: Mapping[str, Any] | None) -> dict[str, dict[str, float]] | None:
    """Backend -> its errors above the limit (NaN is above it); None where there is no cell."""
    if cell is None:
        return None
    limit = LIMITS[cell["cell"]["dtype"]]
    found = {
        name: {what: error for what, error in backend["errors"].items() if not error <= limit}
        for name, backend in cell["backends"].items()
    }
    return {name: errors for name, errors in found.items() if errors}


def summary(cell: dict[str, Any]) -> str:
    words = []
    for name, backend in cell["backends"].items():
        worst = f"error {max(backend['errors'].values()):.0e}"
        if "build" in backend:
            worst += f", {backend['build']['median_s'] * 1e3:.2f} + {backend['gradients']['median_s'] * 1e3:.2f} ms"
        words.append(f"{name} {worst}")
    return f"{_words(cell['cell'])}: {'; '.join(words)}"


def _words(key: Mapping[str, Any]) -> str:
    return f"{key['width']} r={key['rank']} {key['dtype']}{' dora' if key['dora'] else ''}"


class Problem(NamedTuple):
    """W, G [out, in] in the dtype under test, factors in float32, m [out] or None."""

    W: Tensor
    G: Tensor
    update: Update
    m: Tensor | None


def problem(width: int, rank: int, dtype: torch.dtype, device: torch.device, *, dora: bool, seed: int = 0) -> Problem:
    """Random values for which float32 forms B A and D C without rounding, so that no sign hangs on a last bit.

    A and C have 12 bits and a sign, B and D 7: the sums of up to 32 products stay below 2^24 in any order, while a
    product taken in TF32 (11 bits) or bfloat16 (8 bits) is off. A row of B and one of D are zero: ReLU'(0), Sign(0).
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(shape: tuple[int, int], bits: int) -> Tensor:
        bound = 1 << bits
        return torch.randint(1 - bound, bound, shape, generator=generator).float().div_(bound)

    A, C = (integers((rank, width), 12) for _ in range(2))
    B, D = (integers((width, rank), 7) for _ in range(2))
    B[1], D[2] = 0, 0
    W = torch.randn(width, width, generator=generator)
    G = torch.randn(width, width, generator=generator).mul_(0.3)  # about half of G M lies outside of the clip's bounds
    m = W.norm(dim=1) * (0.5 + torch.rand(width, generator=generator)) if dora else None
    update = Update(A.to(device), B.to(device), C.to(device), D.to(device), 1.7)
    return Problem(W.to(device, dtype), G.to(device, dtype), update, None if m is None else m.to(device))


def exact(case: Problem) -> dict[str, Tensor]:
    """Weight and gradients in float64, from the one formula; the norm is a constant of the backward."""
    A, B, C, D = (factor.double() for factor in case.update[:4] if factor is not None)
    update = case.update._replace(A=A, B=B, C=C, D=D)
    V, G = case.W.double() + update.delta(), case.G.double()
    found = {"weight": V}
    if case.m is not None:
        norm = V.norm(dim=1, keepdim=True)
        scale = case.m.double()[:, None] / norm
        found = {"weight": scale * V, "dm": (G * V).sum(1) / norm[:, 0]}
        G = scale * G
    _, dA, dB, dC, dD = update.backward(G)
    assert dC is not None
    assert dD is not None
    return {**found, "dA": dA, "dB": dB, "dC": dC, "dD": dD}


def passes(backend: ModuleType, case: Problem) -> tuple[Callable[[], tuple], Callable[[], list[Tensor]]]:
    """The two passes of ``backend`` on the case, as calls without arguments."""
    options: dict[str, Any] = {"fan_in_fan_out": False, "dtype": case.W.dtype, "m": case.m}
    _, norm = backend.build_weight(case.W, case.update, **options)
    return (
        lambda: backend.build_weight(case.W, case.update, **options),
        lambda: backend.weight_and_gradients(case.G, case.W, case.update, **options, norm=norm),
    )


def errors(backend: ModuleType, case: Problem, expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of each result; the weight's is the larger of the two passes'."""
    build, gradients = passes(backend, case)
    first, (second, *rest) = build()[0], gradients()
    found = {name: relative(value, expected[name]) for name, value in zip(("dA", "dB", "dC", "dD"), rest, strict=False)}
    if "dm" in expected:
        found["dm"] = relative(rest[4], expected["dm"])
    worst = [relative(weight, expected["weight"]) for weight in (first, second)]
    return {"weight": math.nan if any(map(math.isnan, worst)) else max(worst), **found}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def measure(
    backends: Mapping[str, ModuleType], key: Mapping[str, Any], device: torch.device, *, rounds: int, seconds: float
) -> dict[str, Any]:
    """One cell: per backend its errors and, where they are within the limit, both times; beside memcpy and one GEMM."""
    width, rank, dtype = key["width"], key["rank"], getattr(torch, key["dtype"])
    case = problem(width, rank, dtype, device, dora=key["dora"])
    expected = exact(case)
    supported = {name: backend for name, backend in backends.items() if backend.supports(case.update, dtype)}
    found: dict[str, dict[str, Any]] = {
        name: {"errors": errors(backend, case, expected)} for name, backend in supported.items()
    }
    del expected
    wrong = red({"cell": key, "backends": found}) or {}
    x, copy = torch.randn(TOKENS, width).to(device, dtype), torch.empty_like(case.W)
    calls: dict[str, Callable[[], object]] = {MEMCPY: lambda: copy.copy_(case.W), GEMM: lambda: F.linear(x, case.W)}
    for name, backend in supported.items():
        if name not in wrong:
            calls[f"{name} build"], calls[f"{name} gradients"] = passes(backend, case)
    subjects = {name: Subject(call, times=back_to_back(device)) for name, call in calls.items()}
    times = interleave(subjects, device, rounds=rounds, seconds=seconds)
    measured = figures(times, {"memcpy": MEMCPY, "gemm": GEMM})
    measured[GEMM]["gflops"] = 2 * TOKENS * width * width / measured[GEMM]["median_s"] / 1e9
    for name in supported:
        if name not in wrong:
            # B A and D C; the gradients take them again and four products more.
            for what, operations in (("build", 4 * rank * width * width), ("gradients", 12 * rank * width * width)):
                found[name][what] = one = measured[f"{name} {what}"]
                one["gflops"] = operations / one["median_s"] / 1e9
    return {"backends": found, "memcpy": measured[MEMCPY], "gemm": measured[GEMM]}

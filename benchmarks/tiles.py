"""Times candidate tiles of the Triton kernels on this GPU: ``python benchmarks/tiles.py [-o FILE]``.

Where the table ``GRADIENTS`` and ``BUILD`` in duallora/ops/triton.py come from. Candidates are compiled in processes of
their own, as many as there are cores, and compared with the torch operators; those that spill or are wrong are not
timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from duallora.bench.kernel import problem
from duallora.bench.store import environment
from duallora.ops import recompute
from duallora.ops import triton as kernels
from duallora.store import record

WIDTH = 4096
SHAPES = [(torch.bfloat16, 16), (torch.bfloat16, 32), (torch.float32, 16), (torch.float16, 16)]


def candidates(which: str, dtype: torch.dtype) -> list[kernels.Tile]:
    if which == "build":
        sizes = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2), (True,))
    elif dtype == torch.float32:
        sizes = itertools.product((16, 32, 64), (16, 32, 64), (2, 4, 8), (1, 2), (True, False))
    else:
        sizes = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2), (True, False))
    tiles = [kernels.Tile(*size) for size in sizes]
    return [t for t in tiles if 8 <= t.rows * t.columns // (32 * t.warps) <= (64 if which == "build" else 32)]


BUILD = kernels.BUILD, kernels.BUILD_HEAVY


def use(which: str, tile: kernels.Tile) -> None:
    kernels.BUILD, kernels.BUILD_HEAVY = (tile, tile) if which == "build" else BUILD
    if which == "gradients":
        every = kernels.Gradients(tile, tile, tile)
        kernels.GRADIENTS = {name: dict.fromkeys(kernels.DTYPES, every) for name in kernels.GRADIENTS}


@functools.cache
def scene(which: str, dtype: torch.dtype, rank: int) -> tuple[Callable[[Any], Any], Any]:
    """(the pass, by a backend; what the torch operators make of it)"""
    case = problem(WIDTH, rank, dtype, torch.device("cuda"), dora=False)
    given = {"fan_in_fan_out": False, "dtype": dtype}

    def build(backend: Any) -> Any:
        return backend.build_weight(case.W, case.update, **given)[:1]

    def gradients(backend: Any) -> Any:
        return backend.weight_and_gradients(case.G, case.W, case.update, **given)

    run = build if which == "build" else gradients
    return run, run(recompute)


def compiled(job: tuple[str, torch.dtype, int, kernels.Tile]) -> dict[str, Any]:
    """Spills and error of a candidate; the compiled code stays in triton's cache."""
    which, dtype, rank, tile = job
    found: list[Any] = []
    run = JITFunction.run

    def remember(self, *args: Any, **kwargs: Any) -> Any:
        found.append(run(self, *args, **kwargs))
        return found[-1]

    JITFunction.run = remember
    try:
        use(which, tile)
        call, reference = scene(which, dtype, rank)
        results = zip(call(kernels), reference, strict=True)
        errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in results if a.numel()]
        return {"error": max(errors), "spills": found[0].n_spills, "registers": found[0].n_regs}
    except Exception as error:  # a candidate too large for the shared memory, say
        return {"failed": f"{type(error).__name__}: {str(error)[:100]}"}
    finally:
        JITFunction.run = run


def timed(which: str, dtype: torch.dtype, rank: int, tile: kernels.Tile) -> float:
    """Median, microseconds."""
    use(which, tile)
    call, _ = scene(which, dtype, rank)
    return triton.testing.do_bench(lambda: call(kernels), warmup=5, rep=25, return_mode="median") * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/bench/gpu/tiles.json"))
    output = parser.parse_args().output
    jobs = [
        (which, dtype, rank, tile)
        for dtype, rank in SHAPES
        for which in ("build", "gradients")
        for tile in candidates(which, dtype)
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        facts = list(pool.map(compiled, jobs))
    content: dict[str, Any] = {"kind": "tiles", **environment(torch.device("cuda")), "width": WIDTH, "tiles": []}
    for (which, dtype, rank, tile), fact in zip(jobs, facts, strict=True):
        row = {"pass": which, "dtype": str(dtype).removeprefix("torch."), "rank": rank, **tile._asdict(), **fact}
        if "failed" not in fact and not fact["spills"] and fact["error"] < 1e-2:
            row["us"] = timed(which, dtype, rank, tile)
        content["tiles"].append(row)
    content["programs"] = []
    for which, (dtype, rank) in itertools.product(("build", "gradients"), SHAPES):
        name = str(dtype).removeprefix("torch.")
        rows = [r for r in content["tiles"] if (r["pass"], r["dtype"], r["rank"]) == (which, name, rank)]
        best = sorted((r for r in rows if "us" in r), key=lambda r: r["us"])[:5]
        print(f"{which} {name} r={rank}: of {len(rows)}, {sum('us' in r for r in rows)} timed")
        for r in best:
            print(
                "  {us:7.1f} us  {rows}x{columns}, {warps} warps, {stages} stages, hoist {hoist}; {registers} registers".format(
                    **r
                )
            )
        for programs in (256, 512, 2048, 4096) if which == "gradients" else ():
            tile = kernels.Tile(**{f: best[0][f] for f in kernels.Tile._fields} | {"programs": programs})
            us = timed(which, dtype, rank, tile)
            content["programs"].append({"dtype": name, "rank": rank, **tile._asdict(), "us": us})
            print(f"  {us:7.1f} us  with {programs} programs")
    record.write_json(output, content)


if __name__ == "__main__":
    main()

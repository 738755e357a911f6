"""What a layer asks of the host: one so small, [16, 16] on four rows, that there is next to nothing to compute.

On a GPU this is what a layer takes at few tokens, whatever its kernels do (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from duallora.bench import methods
from duallora.bench.store import Store, default_device
from duallora.bench.timing import Subject, figures, interleave

WIDTH, TOKENS, RANK, TIMES = 16, 4, 4, 200
BARE = "F.linear"
PASSES = ("evaluation", "forward", "forward and backward")


def bench(
    output: Path,
    *,
    rounds: int = 15,
    seconds: float = 25.0,
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures each of `PASSES` that ``output`` lacks: microseconds a call of the layer, `TIMES` calls a round."""
    where = default_device(device)
    keys = [{"pass": name, "width": WIDTH, "tokens": TOKENS, "rank": RANK, "dtype": "float32"} for name in PASSES]
    one = partial(measure, rounds=rounds, seconds=seconds, device=where)
    return Store(output, "host", where).measure(keys, lambda key: one(key["pass"]), summary, console)


def summary(cell: dict[str, Any]) -> str:
    exact = cell["methods"][methods.EXACT]
    ratio = exact["ratio_to_lora"]["median"]
    return f"{cell['cell']['pass']}: {exact['median_s'] * 1e6:.0f} us, {ratio:.2f} x LoRA, {exact['rounds']} rounds"


def measure(what: str, *, rounds: int, seconds: float, device: torch.device, times: int = TIMES) -> dict[str, Any]:
    """One cell: ``methods`` -> figures of Dual LoRA with a ramp, LoRA, DoRA and the bare layer."""
    torch.manual_seed(0)
    x, dY = torch.randn(TOKENS, WIDTH, device=device), torch.randn(TOKENS, WIDTH, device=device)
    x.requires_grad_(what != PASSES[0])
    found = methods.methods(RANK, ["0"], torch.float32)
    rivals = {name: found[name] for name in (methods.LORA, methods.DORA)}
    rivals[methods.EXACT] = methods.dual(RANK, ["0"])
    subjects = {BARE: _subject(what, _linear(device)[0], x, dY, times)}
    for name, method in rivals.items():
        model: Any = _linear(device)
        methods.adapt(model, method)  # in place
        subjects[name] = _subject(what, model.train()[0], x, dY, times)
    return {"methods": figures(interleave(subjects, device, rounds=rounds, seconds=seconds), {"lora": methods.LORA})}


def _linear(device: torch.device) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(device).requires_grad_(False)


def _subject(what: str, layer: Callable[[Tensor], Tensor], x: Tensor, dY: Tensor, times: int) -> Subject:
    def evaluate() -> None:
        with torch.no_grad():
            layer(x)

    calls = (evaluate, lambda: layer(x), lambda: layer(x).backward(dY))
    return Subject(calls[PASSES.index(what)], times=times)

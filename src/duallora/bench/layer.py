"""Forward and backward of one adapted linear layer [width, width] on ``tokens`` rows, against the three bare products.

The floor of every method with a full weight gradient is y = x W^T, dx = dY W and G = dY^T x: 6 n d k operations, LoRA
needs 4 n d k. Layers share one frozen W and have no bias.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from duallora.bench import methods
from duallora.bench.store import Store, default_device
from duallora.bench.timing import Subject, back_to_back, figures, interleave, replayed
from duallora.ops import dual_linear

DEFAULT = {"widths": (576, 1024, 2048), "tokens": (512, 2048), "ranks": (16,)}  # about ten minutes on two cores
FULL = {"widths": (576, 1024, 2048, 4096), "tokens": (512, 2048, 8192), "ranks": (8, 16, 32)}
DTYPES = ("float32", "bfloat16")
COMPILED = "torch.compile of plain"


def bench(
    output: Path,
    *,
    widths: Sequence[int] = DEFAULT["widths"],
    tokens: Sequence[int] = DEFAULT["tokens"],
    ranks: Sequence[int] = DEFAULT["ranks"],
    dtypes: Sequence[str] = DTYPES,
    rounds: int = 15,
    seconds: float = 25.0,
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures every cell of the grid that ``output`` lacks; at most ``rounds`` rounds and about ``seconds`` a cell."""
    where = default_device(device)
    grid: list[dict[str, Any]] = [
        {"width": width, "tokens": n, "rank": rank, "dtype": dtype}
        for width, n, rank, dtype in itertools.product(widths, tokens, ranks, dtypes)
    ]

    def one(key: Mapping[str, Any]) -> dict[str, Any]:
        # Compiling takes longer than all the rest of a cell.
        compiles = key["width"] in DEFAULT["widths"] and key["tokens"] == 2048 and key["rank"] in DEFAULT["ranks"]
        return measure(**key, rounds=rounds, seconds=seconds, device=where, compiles=compiles)

    return Store(output, "layer", where).measure(grid, one, summary, console)


def summary(cell: dict[str, Any]) -> str:
    key, exact = cell["cell"], cell["methods"][methods.EXACT]
    return (
        f"{key['width']} x {key['tokens']} r={key['rank']} {key['dtype']}: duallora "
        f"{exact['ratio_to_lora']['median']:.2f} x LoRA, {exact['ratio_to_gemms']['median']:.2f} x three GEMMs, "
        f"{exact['rounds']} rounds"
    )


def measure(
    width: int,
    tokens: int,
    rank: int,
    dtype: str,
    *,
    rounds: int,
    seconds: float,
    device: torch.device,
    compiles: bool = False,
) -> dict[str, Any]:
    """One cell: ``methods`` -> figures, and ``skipped`` -> why a competitor is not among them.

    On a GPU ``graph`` holds a method's figures when it is replayed as a CUDA graph, where the host no longer counts.
    """
    kind: torch.dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(width, width).div_(width**0.5).to(device, kind), requires_grad=False)
    x = torch.randn(tokens, width).to(device, kind).requires_grad_()
    dY = torch.randn(tokens, width).to(device, kind)

    def gemms() -> None:
        # Held until all three are done, as a training step holds them.
        _ = F.linear(x.detach(), W), dY @ W, dY.T @ x.detach()

    subjects = {methods.FLOOR: Subject(gemms, times=back_to_back(device))}
    facts: dict[str, dict[str, Any]] = {methods.FLOOR: {"parameters": 0}}
    skipped: dict[str, str] = {}
    for name, method in methods.layer_methods(rank, ["0"], kind, width).items():
        layer = _layer(W, method)
        subjects[name] = _subject(layer, x, dY, methods.trained(layer))
        facts[name] = {"parameters": methods.count(layer), "saved_bytes": saved_bytes(layer, x, dY)}
    if compiles:
        reason = "no C++ compiler" if device.type == "cpu" and shutil.which("g++") is None else ""
        reason = reason or _add_compiled(subjects, facts, W, x, dY, rank)
        if reason:
            skipped[COMPILED] = reason
    times = interleave(subjects, device, rounds=rounds, seconds=seconds)
    over = {"lora": methods.LORA, "gemms": methods.FLOOR}
    found = figures(times, over)
    graphs, why = replayed(subjects, device, over, rounds=rounds, seconds=seconds)
    facts = {name: fact | ({"graph": graphs[name]} if name in graphs else {}) for name, fact in facts.items()}
    skipped |= why
    return {"methods": {name: {**facts[name], **found[name]} for name in subjects}, "skipped": skipped}


def _layer(W: nn.Parameter, method: methods.Method) -> nn.Module:
    """The adapted layer itself, without the model around it, over the shared weight."""
    base = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta", dtype=W.dtype)
    base.weight = W
    model = nn.Sequential(base)
    methods.adapt(model, method)  # in place
    return model[0].train()


def _subject(run: Callable[[Tensor], Tensor], x: Tensor, dY: Tensor, parameters: Sequence[Tensor]) -> Subject:
    def clear() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None

    return Subject(lambda: run(x).backward(dY), before=clear, times=back_to_back(x.device))


def _add_compiled(
    subjects: dict[str, Subject], facts: dict[str, dict], W: Tensor, x: Tensor, dY: Tensor, rank: int
) -> str:
    """The plain formula through inductor; the time of compiling apart. Returns why not, where inductor gives up."""
    width = W.shape[0]
    shapes = [(rank, width), (width, rank)] * 2
    factors = [nn.Parameter(torch.randn(shape).mul_(0.02).to(W.device)) for shape in shapes]

    @torch.compile(dynamic=False)
    def plain(x: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return dual_linear(x, W, None, A, B, C, D, 2.0, backend="reference")

    subject = _subject(lambda x: plain(x, *factors), x, dY, factors)
    torch._dynamo.reset()
    begin = time.perf_counter()
    try:
        subject.run()
    except torch._dynamo.exc.TorchDynamoException as error:  # what inductor raises arrives wrapped in it
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    parameters = sum(factor.numel() for factor in factors)
    facts[COMPILED] = {"parameters": parameters, "compile_s": time.perf_counter() - begin}
    subjects[COMPILED] = subject
    return ""


def saved_bytes(layer: nn.Module, x: Tensor, dY: Tensor) -> int:
    """Bytes autograd keeps from forward to backward, parameters and x left out."""
    seen: dict[int, int] = {}
    known = {tensor.data_ptr() for tensor in (x, *layer.parameters(), *layer.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            seen[tensor.data_ptr()] = max(seen.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).backward(dY)
    return sum(seen.values())

"""Time and saved memory of one layer, forward + backward: Dual LoRA's two backends, the bare products, PEFT's methods.

One process, the competitors interleaved, medians of interleaved rounds; ratios within the run are what counts.
All methods have the same number of trainable parameters (DoRA: one vector more).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

import duallora
from duallora.train.record import environment, write_json

R = 16  # LoRA's rank; Dual LoRA has r1 = r2 = R / 2


def layer(width: int, dtype: torch.dtype, config: peft.PeftConfig) -> nn.Module:
    """One adapted [width, width] layer with every factor non-zero, so that no product is trivial."""
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(width, width, dtype=dtype)), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def bare(width: int, dtype: torch.dtype) -> Callable[[Tensor, Tensor], None]:
    """The three products any method with a full weight gradient needs."""
    W = torch.randn(width, width, dtype=dtype) / width**0.5

    def run(x: Tensor, dY: Tensor) -> None:
        _ = x @ W.T, dY @ W, dY.T @ x

    return run


def competitors(width: int, dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor], None]]:
    dual = {"r": R // 2, "target_modules": ["0"], "init_weights": False}
    configs = {
        "duallora recompute": duallora.DualLoraConfig(**dual, backend="recompute"),
        "duallora reference": duallora.DualLoraConfig(**dual, backend="reference"),
        "peft lora": peft.LoraConfig(r=R, target_modules=["0"]),
        "peft dora": peft.LoraConfig(r=R, target_modules=["0"], use_dora=True),
    }
    if hasattr(peft, "HiraConfig"):
        configs["peft hira"] = peft.HiraConfig(r=R, target_modules=["0"])

    def step_of(module: nn.Module) -> Callable[[Tensor, Tensor], None]:
        def run(x: Tensor, dY: Tensor) -> None:
            module(x).backward(dY)

        return run

    runs = {name: step_of(layer(width, dtype, config)) for name, config in configs.items()}
    return {"three products": bare(width, dtype), **runs}


def saved_bytes(run: Callable[[Tensor, Tensor], None], x: Tensor, dY: Tensor) -> int:
    """Bytes autograd keeps between forward and backward, parameters and x left out."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.data_ptr() != x.data_ptr():
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x, dY)
    return sum(seen.values())


def measure(width: int, tokens: int, dtype: torch.dtype, rounds: int) -> list[dict]:
    runs = competitors(width, dtype)
    torch.manual_seed(1)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    dY = torch.randn(tokens, width, dtype=dtype)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x, dY)
            if round_:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    shape = {"width": width, "tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "r": R}
    return [
        {
            **shape,
            "method": name,
            "median_s": median[name],
            "quartiles_s": statistics.quantiles(times[name], n=4)[::2],
            "ratio_to_lora": median[name] / median["peft lora"],
            "ratio_to_products": median[name] / median["three products"],
            "saved_bytes_besides_x": saved_bytes(runs[name], x, dY),
        }
        for name in runs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, nargs="+", default=[576, 1024, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for width in arguments.width:
        for tokens in arguments.tokens:
            for dtype in (torch.float32, torch.bfloat16):
                rows += measure(width, tokens, dtype, arguments.rounds)
                for row in rows[-6:]:
                    print(
                        f"{row['dtype']:9} {width:5} x {tokens:5}  {row['method']:20} {row['median_s'] * 1e3:8.1f} ms  "
                        f"{row['ratio_to_lora']:5.2f} x LoRA  {row['ratio_to_products']:5.2f} x products  "
                        f"{row['saved_bytes_besides_x'] / 2**20:7.1f} MiB saved"
                    )
    if arguments.output:
        write_json(arguments.output, {"kind": "bench-layer", "environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()

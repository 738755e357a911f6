"""The planner against the peak of real training steps on the CPU: small models, three methods, several shapes.

Each cell is a process of its own (`duallora.bench.memory` says why) that takes a step to have optimizer states, then two
more whose peak above what is resident is read. The prediction is made for the very same step: CPU kernels, gradients
that come to life in it. A cell that the file holds is not measured again.

    python benchmarks/plan_check.py --output results/plan.json [--only TEXT] [--page docs/scale.md]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from duallora.bench.memory import ALLOCATOR, REPEATS, peak_above
from duallora.plan.architectures import config_of
from duallora.plan.trace import METHODS, Setting, Traced, adapt, build
from duallora.store import record
from duallora.terminal import quiet_libraries

# Random models small enough for a CPU, of shapes that share no factor by accident.
SMALL: dict[str, dict[str, Any]] = {
    "llama, 6 layers of 320": {
        "model_type": "llama", "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6,
        "num_attention_heads": 5, "num_key_value_heads": 5, "vocab_size": 6000,
    },
    "qwen2, 5 layers of 512": {
        "model_type": "qwen2", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 5,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 16000, "tie_word_embeddings": True,
    },
    "gpt2, 6 layers of 384": {
        "model_type": "gpt2", "n_embd": 384, "n_layer": 6, "n_head": 6, "vocab_size": 9000,
    },
}  # fmt: skip
SMOLLM2 = "smollm2-135m"


def cells() -> list[dict[str, Any]]:
    """model, method, batch, length, dtype, checkpointing, padded of every cell."""
    llama, qwen, gpt2 = SMALL
    shapes: list[tuple[str, int, int, str, bool, bool]] = [
        (llama, 4, 256, "float32", False, False),
        (SMOLLM2, 2, 128, "float32", False, False),
        (qwen, 2, 512, "bfloat16", False, False),
        (gpt2, 4, 256, "float32", False, False),
        (llama, 8, 256, "float32", True, False),
        (qwen, 3, 320, "float32", False, True),
        (SMOLLM2, 4, 128, "bfloat16", False, False),
        (gpt2, 2, 512, "bfloat16", True, False),
        (SMOLLM2, 4, 128, "float32", True, False),
    ]
    names = ("model", "batch", "length", "dtype", "checkpointing", "padded")
    return [{**dict(zip(names, shape, strict=True)), "method": method} for shape in shapes for method in METHODS]


def config(model: str) -> Any:
    if model not in SMALL:
        return config_of(model)
    values = dict(SMALL[model])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def setting(cell: dict[str, Any]) -> Setting:
    more = {name: cell[name] for name in ("checkpointing", "padded")}
    return Setting(cell["method"], rank=8, dtype=getattr(torch, cell["dtype"]), fused_attention=False, **more)


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Peak above the resident model of a step (forward, backward, AdamW), as `duallora.bench.memory` measures it."""
    torch.manual_seed(0)
    with quiet_libraries():
        model = adapt(build(config(cell["model"]), setting(cell)), setting(cell), "CAUSAL_LM").train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    ids = torch.randint(model.config.vocab_size, (cell["batch"], cell["length"]))
    mask = torch.ones_like(ids)
    if cell["padded"]:
        mask[0, -cell["length"] // 8 :] = 0

    def step() -> None:
        model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    peaks = [peak_above(step, torch.device("cpu")) for _ in range(REPEATS)]
    return {"measured_bytes": int(statistics.median(peaks)), "peaks": peaks}


def in_a_process(cell: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ALLOCATOR}, check=False)
    if done.returncode:
        raise SystemExit(f"{cell}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [cell["ratio"] for cell in found]
    return {
        "cells": len(ratios),
        "median_ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
    }


def table(found: list[dict[str, Any]]) -> str:
    """Rows of shapes, a column of measured MB and of predicted / measured for each method."""
    lines = ["| model, batch x length | " + " | ".join(f"{m}, MB | ratio" for m in METHODS) + " |"]
    lines.append("| --- |" + " ---: | ---: |" * len(METHODS))
    rows: dict[str, dict[str, str]] = {}
    for entry in found:
        cell = entry["cell"]
        more = [cell["dtype"]] + [name for name in ("checkpointing", "padded") if cell[name]]
        row = rows.setdefault(f"{cell['model']}: {cell['batch']} x {cell['length']}, {', '.join(more)}", {})
        row[cell["method"]] = f"{entry['measured_bytes'] / 1e6:.0f} | {entry['ratio']:.3f}"
    lines += [f"| {name} | " + " | ".join(row.get(m, "| ") for m in METHODS) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def fill(page: Path, text: str) -> None:
    begin, end = "<!-- plan:check -->", "<!-- /plan:check -->"
    before, _, rest = page.read_text().partition(begin)
    record.write_text(page, f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/plan.json"))
    parser.add_argument("--only", default="", help="cells whose JSON holds this text")
    parser.add_argument("--page", type=Path, help="page whose table is filled in, such as docs/scale.md")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(json.loads(arguments.measure))))
        return
    started = time.time()
    earlier = record.read_json(arguments.output)["cells"] if arguments.output.exists() else []
    known = {json.dumps(cell["cell"], sort_keys=True): cell for cell in earlier}
    found = []
    for cell in cells():
        key = json.dumps(cell, sort_keys=True)
        use = Traced(config(cell["model"]), setting(cell)).use(cell["batch"], cell["length"], accumulating=False)
        if key in known:
            now = known[key]
        elif arguments.only in key:
            now = {
                "cell": cell,
                "measured": record.now(),
                **record.git_state(Path(__file__).parent),
                **in_a_process(cell),
            }
        else:
            continue
        now |= {"predicted_bytes": use.peak, "ratio": round(use.peak / now["measured_bytes"], 4)}
        found.append(now)
        facts = record.result("plan", {"rank": 8}, summary(found), seeds=[0], started=started, cells=found)
        record.write_json(arguments.output, facts)
        print(f"{now['ratio']:.3f}  {now['measured_bytes'] / 1e6:8.1f} MB  {cell}", flush=True)
    if arguments.page:
        fill(arguments.page, table(found))


if __name__ == "__main__":
    main()

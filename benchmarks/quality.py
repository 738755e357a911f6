"""What the forms of the forward and sampled gradients cost in quality: SmolLM2-135M on E2E, loss against steps.

Each setting is one ``duallora train`` run (120 steps of 8, q and v, r = 4, the learning rate that suited Dual LoRA best in
earlier runs), evaluated on the same 150 held-out rows every 40 steps. A finished run is not repeated.

    python benchmarks/quality.py --runs runs/quality --output results/bench/quality.json [--only NAME ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from duallora.store.record import write_json
from duallora.store.run_folder import RunFolder

COMMON = (
    "adapter.r=4", "adapter.target_modules=[q_proj,v_proj]", "learning_rate=1.2e-2", "max_steps=120",
    "train.batch_size=8", "data.eval_limit=150", "eval.metrics=false", "eval_steps=40", "logging_steps=5",
    "lr_warmup_steps=10", "adapter.init_std=0.02", "adapter.direction_init_std=0.02",
)  # fmt: skip
BF16 = "model.dtype=bfloat16"
SETTINGS = {
    "fp32-merged": (),
    "fp32-added": ("adapter.forward=added",),
    "bf16-merged": (BF16, "adapter.forward=merged"),
    "bf16-added": (BF16, "adapter.forward=added"),
    "tokens-0.25": ("adapter.gradient_tokens=0.25",),
    "tokens-0.125": ("adapter.gradient_tokens=0.125",),
}


def folder(runs: Path, name: str, seed: int) -> Path:
    return runs / (name if seed == 0 else f"{name}-s{seed}")


def run(runs: Path, name: str, seed: int, data_dir: str | None) -> None:
    output = folder(runs, name, seed)
    if RunFolder(output).metrics() is not None:
        return
    command = [sys.executable, "-m", "duallora.cli", "train", "--model", "builtin:smollm2-135m", "--task", "e2e"]
    command += ["-o", str(output)] + (["--data-dir", data_dir] if data_dir else [])
    for setting in (*COMMON, *SETTINGS[name], f"seed={seed}"):
        command += ["--set", setting]
    subprocess.run(command, check=True)


def result(runs: Path, name: str, seed: int) -> dict:
    """Held-out loss by step, with where it came from."""
    run_folder = RunFolder(folder(runs, name, seed))
    metrics = run_folder.metrics()
    return {
        "setting": name,
        "seed": seed,
        "sets": [*COMMON, *SETTINGS[name]],
        "eval_loss": {str(row["step"]): row["eval_loss"] for row in run_folder.log.lines() if "eval_loss" in row},
        **{
            key: metrics[key] for key in ("commit", "dirty", "versions", "device", "threads", "started", "data", "base")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--output", type=Path, default=Path("results/bench/quality.json"))
    parser.add_argument("--data-dir")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for name in arguments.only:
            run(arguments.runs, name, seed, arguments.data_dir)
    done = [path for path in arguments.runs.glob("*") if RunFolder(path).metrics() is not None]
    known = [(name, seed) for name in SETTINGS for seed in range(10) if folder(arguments.runs, name, seed) in done]
    write_json(arguments.output, {"kind": "quality", "runs": [result(arguments.runs, *each) for each in known]})


if __name__ == "__main__":
    main()

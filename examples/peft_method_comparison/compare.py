"""The protocol of PEFT's method comparison on a model and a task of your choice, with the record in the shape of its results:

    python examples/peft_method_comparison/compare.py experiments/duallora/llama-3.2-3B-rank16-lr1e-3 \
        --model builtin:smollm2-135m --task arithmetic --steps 5000

An experiment is a folder as PEFT's are (adapter_config.json, training_params.json). As there: batches of 4, AdamW, a cosine, gradients
clipped at 1, seed 0; accuracy on the test rows, forgetting (the loss on other text, after minus before), memory, time, file size.
Memory is the training process's: what the GPU's driver says, or the resident set on a CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from duallora.store import record

METHODS = {"DUALLORA": "duallora", "LORA": "lora", "HIRA": "hira"}
SAMPLED_EVERY = 0.1  # seconds


def settings(experiment: Path, model: str, task: str, steps: int, rows: int | None) -> list[str]:
    """Those of `duallora train` for an experiment."""
    config = json.loads((experiment / "adapter_config.json").read_text())
    file = experiment / "training_params.json"
    optimizer = {"lr": 1e-4, "weight_decay": 0.1}
    if file.is_file():
        optimizer |= json.loads(file.read_text()).get("optimizer_kwargs", {})
    kind = config["peft_type"]
    if kind not in METHODS:
        sys.exit(f"{experiment}: peft_type={kind!r}; expected one of {', '.join(METHODS)}")
    method = "dora" if config.get("use_dora") and kind == "LORA" else METHODS[kind]
    found: dict[str, Any] = {
        "model.name": model, "data.task": task, "data.max_length": 768, "adapter.method": method, "adapter.r": config["r"],
        "adapter.target_modules": config["target_modules"], "train.max_steps": steps, "train.batch_size": 4,
        "train.learning_rate": optimizer["lr"], "train.weight_decay": optimizer["weight_decay"], "train.lr_scheduler": "cosine",
        "train.max_grad_norm": 1.0, "train.report_to": [], "eval.test": True, "eval.forgetting": "auto", "seed": 0,
    }  # fmt: skip
    if method == "duallora":
        taken = ("alpha", "warmup", "warmup_steps", "magnitude", "direction", "ste_clip", "init", "r1", "r2")
        found |= {f"adapter.{name}": config[name] for name in taken if config.get(name) is not None}
        found["adapter.warmup_steps"] = min(found.get("adapter.warmup_steps", 100), max(steps // 10, 1))
    elif "lora_alpha" in config:
        found["adapter.alpha"] = config["lora_alpha"]
    if rows is not None:
        found["data.eval_limit"] = rows
    return [part for name, value in found.items() for part in ("--set", f"{name}={json.dumps(value)}")]


def memory_of(process: psutil.Process) -> int:
    """Bytes: on the GPU where one is used, else resident."""
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        for line in subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines():
            pid, used = line.split(",")
            if int(pid) == process.pid:
                return int(used) << 20
    return process.memory_info().rss


def run(experiment: Path, output: Path, arguments: list[str]) -> dict[str, Any]:
    """The result of `duallora train` and the memory that it took, sampled as it went."""
    command = [sys.executable, "-m", "duallora", "train", *arguments, "-o", str(output), "--json"]
    with tempfile.TemporaryFile("w+") as told:
        child = subprocess.Popen(command, stdout=told)
        samples, process = [], psutil.Process(child.pid)
        while child.poll() is None:
            try:
                samples.append(memory_of(process))
            except psutil.Error:
                break
            time.sleep(SAMPLED_EVERY)
        if child.wait() != 0:
            sys.exit(f"{experiment}: training ended with exit code {child.returncode}")
        told.seek(0)
        return {**json.loads(told.read().splitlines()[-1]), "memory": samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", type=Path, help="folders with adapter_config.json")
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rows", type=int, help="test rows at most")
    parser.add_argument("--output", "-o", type=Path, default=Path("results"), help="folder of the records")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for experiment in arguments.experiments:
        chosen = settings(experiment, arguments.model, arguments.task, arguments.steps, arguments.rows)
        began = time.time()
        with tempfile.TemporaryDirectory() as folder:
            done = run(experiment, Path(folder) / "run", chosen)
            size = sum(file.stat().st_size for file in (Path(folder) / "run" / "adapter").glob("*.safetensors"))
            kept = record.read_json(Path(folder) / "run" / "metrics.json")
        metrics, parameters = done["metrics"], kept["parameters"]
        found = {
            "run_info": {
                "created_at": kept["started"],
                "total_time": round(time.time() - began, 1),
                "experiment_name": "/".join(experiment.parts[-2:]),
                "train_config": {
                    "model_id": arguments.model,
                    "task": arguments.task,
                    "max_steps": arguments.steps,
                    "seed": 0,
                },
                "peft_config": json.loads((experiment / "adapter_config.json").read_text()),
                "error_msg": "",
            },
            "train_info": {
                "accelerator_memory_reserved_avg": int(np.mean(done["memory"])),
                "accelerator_memory_max": max(done["memory"]),
                "accelerator_memory_reserved_99th": int(np.percentile(done["memory"], 99)),
                "train_time": metrics["train_seconds"],
                "file_size": size,
                "num_trainable_params": parameters["trainable"],
                "num_total_params": parameters["total"],
                "status": "success",
                "metrics": [
                    {
                        "step": done["steps"],
                        "test accuracy": metrics["test"]["exact_match"] / 100,
                        "train loss": metrics["train_loss"],
                        "forgetting": metrics["forgetting"],
                    }
                ],
            },
            "meta_info": {
                name: kept[name] for name in ("commit", "dirty", "versions", "device", "threads", "platform")
            },
        }
        file = arguments.output / f"{'--'.join(experiment.parts[-2:])}.json"
        record.write_json(file, found)
        result = found["train_info"]["metrics"][0]
        print(
            f"{experiment}: accuracy {result['test accuracy']:.3f}, forgetting {result['forgetting']:.3f}, "
            f"{found['train_info']['train_time']:.0f} s, {found['train_info']['accelerator_memory_max'] >> 20:,} MiB; {file}"
        )


if __name__ == "__main__":
    main()

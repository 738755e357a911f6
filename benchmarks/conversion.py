"""What calibration is worth: KL from the adapter, on held-out rows, of plain and calibrated conversions by rank.

Three adapters: the demo's and E2E's on SmolLM2, SST-2's on MiniLM. A run that is not in --runs is trained there first;
E2E and SST-2 are read from DUALLORA_DATA.

    python benchmarks/conversion.py -o results/convert/calibrated.json --page docs/serving.md [--runs FOLDER] [NAME ...]
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import convert_to_lora, get_peft_model, set_peft_model_state_dict
from rich.console import Console

from duallora.config.load import load_recipe
from duallora.export import calibration
from duallora.store import adapters, record
from duallora.terminal import quiet_libraries
from duallora.train import run
from duallora.tuner import conversion

RANKS = (8, 16, 32, 64)
SHRINKAGES = (1e-4, 1e-2)  # beside the one in use, and PEFT's own, at rank 16 of the smallest model
ON_Q_AND_V = (
    "adapter.r=8", "adapter.target_modules=[q_proj, v_proj]", "adapter.direction_init_std=0.002", "data.max_length=128",
    "data.eval_limit=48", "train.max_steps=60", "train.learning_rate=4e-3", "train.lr_warmup_steps=8", "eval.metrics=false",
)  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "demo": {"model": "builtin:smollm2-135m", "data": "builtin:docstrings", "settings": (*ON_Q_AND_V, "train.batch_size=16")},
    "e2e": {"model": "builtin:smollm2-135m", "task": "e2e", "settings": (*ON_Q_AND_V, "train.batch_size=8", "data.limit=2000")},
    "sst2": {
        "model": "builtin:minilm-l6", "task": "sst2",
        "settings": (
            "adapter.r=8", "data.max_length=64", "data.limit=4000", "data.eval_limit=200", "train.max_steps=100",
            "train.batch_size=16", "train.learning_rate=2e-3", "eval.metrics=false",
        ),
    },
}  # fmt: skip
Tensors = dict[str, torch.Tensor]
MARKS = ("<!-- calibrated: begin -->", "<!-- calibrated: end -->")


def adapter_of(name: str, place: Path) -> Path:
    """The run's adapter, or where it was stopped early its last checkpoint; trained now where there is none."""
    folder = place / name
    if not folder.exists():
        options = dict(RUNS[name])
        run.train(load_recipe(None, options.pop("settings"), **options, output=folder), console=Console(quiet=True))
    stopped = sorted(folder.glob("checkpoints/checkpoint-*"), key=lambda one: int(one.name.rpartition("-")[2]))
    return folder if (folder / "adapter").exists() or not stopped else stopped[-1]


def factors(model: Any, data: calibration.Data, tokenizer: Any, shrinkages: tuple[float, ...]) -> dict[str, Tensors]:
    """The tensors of each way to convert, at the largest rank; those of smaller ranks are their parts."""
    layers, most = conversion.dual_layers(model), max(RANKS)
    batches = data.batches(model, tokenizer)

    def tensors(batches: Any, shrinkage: float = conversion.SHRINKAGE) -> Tensors:
        before, conversion.SHRINKAGE = conversion.SHRINKAGE, shrinkage
        done = list(conversion.convert_layers(model, layers, most, batches))
        conversion.SHRINKAGE = before
        return {name: tensor for layer in done for name, tensor in layer.tensors.items()}

    found = {"plain": tensors(None), "calibrated": tensors(batches)}
    found |= {f"shrinkage {one:g}": tensors(batches, one) for one in shrinkages}
    if shrinkages:
        found["PEFT convert_to_lora"] = convert_to_lora(model, most)[1]
    return found


def measure(name: str, place: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(figures, facts of the rows, fingerprint of the base) of one adapter."""
    source, quiet = adapter_of(name, place), Console(quiet=True)
    task_kind = adapters.adapter_kind(source)
    model, tokenizer = adapters.load_adapter(source, task_kind)
    data = calibration.load(source, model, tokenizer, quiet)
    reference = data.outputs(model, tokenizer)
    sidecar = adapters.read_sidecar(adapters.find(source) or source)
    stopped = source.name.rpartition("checkpoint-")[2] if "checkpoint-" in source.name else sidecar.get("steps")
    figures: dict[str, Any] = {"steps": stopped and int(stopped), "adapter": data.measure(reference)}
    ways, rest = factors(model, data, tokenizer, SHRINKAGES if name == "sst2" else ()), conversion.carried(model)
    configs = {rank: conversion.lora_config(model, conversion.dual_layers(model), rank) for rank in RANKS}
    base = model.unload()
    if task_kind == "generate":
        figures["base"] = data.measure(data.outputs(base, tokenizer), reference)
    for way, whole in ways.items():
        for rank in RANKS if way in ("plain", "calibrated") else (16,):
            lora = get_peft_model(base, configs[rank])
            set_peft_model_state_dict(
                lora,
                {
                    key: tensor[:rank] if "lora_A" in key else tensor[:, :rank]
                    for key, tensor in whole.items()
                    if ".lora_" in key
                }
                | rest,
            )
            found = data.measure(data.outputs(lora.eval(), tokenizer), reference)
            figures.setdefault(way, {})[str(rank)] = found
            print(name, way, rank, found, flush=True)
            base = lora.unload()
    return figures, {**data.facts, "recipe": sidecar.get("recipe")}, sidecar.get("base", {}).get("fingerprint", "")


def lines(metrics: dict[str, Any]) -> str:
    """The figures as a table of the page."""
    head = (
        "| adapter | rank | plain: KL | loss | calibrated: KL | loss | of plain's KL |\n|---|---|---|---|---|---|---|\n"
    )
    body = ""
    for name, figures in metrics.items():
        for rank in map(str, RANKS):
            plain, ours = figures["plain"][rank], figures["calibrated"][rank]
            body += f"| {name} | {rank} | {plain['kl']:.4f} | {plain['loss']:.3f} | {ours['kl']:.4f} | {ours['loss']:.3f} | {ours['kl'] / plain['kl']:.2f} |\n"
    return head + body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="*", default=list(RUNS))
    parser.add_argument("-o", "--output", type=Path, default=Path("results/convert/calibrated.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs/conversion"))
    parser.add_argument("--page", type=Path, help="page whose table is filled in")
    options = parser.parse_args()
    before = record.read_json(options.output) if options.output.exists() else {}  # adapters are measured one by one
    started, metrics, rows, bases = time.time(), *(dict(before.get(key, {})) for key in ("metrics", "rows", "bases"))
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in options.name:
            metrics[name], rows[name], bases[name] = measure(name, options.runs)
            recipe = {
                "ranks": RANKS,
                "rows": calibration.ROWS,
                "held_out": calibration.HELD_OUT,
                "shrinkage": conversion.SHRINKAGE,
            }
            data = {f"{one} {split}": sha for one, facts in rows.items() for split, sha in facts["data"].items()}
            found = record.result(
                "convert_calibrated", recipe, metrics, seeds=[calibration.SEED], started=started, data=data
            )
            record.write_json(
                options.output, {**found, "rows": rows, "bases": bases}
            )  # after each: a run may be cut short
    print(table := lines(metrics))
    if options.page:
        head, _, rest = options.page.read_text().partition(MARKS[0])
        options.page.write_text(f"{head}{MARKS[0]}\n{table}{MARKS[1]}{rest.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    main()

"""What the tests of runs ask of a run folder."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from duallora.store import record

WEIGHTS = "adapter_model.safetensors"


def without_model_dropout(recipe, tmp_path, rate):
    folder = tmp_path / "encoder"
    if not folder.exists():
        shutil.copytree(recipe.model.name, folder)
        config = record.read_json(folder / "config.json")
        record.write_json(
            folder / "config.json", {**config, "hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
        )
    return with_model(recipe, folder)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def kill_with(number):
    return lambda trainer: os.kill(os.getpid(), number)


def log(folder):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "gate") if key in line} for line in lines]


def weights(folder):
    return load_file(Path(folder) / "adapter" / WEIGHTS)


def with_model(recipe, folder):
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(folder)})})


# What make_recipe sets beyond the settings every method has, put back.
PLAIN = ("adapter.r1=null", "adapter.warmup_steps=auto")
NO_RANK = ("adapter.r=null", "adapter.alpha=null", "adapter.duallora_dropout=null")


def settings(name: str, *more: str) -> list[str]:
    """Overrides that make a recipe one of method ``name``; those without rank or scale get the section's defaults back."""
    bare = {
        "loreft": NO_RANK[1:],
        "prompt": NO_RANK,
        "prefix": NO_RANK,
        "p-tuning-v2": NO_RANK,
        "delta-lora": NO_RANK[2:],
        "hira": NO_RANK[1:],
    }
    return [f"adapter.method={name}", *PLAIN, *bare.get(name, ()), *more]

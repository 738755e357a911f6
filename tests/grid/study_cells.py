"""A grid's folder as finished runs would have left it, from made-up predictions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duallora.grid.study import STUDY, Cell, Study, cell_folder, outcomes
from duallora.tasks import Example
from duallora.tasks.metrics import Metrics

GOLD = {"cola": np.random.default_rng(0).integers(0, 2, 150).tolist()}
GOLD["stsb"] = (np.random.default_rng(1).random(120) * 5).round(2).tolist()
GOLD["twin"] = GOLD["cola"]  # a second task of as many rows
GOLD["e2e"] = [[f"text {number}"] for number in range(60)]
GOLD["commonsense"] = [("boolq", ["true"])] * 40 + [("piqa", ["solution1"])] * 20
METRICS = {
    "cola": Metrics("matthews", "accuracy"), "twin": Metrics("matthews", "accuracy"),
    "stsb": Metrics("pearson", "spearman"), "commonsense": Metrics("average", by_group=["accuracy"]),
    "e2e": Metrics("bleu"),
}  # fmt: skip
ENVIRONMENT = {
    "commit": "a" * 40, "dirty": False, "versions": {"torch": "2.13.0", "peft": "0.21.2"}, "device": "cpu (test)",
    "threads": 1, "platform": "Linux x86_64",
}  # fmt: skip
VARIANTS = {
    "lora": {"adapter.method": "lora", "adapter.r": 16},
    "duallora": {"adapter.r": 8},
    "dora": {"adapter.method": "dora", "adapter.r": 16},
}


def score(task: str, guess: list) -> dict[str, float]:
    """What a run of the task records."""
    if task == "e2e":
        return {"bleu": 12.5, "loss": -sum(own for own, _ in guess) / sum(tokens for _, tokens in guess)}
    rows = [Example(**truth(gold)) for gold in GOLD[task]]
    return {**METRICS[task](guess, rows), "loss": 0.5}


def guesses(task: str, skill: float, seed: int) -> list:
    """Predictions that hit with probability ``skill`` (cola) or have about that correlation (stsb)."""
    random = np.random.default_rng(seed)
    if task in ("cola", "twin"):
        return [int(gold if random.random() < skill else 1 - gold) for gold in GOLD[task]]
    if task == "commonsense":
        return [own[0] if random.random() < skill else "" for _, own in GOLD[task]]
    if task == "e2e":  # (log-likelihood, tokens): rows differ in length and in how hard they are, whoever answers
        rows = np.random.default_rng(2)
        tokens, hard = rows.integers(3, 30, 60), rows.uniform(0.5, 1.5, 60)
        per_token = hard + 1 - skill + random.normal(0, 0.05, 60)
        return [(float(-n * each), int(n)) for n, each in zip(tokens, per_token, strict=True)]
    noise = random.normal(0, 1.4 * max(0.05, 1 - skill) / max(skill, 0.1), len(GOLD[task]))
    return [float(value) for value in np.array(GOLD[task]) + noise]


def said(task: str, guess: Any) -> dict[str, Any]:
    return (
        {"prediction": "", "log_likelihood": guess[0], "tokens": guess[1]} if task == "e2e" else {"prediction": guess}
    )


def truth(gold: Any) -> dict[str, Any]:
    if isinstance(gold, list):
        return {"references": tuple(gold)}
    return {"references": tuple(gold[1]), "group": gold[0]} if isinstance(gold, tuple) else {"label": gold}


def write_cell(folder: Path, cell: Cell, skill: float | None, steps: int) -> None:
    """A finished cell, or one that diverged where ``skill`` is None."""
    there, task, seed = cell_folder(folder, cell.name), cell.tags["task"], cell.tags["seed"]
    there.path.mkdir(parents=True)
    recipe = cell.recipe().model_dump(mode="json")
    rank = int(recipe["adapter"]["r"] or 16)
    run = {
        "status": "done", "result": {"metrics": {}}, **ENVIRONMENT, "recipe": recipe, "steps": steps, "fingerprints": {"base": "b" * 64},
        "parameters": {"trainable": 100 * rank, "total": 100_000},
    }  # fmt: skip
    log = [{"step": step, "loss": 2.0 / (step + 1) + seed, "gate": 1.0} for step in range(1, steps + 1)]
    there.log.path.write_text("".join(json.dumps(line) + "\n" for line in log) + '{"step": 7, "lo')
    if skill is None:
        error = "NonFiniteError: the loss is nan in step 3 of /home/somebody/run"
        run |= {"status": "failed", "kind": "diverged", "error": error}
    else:
        guess = guesses(task, skill, seed)
        there.write_predictions(
            [{**said(task, one), **truth(gold)} for one, gold in zip(guess, GOLD[task], strict=True)]
        )
        seconds = {"train_seconds": 10.0 + rank, "train_cpu_seconds": 20.0 + rank}
        validation = {name: value * 0.9 for name, value in score(task, guesses(task, skill, 77)).items()}
        there.write_metrics({
            **ENVIRONMENT, "main_metric": METRICS[task].names[0], "data": {"validation": f"{task}-held-out", "test": f"{task}-test"},
            "metrics": {**validation, **seconds, "test": score(task, guess)},
        })  # fmt: skip
    there.write_facts(run)


def run_all(
    folder: Path, study: Study, skill: Callable[[Cell], float | None], *, stop_after: int | None = None, steps: int = 6
) -> Path:
    """Writes every cell that ``study`` wants, stage by stage, or the first ``stop_after`` of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STUDY).write_text(study.yaml())
    written = 0
    while True:
        found = outcomes(folder)
        missing = [cell for cell in study.wanted(found) if cell.name not in found]
        for cell in missing[: stop_after and stop_after - written]:
            write_cell(folder, cell, skill(cell), steps)
            written += 1
        if not missing or written == stop_after:
            return folder


def study_of(
    *tasks: str, variants: Sequence[str] | Mapping[str, Any] = ("lora", "duallora", "dora"), **changes: Any
) -> Study:
    """Methods on tasks of `GOLD`, three learning rates, three seeds."""
    settings: dict[str, Any] = {
        "base": {"model.name": "builtin:minilm-l6", "train.max_steps": 6, "eval.test": True},
        "tasks": {task: {"data.task": "cola" if task == "twin" else task} for task in tasks},
        "variants": variants if isinstance(variants, Mapping) else {name: VARIANTS[name] for name in variants},
        "search": {"train.learning_rate": [1e-3, 3e-3, 1e-2]},
        "extend": False,
    }
    return Study("made-up", **{**settings, **changes})


def made_up(cell: Cell) -> float | None:
    """Dual LoRA hits 90 %, the others 70 %, at their best rate (1e-2 and 3e-3); DoRA diverges at 1e-2."""
    rate, variant = cell.tags["train.learning_rate"], cell.tags["variant"]
    if variant == "dora" and rate == 1e-2:
        return None
    top, best = (0.9, 1e-2) if variant == "duallora" else (0.7, 3e-3)
    return top if rate == best else top - 0.12

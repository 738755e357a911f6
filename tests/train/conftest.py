"""Runs small enough to repeat: a tiny random model, rows written here, a dozen steps with everything switched on."""

from __future__ import annotations

import functools
import io
import json
import random
import shutil
from pathlib import Path

import pytest
from of_runs import equal
from rich.console import Console
from safetensors.torch import load_file

from duallora.config.load import load_recipe
from duallora.store import adapters
from duallora.tasks import encode_split
from duallora.train import evaluate, prepare, run


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> Path:
    """Prompt-completion rows of uneven length."""
    draw = random.Random(0)
    lines = []
    for _ in range(26):
        a, b = draw.randrange(500), draw.randrange(10 ** draw.randrange(1, 5))
        lines.append(json.dumps({"prompt": f"{a} plus {b} is", "completion": f" {a + b}"}))
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def moods(tmp_path_factory) -> Path:
    """Classification rows: two classes told apart by one word."""
    draw = random.Random(1)
    lines = []
    for number in range(24):
        good = number % 3 > 0
        noise = " ".join("abcdefgh"[draw.randrange(8)] for _ in range(draw.randrange(1, 9)))
        lines.append(json.dumps({"text": f"{'fine' if good else 'poor'} {noise}", "label": "good" if good else "bad"}))
    path = tmp_path_factory.mktemp("data") / "moods.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def recipe_at(tiny_causal_folder, tiny_encoder_folder, sums, moods):
    """A recipe for 10 steps with dropout, accumulation, a ramp of 6 steps and a checkpoint every 2; settings override."""

    def make(output: Path, *settings: str, kind: str = "generate", data: Path | None = None):
        model, own = (tiny_causal_folder, sums) if kind == "generate" else (tiny_encoder_folder, moods)
        defaults = {
            "adapter.r": 4,
            "adapter.r1": 3,
            "adapter.alpha": 10,
            "adapter.duallora_dropout": 0.1,
            "adapter.init_std": 0.02,  # of random weights of 0.02; the default is meant for trained ones
            "adapter.direction_init_std": 0.02,
            "adapter.warmup_steps": 6,
            "data.eval_fraction": 0.2,
            "data.max_length": 64,
            "train.max_steps": 10,
            "train.batch_size": 2,
            "train.gradient_accumulation_steps": 2,
            "train.learning_rate": 1e-2,
            "train.save_steps": 2,
            "train.logging_steps": 3,
            "train.report_to": "[]",
            "eval.metrics": "false",
        }
        if any(setting.startswith("adapter.method=") for setting in settings):  # no setting of another method
            del defaults["adapter.init_std"]
        base = [f"{key}={value}" for key, value in defaults.items()]
        return load_recipe(None, [*base, *settings], model=str(model), data=str(data or own), output=output)

    return make


@pytest.fixture
def make_recipe(recipe_at, tmp_path):
    """`recipe_at`, in a folder of the test's own unless told otherwise."""
    return lambda *settings, output=None, **options: recipe_at(output or tmp_path / "run", *settings, **options)


@pytest.fixture(scope="session")
def trained(recipe_at, tmp_path_factory):
    """``trained(kind)`` is the run folder of 8 steps, made once a session; copy it before damaging it."""

    @functools.cache
    def folder(kind: str) -> Path:
        output = tmp_path_factory.mktemp(kind) / "run"
        run.train(recipe_at(output, "train.max_steps=8", kind=kind), console=Console(quiet=True))
        return output

    return lambda kind="generate": folder(kind)


@pytest.fixture
def interrupted():
    """``interrupted(folder, copy, at)``: a copy of a finished run as if it had been stopped after checkpoint ``at``."""

    def make(folder: Path, copy: Path, at: int) -> Path:
        shutil.copytree(folder, copy)
        for result in ("adapter", "model"):
            shutil.rmtree(copy / result, ignore_errors=True)
        for later in (copy / "checkpoints").glob("checkpoint-*"):
            if int(later.name.removeprefix("checkpoint-")) > at:
                shutil.rmtree(later)
        facts = json.loads((copy / "run.json").read_text())
        (copy / "run.json").write_text(json.dumps({**facts, "status": "interrupted"}))
        return copy

    return make


@pytest.fixture
def resumes(make_recipe, console, tmp_path, interrupted):
    """``resumes(*settings)`` is (result, folder, that of the run stopped after checkpoint ``at``), resumed to the bit."""

    def check(*settings: str, at: int = 2, name: str = "run", make=make_recipe, **options):
        folder = tmp_path / name
        whole = run.train(make(*settings, output=folder, **options), console=console)
        stopped = interrupted(folder, tmp_path / f"{name}-stopped", at=at)
        again = run.train(make(*settings, output=stopped, **options), resume="auto", console=console)
        first, second = (load_file(next(Path(each["adapter"]).glob("*model.safetensors"))) for each in (whole, again))
        assert len(first) > 0
        assert equal(first, second)
        assert again["metrics"]["loss"] == whole["metrics"]["loss"] != whole["metrics"]["loss_before"]
        for name in ("start_rows", "forgetting"):
            assert again["metrics"].get(name) == whole["metrics"].get(name)
        return whole, folder, stopped

    return check


@pytest.fixture
def held_out_loss(console):
    """``held_out_loss(source, recipe, kind)``: of what is loaded from there, on the recipe's validation rows."""

    def loss(source, recipe, kind: str = "generate") -> float:
        model, tokenizer = adapters.load_adapter(source, kind)
        rows = evaluate.select(prepare.load(recipe, console), "validation")
        held_out, _ = encode_split(rows, tokenizer, kind, max_length=64)
        return evaluate.loss_on(model, tokenizer, held_out, kind)

    return loss


@pytest.fixture
def console():
    """A console whose text the test can read: ``console.file.getvalue()``."""
    return Console(file=io.StringIO(), width=200)

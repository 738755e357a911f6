"""Adapters with awkward values, made without training: r1 != r2, alpha != r, biases, a gate half open."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from duallora import DualLoraConfig
from duallora.tuner.layer import DualLoraLayer


def shake(model: nn.Module, steps: int = 4, seed: int = 0) -> nn.Module:
    """Factors as after training, and the gate at step ``steps``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "duallora_" in name and "duallora_m" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for layer in model.modules():
        if isinstance(layer, DualLoraLayer):
            for step in layer.duallora_step.values():
                step.fill_(steps)
    return model


@pytest.fixture(scope="session")
def awkward() -> dict:
    return {"r": 4, "r1": 3, "r2": 5, "alpha": 10, "warmup_steps": 6}


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory, tiny_causal_folder, tiny_encoder_folder, awkward):
    """``make_adapter(kind, **config)`` is the folder of an adapter on a tiny model, its gate at 4 of 6."""

    def make(kind: str = "generate", *, steps: int = 4, factory=None, **config) -> Path:
        base_folder = tiny_causal_folder if kind == "generate" else tiny_encoder_folder
        torch.manual_seed(0)
        factory = AutoModelForCausalLM if kind == "generate" else AutoModelForSequenceClassification
        options = {} if kind == "generate" else {"num_labels": 3}
        base = factory.from_pretrained(base_folder, **options)
        task_type = "CAUSAL_LM" if kind == "generate" else "SEQ_CLS"
        settings = {**awkward, "target_modules": "all-linear", "task_type": task_type, **config}
        model = shake(get_peft_model(base, DualLoraConfig(**settings)), steps)
        folder = tmp_path_factory.mktemp("adapters") / "adapter"
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        AutoTokenizer.from_pretrained(base_folder).save_pretrained(str(folder))
        return folder

    return make


@pytest.fixture(scope="session")
def native(make_adapter) -> Path:
    """A causal adapter without a sidecar; copy it before changing it."""
    return make_adapter()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, tiny_causal_folder) -> Path:
    """The folder of a real run of a few steps, with its sidecar; copy it before changing it."""
    from duallora.config.load import load_recipe
    from duallora.train import run

    place = tmp_path_factory.mktemp("run")
    rows = [{"prompt": f"{a} plus {a * a} is", "completion": f" {a + a * a}"} for a in range(26)]
    data = place / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "adapter.r1": 3,
        "adapter.r2": 5,
        "adapter.alpha": 10,
        "adapter.target_modules": "all-linear",
        "adapter.warmup_steps": 2,
        "data.eval_fraction": 0.2,
        "data.max_length": 64,
        "train.max_steps": 4,
        "train.batch_size": 4,
        "train.learning_rate": 1e-2,
        "train.report_to": "[]",
        "eval.max_new_tokens": 4,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    recipe = load_recipe(None, overrides, model=str(tiny_causal_folder), data=str(data), output=place / "sums")
    run.train(recipe, console=Console(file=io.StringIO()))
    return place / "sums"


@pytest.fixture
def console() -> Console:
    """A console whose text the test can read: ``console.file.getvalue()``."""
    return Console(file=io.StringIO(), width=200)

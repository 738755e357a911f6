"""Adapters with awkward values, made without training: r1 != r2, alpha != r, biases, a gate half open."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from duallora import DualLoraConfig
from duallora.export.merge import probe
from duallora.tuner.layer import DualLoraLayer

AWKWARD = {"r": 4, "r1": 3, "r2": 5, "alpha": 10, "warmup_steps": 6}


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


def settings_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


def base_of(adapter: Path) -> str:
    return settings_of(adapter)["base_model_name_or_path"]


def assert_same_logits(a: tuple, b: tuple, tolerance: float = 1e-5) -> None:
    """Of two (model, tokenizer), on the probes that merging compares by."""
    for one, other in zip(probe(*a), probe(*b), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory, tiny_causal_folder, tiny_encoder_folder):
    """``make_adapter(kind, **config)`` is the folder of an adapter on a tiny model, its gate at 4 of 6."""

    def make(kind: str = "generate", *, steps: int = 4, **config) -> Path:
        torch.manual_seed(0)
        if kind == "generate":
            base, task_type = AutoModelForCausalLM.from_pretrained(tiny_causal_folder), "CAUSAL_LM"
        else:
            base = AutoModelForSequenceClassification.from_pretrained(tiny_encoder_folder, num_labels=3)
            task_type = "SEQ_CLS"
        settings = {**AWKWARD, "target_modules": "all-linear", "task_type": task_type, **config}
        model = shake(get_peft_model(base, DualLoraConfig(**settings)), steps)
        folder = tmp_path_factory.mktemp("adapters") / "adapter"
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        AutoTokenizer.from_pretrained(base.name_or_path).save_pretrained(str(folder))
        return folder

    return make


@pytest.fixture(scope="session")
def native(make_adapter) -> Path:
    """A causal adapter without a sidecar; copy it before changing it."""
    return make_adapter()


def short_run(model: Path, rows: list[dict[str, str]], output: Path, *settings: str) -> Path:
    """The folder of a run of four steps on ``rows``, with its sidecar."""
    from duallora.config.load import load_recipe
    from duallora.train import run

    data = output.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["train.max_steps=4", "train.batch_size=4", "train.learning_rate=1e-2", "train.report_to=[]"]
    recipe = load_recipe(None, [*common, *settings], model=str(model), data=str(data), output=output)
    run.train(recipe, console=Console(quiet=True))
    return output


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, tiny_causal_folder) -> Path:
    """A run with awkward ranks; copy it before changing it."""
    rows = [{"prompt": f"{a} plus {a * a} is", "completion": f" {a + a * a}"} for a in range(26)]
    adapter = ["r1=3", "r2=5", "alpha=10", "target_modules=all-linear", "adapter.warmup_steps=2"]
    other = ["data.eval_fraction=0.2", "data.max_length=64", "eval.max_new_tokens=4"]
    return short_run(tiny_causal_folder, rows, tmp_path_factory.mktemp("run") / "sums", *adapter, *other)


@pytest.fixture
def console() -> Console:
    """A console whose text the test can read: ``console.file.getvalue()``."""
    return Console(file=io.StringIO(), width=200)

"""`duallora train --method`: the other methods through the same run, files and checks."""

from __future__ import annotations

import json

import pytest
import torch
from of_runs import NO_RANK, PLAIN, log, settings
from safetensors.torch import load_file

from duallora.config.load import load_recipe
from duallora.errors import ConfigError
from duallora.export import merge
from duallora.store import adapters
from duallora.train import loop, run


@pytest.mark.parametrize("name", ["lora+", "loreft", "delta-lora", "p-tuning-v2"])
def test_another_method_runs_resumes_to_the_bit_and_is_read_back(
    name, make_recipe, console, tmp_path, resumes, held_out_loss
):
    """The rest of the run after a stop at step 2 (optimizer, rates, Delta-LoRA's counter, a prefix) as the whole one."""
    own = {"lora+": "{lr_ratio: 4}", "delta-lora": "{K: 2}"}.get(name, "{}")
    steps = ["train.max_steps=4", f"adapter.options={own}"]
    whole, folder, _ = resumes(*settings(name, *steps))
    assert load_recipe(folder / "recipe.yaml") == make_recipe(*settings(name, *steps), output=folder)
    assert json.loads((folder / "adapter" / adapters.SIDECAR).read_text())["method"] == name.upper()
    found = held_out_loss(folder, make_recipe(*settings(name)))
    assert found == pytest.approx(whole["metrics"]["loss"], abs=1e-6)
    if name in ("lora+", "delta-lora"):
        assert merge.merge(folder, tmp_path / "merged", console=console)["max_logit_difference"] < 1e-5
    else:
        with pytest.raises(ConfigError, match="merge"):
            merge.merge(folder, tmp_path / "merged", console=console)


def test_prefix_tuning_resumes_from_its_mlp(tmp_path, resumes):
    """Its adapter holds what the MLP gives; the MLP itself, and a head beside it, lie in the checkpoints alone."""
    own = settings("prefix", "train.max_steps=4", "adapter.options={num_virtual_tokens: 3}")
    _, _, stopped = resumes(*own, kind="classify")
    mid = load_file(stopped / "checkpoints" / "checkpoint-2" / "trained.safetensors")
    end = load_file(stopped / "checkpoints" / "checkpoint-4" / "trained.safetensors")
    assert any("transform" in key and not torch.equal(mid[key], end[key]) for key in mid)
    assert adapters.load_adapter(tmp_path / "run", "classify")


@pytest.mark.parametrize(("optimizer", "rate"), [("galore", 1e-2), ("flora", 0.2)])
def test_the_papers_orthogonal_optimizers_train_dual_loras_factors(optimizer, rate, tmp_path, resumes):
    """The gate opens, the loss falls, every factor moves, and a resumed run ends to the bit."""
    own = ("adapter.r1=12", "adapter.r=9", "train.max_steps=30", "train.logging_steps=1")
    whole, folder, _ = resumes(*own, f"train.optimizer={optimizer}", f"train.learning_rate={rate}", at=28)
    gates = [line["gate"] for line in log(folder) if "gate" in line]
    assert gates[0] < 1
    assert gates[-1] == 1
    assert whole["metrics"]["loss"] < whole["metrics"]["loss_before"] - 0.01


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["adapter.method=full"], r"galore with adapter\.method=full: .* it is adapter\.method=galore"),
        (["adapter.method=garare"], r"galore with adapter\.method=garare"),
        ([*settings("vera"), "adapter.alpha=null"], "no matrix that VeRA trains is larger on both sides"),
        ([*settings("lora"), "adapter.r=4"], "projects onto rank 4, and no matrix that LoRA trains"),
        ([*settings("lora"), "train.optimizer=galore_adamw"], r"train\.optimizer=galore_adamw: .*galore"),
    ],
)
def test_where_a_projection_makes_no_sense_it_is_refused(own, message, make_recipe, console):
    recipe = make_recipe(*PLAIN, *NO_RANK, "train.optimizer=galore", *own)
    with pytest.raises(ConfigError, match=message):
        run.train(recipe, console=console)


def test_label_smoothing_is_loras_loss(make_recipe, console, tmp_path):
    """(1 - s) (-log p_y) + s mean_v (-log p_v) over the trained tokens, in numpy; it trains another adapter, and LoReFT refuses."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 5, generator=generator)
    labels = torch.tensor([[-100, -100, 3, 1], [-100, 0, 4, -100]])  # two virtual tokens come before
    shifted = torch.log_softmax(logits.double(), -1)[:, 2:-1].numpy()
    total = 0.0
    for row, position, label in ((0, 1, 3), (0, 2, 1), (1, 0, 0), (1, 1, 4)):
        p = shifted[row, position]
        total += 0.9 * -p[label] + 0.1 * -p.mean()
    found = loop.token_loss(0.1, {"logits": logits}, labels, torch.tensor(4))
    assert float(found) == pytest.approx(total / 4, abs=1e-6)
    losses = []
    for smoothing in (0.0, 0.1):
        own = settings("lora", "train.max_steps=2", f"train.label_smoothing={smoothing}")
        losses.append(run.train(make_recipe(*own, output=tmp_path / f"{smoothing}"), console=console)["metrics"])
    assert losses[0]["loss_before"] == losses[1]["loss_before"]
    assert losses[0]["loss"] != losses[1]["loss"]
    with pytest.raises(ConfigError, match=r"train\.label_smoothing=0\.1 takes the labels from the model, and LoReFT"):
        run.train(make_recipe(*settings("loreft"), "train.label_smoothing=0.1"), console=console)


@pytest.mark.parametrize("name", ["vera", "adapter-l"])
def test_a_classifier_with_another_method_trains_its_head(name, make_recipe, console):
    recipe = make_recipe(*settings(name, *NO_RANK[1:], "train.max_steps=2"), kind="classify")
    result = run.train(recipe, console=console)
    tensors = load_file(f"{result['adapter']}/adapter_model.safetensors")
    assert any("classifier" in key for key in tensors)
    model, _ = adapters.load_adapter(result["folder"], "classify")
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("adapter.method=lora", "adapter.warmup_steps=auto"),
            'adapter.r1 = 3.*Dual LoRA\'s, but adapter.method is "lora", which takes method, .*r, alpha',
        ),
        (("adapter.options={lr_ratio: 4}",), "for other methods; Dual LoRA's settings are keys of adapter"),
    ],
)
def test_settings_of_two_methods_are_not_mixed(make_recipe, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_recipe(*changes)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("lroa", (), "nearest: lora"),
        ("prefix", ("adapter.target_modules=all-linear",), "target_modules='all-linear': Prefix.*takes num_virtual"),
        ("prompt", ("adapter.r=16",), "r=16: Prompt tuning has no such setting; it takes num_virtual_tokens"),
        ("prompt", ("adapter.exclude_modules=[q_proj]",), r"exclude_modules=\['q_proj'\]: Prompt tuning has no"),
        ("full", ("adapter.modules_to_save=[x]",), "adapter.modules_to_save"),
    ],
)
def test_what_the_verb_cannot_train_is_said_before_it_loads_a_model(
    make_recipe, console, monkeypatch, name, more, message
):
    monkeypatch.setattr(run, "load_model", None)
    with pytest.raises(ConfigError, match=message):
        run.train(make_recipe(*settings(name), *more), console=console)


@pytest.mark.parametrize(("targets", "adapted"), [("null", {"up_proj", "down_proj"}), ("all-linear", None)])
def test_the_modules_that_a_recipe_names_are_the_modules_that_are_trained(make_recipe, console, targets, adapted):
    """Adapter-P goes onto up_proj and down_proj by itself, and onto all linear layers where it is told to."""
    more = (f"adapter.target_modules={targets}", "train.max_steps=1", *NO_RANK[1:])
    result = run.train(make_recipe(*settings("adapter-p", *more)), console=console)
    tensors = load_file(f"{result['adapter']}/adapter_model.safetensors")
    found = {name.split(".duallora_rule")[0].rpartition(".")[2] for name in tensors}
    assert found == (adapted or {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})

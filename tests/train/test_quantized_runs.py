"""model.quantization from the recipe to the merged folder: one run per library, on the tiny model."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil

import pytest
import torch
from of_runs import equal, weights, with_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from duallora.config.load import load_recipe
from duallora.errors import ConfigError, IntegrityError
from duallora.export import merge
from duallora.store import adapters, models, record
from duallora.train import run
from duallora.tuner import quantized

NAMES = list(models.QUANTIZATIONS)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def quantized_run(recipe_at, tmp_path_factory):
    """``quantized_run(name)`` is the folder of 8 steps on that base and what train returned, made once."""

    @functools.cache
    def made(name: str):
        pytest.importorskip(models.QUANTIZATIONS[name], reason=f"{models.QUANTIZATIONS[name]} is not installed")
        output = tmp_path_factory.mktemp(name) / "run"
        recipe = recipe_at(output, f"model.quantization={name}", "train.max_steps=8")
        return output, run.train(recipe, console=Console(quiet=True))

    return made


@pytest.mark.parametrize("name", NAMES)
def test_the_run_says_what_it_was_trained_on_and_loads_the_same(quantized_run, make_recipe, held_out_loss, name):
    folder, result = quantized_run(name)
    assert result["metrics"]["loss"] < result["metrics"]["loss_before"]
    assert record.read_json(folder / "adapter" / "duallora.json")["base"]["quantization"] == name
    model, _ = adapters.load_adapter(folder, "generate")
    assert sum(bool(quantized.storage(module)) for module in model.modules()) == 14
    assert held_out_loss(folder, make_recipe()) == pytest.approx(result["metrics"]["loss"], rel=1e-4)


@needs_bitsandbytes
def test_a_resumed_run_ends_on_the_bits_of_the_uninterrupted_one(
    quantized_run, make_recipe, console, tmp_path, interrupted
):
    folder, _ = quantized_run("bnb-4bit")
    output = interrupted(folder, tmp_path / "again", at=6)
    other = make_recipe("model.quantization=bnb-8bit", "train.max_steps=8", output=output)
    with pytest.raises(ConfigError, match=r'model.quantization: "bnb-4bit" -> "bnb-8bit"'):
        run.train(other, resume="auto", console=console)
    recipe = make_recipe("model.quantization=bnb-4bit", "train.max_steps=8", output=output)
    run.train(recipe, resume="auto", console=console)
    assert "from checkpoint-6" in console.file.getvalue()
    assert equal(weights(output), weights(folder))


@pytest.mark.parametrize(("name", "into"), [("bnb-4bit", "dequantized"), ("torchao-int8", "auto")])
def test_merging_goes_into_plain_weights_and_says_how_far_they_are(quantized_run, console, tmp_path, name, into):
    """Never onto the grid: the original weights by default, or the values it was trained on, then with the same logits."""
    folder, _ = quantized_run(name)
    result = merge.merge(folder, tmp_path / "merged", into=into, console=console)
    assert result["max_logit_difference"] == 0.0
    assert result["weights"] == {"auto": "original"}.get(into, into)
    adapted, tokenizer = adapters.load_adapter(folder, "generate")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not any(quantized.storage(module) for module in plain.modules())
    far = max(
        float((a - b).abs().max())
        for a, b in zip(merge.probe(plain, tokenizer), merge.probe(adapted, tokenizer), strict=True)
    )
    assert result["quantized_logit_difference"] == pytest.approx(far, abs=1e-6)
    assert (far < 1e-5) == (into == "dequantized")
    said = re.sub(r"\s+", " ", console.file.getvalue())
    assert f"trained on quantized weights, this model has the {result['weights']} ones: logits differ by up to" in said
    original, _ = models.load_model(adapted.peft_config["default"].base_model_name_or_path, "generate")
    layer, plain_layer = (m.model.layers[0].mlp.down_proj.weight for m in (original, plain))
    dW = adapted.base_model.model.model.layers[0].mlp.down_proj.get_delta_weight("default")
    distance = float((plain_layer - layer - dW).norm() / layer.norm())
    assert distance < 1e-6 if into == "auto" else 1e-4 < distance < 0.2


@needs_bitsandbytes
def test_a_checkpoint_stored_quantized_is_merged_dequantized(tiny_causal_folder, make_recipe, console, tmp_path):
    stored, tokenizer = models.load_model(str(tiny_causal_folder), "generate", quantization="bnb-4bit")
    stored.save_pretrained(tmp_path / "stored")
    tokenizer.save_pretrained(tmp_path / "stored")
    run.train(with_model(make_recipe("train.max_steps=4"), tmp_path / "stored"), console=console)
    result = merge.merge(tmp_path / "run", tmp_path / "merged", console=console)
    assert result["weights"] == "dequantized"
    assert result["quantized_logit_difference"] < 1e-5
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config, "quantization_config")
    with pytest.raises(ConfigError, match="original weights are not known"):
        merge.merge(tmp_path / "run", tmp_path / "other", into="original", console=console)
    with pytest.raises(ConfigError, match="is stored quantized"):
        models.load_model(str(tmp_path / "stored"), "generate", quantization="bnb-8bit")


def test_an_unquantized_base_leaves_nothing_to_choose(trained, console, tmp_path):
    with pytest.raises(ConfigError, match="not quantized"):
        merge.merge(trained(), tmp_path / "merged", into="dequantized", console=console)


@pytest.mark.parametrize("name", NAMES)
def test_the_fingerprint_sees_codes_and_scales(tiny_causal_folder, name):
    pytest.importorskip(models.QUANTIZATIONS[name], reason=f"{models.QUANTIZATIONS[name]} is not installed")
    model, _ = models.load_model(str(tiny_causal_folder), "generate", quantization=name)
    same, _ = models.load_model(str(tiny_causal_folder), "generate", quantization=name)
    start = models.weights_fingerprint(model)
    assert start == models.weights_fingerprint(same)
    with torch.no_grad():
        same(torch.tensor([[1, 2, 3]]))  # the first forward moves bitsandbytes' scales about
    assert start == models.weights_fingerprint(same)
    found = {start}
    tensors = {
        n: t for n, t in quantized.stored_tensors(model).items() if "layers.1.mlp.down_proj" in n and t.numel() > 1
    }
    assert len(tensors) >= 2
    for tensor in tensors.values():
        if tensor.dtype == torch.uint8 and tensor.dim() == 1:
            continue  # bitsandbytes' own description of the type, made anew each time
        was = tensor.detach().clone()
        tensor.data.view(-1)[0] += 1
        found.add(models.weights_fingerprint(model))
        tensor.data.copy_(was)
    assert len(found) >= 3
    assert models.weights_fingerprint(model) == start


@needs_bitsandbytes
def test_another_base_is_refused(quantized_run, tmp_path):
    """The same checkpoint quantized otherwise is another base."""
    folder, _ = quantized_run("bnb-4bit")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "duallora.json"
    sidecar = record.read_json(path)
    sidecar["base"]["quantization"] = "bnb-8bit"
    record.write_json(path, sidecar)
    with pytest.raises(IntegrityError, match="was trained on a base model with the weights"):
        adapters.load_adapter(tmp_path / "adapter", "generate")


def test_what_cannot_be_quantized_here_is_said_before_anything_is_read(tiny_causal_folder, monkeypatch):
    with pytest.raises(ConfigError, match=r"model.quantization.*bnb-4bit"):
        load_recipe(None, ["data.task=e2e", "model.quantization=gptq"])
    with pytest.raises(ConfigError, match=r"model\.quantization"):
        load_recipe(None, ["data.task=e2e", "model.load_in_4bit=true"])
    with pytest.raises(ConfigError, match="expected one of bnb-4bit, bnb-8bit, torchao-int8"):
        models.load_model(str(tiny_causal_folder), "generate", quantization="gptq")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else found(name, *rest)
    )
    with pytest.raises(ConfigError, match="pip install torchao"):
        models.load_model(str(tiny_causal_folder), "generate", quantization="torchao-int8")

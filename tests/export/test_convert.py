"""The conversion is the nearest LoRA of its rank, is read alike by every engine, and needs nothing of this package."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import peft
import pytest
import torch
from export.conftest import shake
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from duallora import DualLoraConfig, cli
from duallora.errors import ConfigError, IntegrityError, NonFiniteError
from duallora.export import check, convert, merge
from duallora.store import adapters
from duallora.tuner import conversion


def oracle_deltas(folder: Path, gate: float) -> dict[str, torch.Tensor]:
    """dW [out, in] of every layer from the stored factors, by the float64 oracle."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = gate * config["alpha"] / math.sqrt(config["r1"] * config["r2"])
    stored = load_file(folder / "adapter_model.safetensors")
    names = [name.removesuffix(".duallora_A") for name in stored if name.endswith(".duallora_A")]
    deltas = {}
    for name in names:
        factors = [stored[f"{name}.duallora_{letter}"].double().tolist() for letter in "ABCD"]
        deltas[name.removeprefix("base_model.model.")] = torch.tensor(
            oracle.delta(*factors, scaling), dtype=torch.float64
        )
    return deltas


@pytest.fixture(scope="module")
def deltas(native):
    return oracle_deltas(native, gate=4 / 6)


def read_as_peft_says(folder: Path) -> dict[str, torch.Tensor]:
    """B A [out, in] of every module times PEFT's lora_alpha / r."""
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = load_file(folder / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in stored if name.endswith(".lora_A.weight")]
    scale = config["lora_alpha"] / config["r"]
    products = {n: stored[f"{n}.lora_B.weight"].double() @ stored[f"{n}.lora_A.weight"].double() for n in names}
    return {name.removeprefix("base_model.model."): scale * product for name, product in products.items()}


@pytest.fixture(scope="module")
def full(native, tmp_path_factory):
    """Asked for more than any layer can have, and converted at that; the narrower ones are padded."""
    output = tmp_path_factory.mktemp("full") / "deep" / "lora"
    console = Console(file=io.StringIO(), width=200)
    result = convert.convert(native, output, rank=99999, console=console)
    assert result["rank"] == 32
    assert "32, not 99999: no layer has more" in console.file.getvalue()
    return output, result


def test_at_full_rank_the_conversion_is_the_adapter(native, deltas, full):
    """The oracle knows the gate (4 of 6 steps), the scale and the signs on its own; [16 x 32] layers are padded to 32."""
    output, result = full
    found = read_as_peft_says(output)
    assert found.keys() == deltas.keys()
    assert len(deltas) == 14
    for name, dW in deltas.items():
        assert float((found[name] - dW).norm() / dW.norm()) < 1e-5, name
    assert result["energy"] == pytest.approx(1, abs=1e-10)
    assert result["relative_error"] < 1e-5
    adapted, tokenizer = adapters.load_adapter(native, "generate")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(native)), str(output)).eval()
    assert isinstance(plain.peft_config["default"], LoraConfig)
    for a, b in zip(merge.probe(adapted, tokenizer), merge.probe(plain, tokenizer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert result["max_logit_difference"] < 1e-5


def base_of(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize("rank", [1, 7])
def test_at_a_cut_rank_no_lora_is_nearer(native, deltas, tmp_path, rank):
    """The error is the one of Eckart and Young, from torch's own SVD, and is the one reported, layer by layer."""
    result = convert.convert(native, tmp_path / "lora", rank=rank)
    found = read_as_peft_says(tmp_path / "lora")
    squares, losts = [], []
    for facts in result["layers"]:
        dW = deltas[facts["name"]]
        squared = torch.linalg.svdvals(dW).square()
        squares.append(float(squared.sum()))
        losts.append(float(squared[rank:].sum()))
        best = math.sqrt(losts[-1] / squares[-1])
        assert float((found[facts["name"]] - dW).norm() / dW.norm()) == pytest.approx(best, abs=2e-6)
        assert facts["relative_error"] == pytest.approx(best, abs=2e-6)
        assert facts["energy"] == pytest.approx(1 - best**2, abs=2e-6)
        assert facts["shape"] == list(dW.shape)
        kept = squared.cumsum(0) / squared.sum()
        assert facts["rank_99"] == int((kept < 0.99).sum()) + 1
    assert result["energy"] == pytest.approx(1 - sum(losts) / sum(squares), abs=2e-6)
    assert result["lowest_energy"] == min(facts["energy"] for facts in result["layers"])


def test_per_layer_each_has_the_smallest_rank_of_its_own_that_keeps_the_energy(native, deltas, tmp_path):
    """Read back by PEFT's and vLLM's rule, with the patterns; engines of one rank are told to refuse it."""
    result = convert.convert(native, tmp_path / "lora", energy=0.8, per_layer=True)
    wanted = {}
    for name, dW in deltas.items():
        lost = torch.linalg.svdvals(dW).square().flip(0).cumsum(0).flip(0)
        wanted[name] = int((lost > 0.2 * lost[0]).sum())
    assert {layer["name"]: layer["rank"] for layer in result["layers"]} == wanted
    assert len({*wanted.values()}) > 2
    found = read_as_peft_says(tmp_path / "lora")
    for layer in result["layers"]:
        dW = deltas[layer["name"]]
        error = float((found[layer["name"]] - dW).norm() / dW.norm())
        assert layer["relative_error"] == pytest.approx(error, abs=2e-6)
    targets = check.check(tmp_path / "lora", files_only=True)["targets"]
    assert {name: told["accepted"] for name, told in targets.items()} == {
        "vllm": True,
        "sglang": False,
        "llamacpp": False,
    }
    for words, options in [
        ("that of every layer", {"rank": 4}),
        ("leave out --per-layer", {"energy": 0.5, "format": "gguf"}),
    ]:
        with pytest.raises(ConfigError, match=words):
            convert.convert(native, tmp_path / "not", per_layer=True, **options)
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("energy", [0.6, 0.95, 1.0])
def test_energy_picks_the_smallest_rank_that_keeps_it_in_every_layer(native, deltas, tmp_path, energy):
    result = convert.convert(native, tmp_path / "lora", energy=energy)
    kept = [torch.linalg.svdvals(dW).square() for dW in deltas.values()]
    lowest = [min(float(s[:k].sum() / s.sum()) for s in kept) for k in range(33)]
    assert lowest[result["rank"]] >= energy - 1e-9
    assert lowest[result["rank"] - 1] < energy - 1e-9
    assert result["lowest_energy"] >= energy - 1e-6


def test_vllm_sglang_and_llama_cpp_read_the_same_update(full):
    """Their rules, from their sources: vLLM lora_alpha / r with pattern overrides (peft_helper.py), SGLang lora_alpha / r
    (lora.py), llama.cpp lora_alpha / the tensor's own rank and no pattern at all (llama-adapter.h)."""
    config = json.loads((full[0] / "adapter_config.json").read_text())
    stored = load_file(full[0] / "adapter_model.safetensors")
    assert config["lora_alpha"] == config["r"]
    assert not config["use_rslora"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    for name, tensor in stored.items():
        rank = tensor.shape[0 if "lora_A" in name else 1]
        assert rank == config["r"], name  # vLLM pads nothing: one rank for the whole file


def test_plain_peft_without_duallora_reproduces_the_promised_error(native, deltas, tmp_path):
    """A fresh interpreter in which duallora cannot be imported, no network, only files."""
    result = convert.convert(native, tmp_path / "lora", rank=5)
    adapted, tokenizer = adapters.load_adapter(native, "generate")
    ids = [tokenizer(text)["input_ids"] for text in merge.PROBES]
    with torch.no_grad():
        save_file({str(i): adapted(torch.tensor([row])).logits for i, row in enumerate(ids)}, tmp_path / "wanted")
    save_file(deltas, tmp_path / "deltas")
    code = """
import json, sys
sys.modules["duallora"] = None
folder, base, place, ids = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
deltas, wanted = load_file(place + "/deltas"), load_file(place + "/wanted")
layers = dict(model.get_base_model().named_modules())
errors = {n: float((layers[n].get_delta_weight("default").double() - d).norm() / d.norm()) for n, d in deltas.items()}
with torch.no_grad():
    worst = max(float((model(torch.tensor([row])).logits - wanted[str(i)]).abs().max()) for i, row in enumerate(ids))
print(json.dumps([errors, worst, type(model.peft_config["default"]).__name__]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "lora"), base_of(native), str(tmp_path), json.dumps(ids)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors, worst, kind = json.loads(done.stdout.splitlines()[-1])
    assert kind == "LoraConfig"
    for facts in result["layers"]:
        assert errors[facts["name"]] == pytest.approx(facts["relative_error"], abs=2e-6)
    assert worst == pytest.approx(result["max_logit_difference"], abs=1e-5)


def test_the_sidecar_makes_it_an_adapter_like_any_other(run_folder, tmp_path, console):
    """Of a real run: eval, merge and the checks of load_adapter work on the conversion, base fingerprint included."""
    result = convert.convert(run_folder, tmp_path / "lora", rank=32, console=console)
    assert re.search(r"kept +\S*100\.0000%", console.file.getvalue())
    model, tokenizer = adapters.load_adapter(tmp_path / "lora", "generate")
    native, _ = adapters.load_adapter(run_folder, "generate")
    for a, b in zip(merge.probe(model, tokenizer), merge.probe(native, tokenizer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    sidecar = adapters.read_sidecar(tmp_path / "lora")
    assert sidecar["base"] == adapters.read_sidecar(run_folder / "adapter")["base"]
    assert sidecar["conversion"]["rank"] == result["rank"] == 32
    assert sidecar["converted_from"]["gate"] == 1.0
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged"):
        adapters.load_adapter(tmp_path / "lora", "generate")


def test_a_conversion_inside_the_adapters_folder_does_not_damage_it(run_folder, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(run_folder / "adapter", folder)
    convert.convert(folder, folder / "lora-r2", rank=2)
    adapters.load_adapter(folder, "generate")
    (folder / "lora-r2" / "deep").mkdir()
    shutil.copy(folder / "adapter_model.safetensors", folder / "lora-r2" / "deep")
    with pytest.raises(IntegrityError, match="was added"):
        adapters.load_adapter(folder, "generate")


def test_target_modules_name_the_same_modules_again(make_adapter, tmp_path):
    """Short names where they select no other module, else full ones; a wrong choice would adapt more layers."""
    folder = make_adapter(target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    convert.convert(folder, tmp_path / "some", rank=2)
    config = json.loads((tmp_path / "some" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    convert.convert(make_adapter(target_modules=r".*\.(q|v)_proj"), tmp_path / "all", rank=2)
    config = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == base_of(folder)
    assert config["auto_mapping"] is None


def test_heads_and_biases_are_carried_over(make_adapter, tmp_path):
    saves_biases = Version(peft.__version__) >= Version("0.21")
    folder = make_adapter("classify", bias="all" if saves_biases else "none")
    stored = load_file(folder / "adapter_model.safetensors")
    changed = {name: tensor + 0.25 if "duallora_" not in name else tensor for name, tensor in stored.items()}
    assert any("classifier" in name for name in changed)
    assert saves_biases == any("bias" in name and "classifier" not in name for name in changed)
    save_file(changed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    calls = []

    def scores(model, tokenizer):
        calls.append(type(model).__name__)
        return {"rows": 3.0}

    result = convert.convert(folder, tmp_path / "lora", rank=32, scores=scores)
    assert result["max_logit_difference"] < 1e-5
    for a, b in zip(
        *(merge.probe(*adapters.load_adapter(f, "classify")) for f in (folder, tmp_path / "lora")), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # both on a base that never held the trained biases
    assert list(result["scores"]) == ["adapter", "conversion"]  # the base has no trained head to score
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, tensor in changed.items():
        if "duallora_" not in name:
            assert torch.equal(written[name], tensor), name
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    saved = json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    assert config["modules_to_save"] == list(dict.fromkeys(saved))  # PEFT appends a second time on loading


def test_dora_on_top_converts_as_w_minus_w0(make_adapter, tmp_path):
    folder = make_adapter(use_dora=True)
    assert convert.convert(folder, tmp_path / "lora", rank=32)["max_logit_difference"] < 1e-5


class Odd(nn.Module):
    """An embedding, two convolutions and a linear layer of sides that share no factor."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.embed = nn.Embedding(63, 10)
        self.conv = nn.Conv2d(5, 7, (3, 2), stride=2, padding=1, **options)
        self.narrow = nn.Conv1d(10, 6, 1)
        self.head = nn.Linear(100, 63)

    def forward(self, ids, image, x):
        return self.narrow(self.embed(ids).transpose(1, 2)).sum() + self.conv(image).sum() + self.head(x).sum()


def written(model, rank: int, folder: Path) -> tuple[list, dict]:
    """(conversions of the layers, their tensors), as the files in ``folder``."""
    layers = convert.dual_layers(model)
    done = list(conversion.convert_layers(model, layers, rank))
    tensors = {name: tensor for layer in done for name, tensor in layer.tensors.items()}
    convert._write(folder, convert.lora_config(model, list(layers), rank), tensors)
    return done, tensors


@pytest.mark.parametrize("rank", [63, 4])
def test_embeddings_and_convolutions_convert_to_what_peft_calls_so(tmp_path, rank):
    torch.manual_seed(0)
    config = DualLoraConfig(r1=3, r2=5, alpha=10, target_modules=["embed", "conv", "narrow", "head"], warmup_steps=6)
    model = shake(get_peft_model(Odd(), config))
    layers = convert.dual_layers(model)
    deltas = {name: layer.get_delta_weight("default").double() for name, layer in layers.items()}
    done, tensors = written(model, rank, tmp_path)
    plain = convert._load(model.unload(), tmp_path, tensors)
    modules = dict(plain.get_base_model().named_modules())
    assert len(done) == 4
    for layer in done:
        dW = deltas[layer.name]
        error = float((modules[layer.name].get_delta_weight("default").double() - dW).norm() / dW.norm())
        assert error == pytest.approx(layer.facts()["relative_error"], abs=1e-5)
        assert error < 1e-5 or rank == 4
        assert len(dW) in (layer.shape[0], layer.shape[1])


def test_signs_that_are_all_up_convert_to_lora_of_the_magnitudes_rank(tmp_path):
    """What starts as LoRA and has turned no sign is one, to the bits' rounding; a rank less is not enough."""
    torch.manual_seed(0)
    start = {"init": "lora", "magnitude": "identity", "warmup": "none", "target_modules": ["head"]}
    model = get_peft_model(Odd(), DualLoraConfig(r1=3, r2=5, alpha=10, **start))
    (layer,) = convert.dual_layers(model).values()
    layer.duallora_B["default"].data.normal_()
    errors = [conversion.convert_layer("head", layer, rank).facts()["relative_error"] for rank in (3, 2)]
    assert errors[0] < 1e-6
    assert errors[1] > 1e-2


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding_mode": "circular"}])
def test_a_convolution_that_lora_cannot_follow_is_refused(options):
    model = shake(get_peft_model(Odd(**options), DualLoraConfig(r=2, target_modules=["conv"], warmup_steps=6)))
    ((name, layer),) = convert.dual_layers(model).items()
    with pytest.raises(ConfigError, match=rf"conv is a Conv2d with {next(iter(options))}=.*duallora merge"):
        conversion.convert_layer(name, layer, 2)


def test_gpt2s_transposed_layers(tmp_path, awkward):
    """Conv1D stores [in, out]: a conversion that forgot it would fit only the square layers."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=24, n_layer=1, n_head=2, n_positions=32))
    base.save_pretrained(tmp_path / "gpt2")
    model = shake(
        get_peft_model(base, DualLoraConfig(**awkward, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM"))
    )
    ids = torch.arange(12)[None]
    model.eval()
    with torch.no_grad():
        wanted = model(ids).logits
    done, _ = written(model, 24, tmp_path)
    assert {layer.shape for layer in done} == {(72, 24), (24, 24), (24, 96)}
    plain = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2"), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_half_precision_reports_the_error_it_makes(native, deltas, tmp_path):
    result = convert.convert(native, tmp_path / "lora", rank=32, dtype="bfloat16")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    found = read_as_peft_says(tmp_path / "lora")
    for facts in result["layers"]:
        dW = deltas[facts["name"]]
        error = float((found[facts["name"]] - dW).norm() / dW.norm())
        assert facts["relative_error"] == pytest.approx(error, rel=1e-3)
        assert 1e-4 < error < 2**-8


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_follow_the_umask(native, tmp_path, umask, mode):
    import os

    before = os.umask(umask)
    try:
        convert.convert(native, tmp_path / "lora", rank=1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "lora").iterdir()} == {mode}


def test_what_cannot_be_converted_is_refused_and_nothing_is_left(native, full, make_adapter, tmp_path, monkeypatch):
    output = tmp_path / "lora"
    broken = tmp_path / "broken"
    shutil.copytree(native, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors[next(name for name in sorted(tensors) if name.endswith("duallora_B"))][0, 0] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    for error, words, source, options in [
        (NonFiniteError, "dW of .* NaN", broken, {"rank": 2}),
        (ConfigError, "changes no weight", make_adapter(steps=0), {"rank": 2}),
        (ConfigError, "only Dual LoRA", full[0], {"rank": 2}),
        (ConfigError, "nothing to convert", base_of(native), {"rank": 2}),
        (ConfigError, "give one of them", native, {}),
        (ConfigError, "give one of them", native, {"rank": 2, "energy": 0.5}),
        (ConfigError, "share of", native, {"energy": math.nan}),
        (ConfigError, "rank=0: expected", native, {"rank": 0}),
    ]:
        with pytest.raises(error, match=words):
            convert.convert(source, output, **options)
    right = convert.lora_config
    monkeypatch.setattr(
        convert, "lora_config", lambda *a: LoraConfig(**{**right(*a).to_dict(), "lora_alpha": 99, "peft_type": None})
    )
    with pytest.raises(IntegrityError, match="PEFT scales"):
        convert.convert(native, output, rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]
    output.mkdir()
    (output / "mine").touch()
    with pytest.raises(ConfigError, match="not empty"):
        convert.convert(native, output, rank=2)
    assert [path.name for path in output.iterdir()] == ["mine"]


def test_the_verb_scores_adapter_base_and_conversion(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = f"convert {run_folder} -o lora --rank 32 --eval --limit 3 --result r/out.json --json"
    assert cli.run(line.split()) == 0
    payload = json.loads(capsys.readouterr().out)
    scores = payload["scores"]
    assert list(scores) == ["adapter", "base", "conversion"]
    assert scores["conversion"]["loss"] == pytest.approx(scores["adapter"]["loss"], rel=1e-5)
    assert scores["base"]["loss"] > scores["adapter"]["loss"]
    written = json.loads((tmp_path / "r" / "out.json").read_text())
    assert written["kind"] == "convert"
    assert written["metrics"]["scores"] == scores
    assert written["recipe"]["rows"] == 3
    assert str(tmp_path) not in json.dumps(written["metrics"])
    assert cli.run(f"convert {run_folder} -o other --rank 2 --energy 0.5".split()) == 2
    assert cli.run(f"convert {run_folder} -o other".split()) == 2
    assert cli.run(f"convert {run_folder} -o lora --rank 2".split()) == 2

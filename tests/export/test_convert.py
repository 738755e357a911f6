"""The conversion is the nearest LoRA of its rank, is read alike by every engine, and needs nothing of this package."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import peft
import pytest
import torch
from export.conftest import AWKWARD, assert_same_logits, base_of, settings_of, shake
from packaging.version import Version
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import duallora
from duallora import DualLoraConfig, cli
from duallora.errors import ConfigError, IntegrityError, NonFiniteError
from duallora.export import check, convert
from duallora.store import adapters
from duallora.tuner import conversion


@pytest.fixture(scope="module")
def deltas(native) -> dict[str, torch.Tensor]:
    """dW [out, in] of every layer from the stored factors, by the float64 oracle."""
    config = settings_of(native)
    scaling = 4 / 6 * config["alpha"] / math.sqrt(config["r1"] * config["r2"])
    stored = load_file(native / adapters.WEIGHTS)
    found = {}
    for name in [name.removesuffix(".duallora_A") for name in stored if name.endswith(".duallora_A")]:
        factors = [stored[f"{name}.duallora_{letter}"].double().tolist() for letter in "ABCD"]
        dW = torch.tensor(oracle.delta(*factors, scaling), dtype=torch.float64)
        found[name.removeprefix("base_model.model.")] = dW
    return found


def read_as_peft_says(folder: Path) -> dict[str, torch.Tensor]:
    """B A [out, in] of every module times PEFT's lora_alpha / r."""
    config, stored = settings_of(folder), load_file(folder / adapters.WEIGHTS)
    names = [name.removesuffix(".lora_A.weight") for name in stored if name.endswith(".lora_A.weight")]
    scale = config["lora_alpha"] / config["r"]
    products = {n: stored[f"{n}.lora_B.weight"].double() @ stored[f"{n}.lora_A.weight"].double() for n in names}
    return {name.removeprefix("base_model.model."): scale * product for name, product in products.items()}


def errors_of(found: dict[str, torch.Tensor], deltas: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == deltas.keys()
    return {name: float((found[name] - dW).norm() / dW.norm()) for name, dW in deltas.items()}


def test_at_full_rank_the_conversion_is_the_adapter(native, deltas, tmp_path, console):
    """The oracle knows the gate (4 of 6 steps), the scale and the signs on its own; a rank that no layer can have is cut."""
    output = tmp_path / "deep" / "lora"
    result = convert.convert(native, output, rank=99999, console=console)
    assert result["rank"] == 32
    assert "32, not 99999: no layer has more" in console.file.getvalue()
    assert len(deltas) == 14
    assert max(errors_of(read_as_peft_says(output), deltas).values()) < 1e-5
    assert result["energy"] == pytest.approx(1, abs=1e-10)
    assert result["relative_error"] < 1e-5
    assert result["max_logit_difference"] < 1e-5
    assert_same_logits(adapters.load_adapter(native, "generate"), adapters.load_adapter(output, "generate"))
    # vLLM pads nothing, so that [16 x 32] layers are padded here: one rank for the whole file, and alpha the rank
    assert (settings_of(output)["r"], settings_of(output)["lora_alpha"]) == (32, 32)
    ranks = {t.shape[0 if "lora_A" in name else 1] for name, t in load_file(output / adapters.WEIGHTS).items()}
    assert ranks == {32}
    told = check.check(output, files_only=True)["targets"]
    assert [name for name, verdict in told.items() if verdict["accepted"]] == [*check.TARGETS]


def test_at_a_cut_rank_no_lora_is_nearer(native, deltas, tmp_path):
    """The error is the one of Eckart and Young, from torch's own SVD, and is the one reported, layer by layer."""
    rank = 7
    result = convert.convert(native, tmp_path / "lora", rank=rank)
    errors = errors_of(read_as_peft_says(tmp_path / "lora"), deltas)
    squares = {name: torch.linalg.svdvals(dW).square() for name, dW in deltas.items()}
    for facts in result["layers"]:
        squared = squares[facts["name"]]
        best = math.sqrt(float(squared[rank:].sum() / squared.sum()))
        assert errors[facts["name"]] == pytest.approx(best, abs=2e-6)
        assert facts["relative_error"] == pytest.approx(best, abs=2e-6)
        assert facts["energy"] == pytest.approx(1 - best**2, abs=2e-6)
        assert facts["shape"] == list(deltas[facts["name"]].shape)
        assert facts["rank_99"] == int((squared.cumsum(0) / squared.sum() < 0.99).sum()) + 1
    lost = sum(float(s[rank:].sum()) for s in squares.values()) / sum(float(s.sum()) for s in squares.values())
    assert result["energy"] == pytest.approx(1 - lost, abs=2e-6)
    assert result["lowest_energy"] == min(facts["energy"] for facts in result["layers"])


def test_energy_picks_the_smallest_rank_that_keeps_it_in_every_layer_or_per_layer(native, deltas, tmp_path):
    """Ranks of layers are read back by PEFT's and vLLM's rule, with the patterns; engines of one rank are told to refuse it."""
    result = convert.convert(native, tmp_path / "lora", energy=0.8, per_layer=True)
    wanted = {}
    for name, dW in deltas.items():
        lost = torch.linalg.svdvals(dW).square().flip(0).cumsum(0).flip(0)
        wanted[name] = int((lost > 0.2 * lost[0]).sum())
    assert {layer["name"]: layer["rank"] for layer in result["layers"]} == wanted
    assert len({*wanted.values()}) > 2
    errors = errors_of(read_as_peft_says(tmp_path / "lora"), deltas)
    assert {layer["name"]: layer["relative_error"] for layer in result["layers"]} == pytest.approx(errors, abs=2e-6)
    targets = check.check(tmp_path / "lora", files_only=True)["targets"]
    assert [name for name, told in targets.items() if told["accepted"]] == ["vllm"]
    assert convert.convert(native, tmp_path / "one", energy=0.8)["rank"] == max(wanted.values())
    whole = convert.convert(native, tmp_path / "all", energy=1.0)
    assert (whole["rank"], whole["lowest_energy"]) == (32, pytest.approx(1, abs=1e-6))


def test_plain_peft_without_duallora_reproduces_the_promised_error(native, tmp_path):
    """A fresh interpreter in which duallora cannot be imported, no network, only files."""
    result = convert.convert(native, tmp_path / "lora", rank=5)
    adapted, tokenizer = adapters.load_adapter(native, "generate")
    rows = [tokenizer(text)["input_ids"] for text in convert.merge.PROBES]
    code = """
import json, sys
sys.modules["duallora"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder, base, rows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
import torch
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
with torch.no_grad():
    logits = [model(torch.tensor([ids])).logits.tolist() for ids in rows]
print(json.dumps([type(model.peft_config["default"]).__name__, logits]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "lora"), base_of(native), json.dumps(rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    kind, logits = json.loads(done.stdout.splitlines()[-1])
    assert kind == "LoraConfig"
    with torch.no_grad():
        pairs = [(torch.tensor(y), adapted(torch.tensor([ids])).logits) for ids, y in zip(rows, logits, strict=True)]
    worst = max(float((a - b).abs().max()) for a, b in pairs)
    assert worst == pytest.approx(result["max_logit_difference"], abs=1e-5)


def test_the_sidecar_makes_it_an_adapter_like_any_other(run_folder, tmp_path, console):
    """Of a real run, base fingerprint included; and inside the adapter's folder it is no file that does not belong there."""
    folder = Path(shutil.copytree(run_folder / "adapter", tmp_path / "adapter"))
    lora = folder / "lora-r2"
    convert.convert(folder, lora, rank=32, console=console)
    assert re.search(r"kept +\S*100\.0000%", console.file.getvalue())
    assert_same_logits(adapters.load_adapter(lora, "generate"), adapters.load_adapter(folder, "generate"))
    sidecar = adapters.read_sidecar(lora)
    assert sidecar["base"] == adapters.read_sidecar(folder)["base"]
    assert sidecar["conversion"]["rank"] == 32
    assert sidecar["converted_from"]["gate"] == 1.0
    weights = lora / adapters.WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="damaged"):
        adapters.load_adapter(lora, "generate")
    (lora / "deep").mkdir()
    shutil.copy(folder / adapters.WEIGHTS, lora / "deep")
    with pytest.raises(IntegrityError, match="was added"):
        adapters.load_adapter(folder, "generate")


def test_target_modules_name_the_same_modules_again(make_adapter, tmp_path):
    """Short names where they select no other module, else full ones; a wrong choice would adapt more layers."""
    full = ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    for chosen, names in (
        ({"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}, full),
        ({"target_modules": r".*\.(q|v)_proj"}, ["q_proj", "v_proj"]),
    ):
        folder, output = make_adapter(**chosen), tmp_path / names[0]
        convert.convert(folder, output, rank=2)
        config = settings_of(output)
        assert sorted(config["target_modules"]) == names
        assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", base_of(folder))
        assert config["auto_mapping"] is None


def test_heads_and_biases_are_carried_over(make_adapter, tmp_path):
    saves_biases = Version(peft.__version__) >= Version("0.21")
    folder, lora = make_adapter("classify", bias="all" if saves_biases else "none"), tmp_path / "lora"
    stored = load_file(folder / adapters.WEIGHTS)
    kept = {name: tensor + 0.25 for name, tensor in stored.items() if "duallora_" not in name}
    assert any("classifier" in name for name in kept)
    assert saves_biases == any("bias" in name and "classifier" not in name for name in kept)
    save_file({**stored, **kept}, folder / adapters.WEIGHTS, metadata={"format": "pt"})
    result = convert.convert(folder, lora, rank=32, scores=lambda model, tokenizer: {"rows": 3.0})
    assert result["max_logit_difference"] < 1e-5
    # both on a base that never held the trained biases
    assert_same_logits(adapters.load_adapter(folder, "classify"), adapters.load_adapter(lora, "classify"))
    assert list(result["scores"]) == ["adapter", "conversion"]  # the base has no trained head to score
    written = load_file(lora / adapters.WEIGHTS)
    assert all(torch.equal(written[name], tensor) for name, tensor in kept.items())
    saved = settings_of(folder)["modules_to_save"]
    assert settings_of(lora)["modules_to_save"] == list(dict.fromkeys(saved))  # PEFT appends a second time on loading


def test_dora_on_top_converts_as_w_minus_w0(make_adapter, tmp_path):
    folder = make_adapter(use_dora=True)
    assert convert.convert(folder, tmp_path / "lora", rank=32)["max_logit_difference"] < 1e-5


def test_signs_that_are_all_up_convert_to_lora_of_the_magnitudes_rank():
    """What starts as LoRA and has turned no sign is one, to the bits' rounding; a rank less is not enough."""
    torch.manual_seed(0)
    start = {"init": "lora", "magnitude": "identity", "warmup": "none", "target_modules": ["0"]}
    model = get_peft_model(nn.Sequential(nn.Linear(100, 63)), DualLoraConfig(r1=3, r2=5, alpha=10, **start))
    (layer,) = convert.dual_layers(model).values()
    layer.duallora_B["default"].data.normal_()
    errors = [conversion.convert_layer("head", layer, rank).facts()["relative_error"] for rank in (3, 2)]
    assert errors[0] < 1e-6
    assert errors[1] > 1e-2


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding_mode": "circular"}])
def test_a_convolution_that_lora_cannot_follow_is_refused(options):
    base = nn.Sequential(nn.Conv2d(5, 7, (3, 2), stride=2, padding=1, **options))
    model = get_peft_model(base, DualLoraConfig(r=2, target_modules=["0"], warmup="none"))
    with pytest.raises(ConfigError, match=rf"0 is a Conv2d with {next(iter(options))}=.*duallora merge"):
        duallora.convert(model, None, 2)


def test_gpt2s_transposed_layers():
    """Conv1D stores [in, out]: a conversion that forgot it would fit only the square layers."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=24, n_layer=1, n_head=2, n_positions=32))
    settings = {**AWKWARD, "target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"}
    model = shake(get_peft_model(base, DualLoraConfig(**settings))).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = model(ids).logits
    config, tensors = duallora.convert(model, None, 24)
    plain = get_peft_model(model.unload(), config).eval()
    set_peft_model_state_dict(plain, tensors)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_half_precision_reports_the_error_it_makes(native, deltas, tmp_path):
    result = convert.convert(native, tmp_path / "lora", rank=32, dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora" / adapters.WEIGHTS).values()} == {torch.bfloat16}
    errors = errors_of(read_as_peft_says(tmp_path / "lora"), deltas)
    assert {facts["name"]: facts["relative_error"] for facts in result["layers"]} == pytest.approx(errors, rel=1e-3)
    assert 1e-4 < min(errors.values()) <= max(errors.values()) < 2**-8


def test_files_follow_the_umask(native, tmp_path):
    before = os.umask(0o027)
    try:
        convert.convert(native, tmp_path / "lora", rank=1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "lora").iterdir()} == {0o640}


def test_what_cannot_be_converted_is_refused_and_nothing_is_left(native, make_adapter, tmp_path, monkeypatch):
    lora, output = tmp_path / "lora", tmp_path / "output"
    convert.convert(native, lora, rank=2)
    broken = Path(shutil.copytree(native, tmp_path / "broken"))
    tensors = load_file(broken / adapters.WEIGHTS)
    tensors[next(name for name in sorted(tensors) if name.endswith("duallora_B"))][0, 0] = torch.nan
    save_file(tensors, broken / adapters.WEIGHTS, metadata={"format": "pt"})
    for error, words, source, options in [
        (NonFiniteError, "dW of .* NaN", broken, {"rank": 2}),
        (ConfigError, "changes no weight", make_adapter(steps=0), {"rank": 2}),
        (ConfigError, "only Dual LoRA", lora, {"rank": 2}),
        (ConfigError, "nothing to convert", base_of(native), {"rank": 2}),
        (ConfigError, "give one of them", native, {}),
        (ConfigError, "give one of them", native, {"rank": 2, "energy": 0.5}),
        (ConfigError, "share of", native, {"energy": math.nan}),
        (ConfigError, "rank=0: expected", native, {"rank": 0}),
        (ConfigError, "that of every layer", native, {"rank": 4, "per_layer": True}),
        (ConfigError, "leave out --per-layer", native, {"energy": 0.5, "format": "gguf", "per_layer": True}),
    ]:
        with pytest.raises(error, match=words):
            convert.convert(source, output, **options)
    right = convert.lora_config
    monkeypatch.setattr(
        convert, "lora_config", lambda *a: LoraConfig(**{**right(*a).to_dict(), "lora_alpha": 99, "peft_type": None})
    )
    with pytest.raises(IntegrityError, match="PEFT scales"):
        convert.convert(native, output, rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "lora"]
    before = sorted(lora.iterdir())
    with pytest.raises(ConfigError, match="not empty"):
        convert.convert(native, lora, rank=2)
    assert sorted(lora.iterdir()) == before


def test_the_verb_scores_adapter_base_and_conversion(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = f"convert {run_folder} -o lora --rank 32 --eval --limit 3 --result r/out.json --json"
    assert cli.run(line.split()) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert list(scores) == ["adapter", "base", "conversion"]
    assert scores["conversion"]["loss"] == pytest.approx(scores["adapter"]["loss"], rel=1e-5)
    assert scores["base"]["loss"] > scores["adapter"]["loss"]
    written = json.loads((tmp_path / "r" / "out.json").read_text())
    assert (written["kind"], written["recipe"]["rows"], written["metrics"]["scores"]) == ("convert", 3, scores)
    assert str(tmp_path) not in json.dumps(written["metrics"])

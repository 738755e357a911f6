"""The check sees what is wrong before the adapter is used, says which engine takes it, and is not to be hung or fooled."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import BOFTConfig, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from duallora import cli
from duallora.errors import ConfigError
from duallora.export import check as checking
from duallora.export import convert
from duallora.store import adapters, untrusted


def findings(report: dict) -> dict[str, tuple[str, int]]:
    return {finding["name"]: (finding["status"], finding["exit_code"]) for finding in report["findings"]}


def message(report: dict, name: str) -> str:
    return next(finding["message"] for finding in report["findings"] if finding["name"] == name)


@pytest.fixture
def mine(native, tmp_path) -> Path:
    """A copy of the adapter to change."""
    return Path(shutil.copytree(native, tmp_path / "adapter"))


def change_config(folder: Path, **values) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def change_tensors(folder: Path, change) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def lora(native, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("lora") / "lora"
    convert.convert(native, output, rank=20)
    return output


def test_a_sound_adapter_passes_and_its_effect_is_measured(run_folder, console):
    report = checking.check(run_folder, console=console)
    assert report["ok"]
    assert report["exit_code"] == 0
    names = ["files", "config", "values", "gate", "serving", "base", "layers", "effect"]
    assert [finding["name"] for finding in report["findings"]] == names
    adapted, tokenizer = adapters.load_adapter(run_folder, "generate")
    base = AutoModelForCausalLM.from_pretrained(report["base"]).eval()
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in checking.merge.PROBES]
        new, old = (torch.cat([model(i).logits[0] for i in ids]).double() for model in (adapted, base))
    assert report["effect"]["max"] == pytest.approx(float((new - old).abs().max()), rel=1e-6)
    assert report["effect"]["mean"] == pytest.approx(float((new - old).abs().mean()), rel=1e-6)
    p, q = new.softmax(-1), old.softmax(-1)
    kl = float((p * (p / q).log()).sum(-1).mean())
    assert report["effect"]["kl"] == pytest.approx(kl, rel=1e-5, abs=1e-9)
    assert report["effect"]["changed"] == pytest.approx(float((p.argmax(-1) != q.argmax(-1)).double().mean()))
    assert "the adapter is sound" in console.file.getvalue()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False),
        BOFTConfig(boft_block_size=4, target_modules=["q_proj"], init_weights=False),
        PromptTuningConfig(num_virtual_tokens=3),
    ],
    ids=["embeddings stored too", "no dW", "longer logits"],
)
def test_other_methods_of_peft_are_sound_too(config, tiny_causal_folder, tmp_path, console):
    config.task_type = "CAUSAL_LM"
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_causal_folder), config).save_pretrained(tmp_path)
    found = checking.check(tmp_path, console=console)
    assert found["ok"], found["findings"]
    assert found["effect"]["max"] > 0


def test_a_half_open_gate_and_dead_layers_are_told(mine):
    """B A <= 0 everywhere: ReLU leaves nothing of it and no gradient will bring it back."""

    def kill(tensors):
        name = next(name for name in sorted(tensors) if name.endswith("k_proj.duallora_A"))
        tensors[name].abs_()
        tensors[name.replace("_A", "_B")].abs_().neg_()

    report = checking.check(change_tensors(mine, kill))
    assert report["ok"]
    assert findings(report)["gate"] == ("note", 0)
    assert "0.67" in message(report, "gate")
    assert findings(report)["layers"] == ("note", 0)
    assert "dW = 0 in 1 of 14 layers (first: model.layers.0.self_attn.k_proj)" in message(report, "layers")


def test_an_adapter_without_effect_fails(make_adapter):
    report = checking.check(make_adapter(steps=0))
    assert not report["ok"]
    assert report["exit_code"] == 4
    assert "the gate is at 0" in message(report, "gate")
    assert "no effect: dW = 0 in all 14 layers" in message(report, "layers")


def drop_one(tensors):
    del tensors[next(name for name in sorted(tensors) if name.endswith("duallora_D"))]


def nan_one(tensors):
    tensors[next(name for name in sorted(tensors) if name.endswith("duallora_C"))][1, 2] = torch.nan


def cut_one(tensors):
    name = next(name for name in sorted(tensors) if name.endswith("duallora_D"))
    return {**tensors, name: tensors[name][:, :-1].contiguous()}


@pytest.mark.parametrize(
    ("change", "name", "code", "words"),
    [
        (drop_one, "base", 4, "1 missing"),
        (cut_one, "base", 4, "size mismatch"),
        (nan_one, "values", 5, "NaN"),
    ],
)
def test_damaged_weights_fail_with_their_exit_code(mine, change, name, code, words):
    report = checking.check(change_tensors(mine, change))
    assert report["exit_code"] == code
    assert findings(report)[name] == ("failed", code)
    assert words in message(report, name)


@pytest.mark.parametrize(
    "bytes_", [b"", b"\xff" * 8 + b"{", (1 << 60).to_bytes(8, "little") + b"{}", b"not safetensors at all"]
)
def test_no_safetensors_file_at_all(mine, bytes_):
    (mine / "adapter_model.safetensors").write_bytes(bytes_)
    report = checking.check(mine)
    assert report["exit_code"] == 4
    assert findings(report) == {"files": ("failed", 4)}


def test_another_base_is_noticed_by_its_weights(run_folder, tiny_causal_folder, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(tiny_causal_folder)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    shutil.copytree(tiny_causal_folder, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    report = checking.check(run_folder, base=str(tmp_path / "other"))
    assert report["exit_code"] == 4
    assert findings(report)["base"] == ("failed", 4)
    assert checking.check(run_folder, base=str(tiny_causal_folder))["ok"]


CANARY = "raise SystemExit('imported')"
HOSTILE = {
    "rank": ({"r": 10**9}, "r=1000000000"),
    "rank of a layer": ({"rank_pattern": {"q_proj": [8, 10**9]}}, "rank_pattern"),
    "rank no number": ({"r2": "8; import os"}, "r2="),
    "alpha": ({"alpha": float("nan")}, "alpha=nan"),
    "negative alpha": ({"alpha": -3}, "alpha=-3"),
    "code": ({"auto_mapping": {"base_model_class": "X", "parent_library": "canary_module"}}, "canary_module"),
    "regular expression": ({"target_modules": r"(.*.*)*(a+)+$"}, "take more than"),
    "pattern key": ({"alpha_pattern": {"(.*.*)*!": 3}}, "take more than"),
    "no regular expression": ({"target_modules": "(q_proj"}, "no regular expression"),
    "long pattern": ({"exclude_modules": "q" * 10**5}, "100,000 characters"),
    "many patterns": ({"rank_pattern": {f"layer{i}": 2 for i in range(10**4)}}, "patterns, expected at most 5,000"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_configuration_is_refused_at_once(mine, case, monkeypatch, tmp_path):
    values, words = HOSTILE[case]
    (tmp_path / "canary_module.py").write_text(CANARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(adapters, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    change_config(mine, **values)
    begin = time.monotonic()
    report = checking.check(mine)
    assert time.monotonic() - begin < untrusted.SECONDS + 3
    assert report["exit_code"] == 2
    assert findings(report)["config"] == ("failed", 2)
    assert words in message(report, "config")
    assert "canary_module" not in sys.modules


def test_deep_and_huge_json_is_refused(mine):
    path = mine / "adapter_config.json"
    path.write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    assert checking.check(mine)["exit_code"] == 2
    path.write_text('{"a": "' + "x" * untrusted.MAX_BYTES + '"}')
    report = checking.check(mine)
    assert report["exit_code"] == 2
    assert f"at most {untrusted.MAX_BYTES:,}" in message(report, "config")
    path.write_text("[1, 2]")
    assert checking.check(mine)["exit_code"] == 4
    (mine / "duallora.json").write_text("[" * 100_000)
    assert findings(checking.check(mine)) == {"files": ("failed", 4)}


def test_every_verb_that_loads_an_adapter_is_as_wary(mine, tmp_path):
    with pytest.raises(ConfigError, match="r=1000000000"):
        adapters.load_adapter(change_config(mine, r=10**9), "generate")
    (mine / "adapter_config.json").write_text('{"a":' + "[" * 100_000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        convert.convert(mine, tmp_path / "lora", rank=1)


def test_a_native_adapter_is_sent_to_convert_or_merge(native):
    for target in checking.TARGETS:
        report = checking.check(native, target=target, files_only=True)
        assert report["exit_code"] == 2
        assert "duallora convert" in message(report, target)
        assert "duallora merge" in message(report, target)
    assert checking.check(native, files_only=True)["ok"]


@pytest.mark.parametrize(
    ("values", "refused_by"),
    [
        ({}, ()),
        ({"use_dora": True}, ("vllm", "sglang")),
        ({"lora_bias": True}, ("vllm", "sglang")),
        ({"bias": "lora_only"}, ("vllm", "sglang")),
        ({"modules_to_save": ["score"]}, ("sglang",)),
        ({"modules_to_save": ["lm_head"]}, ("vllm", "sglang")),
        ({"init_lora_weights": "pissa"}, tuple(checking.TARGETS)),
        ({"init_lora_weights": "PiSSA_niter_4"}, tuple(checking.TARGETS)),
        ({"init_lora_weights": "gaussian"}, ()),
        ({"use_rslora": True}, ("sglang", "llamacpp")),
        ({"alpha_pattern": {"q_proj": 5}}, ("sglang", "llamacpp")),
        ({"rank_pattern": {"nowhere": 3}}, ("sglang",)),
        ({"lora_alpha": 7}, ()),
        ({"layer_replication": [[0, 2], [1, 2]]}, ("vllm", "llamacpp")),
        ({"alora_invocation_tokens": [1, 2]}, ("vllm", "llamacpp")),
        ({"use_qalora": True}, ("vllm",)),
        ({"target_modules": r".*\.(q|v)_proj"}, ("sglang",)),
        ({"target_parameters": ["experts.down_proj"]}, tuple(checking.TARGETS)),
        ({"trainable_token_indices": [5]}, tuple(checking.TARGETS)),
    ],
)
def test_targets_agree_with_the_engines_documented_limits(lora, values, refused_by):
    config = {**json.loads((lora / "adapter_config.json").read_text()), **values}
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(lora / "adapter_model.safetensors").items()}
    verdicts = {name: judge(config, shapes) for name, judge in checking.TARGETS.items()}
    assert tuple(name for name, verdict in verdicts.items() if not verdict.accepted) == refused_by, verdicts


@pytest.mark.parametrize(
    ("rank", "flag"),
    [(1, None), (16, None), (17, "32"), (64, "64"), (257, "320"), (512, "512"), (513, "refused")],
)
def test_vllm_is_told_the_rank_it_allows(lora, rank, flag):
    """Its default is 16 and it takes only certain values (vllm/config/lora.py)."""
    config = {**json.loads((lora / "adapter_config.json").read_text()), "r": rank, "lora_alpha": rank}
    verdict = checking.vllm(config, {})
    if flag == "refused":
        assert "rank 513 is above 512" in verdict.reasons[0]
    else:
        assert ("--max-lora-rank" in verdict.flags) == (flag is not None)
        assert flag is None or f"--max-lora-rank {flag} " in verdict.flags


def test_what_the_tensors_tell(lora, tmp_path):
    config = json.loads((lora / "adapter_config.json").read_text())
    prefix = "base_model.model.model"
    embedding = {f"{prefix}.embed_tokens.lora_embedding_A": (4, 63), f"{prefix}.embed_tokens.lora_embedding_B": (10, 4)}
    assert "embeddings" in checking.llamacpp(config, embedding).reasons[0]
    head = {"base_model.model.score.weight": (3, 32)}
    assert "no lora_A or lora_B" in checking.llamacpp(config, head).reasons[0]
    norm = {f"{prefix}.norm.weight": (32,)}
    assert "norms are trained" in checking.llamacpp(config, norm).reasons[0]
    head = {"base_model.model.lm_head.lora_A.weight": (20, 32), "base_model.model.lm_head.lora_B.weight": (63, 20)}
    for is_tied in (True, False):
        base = tmp_path / str(is_tied)
        AutoConfig.for_model("llama", tie_word_embeddings=is_tied).save_pretrained(base)
        assert checking.llamacpp({**config, "base_model_name_or_path": str(base)}, head).accepted is not is_tied
    unknown = {**config, "base_model_name_or_path": str(tmp_path / "none")}
    assert "no such tensor" in checking.llamacpp(unknown, head).reasons[0]
    convolution = {f"{prefix}.conv.lora_A.weight": (20, 5, 3, 2), f"{prefix}.conv.lora_B.weight": (7, 20, 1, 1)}
    for judge in checking.TARGETS.values():
        assert any("convolutions" in reason for reason in judge(config, convolution).reasons)
    for alone, needed in (("q_proj", "v_proj"), ("up_proj", "gate_proj")):
        only = {
            f"{prefix}.layers.0.x.{alone}.lora_A.weight": (20, 32),
            f"{prefix}.layers.0.x.{alone}.lora_B.weight": (32, 20),
        }
        assert f"{alone} is adapted without {needed}" in checking.sglang(config, only).reasons[0]
        assert checking.vllm(config, only).accepted
        assert checking.llamacpp(config, only).accepted
    cut = {f"{prefix}.q_proj.lora_A.weight": (10, 32), f"{prefix}.q_proj.lora_B.weight": (32, 10)}
    assert "scale 1, and lora_alpha / rank is 2" in checking.llamacpp(config, cut).reasons[0]


def test_the_verb_gives_the_whole_report_also_on_failure(native, mine, capsys):
    assert cli.run(["check", str(native), "--files-only", "--json"]) == 0
    sound = json.loads(capsys.readouterr().out)
    assert sound["status"] == "done"
    assert sound["method"] == "DUALLORA"
    assert sound["effect"] is None
    change_tensors(mine, nan_one)
    assert cli.run(["check", str(mine), "--json"]) == 5
    broken = json.loads(capsys.readouterr().out)
    assert broken["status"] == "error"
    assert findings(broken)["values"] == ("failed", 5)
    assert not broken["ok"]
    assert cli.run(["check", str(native), "--target", "vllm", "--files-only"]) == 2
    assert cli.run(["check", str(native), "--target", "triton"]) == 2
    assert cli.run(["check", json.loads((native / "adapter_config.json").read_text())["base_model_name_or_path"]]) == 2

"""The check sees what is wrong before the adapter is used, says which engine takes it, and is not to be hung or fooled."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from export.conftest import base_of, settings_of
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
    path.write_text(json.dumps({**settings_of(folder), **values}))
    return folder


def change_tensors(folder: Path, change) -> Path:
    """``change`` gets all tensors and the name of a D of them."""
    path = folder / adapters.WEIGHTS
    tensors = load_file(path)
    change(tensors, next(name for name in sorted(tensors) if name.endswith("duallora_D")))
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def lora(native, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("lora") / "lora"
    convert.convert(native, output, rank=20)
    return output


def test_a_sound_adapter_passes_and_its_effect_is_measured(run_folder, console):
    report = checking.check(run_folder, console=console)
    assert (report["ok"], report["exit_code"]) == (True, 0)
    names = ["files", "config", "values", "gate", "serving", "base", "layers", "effect"]
    assert [finding["name"] for finding in report["findings"]] == names
    adapted, tokenizer = adapters.load_adapter(run_folder, "generate")
    base = AutoModelForCausalLM.from_pretrained(report["base"]).eval()
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in checking.merge.PROBES]
        new, old = (torch.cat([model(i).logits[0] for i in ids]).double() for model in (adapted, base))
    far, p, q = (new - old).abs(), new.softmax(-1), old.softmax(-1)
    expected = {"max": float(far.max()), "mean": float(far.mean()), "kl": float((p * (p / q).log()).sum(-1).mean())}
    expected["changed"] = float((p.argmax(-1) != q.argmax(-1)).double().mean())
    assert report["effect"] == pytest.approx(expected, rel=1e-5, abs=1e-9)
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

    def kill(tensors, _):
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


def nan_one(tensors, name):
    tensors[name][1, 2] = torch.nan


@pytest.mark.parametrize(
    ("change", "name", "code", "words"),
    [
        (lambda tensors, name: tensors.pop(name), "base", 4, "1 missing"),
        (lambda tensors, name: tensors.update({name: tensors[name][:, :-1].contiguous()}), "base", 4, "size mismatch"),
        (nan_one, "values", 5, "NaN"),
    ],
)
def test_damaged_weights_fail_with_their_exit_code(mine, change, name, code, words):
    report = checking.check(change_tensors(mine, change))
    assert report["exit_code"] == code
    assert findings(report)[name] == ("failed", code)
    assert words in message(report, name)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{", (1 << 60).to_bytes(8, "little") + b"{}"])
def test_no_safetensors_file_at_all(mine, content):
    (mine / adapters.WEIGHTS).write_bytes(content)
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


HOSTILE = {
    "rank": ({"r": 10**9}, "r=1000000000"),
    "rank of a layer": ({"rank_pattern": {"q_proj": [8, 10**9]}}, "rank_pattern"),
    "rank no number": ({"r2": "8; import os"}, "r2="),
    "alpha": ({"alpha": float("nan")}, "alpha=nan"),
    "negative alpha": ({"alpha": -3}, "alpha=-3"),
    "code": ({"auto_mapping": {"base_model_class": "X", "parent_library": "canary_module"}}, "canary_module"),
    "pattern key": ({"alpha_pattern": {"(.*.*)*!": 3}}, "take more than"),
    "no regular expression": ({"target_modules": "(q_proj"}, "no regular expression"),
    "flags that PEFT puts in the middle": ({"rank_pattern": {"(?i)Q_proj": 4}}, "no regular expression"),
    "long pattern": ({"exclude_modules": "q" * 10**5}, "100,000 characters"),
    "many patterns": ({"rank_pattern": {f"layer{i}": 2 for i in range(10**4)}}, "patterns, expected at most 5,000"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_configuration_is_refused_at_once(mine, case, monkeypatch, tmp_path):
    values, words = HOSTILE[case]
    (tmp_path / "canary_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(adapters, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    if words == "take more than":
        monkeypatch.setattr(untrusted, "SECONDS", 0.3)
    change_config(mine, **values)
    begin = time.monotonic()
    report = checking.check(mine)
    assert time.monotonic() - begin < untrusted.SECONDS + 3
    assert findings(report)["config"] == ("failed", report["exit_code"]) == ("failed", 2)
    assert words in message(report, "config")
    assert "canary_module" not in sys.modules


def test_a_pattern_with_flags_is_as_sound_as_peft_finds_it(mine):
    names = {name.rpartition(".")[2].upper() for name in settings_of(mine)["target_modules"]}
    change_config(mine, target_modules=rf"(?i).*\.({'|'.join(names)})")
    assert checking.check(mine)["ok"]


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
        assert all(f"duallora {verb}" in message(report, target) for verb in ("convert", "merge"))
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
    config = {**settings_of(lora), **values}
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(lora / adapters.WEIGHTS).items()}
    verdicts = {name: judge(config, shapes) for name, judge in checking.TARGETS.items()}
    assert tuple(name for name, verdict in verdicts.items() if not verdict.accepted) == refused_by, verdicts


@pytest.mark.parametrize(("rank", "flag"), [(1, None), (16, None), (17, 32), (64, 64), (257, 320), (512, 512)])
def test_vllm_is_told_the_rank_it_allows(lora, rank, flag):
    """Its default is 16 and it takes only certain values (vllm/config/lora.py)."""
    verdict = checking.vllm({**settings_of(lora), "r": rank}, {})
    assert verdict.accepted
    assert ("--max-lora-rank" in verdict.flags) == (flag is not None)
    assert flag is None or f"--max-lora-rank {flag} " in verdict.flags
    assert "rank 513 is above 512" in checking.vllm({**settings_of(lora), "r": 513}, {}).reasons[0]


def test_what_the_tensors_tell(lora, tmp_path):
    config, layer = settings_of(lora), "model.layers.0.x"

    def lora_on(name: str, *more: int, rank: int = 20) -> dict[str, tuple[int, ...]]:
        prefix = f"base_model.model.{name}.lora"
        return {f"{prefix}_A.weight": (rank, 32, *more), f"{prefix}_B.weight": (32, rank, *[1 for _ in more])}

    for shapes, words in [
        ({"base_model.model.model.embed_tokens.lora_embedding_A": (4, 63)}, "embeddings"),
        ({"base_model.model.score.weight": (3, 32)}, "no lora_A or lora_B"),
        ({"base_model.model.model.norm.weight": (32,)}, "norms are trained"),
        (lora_on(f"{layer}.q_proj", rank=10), "scale 1, and lora_alpha / rank is 2"),
    ]:
        assert words in checking.llamacpp(config, shapes).reasons[0]
    for base, accepted in (("tied", False), ("untied", True), ("none", False)):
        if base != "none":
            AutoConfig.for_model("llama", tie_word_embeddings=not accepted).save_pretrained(tmp_path / base)
        told = checking.llamacpp({**config, "base_model_name_or_path": str(tmp_path / base)}, lora_on("lm_head"))
        assert told.accepted is accepted
    for judge in checking.TARGETS.values():
        assert any("convolutions" in reason for reason in judge(config, lora_on("model.conv", 3, 2)).reasons)
    for alone, needed in (("q_proj", "v_proj"), ("up_proj", "gate_proj")):
        only = lora_on(f"{layer}.{alone}")
        assert f"{alone} is adapted without {needed}" in checking.sglang(config, only).reasons[0]
        assert checking.vllm(config, only).accepted
        assert checking.llamacpp(config, only).accepted


def test_the_verb_gives_the_whole_report_also_on_failure(native, mine, capsys):
    assert cli.run(["check", str(native), "--files-only", "--json"]) == 0
    sound = json.loads(capsys.readouterr().out)
    assert (sound["status"], sound["method"], sound["effect"]) == ("done", "DUALLORA", None)
    change_tensors(mine, nan_one)
    assert cli.run(["check", str(mine), "--json"]) == 5
    broken = json.loads(capsys.readouterr().out)
    assert (broken["status"], broken["ok"]) == ("error", False)
    assert findings(broken)["values"] == ("failed", 5)
    for words in (["--target", "vllm", "--files-only"], ["--target", "triton"]):
        assert cli.run(["check", str(native), *words]) == 2
    assert cli.run(["check", base_of(native)]) == 2

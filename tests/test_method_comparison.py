"""The experiments for PEFT's method comparison: as many parameters as its LoRA's, files that PEFT reads, one path run to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import duallora

FOLDER = Path(__file__).parents[1] / "examples" / "peft_method_comparison"
OURS = sorted((FOLDER / "experiments").glob("*/*"))


@pytest.mark.parametrize("experiment", OURS, ids=lambda folder: folder.name)
def test_each_experiment_has_the_parameters_of_peft_s_lora_of_rank_32(experiment):
    config = peft.PeftConfig.from_pretrained(str(experiment))
    assert type(config) in (duallora.DualLoraConfig, peft.LoraConfig)
    shape = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 1, "num_attention_heads": 24}
    with torch.device("meta"):  # one of the 28 layers of Llama-3.2-3B
        base = LlamaForCausalLM(LlamaConfig(vocab_size=128256, num_key_value_heads=8, head_dim=128, **shape))
        model = peft.get_peft_model(base, config)
    assert 28 * sum(p.numel() for p in model.parameters() if p.requires_grad) == 9_175_040
    assert json.loads((experiment / "training_params.json").read_text())["optimizer_kwargs"]["lr"] in (1e-3, 3e-3)


def test_the_wrapper_runs_peft_s_script_with_the_method_registered(tmp_path):
    command = [sys.executable, str(FOLDER / "run_in_peft.py"), "-v", "experiments/x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "go to method_comparison/MetaMathQA" in done.stderr
    script = "import sys, peft, helper\nprint(sys.argv, 'DUALLORA' in peft.PeftType.__members__)\n"
    (tmp_path / "run.py").write_text(script)
    (tmp_path / "helper.py").write_text("")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "['run.py', '-v', 'experiments/x'] True" in done.stdout


def test_the_protocol_runs_to_its_end_and_records_what_peft_records(tiny_causal_folder, tmp_path):
    experiment = FOLDER / "experiments" / "duallora" / "llama-3.2-3B-rank16-lr1e-3"
    command = [sys.executable, str(FOLDER / "compare.py"), str(experiment), "--model", str(tiny_causal_folder)]
    subprocess.run([*command, "--steps", "3", "--rows", "2", "-o", str(tmp_path)], check=True, capture_output=True)
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert file.name == "duallora--llama-3.2-3B-rank16-lr1e-3.json"
    train = found["train_info"]
    assert train["accelerator_memory_reserved_avg"] <= train["accelerator_memory_max"]
    assert train["accelerator_memory_max"] > 50 << 20
    assert train["file_size"] > 4 * train["num_trainable_params"]
    (last,) = train["metrics"]
    assert last["step"] == 3
    assert 0 <= last["test accuracy"] <= 1
    assert abs(last["forgetting"]) < 5

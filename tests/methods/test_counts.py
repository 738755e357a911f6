"""The paper's parameter counts: computed, not quoted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, RobertaConfig

from duallora.methods import MethodSpec
from duallora.methods.counts import ALL, Count, Row, count, rows
from duallora.plan.architectures import config_of

ROOT = Path(__file__).parents[2]
LINES = json.loads((ROOT / "results" / "method_counts.json").read_text())["metrics"]["rows"]
FOUND = {(line["model"], line["method"]): line for line in LINES}


def script():
    spec = importlib.util.spec_from_file_location("method_counts", ROOT / "benchmarks" / "method_counts.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


# LoRA r (out + in), Dual LoRA (r1 + r2)(out + in), DoRA + out, summed over q, k, v, up, down by hand: 70B has 8 of 64 heads
# for keys and values.
FORMULAS = {
    ("llama-7b", "Dual LoRA, r 16"): 32 * 32 * (3 * (4096 + 4096) + 2 * (4096 + 11008)),
    ("llama-7b", "DoRA, r 64"): 32 * (64 * (3 * (4096 + 4096) + 2 * (4096 + 11008)) + 4 * 4096 + 11008),
    ("llama-7b", "Adapter-P, r 256"): 32 * 2 * 256 * (4096 + 11008),
    ("llama-13b", "Dual LoRA, r 16"): 40 * 32 * (3 * (5120 + 5120) + 2 * (5120 + 13824)),
    ("llama-3-8b", "HiRA, r 32"): 32 * 32 * (2 * 4096 + 2 * (4096 + 1024) + 2 * (4096 + 14336)),
    ("llama-3-70b", "Dual LoRA, r 8"): 80 * 16 * (2 * 8192 + 2 * (8192 + 1024) + 2 * (8192 + 28672)),
    ("roberta-base", "Dual LoRA, r 8"): 12 * 2 * 16 * (768 + 768),
    ("roberta-large", "LoRA, r 16"): 24 * 2 * 16 * (1024 + 1024),
    ("deberta-v2-xxlarge", "Dual LoRA, r 16"): 48 * 2 * 32 * (1536 + 1536),
    ("gpt2-medium", "Adapter-L, r 224"): 24 * (2 * 1024 * 224 + 224 + 1024 + 2 * 1024),
    ("gpt2-medium", "LoRA, r 8"): 24 * 8 * (1024 + 3 * 1024),
    ("gpt2-large", "Adapter-L, r 248"): 36 * (2 * 1280 * 248 + 248 + 1280 + 2 * 1280),
}


@pytest.mark.parametrize(("model", "method"), FORMULAS)
def test_the_counts_are_the_formulas(model, method):
    assert FOUND[model, method]["trainable"] == FORMULAS[model, method]


def test_the_papers_figures_are_met_or_explained():
    """0.8256, 0.6702, 0.7002, 0.1965 %; 0.6, 1.6, 9.4 M; and every other figure, or a reason why not."""
    percent = {key: Count(line["trainable"], line["base"]).percent for key, line in FOUND.items()}
    for model, expected in (("llama-7b", 0.8256), ("llama-13b", 0.6702), ("llama-3-8b", 0.7002)):
        assert percent[model, "Dual LoRA, r 16"] == pytest.approx(expected, abs=5e-5)
    assert percent["llama-3-70b", "Dual LoRA, r 8"] == pytest.approx(0.1965, abs=5e-5)
    shown = [
        FOUND[m, f"Dual LoRA, r {r}"]["ours"]
        for m, r in (("roberta-base", 8), ("roberta-large", 8), ("deberta-v2-xxlarge", 16))
    ]
    assert shown == ["0.6", "1.6", "9.4"]
    assert FOUND["gpt2-medium", "Dual LoRA, r 4"]["ours"] == "0.79"
    assert all(line["agrees"] or line["note"] for line in LINES)
    assert sum(line["agrees"] for line in LINES) >= 40
    assert [(r.model, r.method) for r in rows()] == [(line["model"], line["method"]) for line in LINES]


def test_the_file_is_what_the_code_counts_today():
    """Two layers and one give a slope and an intercept: exact for models whose layers are alike, and quick."""
    for row in rows():
        if (row.model, row.method) not in {
            ("llama-3-8b", "Dual LoRA, r 16"), ("llama-3-8b", "DoRA, r 32"), ("llama-7b", "Adapter-P, r 256"),
            ("roberta-base", "RandLoRA, r 64"), ("roberta-base", "VeRA, r 1024"), ("gpt2-medium", "Adapter-L, r 224"),
        }:  # fmt: skip
            continue
        config = config_of(row.model)
        layers = config.num_hidden_layers
        small = []
        for number in (1, 2):
            config.num_hidden_layers = number
            small.append(count(config, row.spec))
        one, two = small
        line = FOUND[row.model, row.method]
        assert line["trainable"] == one.trainable + (layers - 1) * (two.trainable - one.trainable), row
        assert line["base"] == one.base + (layers - 1) * (two.base - one.base), row


def test_the_page_shows_the_file():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert script().table(LINES) in page


def test_digits_and_units_follow_the_paper():
    row = Row(1, "m", "LoRA", MethodSpec("lora"), ".35")
    assert Count(351, 100_000 - 351).shown(row) == "0.35"
    assert Count(351, 100_000 - 351).agrees(row)
    assert not Count(356, 100_000 - 356).agrees(row)
    assert Count(1_649_999, 0).shown(row._replace(table=2, printed="1.6")) == "1.6"


def test_full_fine_tuning_counts_every_parameter_once():
    """Tied embeddings are one matrix, a classifier's head is part of the model."""
    config = RobertaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    encoder = count(config, MethodSpec("full", task_type=None))
    assert encoder.base == 0
    assert encoder.trainable > 50 * 8
    llama = LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    found = count(llama, MethodSpec("lora", r=3, target_modules=ALL, task_type=None))
    assert found.base == 50 * 8 + 4 * 64 + 3 * 96 + 3 * 8
    assert found.trainable == 3 * (3 * 16 + 2 * 20)

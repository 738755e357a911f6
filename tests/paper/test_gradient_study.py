"""The comparison of starts compares starts: everything else of its cells is the same."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from duallora.config.recipe import fingerprint
from duallora.errors import ConfigError
from duallora.paper import studies
from duallora.train.adapter import adapt

STUDIES = {study.name: study for study in studies("gradient-start", "mini")}


def recipes(name: str):
    return {(cell.tags["task"], cell.tags["variant"], cell.name): cell.recipe() for cell in STUDIES[name].wanted({})}


@pytest.mark.parametrize("name", STUDIES)
def test_cells_of_a_task_differ_in_the_adapter_and_the_rates_alone(name):
    shared = {}
    for (task, variant, cell), recipe in recipes(name).items():
        values = recipe.model_dump(exclude={"adapter": True, "train": {"learning_rate", "direction_lr_ratio"}})
        assert values == shared.setdefault(task, values), cell
        assert (recipe.train.direction_lr_ratio == 1) == ("direction-lr" not in variant)
    rates = {}
    for (task, variant, _), recipe in recipes(name).items():
        rates.setdefault((task, variant), []).append(recipe.train.learning_rate)
    assert len({tuple(tried) for tried in rates.values()}) == 1


@pytest.mark.parametrize("name", STUDIES)
def test_every_variant_trains_as_many_parameters(name):
    """Counted on a model, but for the starts that look at data: there the plain LoRA of their shape."""
    config = BertConfig(vocab_size=9, hidden_size=20, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    counts = {}
    one_each = {variant: recipe for (_, variant, _), recipe in recipes(name).items()}
    for variant, recipe in one_each.items():
        plain = {"options": {}} if recipe.adapter.method == "lora" else {}
        adapter = recipe.adapter.model_copy(update={"target_modules": ["query", "value"], **plain})
        with torch.device("meta"):
            model = BertForSequenceClassification(config)
        adapted = adapt(model, recipe.model_copy(update={"adapter": adapter}), "classify", lr_warmup=1)
        counts[variant] = sum(p.numel() for n, p in adapted.named_parameters() if p.requires_grad and "layer.0" in n)
    rank = 8 if name == "gradient-start-e2e" else 16
    assert set(counts.values()) == {2 * rank * (20 + 20)}, counts


@pytest.mark.parametrize("name", ["gradient-start", "gradient-start-e2e"])
def test_starts_from_data_look_at_as_many_rows(name):
    rows = {
        variant: recipe.adapter.options["calibration"]
        if recipe.adapter.method == "lora" and recipe.adapter.options
        else recipe.adapter.init_batches * recipe.train.batch_size
        for (_, variant, _), recipe in recipes(name).items()
        if variant in ("gradient", "lora-eva", "lora-corda", "lora-ga")
    }
    assert len(rows) == (3 if name == "gradient-start-e2e" else 4)
    assert set(rows.values()) == {rows["gradient"]}, rows


@pytest.mark.parametrize("name", ["gradient-start", "start-values", "ablations"])
def test_the_paper_has_no_such_comparison(name):
    with pytest.raises(ConfigError, match=f"{name} is ours, not the paper's: expected --scale mini, not paper"):
        studies(name, "paper")


@pytest.mark.parametrize(
    ("name", "other", "rows"),
    [
        ("gradient-start", "table2", ["lora", "duallora"]),
        ("gradient-start-e2e", "table4", ["lora", "duallora"]),
        ("gradient-start-e2e", "start-values", ["duallora", "duallora-0.05-0.002"]),
        ("gradient-start-parts", "ablations", ["duallora", "duallora-direction-std0.1", "duallora-direction-std0.002"]),
    ],
)
def test_the_rows_without_a_start_are_another_studys(name, other, rows):
    """So that --reuse trains them once."""
    theirs = {fingerprint(cell.recipe()) for study in studies(other, "mini") for cell in study.wanted({})}
    for variant in rows:
        own = [cell for cell in STUDIES[name].wanted({}) if cell.tags["variant"] == variant]
        assert own
        assert {fingerprint(cell.recipe()) for cell in own} <= theirs, variant

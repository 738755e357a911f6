"""The comparison of starts compares starts: all else of its cells is the same, and its second look has other rows or seeds."""

from __future__ import annotations

import itertools
from functools import cache

import pytest

from duallora.config.recipe import fingerprint
from duallora.errors import ConfigError
from duallora.paper import studies

STUDIES = {study.name: study for name in ("gradient-start", "start-values") for study in studies(name, "mini")}
STARTS = [name for name in STUDIES if name.startswith("gradient-start")]
(ABLATIONS,) = studies("ablations", "mini")


@cache
def recipes(name: str):
    return {(cell.tags["task"], cell.tags["variant"], cell.name): cell.recipe() for cell in STUDIES[name].wanted({})}


@pytest.mark.parametrize("name", STARTS)
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


def test_the_paper_has_no_such_comparison():
    with pytest.raises(ConfigError, match="start-values is ours, not the paper's: expected --scale mini, not paper"):
        studies("start-values", "paper")


@pytest.mark.parametrize(
    ("name", "other", "rows"),
    [
        ("gradient-start", "table2", ["lora", "duallora"]),
        ("gradient-start-e2e", "table4", ["lora", "duallora"]),
        ("gradient-start-e2e", "start-values", ["duallora", "duallora-0.05-0.002"]),
        ("gradient-start-parts", "ablations", ["duallora", "duallora-direction-std0.1", "duallora-direction-std0.002"]),
        ("start-values-e2e", "table4", ["plain"]),
    ],
)
def test_the_rows_without_a_start_are_another_studys(name, other, rows):
    """So that --reuse trains them once."""
    theirs = {fingerprint(cell.recipe()) for study in studies(other, "mini") for cell in study.wanted({})}
    for variant in rows:
        own = {fingerprint(recipe) for (_, label, _), recipe in recipes(name).items() if label == variant}
        assert set() < own <= theirs, variant


def test_what_the_ablations_have_seen_is_not_looked_at_again():
    seen = set(itertools.product(ABLATIONS.tasks, ABLATIONS.seeds))
    for name in ("start-values", "start-values-e2e"):
        assert seen.isdisjoint(itertools.product(STUDIES[name].tasks, STUDIES[name].seeds))


def test_start_values_variants_are_the_ablations_but_for_task_seed_and_rank():
    free = {"adapter.r", "adapter.target_modules", "adapter.modules_to_save"}
    for name in ("start-values", "start-values-e2e"):
        for label, own in STUDIES[name].variants.items():
            first = ABLATIONS.variants[label]
            assert [own[key] for key in own.keys() - free] == [first[key] for key in own.keys() - free]
            assert own.keys() - free == first.keys() - free

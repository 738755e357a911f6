"""The second look at start values is a second look: other rows or other seeds than the first."""

from __future__ import annotations

from duallora.config.recipe import fingerprint
from duallora.paper import studies

STUDIES = {study.name: study for study in studies("start-values", "mini")}


def prints(study, **tags):
    cells = study.wanted({})
    return {fingerprint(cell.recipe()) for cell in cells if tags.items() <= cell.tags.items()}


def test_what_the_ablations_have_seen_is_not_looked_at_again():
    (first,) = studies("ablations", "mini")
    seen = {(task, seed) for task in first.tasks for seed in first.seeds}
    for study in STUDIES.values():
        assert seen.isdisjoint((task, seed) for task in study.tasks for seed in study.seeds)


def test_its_variants_are_the_ablations_but_for_task_seed_and_rank():
    (first,) = studies("ablations", "mini")
    for study in STUDIES.values():
        for label, own in study.variants.items():
            free = ("adapter.r", "adapter.target_modules", "adapter.modules_to_save")
            assert {key: own[key] for key in own if key not in free} == {
                key: value for key, value in first.variants[label].items() if key not in free
            }


def test_the_plain_start_on_e2e_is_table_4s():
    (table4,) = studies("table4", "mini")
    assert prints(STUDIES["start-values-e2e"], variant="plain") == prints(table4, variant="duallora-r4")

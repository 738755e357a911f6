"""The study of forms where capacity binds: as many parameters for all, and half a day of one core."""

from __future__ import annotations

import itertools
import math

from duallora.paper import cost, reproduce
from duallora.paper.cost import Gpu

IDLE = Gpu(0.11, 0.11, 15.0, math.inf, cost.MFU_MEASURED)  # one core of the machine it was sized for
PARTS = reproduce.parts("binding", "mini")


def test_every_form_trains_as_many_parameters_as_lora_of_the_rank_it_is_named_for():
    """DoRA has the lengths of one layer's outputs on top; the head of the encoder, which all train, does not count."""
    one_each = {(part.study.name, cell.tags["variant"]): cell for part in PARTS for cell in part.first_cells()}
    assert len(one_each) == 14 + 4 + 4 + 4 + 4
    per_rank = {"binding-facts": 1536 + 576, "binding-glue": 6 * 2 * 768}
    for (study, label), cell in one_each.items():
        expected = int(label.rpartition("-R")[2]) * per_rank.get(study, 30 * (576 + 576 + 576 + 192))
        more = 576 if label.startswith("dora") else 0
        assert cost.shape(cell.recipe()).trained == expected + more, (study, label)


def test_rates_are_six_half_a_decade_apart_and_facts_are_asked_back():
    for part in PARTS:
        for task, variant in itertools.product(part.study.tasks, part.study.variants):
            rates = part.study.search_for(task, variant)["train.learning_rate"]
            assert len(rates) == 6
            assert all(3 <= high / low <= 3.4 for low, high in itertools.pairwise(rates))
    (facts,) = reproduce.parts("binding", "mini", only=["task=facts"])
    assert {cell.settings["data.limit"] == cell.settings["data.eval_limit"] for cell in facts.first_cells()} == {True}


def test_it_takes_half_a_day(monkeypatch):
    monkeypatch.setattr(cost, "gpu_named", lambda name: IDLE)
    found = reproduce.plan(PARTS, "cpu")
    assert found["hours"] < 12
    assert max(line["hours"] for line in found["studies"][0]["lines"]) < 3 / 60  # of facts

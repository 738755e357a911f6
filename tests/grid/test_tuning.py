"""A search by Optuna: where its trials lie, what it is told, and that a stopped search draws what it would have drawn."""

from __future__ import annotations

import math
import sys

import pytest

from duallora.errors import ConfigError
from duallora.grid.study import Outcome, Study
from duallora.grid.tuning import JOURNALS, Trials

optuna = pytest.importorskip("optuna")

SPACE = {
    "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
    "r": {"low": 2, "high": 14, "step": 4},
    "lr_scheduler": {"choices": ["cosine", "linear"]},
}


def study(trials: int, **changes) -> Study:
    given = {
        "name": "drawn",
        "base": {"task": "cola"},
        "tasks": {"cola": {}},
        "variants": {"a": {}, "b": {}},
        "seeds": [3, 8],
    }
    return Study(**{**given, "space": SPACE, "trials": trials, **changes})


def run_all(one: Study, folder, found=(), *, most: int = 10_000) -> dict[str, Outcome]:
    """As the engine does with one worker: what is wanted first, and a new trial where nothing is left."""
    folder.mkdir(exist_ok=True)
    trials, found = Trials(one, folder), dict(found)
    while len(found) < most:
        left = [cell for cell in one.wanted(found, trials.asked) if cell.name not in found]
        if not left:
            if not trials.ask(found, ()):
                return found
            continue
        found[left[0].name] = ended(left[0])
    return found


def ended(cell) -> Outcome:
    recipe = cell.recipe()
    rate = recipe.train.learning_rate
    facts = {"recipe": recipe.model_dump(mode="json")}
    if rate > 2e-2:
        return Outcome(cell.name, "failed", "diverged", **facts)
    score = -abs(math.log(rate / 1e-3)) + (recipe.train.lr_scheduler == "cosine")
    return Outcome(cell.name, "done", metrics={"accuracy": score}, main_metric="accuracy", **facts)


def test_each_task_and_variant_has_its_trials_within_the_space_and_the_other_seeds_at_the_best(tmp_path):
    one = study(12)
    found = run_all(one, tmp_path)
    assert len(found) == 2 * (12 + 1)
    for variant in "ab":
        points = one.points(found, "cola", variant)
        assert [point.label for point in points] == [f"trial{number}" for number in range(12)]
        for point in points:
            assert 1e-5 <= point.values["train.learning_rate"] <= 1e-1
            assert point.values["adapter.r"] in (2, 6, 10, 14)
        best = max(points, key=lambda point: one.score(found, "cola", variant, point))
        assert one.best(found, "cola", variant) == best
        assert f"cola-{variant}-{best.label}-seed8" in found
    assert one.expected(found) == len(found)
    # Without Optuna, from the folder alone, the same is read.
    assert {cell.name for cell in one.wanted(found)} == set(found)


def test_a_diverged_trial_is_told_as_failed(tmp_path):
    found = run_all(study(12), tmp_path)
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / JOURNALS / "cola-a.log"))
    )
    told = optuna.load_study(study_name="cola-a", storage=storage).get_trials()
    states = [trial.state.name for trial in told]
    nan = [found[f"cola-a-trial{number}-seed3"].diverged for number in range(12)]
    assert any(nan)
    assert states == ["FAIL" if one else "COMPLETE" for one in nan]


def test_a_stopped_search_goes_on_with_the_points_it_would_have_drawn(tmp_path):
    straight = run_all(study(9), tmp_path / "straight")
    first = run_all(study(9), tmp_path / "stopped", most=7)
    Trials(study(9), tmp_path / "stopped").ask(first, ())  # killed before the cell it asked for was done
    again = run_all(study(9), tmp_path / "stopped", first)
    assert again == straight


def test_more_trials_go_on_from_those_that_lie_there(tmp_path):
    few = run_all(study(4), tmp_path)
    more = run_all(study(7), tmp_path)
    assert {name for name in few if "seed3" in name} <= more.keys()
    assert len([name for name in more if "-a-" in name and "seed3" in name]) == 7


def test_a_pair_with_a_cell_that_failed_for_good_is_not_gone_on_with(tmp_path):
    one = study(5)
    trials = Trials(one, tmp_path)
    assert trials.ask({}, ())
    assert trials.ask({}, ())
    while trials.ask({}, {"cola-a-trial0-seed3"}):
        pass
    assert {pair: len(points) for pair, points in trials.asked.items()} == {("cola", "a"): 1, ("cola", "b"): 5}


def test_the_engine_works_a_space_off_and_a_second_start_does_nothing(fakes):
    one = study(3, variants={"a": {}})
    found = fakes.run(one, workers=2)
    assert len(found) == 4
    assert {item.status for item in found.values()} == {"done"}
    assert fakes.run(one).keys() == found.keys()
    assert set(fakes.starts().values()) == {1}


def test_without_optuna_it_is_said_plainly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'duallora\[optuna\]'"):
        Trials(study(2), tmp_path)

"""A summary holds what the cells say, at the value the study chose, and nothing of the data; its sentences follow."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import study_cells
from study_cells import GOLD, guesses, made_up, run_all, score, study_of

from duallora.errors import ConfigError, DataError, IntegrityError
from duallora.grid import report, statistics
from duallora.grid import summary as studies
from duallora.grid.study import CELLS, Study, outcomes
from duallora.tasks import load_task
from duallora.train import plugins


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "grid")


def row_of(summary, task, variant):
    (row,) = (row for row in summary["rows"] if (row["task"], row["variant"]) == (task, variant))
    return row


def pair_of(summary, task, other):
    (pair,) = (pair for pair in summary["pairs"] if (pair["task"], pair["other"]) == (task, other))
    return pair


def rewrite(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def scores(metric: str, skill: float, task: str = "cola", seeds=(0, 1, 2)) -> np.ndarray:
    """What the seeds' runs of that skill recorded."""
    return np.array([score(task, guesses(task, skill, seed))[metric] for seed in seeds])


def test_each_row_is_the_test_values_of_every_seed_at_the_value_chosen_on_validation(summary, finished):
    study, found = Study.read(finished), outcomes(finished)
    for task, metric in (("cola", "matthews"), ("stsb", "pearson")):
        for variant, skill, rate in (("lora", 0.7, 3e-3), ("duallora", 0.9, 1e-2), ("dora", 0.7, 3e-3)):
            row, recorded = row_of(summary, task, variant), scores(metric, skill, task)
            assert row["values"] == study.best(found, task, variant).values == {"train.learning_rate": rate}
            assert row["by_seed"] == pytest.approx(recorded, rel=1e-5)
            assert (row["mean"], row["sd"]) == pytest.approx((recorded.mean(), recorded.std(ddof=1)), rel=1e-4)
            assert row["interval"][0] < row["mean"] < row["interval"][1]
            assert row["steps"] == 6
    accuracy = row_of(summary, "cola", "duallora")["every"]["accuracy"]["mean"]
    assert accuracy == pytest.approx(scores("accuracy", 0.9).mean(), rel=1e-5)


def test_pairs_are_seed_by_seed_differences_against_the_reference(summary):
    assert {(pair["task"], pair["one"], pair["other"]) for pair in summary["pairs"]} == {
        (task, "duallora", other) for task in ("cola", "stsb", "average") for other in ("lora", "dora")
    }
    by_seed = scores("matthews", 0.9) - scores("matthews", 0.7)
    pair = pair_of(summary, "cola", "lora")
    assert (pair["mean"], pair["sd"]) == pytest.approx((by_seed.mean(), by_seed.std(ddof=1)), rel=1e-4)
    assert pair["better"] == "yes"
    assert pair["p"] < pair["p_adjusted"] <= 2 * pair["p"] * (1 + 1e-5)
    whole = pair_of(summary, "average", "lora")
    assert whole["mean"] == pytest.approx((pair["mean"] + pair_of(summary, "stsb", "lora")["mean"]) / 2, rel=1e-4)


def test_tasks_are_resampled_apart_however_alike_their_sizes(tmp_path):
    """Two tasks of 150 rows and the same predictions: their mean must be surer than either, by sqrt(2)."""
    study = study_of("cola", "twin", variants=["lora"], search={})
    summary = studies.summarize(run_all(tmp_path, study, lambda cell: 0.8), rounds=3000)
    single, whole = (np.ptp(row_of(summary, task, "lora")["interval_of_models"]) for task in ("cola", "average"))
    assert whole == pytest.approx(single / np.sqrt(2), rel=0.1)


def test_methods_with_equal_predictions_cannot_be_told_apart(copy):
    """LoRA and DoRA of the made-up grid predict the same; the summary must not find a winner."""
    (copy / "study.yaml").write_text(study_of("cola", "stsb", reference="lora").yaml())
    summary = studies.summarize(copy, rounds=500)
    pair = pair_of(summary, "cola", "dora")
    assert (pair["mean"], pair["interval"], pair["better"]) == (0, [0, 0], "cannot be said")
    assert pair_of(summary, "cola", "duallora")["better"] == "no"
    text = "\n".join(summary["statement"])
    assert "lora is worse than duallora" in text
    assert "cannot be told from dora (+0.00 [+0.00, +0.00])" in text


def test_cost_is_relative_to_lora_and_parameters_are_the_runs(summary):
    """The made-up cells take 20 + r processor seconds and train 100 r parameters."""
    assert row_of(summary, "cola", "duallora")["cpu_ratio"] == pytest.approx(28 / 36, rel=1e-5)
    assert row_of(summary, "average", "duallora")["cpu_ratio"] == pytest.approx(28 / 36, rel=1e-5)
    assert row_of(summary, "cola", "lora")["cpu_ratio"] == 1
    assert row_of(summary, "stsb", "duallora")["parameters"] == {"trainable": 800, "total": 100_000}


def test_runs_that_diverged_are_counted_and_their_messages_stay_behind(summary):
    """The committed file names neither folders, nor rows, nor predictions."""
    diverged = [cell for cell in summary["cells"] if cell["status"] == "diverged"]
    assert {(cell["tags"]["variant"], cell["tags"]["train.learning_rate"]) for cell in diverged} == {("dora", 1e-2)}
    assert summary["statement"][0] == (
        "All 30 cells have run; 2 diverged, which counts as the worst value of their search."
    )
    text = json.dumps(summary)
    assert "/home" not in text
    assert all(word not in text for word in ('"prediction"', '"label"', '"references"'))


def test_an_unfinished_study_says_how_much_of_it_there_is(tmp_path):
    """The grid is killed in its first stage: CoLA's values are all tried with one seed, STS-B's not."""
    summary = studies.summarize(run_all(tmp_path, study_of("cola", "stsb"), made_up, stop_after=14), rounds=200)
    assert summary["done"] == 13  # one diverged
    assert summary["wanted"] == 18 + 2 * 3 + 2  # stage 2 of CoLA, and of LoRA on STS-B
    assert summary["statement"][0].startswith("Not finished: 13 of the 26 cells wanted so far are done; 1 diverged")
    assert summary["open"] == [["stsb", "duallora"], ["stsb", "dora"]]
    assert row_of(summary, "cola", "duallora")["seeds"] == [0]
    assert any("No best value yet" in line and "stsb dora" in line for line in summary["statement"])
    assert "cola, stsb: one seed so far, so the intervals allow for other test rows alone." in summary["statement"]


def test_a_seed_that_diverged_at_the_chosen_value_is_named(tmp_path):
    def skill(cell):
        return None if (cell.tags["seed"], cell.tags["variant"]) == (1, "lora") else made_up(cell)

    summary = studies.summarize(run_all(tmp_path, study_of("cola"), skill), rounds=200)
    pair = pair_of(summary, "cola", "lora")
    assert row_of(summary, "cola", "lora")["seeds"] == pair["seeds"] == [0, 2]
    by_seed = scores("matthews", 0.9, seeds=(0, 2)) - scores("matthews", 0.7, seeds=(0, 2))
    assert pair["mean"] == pytest.approx(by_seed.mean(), rel=1e-4)
    assert pair_of(summary, "cola", "dora")["seeds"] == [0, 1, 2]
    assert "lora on cola diverged at its chosen value with seed 1" in "\n".join(summary["statement"])


def test_a_pair_of_one_seed_is_no_surer_than_the_seeds_of_the_others_let_it_be(tmp_path):
    """LoRA diverged with two of three seeds: one difference is left, on which the seeds' spread was lost."""
    skills = {"lora": (0.7, None, None), "dora": (0.95, 0.7, 0.85), "duallora": (0.8, 0.82, 0.84)}
    folder = run_all(
        tmp_path, study_of("cola", search={}), lambda cell: skills[cell.tags["variant"]][cell.tags["seed"]]
    )
    summary = studies.summarize(folder, rounds=2000)
    for found in (pair_of(summary, "cola", "lora"), row_of(summary, "cola", "lora")):
        assert found["seeds"] == [0]
        assert np.ptp(found["interval"]) > 1.5 * np.ptp(found["interval_of_models"])


def test_a_variant_whose_seeds_vary_much_more_is_pointed_at_and_not_pooled(tmp_path):
    """It leaves the others' intervals as they are without it, and has a wide one of its own."""

    def summary_of(*methods):
        variants = {name: {"adapter.method": name} for name in methods}
        folder = run_all(
            tmp_path,
            study_of("cola", variants=variants, search={}),
            lambda cell: (0.55, 0.8, 0.97)[cell.tags["seed"]] if cell.tags["variant"] == "hira" else 0.8,
        )
        return studies.summarize(folder, rounds=200)

    calm = ("lora", "dora", "duallora")
    summary, without = summary_of(*calm, "hira"), summary_of(*calm)
    assert [one["tasks"]["cola"]["apart"] for one in (summary, without)] == [["hira"], []]
    assert "On cola hira (sd" in "\n".join(summary["statement"])
    for name in calm:
        assert row_of(summary, "cola", name) == row_of(without, "cola", name)
    wide, narrow = (np.ptp(row_of(summary, "cola", name)["interval"]) for name in ("hira", "lora"))
    assert wide > 2 * 4.303 * row_of(summary, "cola", "hira")["sd"] / np.sqrt(3) > 3 * narrow


def test_what_is_unequal_between_methods_is_said(tmp_path):
    variants = {
        "lora": {"adapter.method": "lora", "train.weight_decay": 0.1, "search": {"train.learning_rate": [1e-3, 3e-3]}},
        "duallora": {},
    }
    summary = studies.summarize(run_all(tmp_path, study_of("cola", variants=variants), made_up), rounds=200)
    assert summary["unequal"]["train.weight_decay"] == {"lora": 0.1, "duallora": 0.0}
    assert set(summary["unequal"]) == {"train.weight_decay", "search"}
    text = "\n".join(summary["statement"])
    assert "the variants differ in train.weight_decay (0.1; duallora: 0)" in text
    assert "values that differ between variants" in text
    assert "lora on cola (train.learning_rate=0.003)" in text  # the best of two values is always at an edge


def test_cells_of_several_versions_are_listed(copy, summary):
    assert summary["unequal"] == {}
    assert not any("differ in" in line or "are of" in line for line in summary["statement"])
    rewrite(copy / CELLS / "cola-lora-lr0.001-seed0" / "run.json", commit="c" * 40, dirty=True)
    summary = studies.summarize(copy, rounds=200)
    assert summary["commit"] == [{"value": "a" * 40, "cells": 29}, {"value": "c" * 40, "cells": 1}]
    text = "\n".join(summary["statement"])
    assert "The cells are of 2 versions of the code: aaaaaaaaaaaa (29 cells), cccccccccccc (1 cells)." in text
    assert "changes that are in no commit" in text


def test_cells_scored_on_different_test_rows_are_refused(copy):
    path = copy / CELLS / "cola-duallora-lr0.01-seed1" / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    other = next(index for index, gold in enumerate(GOLD["cola"]) if gold != GOLD["cola"][0])
    swapped = [lines[other], *lines[1:other], lines[0], *lines[other + 1 :]]
    for text, words in (
        ("".join(swapped), r"cola-duallora-lr0.01-seed1 were scored on different test rows"),
        ("".join(lines)[:-9], "is damaged"),
        (None, "are gone"),
    ):
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(IntegrityError, match=words):
            studies.summarize(copy)


def test_values_that_do_not_follow_from_the_predictions_get_no_interval(copy):
    path = copy / CELLS / "stsb-lora-lr0.003-seed2" / "metrics.json"
    metrics = json.loads(path.read_text())["metrics"]
    metrics["test"]["pearson"] += 0.01
    rewrite(path, metrics=metrics)
    summary = studies.summarize(copy, rounds=200)
    assert "interval" not in row_of(summary, "stsb", "duallora")
    assert {pair["task"] for pair in summary["pairs"]} == {"cola"}
    assert any("nothing here computes pearson as stsb-lora-lr0.003-seed2" in line for line in summary["statement"])


def test_validation_that_is_the_test_and_a_study_without_test_rows_are_said(copy):
    for path in (copy / CELLS).glob("cola-*/metrics.json"):
        rewrite(path, data={"validation": "same", "test": "same"})
    assert "cola: validation and test are the same rows" in "\n".join(studies.summarize(copy, rounds=200)["statement"])
    for path in (copy / CELLS).glob("*/metrics.json"):
        metrics = json.loads(path.read_text())["metrics"]
        rewrite(path, metrics={name: value for name, value in metrics.items() if name != "test"})
    summary = studies.summarize(copy)
    row = row_of(summary, "cola", "duallora")
    assert row["mean"] == pytest.approx(0.9 * score("cola", guesses("cola", 0.9, 77))["matthews"], rel=1e-5)
    assert summary["pairs"] == []
    assert any("no test rows were scored" in line for line in summary["statement"])


def test_metrics_without_sums_and_averages_over_parts_have_intervals_too(tmp_path):
    """Spearman by one call for each resample; the commonsense mean over parts, which ``predictions.jsonl`` names."""
    study = study_of("stsb", "commonsense", variants=["duallora"], metric="spearman", search={}, seeds=(0, 1))
    summary = studies.summarize(run_all(tmp_path, study, lambda cell: 0.8))
    assert {task: facts["metric"] for task, facts in summary["tasks"].items()} == {
        "stsb": "spearman", "commonsense": "average",
    }  # fmt: skip
    assert summary["tasks"]["stsb"]["rounds"] == statistics.ROUNDS_SLOW
    for task in study.tasks:
        row = row_of(summary, task, "duallora")
        assert row["interval"][0] < row["mean"] < row["interval"][1]
    assert row_of(summary, "commonsense", "duallora")["every"]["accuracy_piqa"]["mean"] > 0


def test_a_study_by_loss_reports_the_loss_of_answers_and_the_lower_is_better(tmp_path):
    folder = run_all(tmp_path, study_of("e2e", metric="loss"), made_up)
    summary = studies.summarize(folder, rounds=500)
    assert summary["tasks"]["e2e"]["metric"] == "loss"
    assert row_of(summary, "e2e", "lora")["mean"] == pytest.approx(scores("loss", 0.7, "e2e").mean(), rel=1e-5)
    pair = pair_of(summary, "e2e", "lora")
    assert pair["mean"] == pytest.approx(-0.2, abs=0.03)  # 0.9 and 0.7 of skill
    assert (pair["interval"][1] < 0, pair["better"]) == (True, "yes")
    assert "duallora is better than lora (-0.2" in "\n".join(summary["statement"])
    bleu = studies.summarize(folder, rounds=500, main=True)
    assert (bleu["tasks"]["e2e"]["metric"], bleu["tasks"]["e2e"]["chosen_by"]) == ("bleu", "loss")
    assert [row["values"] for row in bleu["rows"]] == [row["values"] for row in summary["rows"]]
    for path in folder.glob("cells/*/predictions.jsonl"):  # as of runs that did not keep the answers
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{name: line[name] for name in ("prediction", "references")} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert studies.summarize(folder, rounds=500)["tasks"]["e2e"]["metric"] == "bleu"


def test_a_curve_is_the_mean_loss_over_seeds_in_few_points(tmp_path):
    study = study_of("cola", variants=["duallora"], search={})
    (curve,) = studies.summarize(run_all(tmp_path, study, lambda cell: 0.9, steps=95), rounds=200)["curves"]
    assert len(curve["steps"]) == math.ceil(95 / 3)
    assert curve["steps"][-1] == 95
    # Seeds 0, 1 and 2 lie 1 above the one before: their mean is that of seed 1.
    assert curve["loss"][0] == pytest.approx(1 + 2 * (1 / 2 + 1 / 3 + 1 / 4) / 3, rel=1e-5)


def test_a_summary_comes_back_from_its_file_and_other_files_are_refused(summary, finished, tmp_path):
    path = tmp_path / "made-up-mini.json"
    studies.save(summary, path)
    assert studies.load(path) == [json.loads(path.read_text())] == [json.loads(json.dumps(summary))]
    assert len(path.read_text().splitlines()) > len(summary["cells"]) + len(summary["rows"])
    assert studies.load(tmp_path) == studies.load(path)
    (again,) = studies.load(finished)
    assert (again["done"], again["scale"]) == (28, None)
    with pytest.raises(ConfigError, match="does not exist"):
        studies.load(tmp_path / "absent.json")
    for text, error, words in (
        ('{"kind": "eval"}', ConfigError, "of kind 'eval'"),
        ("{", DataError, "cannot be read as JSON"),
        (None, ConfigError, "holds no study: expected study.yaml"),
    ):
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(error, match=words):
            studies.load(path if text else tmp_path)
    with pytest.raises(ConfigError, match=r"holds no study.yaml"):
        studies.summarize(tmp_path)


TOY = """
from duallora import tasks
from duallora.tasks import LazySplits, Task, metrics
from duallora.tasks.metrics import Metric, Metrics

def load(folder):
    return Task(name="toy", kind="classify", splits=LazySplits({}), format="toy", labels=("no", "yes"),
                metrics=Metrics("missed"), main_metric="missed")

metrics.add(Metric("missed", compute=lambda guess, rows: float(sum(g != r.label for g, r in zip(guess, rows))),
                   higher_is_better=False, digits=0))
tasks.add("toy", load)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    plugins.load([str(tmp_path / "toy.py")])
    monkeypatch.setitem(study_cells.GOLD, "toy", GOLD["cola"])
    monkeypatch.setitem(study_cells.METRICS, "toy", load_task("toy").metrics)
    monkeypatch.setattr(study_cells, "guesses", lambda task, skill, seed: guesses("cola", skill, seed))


def test_a_metric_of_a_plug_in_goes_from_scoring_to_the_report(toy, tmp_path):
    """One file makes it known; fewer are better: in the choice of a value, the comparison, the table and the plot."""
    summary = studies.summarize(run_all(tmp_path / "grid", study_of("toy"), made_up))
    row, pair = row_of(summary, "toy", "duallora"), pair_of(summary, "toy", "lora")
    assert (row["metric"], row["values"]) == ("missed", {"train.learning_rate": 1e-2})
    assert row["interval"][0] < row["mean"] < row["interval"][1]
    assert summary["tasks"]["toy"]["rounds"] == statistics.ROUNDS_SLOW
    assert (pair["better"], pair["interval"][1] < 0) == ("yes", True)
    shown = {line[0].text: line[-1] for line in report.tables(summary)[0].rows}
    assert ("best" in shown["duallora"].kind, "worse" in shown["lora"].kind) == (True, True)
    assert "." not in shown["lora"].text.split(" ± ")[0]


def test_many_variants_can_be_told_apart_by_a_metric_without_sums(toy, tmp_path):
    """Eight comparisons: the smallest p-value of 300 resamples would be 0.053 after Holm."""
    variants = {f"lora-r{rank}": {"adapter.method": "lora", "adapter.r": rank} for rank in range(1, 9)}
    study = study_of("toy", variants={**variants, "duallora": {}}, search={}, seeds=(0,))
    folder = run_all(tmp_path / "grid", study, lambda cell: 0.97 if cell.tags["variant"] == "duallora" else 0.6)
    assert {pair["better"] for pair in studies.summarize(folder)["pairs"]} == {"yes"}

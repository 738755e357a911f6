"""A summary holds what the cells say, at the value the study chose, and nothing of the data; its sentences follow."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import study_cells
from study_cells import GOLD, guesses, made_up, run_all, score, two_tasks, write_cell

from duallora.errors import ConfigError, DataError, IntegrityError
from duallora.grid import report, statistics
from duallora.grid import summary as studies
from duallora.grid.study import CELLS, Study, outcomes
from duallora.tasks import load_task
from duallora.train import plugins


@pytest.fixture(scope="module")
def summary(finished):
    return studies.summarize(finished, scale="mini", rounds=2000)


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


def test_each_row_is_the_test_values_of_every_seed_at_the_value_chosen_on_validation(summary, finished):
    study, found = Study.read(finished), outcomes(finished)
    for task, metric in (("cola", "matthews"), ("stsb", "pearson")):
        for variant, skill, rate in (("lora", 0.7, 3e-3), ("duallora", 0.9, 1e-2), ("dora", 0.7, 3e-3)):
            row = row_of(summary, task, variant)
            recorded = [score(task, guesses(task, skill, seed))[metric] for seed in (0, 1, 2)]
            assert row["values"] == study.best(found, task, variant).values == {"train.learning_rate": rate}
            assert row["by_seed"] == pytest.approx(recorded, rel=1e-5)
            assert row["mean"] == pytest.approx(np.mean(recorded), rel=1e-5)
            assert row["sd"] == pytest.approx(np.std(recorded, ddof=1), rel=1e-4)
            assert row["interval"][0] < row["mean"] < row["interval"][1]
            assert row["steps"] == 6
    assert row_of(summary, "cola", "duallora")["every"]["accuracy"]["mean"] == pytest.approx(
        np.mean([score("cola", guesses("cola", 0.9, seed))["accuracy"] for seed in (0, 1, 2)]), rel=1e-5
    )


def test_pairs_are_seed_by_seed_differences_against_the_reference(summary):
    assert {(pair["task"], pair["one"], pair["other"]) for pair in summary["pairs"]} == {
        (task, "duallora", other) for task in ("cola", "stsb", "average") for other in ("lora", "dora")
    }
    by_seed = np.subtract(
        *(
            [score("cola", guesses("cola", skill, seed))["matthews"] for seed in (0, 1, 2)]
            for skill in (0.9, 0.7)
        )
    )  # fmt: skip
    pair = pair_of(summary, "cola", "lora")
    assert (pair["mean"], pair["sd"]) == pytest.approx((by_seed.mean(), by_seed.std(ddof=1)), rel=1e-4)
    assert pair["better"] == "yes"
    assert pair["p"] < pair["p_adjusted"] <= 2 * pair["p"] * (1 + 1e-5)
    whole = pair_of(summary, "average", "lora")
    assert whole["mean"] == pytest.approx((pair["mean"] + pair_of(summary, "stsb", "lora")["mean"]) / 2, rel=1e-4)


def test_tasks_are_resampled_apart_however_alike_their_sizes(tmp_path):
    """Two tasks of 150 rows and the same predictions: their mean must be surer than either, by sqrt(2)."""
    tasks = {name: {"data.task": "cola"} for name in ("cola", "twin")}
    summary = studies.summarize(run_all(tmp_path, two_tasks(tasks=tasks, search={}), lambda cell: 0.8), rounds=3000)
    single, whole = (
        np.ptp(row_of(summary, task, "lora")["interval_of_models"]) for task in ("cola", "average")
    )  # fmt: skip
    assert whole == pytest.approx(single / np.sqrt(2), rel=0.1)


def test_methods_with_equal_predictions_cannot_be_told_apart(tmp_path):
    """LoRA and DoRA of the made-up grid predict the same; the summary must not find a winner."""
    summary = studies.summarize(run_all(tmp_path, two_tasks(reference="lora"), made_up), rounds=500)
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
    summary = studies.summarize(run_all(tmp_path, two_tasks(), made_up, stop_after=14), rounds=200)
    assert summary["done"] == 13  # one diverged
    assert summary["wanted"] == 18 + 2 * 3 + 2  # stage 2 of CoLA, and of LoRA on STS-B
    assert summary["statement"][0].startswith("Not finished: 13 of the 26 cells wanted so far are done; 1 diverged")
    assert summary["open"] == [["stsb", "duallora"], ["stsb", "dora"]]
    assert row_of(summary, "cola", "duallora")["seeds"] == [0]
    assert any("No best value yet" in line and "stsb dora" in line for line in summary["statement"])
    assert "cola, stsb: one seed so far, so the intervals allow for other test rows alone." in summary["statement"]


def test_a_seed_that_diverged_at_the_chosen_value_is_named(tmp_path):
    study = two_tasks(tasks={"cola": {"data.task": "cola"}})
    skill = lambda cell: None if cell.tags["seed"] == 1 and cell.tags["variant"] == "lora" else made_up(cell)  # noqa: E731
    summary = studies.summarize(run_all(tmp_path, study, skill), rounds=200)
    assert row_of(summary, "cola", "lora")["seeds"] == [0, 2]
    pair = pair_of(summary, "cola", "lora")
    assert pair["seeds"] == [0, 2]
    by_seed = [
        score("cola", guesses("cola", 0.9, seed))["matthews"] - score("cola", guesses("cola", 0.7, seed))["matthews"]
        for seed in (0, 2)
    ]
    assert pair["mean"] == pytest.approx(np.mean(by_seed), rel=1e-4)
    assert pair_of(summary, "cola", "dora")["seeds"] == [0, 1, 2]
    assert any(
        line.startswith("lora on cola diverged at its chosen value with seed 1") for line in summary["statement"]
    )


def test_a_pair_of_one_seed_is_no_surer_than_the_seeds_of_the_others_let_it_be(tmp_path):
    """LoRA diverged with two of three seeds: one difference is left, on which the seeds' spread was lost."""
    study = two_tasks(tasks={"cola": {"data.task": "cola"}}, search={})

    def skill(cell):
        if cell.tags["variant"] == "lora":
            return 0.7 if cell.tags["seed"] == 0 else None
        return (0.95, 0.7, 0.85)[cell.tags["seed"]] if cell.tags["variant"] == "dora" else 0.8 + cell.tags["seed"] / 50

    summary = studies.summarize(run_all(tmp_path, study, skill), rounds=2000)
    assert pair_of(summary, "cola", "lora")["seeds"] == row_of(summary, "cola", "lora")["seeds"] == [0]
    for found in (pair_of(summary, "cola", "lora"), row_of(summary, "cola", "lora")):
        assert np.ptp(found["interval"]) > 1.5 * np.ptp(found["interval_of_models"])


def test_many_variants_can_be_told_apart_by_a_metric_without_sums(tmp_path):
    """Nine comparisons by Spearman: the smallest p-value of 300 resamples would be 0.06 after Holm."""
    variants = {f"lora-r{rank}": {"adapter.method": "lora", "adapter.r": rank} for rank in range(1, 10)}
    study = two_tasks(
        tasks={"stsb": {"data.task": "stsb"}}, variants={**variants, "duallora": {}}, metric="spearman", search={},
        seeds=(0,),
    )  # fmt: skip
    folder = run_all(tmp_path, study, lambda cell: 0.97 if cell.tags["variant"] == "duallora" else 0.6)
    assert {pair["better"] for pair in studies.summarize(folder)["pairs"]} == {"yes"}


def test_a_variant_whose_seeds_vary_much_more_is_pointed_at_and_not_pooled(tmp_path):
    """It leaves the others' intervals as they are without it, and has a wide one of its own."""
    variants = {name: {"adapter.method": name} for name in ("lora", "dora", "hira")} | {"duallora": {}}
    study = two_tasks(tasks={"cola": {"data.task": "cola"}}, variants=variants, search={}, seeds=(0, 1, 2))

    def skill(cell):
        return 0.8 if cell.tags["variant"] != "hira" else (0.55, 0.8, 0.97)[cell.tags["seed"]]

    summary = studies.summarize(run_all(tmp_path / "all", study, skill), rounds=200)
    assert "On cola hira (sd" in "\n".join(summary["statement"])
    assert summary["tasks"]["cola"]["apart"] == ["hira"]
    calm = replace(study, variants={name: own for name, own in variants.items() if name != "hira"})
    without = studies.summarize(run_all(tmp_path / "calm", calm, skill), rounds=200)
    assert without["tasks"]["cola"]["apart"] == []
    for name in calm.variants:
        assert row_of(summary, "cola", name) == row_of(without, "cola", name)
    wide, narrow = (np.ptp(row_of(summary, "cola", name)["interval"]) for name in ("hira", "lora"))
    assert wide > 2 * 4.303 * row_of(summary, "cola", "hira")["sd"] / np.sqrt(3) > 3 * narrow


def test_what_is_unequal_between_methods_is_said(tmp_path):
    variants = {
        "lora": {"adapter.method": "lora", "train.weight_decay": 0.1, "search": {"train.learning_rate": [1e-3, 3e-3]}},
        "duallora": {},
    }
    folder = run_all(tmp_path, two_tasks(tasks={"cola": {"data.task": "cola"}}, variants=variants), made_up)
    summary = studies.summarize(folder, rounds=200)
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
    path.write_text("".join(swapped))
    with pytest.raises(IntegrityError, match=r"cola-duallora-lr0.01-seed1 were scored on different test rows"):
        studies.summarize(copy)
    path.write_text("".join(lines[:-1]) + lines[-1][:9])
    with pytest.raises(IntegrityError, match="is damaged"):
        studies.summarize(copy)
    path.unlink()
    with pytest.raises(IntegrityError, match="are gone"):
        studies.summarize(copy)


def test_values_that_do_not_follow_from_the_predictions_get_no_interval(copy):
    path = copy / CELLS / "stsb-lora-lr0.003-seed2" / "metrics.json"
    content = json.loads(path.read_text())
    content["metrics"]["test"]["pearson"] += 0.01
    path.write_text(json.dumps(content))
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
    tasks = {"stsb": {"data.task": "stsb"}, "commonsense": {"data.task": "commonsense"}}
    variants = {"lora": {"adapter.method": "lora"}, "duallora": {}}
    study = two_tasks(tasks=tasks, variants=variants, metric="spearman", search={}, seeds=(0, 1))
    folder = run_all(tmp_path, study, lambda cell: 0.8 if cell.tags["variant"] == "lora" else 0.95)
    summary = studies.summarize(folder)
    assert summary["tasks"]["stsb"]["metric"] == "spearman"
    assert summary["tasks"]["stsb"]["rounds"] == statistics.ROUNDS_SLOW
    assert summary["tasks"]["commonsense"]["metric"] == "average"
    for task in tasks:
        row = row_of(summary, task, "duallora")
        assert row["interval"][0] < row["mean"] < row["interval"][1]
    assert row_of(summary, "commonsense", "lora")["every"]["accuracy_piqa"]["mean"] > 0


def test_a_study_by_loss_reports_the_loss_of_answers_and_the_lower_is_better(tmp_path):
    study = two_tasks(tasks={"e2e": {"data.task": "e2e"}}, metric="loss", reference="duallora")
    folder = run_all(tmp_path, study, made_up)
    summary = studies.summarize(folder, rounds=500)
    assert summary["tasks"]["e2e"]["metric"] == "loss"
    losses = []
    for seed in range(3):
        lines = (folder / "cells" / f"e2e-lora-lr0.003-seed{seed}" / "predictions.jsonl").read_text().splitlines()
        own = [json.loads(line) for line in lines]
        losses.append(-sum(line["log_likelihood"] for line in own) / sum(line["tokens"] for line in own))
    assert row_of(summary, "e2e", "lora")["mean"] == pytest.approx(np.mean(losses), rel=1e-5)
    pair = pair_of(summary, "e2e", "lora")
    assert pair["mean"] == pytest.approx(-0.2, abs=0.03)  # 0.9 and 0.7 of skill
    assert pair["interval"][1] < 0
    assert pair["better"] == "yes"
    assert "duallora is better than lora (-0.2" in "\n".join(summary["statement"])
    for path in folder.glob("cells/*/predictions.jsonl"):  # as of runs that did not keep the answers
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{name: line[name] for name in ("prediction", "references")} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert studies.summarize(folder, rounds=500)["tasks"]["e2e"]["metric"] == "bleu"


def test_a_curve_is_the_mean_loss_over_seeds_in_few_points(tmp_path):
    study = two_tasks(tasks={"cola": {"data.task": "cola"}}, variants={"duallora": {}}, search={})
    folder = tmp_path / "grid"
    folder.mkdir()
    (folder / "study.yaml").write_text(study.yaml())
    for cell in study.wanted({}):
        write_cell(folder, cell, 0.9, steps=95)
    (curve,) = studies.summarize(folder, rounds=200)["curves"]
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
    path.write_text('{"kind": "eval"}')
    with pytest.raises(ConfigError, match="of kind 'eval'"):
        studies.load(path)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        studies.load(path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"holds no study: expected study.yaml"):
        studies.load(tmp_path)
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


def test_a_metric_of_a_plug_in_goes_from_scoring_to_the_report(tmp_path, monkeypatch):
    """One file makes it known; fewer are better: in the choice of a value, the comparison, the table and the plot."""
    (tmp_path / "toy.py").write_text(TOY)
    plugins.load([str(tmp_path / "toy.py")])
    monkeypatch.setitem(study_cells.GOLD, "toy", GOLD["cola"])
    monkeypatch.setitem(study_cells.METRICS, "toy", load_task("toy").metrics)
    assert score("toy", [1 - label for label in GOLD["toy"]])["missed"] == 150
    monkeypatch.setattr(study_cells, "guesses", lambda task, skill, seed: guesses("cola", skill, seed))
    folder = run_all(tmp_path / "grid", two_tasks(tasks={"toy": {"data.task": "toy"}}), made_up)
    summary = studies.summarize(folder)
    row, pair = row_of(summary, "toy", "duallora"), pair_of(summary, "toy", "lora")
    assert (row["metric"], row["values"]) == ("missed", {"train.learning_rate": 1e-2})
    assert row["interval"][0] < row["mean"] < row["interval"][1]
    assert summary["tasks"]["toy"]["rounds"] == statistics.ROUNDS_SLOW
    assert (pair["better"], pair["interval"][1] < 0) == ("yes", True)
    (table,) = (one for one in report.tables(summary) if one.part == "metrics")
    shown = {line[0].text: line[-1] for line in table.rows}
    assert ("best" in shown["duallora"].kind, "worse" in shown["lora"].kind) == (True, True)
    assert "." not in shown["lora"].text.split(" ± ")[0]

"""`reproduce capacity`: what it measures, against sums done otherwise, and that a stopped run goes on."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from duallora import cli
from duallora.errors import ConfigError
from duallora.grid import report
from duallora.grid.study import Cell, outcomes
from duallora.paper import capacity, studies

STUDIES = {study.name: study for study in studies("capacity", "mini")}


def settings(study: str, variant: str, **train: object) -> dict:
    own = STUDIES[study]
    return {**own.base, **own.variants[variant], **{f"train.{key}": value for key, value in train.items()}}


def numpys(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("task", ["fit-gaussian", "fit-power-0.5"])
def test_what_lora_leaves_is_what_the_best_matrix_of_its_rank_leaves(task):
    """By Eckart and Young no LoRA leaves less, and gradient descent finds it: a wrong norm, target or sign would show."""
    _, T = capacity._drawn(task, 3)
    U, values, V = np.linalg.svd(numpys(T))
    left = np.square(U[:, :16] * values[:16] @ V[:16] - numpys(T)).sum() / np.square(numpys(T)).sum()
    assert capacity.left_by_svd(T, 16) == pytest.approx(left, rel=1e-6)
    found, parameters = capacity.fit(
        settings("capacity", "lora", max_steps=200, learning_rate=1e-2), task, 3, Path()
    )  # fmt: skip
    assert parameters == 2 * 16 * 192
    assert left - 1e-5 < found < left * 1.005


def test_drawn_targets_have_the_singular_values_they_are_named_after():
    for power, task in ((0.5, "fit-power-0.5"), (1.0, "fit-power-1")):
        values = np.linalg.svd(numpys(capacity._drawn(task, 0)[1]), compute_uv=False)
        assert values == pytest.approx(np.arange(1, 193) ** -power, rel=1e-4)
    assert not torch.equal(*(capacity._drawn("fit-power-1", seed)[1] for seed in (0, 1)))


@pytest.mark.parametrize("variant", ["dora", "hira", "mora", "flora-core", "relu-sign", "identity-tanh-3to1"])
def test_the_loss_of_a_fit_is_of_the_merged_weight(variant):
    """The output on x = I less W0 is dW^T, in methods that add, multiply or rescale; T is as large as W0."""
    own = capacity.problem("fit-power-1", 1, Path())
    W0 = numpys(own.model.one.weight)
    adapted = capacity.attach(settings("capacity", variant), own.model, 1)
    optimizer = adapted.optimizer(1e-2)
    for _ in range(3):
        loss = own.loss(adapted.model(own.inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    measured = float(own.loss(adapted.model(own.inputs)).detach())
    dW = numpys(adapted.merged().one.weight) - W0
    T = numpys(capacity._drawn("fit-power-1", 1)[1])
    T *= np.linalg.norm(W0) / np.linalg.norm(T)
    assert np.abs(dW).max() > 1e-3
    assert measured == pytest.approx(np.square(dW - T).sum() / np.square(T).sum(), rel=1e-4)


def test_bits_by_hand():
    """Half the probability on the right one of 64 labels leaves one bit of six; a guess leaves all, and worse is negative."""
    assert capacity.bits_per_parameter(768, math.log(2), 1536) == pytest.approx(2.5)
    assert capacity.bits_per_parameter(768, math.log(64), 1536) == pytest.approx(0, abs=1e-12)
    assert capacity.bits_per_parameter(10, math.log(128), 10) == pytest.approx(-1)


def test_labels_are_learned_by_heart_and_cannot_be_guessed():
    """Bits come from the adapter alone: the frozen model knows nothing of the labels, and rank 8 learns 64 keys whole."""
    own = capacity.problem("keys-64", 0, Path())
    before = capacity.bits_per_parameter(64, float(own.loss(own.model(own.inputs)).detach()), 64)
    assert before < 0.2
    found, parameters = capacity.fit(
        settings("capacity-bits-r8", "lora", max_steps=150, learning_rate=1e-2), "keys-64", 0, Path()
    )  # fmt: skip
    assert found * parameters == pytest.approx(64 * 6, rel=0.02)


# Without r more, worked by hand: (in + out) r, and what DoRA's lengths, MoRA's square, FLoRA's core and RandLoRA's diagonals make of it.
FIT = {
    "dora": 192, "mora": 78**2 - 6144, "flora-core": 192 * 31 + 240 - 6144, "randlora": 32 * (6 + 192) - 6144, "vera": 832 + 192 - 6144,
}  # fmt: skip
BITS = {"dora": 3 * 64, "mora": 3 * 22**2 - 1536, "flora-core": 48, "randlora": 3 * 7 * (10 + 64) - 1536, "vera": 0}


@pytest.mark.parametrize(
    ("study", "lora", "more"),
    [("capacity", 6144, FIT), ("capacity-layers", 6144, FIT), ("capacity-bits", 1536, BITS), ("capacity-bits-r2", 768, {}),
     ("capacity-bits-r8", 3072, {})],
)  # fmt: skip
def test_trained_parameters_are_loras_or_differ_as_stated(study, lora, more):
    planned = capacity.plan([STUDIES[study]], Console(quiet=True))["studies"][0]
    assert planned["trained_parameters"] == {label: lora + more.get(label, 0) for label in STUDIES[study].variants}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = ("capacity", "--scale", "mini", "--only", "study=capacity", "--only", "task=fit-power-1", "--only", "variant=lora",
         "--only", "variant=identity-tanh", "--set", "train.max_steps=2", "-o", "runs/c", "--result", "c.json")  # fmt: skip


def run(capsys, *arguments: str) -> dict:
    code = cli.run(["reproduce", *arguments, "--json"])
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == out["exit_code"]
    return out


def test_a_stopped_study_goes_on_and_ends_with_the_same_values(here, capsys):
    """Each form is tuned at the first seed, over a grid that grows, and has three seeds at its own rate."""
    assert run(capsys, *SHORT)["status"] == "done"
    first = json.loads(Path("c.json").read_text())
    (folder,) = {path.parents[1] for path in here.glob("runs/c/**/cells/*")}
    ran = outcomes(folder)
    assert first["done"] == first["wanted"] == len(ran)
    for row in first["rows"]:
        assert row["seeds"] == [0, 1, 2]
        scores = {own["tags"]["train.learning_rate"]: own["metrics"]["residual"] for own in first["cells"]
                  if own["tags"]["variant"] == row["variant"] and own["tags"]["seed"] == 0}  # fmt: skip
        assert row["values"]["train.learning_rate"] == min(scores, key=scores.get)
        assert len(scores) >= 4
    assert first["targets"]["fit-power-1"]["svd"] == pytest.approx(0.0338, abs=1e-4)
    assert first["threads"] == [{"value": 1, "cells": len(ran)}]
    gone = folder / "cells" / sorted(ran)[0]
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/run.json") if path.parent != gone}
    for path in gone.iterdir():
        path.unlink()
    assert run(capsys, *SHORT)["status"] == "done"
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    again = json.loads(Path("c.json").read_text())
    one, other = (
        [{key: value for key, value in row.items() if not key.startswith("cpu")} for row in found["rows"]]
        for found in (first, again)
    )
    assert one == other
    longer = [text.replace("max_steps=2", "max_steps=3") for text in SHORT]
    assert run(capsys, *longer)["exit_code"] == 2  # never two lengths in one study


def test_a_dry_run_writes_nothing_and_what_cannot_hold_is_refused(here, capsys):
    assert run(capsys, *SHORT, "--dry-run")["runs"] == 2 * (4 + 2)
    assert list(here.iterdir()) == []
    refused = ("--set train.batch_size=4", "--ray local", "--gpu h100", "--keep all", "--commands 0")
    for option, value in (text.split() for text in refused):
        out = run(capsys, *SHORT, option, value)
        assert (out["exit_code"], option in out["error"]) == (2, True), option
    assert run(capsys, "capacity", "--scale", "paper")["exit_code"] == 2


def test_a_rate_that_diverges_is_the_worst_and_no_failure(here):
    (here / "cells").mkdir()
    own = settings("capacity", "identity-identity", max_steps=20, learning_rate=1e30)
    cell = Cell("far", own, {"task": "fit-gaussian", "seed": 0})
    capacity.run_cell(here, "residual", cell)
    assert (outcomes(here)["far"].diverged, outcomes(here)["far"].metrics) == (True, {})


def test_a_layer_whose_model_is_absent_is_left_out_and_said(here, monkeypatch):
    def absent(task, folder, console):
        if task == "fit-minilm":
            raise ConfigError("builtin:minilm-l6 needs its package")

    monkeypatch.setattr(capacity, "change", absent)
    console = Console(record=True, width=200)
    study = capacity._with_models(STUDIES["capacity-layers"], here, console)
    assert list(study.tasks) == ["fit-smollm2"]
    assert "fit-minilm is left out: builtin:minilm-l6 needs its package" in console.export_text()


def test_a_change_of_weights_is_that_of_full_fine_tuning_and_made_once(here, tiny_encoder_folder, monkeypatch):
    """W0 is the model's, W0 + T what the training left; nothing else of the run stays."""
    from transformers import AutoModel

    layer = "encoder.layer.0.attention.self.query.weight"
    (here / "rows.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 20)
    short = ("data.max_length=16", "train.max_steps=2", "train.batch_size=4", "train.learning_rate=0.01")
    own = capacity.Real(
        str(tiny_encoder_folder), "rows.csv", "classify", f"bert.{layer}", (*capacity._SHORT, *short)
    )  # fmt: skip
    monkeypatch.setitem(capacity.REAL, "fit-tiny", own)
    capacity.change("fit-tiny", here, Console(quiet=True))
    found = load_file(here / "changes" / "fit-tiny.safetensors")
    assert torch.equal(found["W0"], AutoModel.from_pretrained(tiny_encoder_folder).get_parameter(layer))
    assert 0.005 < found["T"].abs().max() < 0.05  # two of Adam's steps
    assert [path.name for path in (here / "changes").iterdir()] == ["fit-tiny.safetensors"]
    monkeypatch.setattr(capacity.training, "train", None)
    capacity.change("fit-tiny", here, Console(quiet=True))


ROOT = Path(__file__).parents[2]
SHOWN = {  # the rows of the page's own tables
    "LoRA, rank 16 (the bound of any: .731, .421, .034)": "lora", "LoRA": "lora", "ReLU(BA) . Sign(DC), the paper's": "relu-sign",
    "the same, gradient of tanh": "relu-window", "\\|BA\\| . Sign(DC), gradient of tanh": "abs-window",
    "ReLU(BA) . tanh(DC / rms)": "relu-tanh", "ReLU(BA) . DC, the paper's Setting 2": "relu-identity",
    "BA . tanh(DC / rms)": "identity-tanh", "BA . DC, LoHa's": "identity-identity",
}  # fmt: skip


def test_the_pages_own_table_is_the_committed_summarys():
    summary = json.loads((ROOT / "results" / "studies" / "capacity-mini.json").read_text())
    means = {(row["variant"], row["task"]): row["mean"] for row in summary["rows"]}
    page = (ROOT / "docs" / "reproduction" / "capacity.md").read_text()
    lines = itertools.takewhile(
        lambda line: line.startswith("|"), page.split("| form | Gaussian |")[1].splitlines()[2:]
    )
    shown = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines]
    tasks = ("fit-gaussian", "fit-power-0.5", "fit-power-1", "average")
    assert len(shown) == 8
    for label, *found in shown:
        own = [f"{means[SHOWN[label], task]:.3f}".lstrip("0") for task in tasks]
        assert [cell.strip(" *") for cell in found] == own, label
    assert [f"{own['svd']:.3f}" for own in summary["targets"].values()] == ["0.731", "0.421", "0.034"]


def test_an_average_has_its_tasks_decimals_and_direction():
    """Of residuals three, and the smallest is the best; one decimal made all of them 0.4."""
    summary = json.loads((ROOT / "results" / "studies" / "capacity-mini.json").read_text())
    table = report.tables(summary)[0]
    best = [row for row in table.rows if row[-1].kind.endswith("best")]
    least = min((row["mean"], row["variant"]) for row in summary["rows"] if row["task"] == "average")
    assert [(row[0].text, row[-1].text[:5]) for row in best] == [(least[1], f"{least[0]:.3f}")]

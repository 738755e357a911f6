"""A start from data through `duallora train`: which rows, which loss, when, and never twice."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from of_runs import equal, weights
from rich.console import Console
from safetensors.torch import load_file

from duallora.errors import ConfigError
from duallora.store import models
from duallora.store.models import load_model
from duallora.tasks import Collator
from duallora.train import calibration, evaluate, prepare, run

GRADIENT = ("adapter.init=gradient", "adapter.init_batches=2", "train.save_total_limit=null")


def factors(folder) -> dict[str, torch.Tensor]:
    """Before the first step."""
    return load_file(folder / "checkpoints" / "init" / "adapter_model.safetensors")


def best_descent(W: torch.nn.Parameter, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(-W.grad.double().numpy(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def cosine(X: np.ndarray, Y: np.ndarray) -> float:
    return float((X * Y).sum() / np.linalg.norm(X) / np.linalg.norm(Y))


@pytest.fixture(scope="module")
def started(recipe_at, tmp_path_factory):
    """``started(kind)`` is (recipe, folder, result) of a run of 4 steps from the gradient, made once."""

    @functools.cache
    def made(kind: str):
        output = tmp_path_factory.mktemp(f"{kind}-gradient") / "run"
        recipe = recipe_at(output, *GRADIENT, "train.max_steps=4", "eval.metrics=true", kind=kind)
        return recipe, output, run.train(recipe, console=Console(quiet=True))

    return made


@pytest.mark.parametrize("kind", ["generate", "classify"])
def test_the_run_starts_down_the_gradient_of_its_own_loss_on_the_drawn_rows(started, console, kind):
    """The oracle takes all drawn rows as one batch through transformers' own loss, in float64."""
    recipe, folder, result = started(kind)
    task = prepare.load(recipe, console)
    run.set_seed(recipe.seed)
    labels = {"classify": 2}.get(kind)
    model, tokenizer = load_model(recipe.model.name, kind, num_labels=labels)
    rows, _ = run.encode_split(evaluate.select(task, "train"), tokenizer, kind, max_length=64)
    drawn = calibration.draw_rows(rows, 2 * 2 * 2, recipe.seed)
    assert result["metrics"]["start_rows"] == len(drawn) == 8
    model = model.double().eval()
    model(**Collator(tokenizer)(drawn)).loss.backward()
    found = factors(folder)
    names = [name for name in found if name.endswith(".duallora_D")]
    assert len(names) == (14 if kind == "generate" else 13)
    for name in names:
        D, C = (found[name.replace("duallora_D", f"duallora_{x}")].double().numpy() for x in "DC")
        module = name.split(".duallora_D")[0].removeprefix("base_model.model.")
        assert cosine(D @ C, best_descent(model.get_submodule(module).weight, 4)) > 1 - 1e-4, name
    assert all((found[name] > 0).all() for name in found if ".duallora_A" in name or ".duallora_B" in name)


def test_a_stopped_run_goes_on_without_a_second_start(
    started, make_recipe, console, tmp_path, monkeypatch, interrupted
):
    """The rest of the run after step 2, bit for bit; a start done twice would undo those steps."""
    _, folder, whole = started("generate")
    stopped = interrupted(folder, tmp_path / "run", at=2)
    monkeypatch.setattr(calibration, "start_from_gradient", None)
    again = run.train(make_recipe(*GRADIENT, "train.max_steps=4", "eval.metrics=true"), resume="auto", console=console)
    assert again["metrics"]["loss"] == whole["metrics"]["loss"]
    assert again["metrics"]["start_rows"] == 8
    assert equal(weights(folder), weights(stopped))
    assert not equal(weights(folder), factors(folder))


def test_half_a_start_leaves_the_other_half_as_the_seed_drew_it(started, make_recipe, console, tmp_path):
    """Every start of one seed begins with the same draw, so a comparison of starts compares nothing else."""
    for init in ("gradient-signs", "gradient-magnitudes", "gaussian"):
        settings = (f"adapter.init={init}", *GRADIENT[1:], "train.max_steps=1")
        run.train(make_recipe(*settings, output=tmp_path / init), console=console)
    gaussian, whole = factors(tmp_path / "gaussian"), factors(started("generate")[1])
    signs, magnitudes = factors(tmp_path / "gradient-signs"), factors(tmp_path / "gradient-magnitudes")
    for name in whole:
        its_own, other = (signs, magnitudes) if name[-1] in "CD" else (magnitudes, signs)
        assert torch.equal(its_own[name], whole[name]), name
        assert torch.equal(other[name], gaussian[name]), name
        if name[-1] in "AB":
            assert torch.equal(whole[name], gaussian[name].abs())


def test_the_rows_are_drawn_by_the_seed_and_cut_to_the_same_start_anywhere(started, make_recipe, console, tmp_path):
    """Half the batch and twice the accumulation is the same run; so are rows one by one under checkpointing."""
    rows = [{"input_ids": [0] * (n % 7 + 1), "number": n} for n in range(50)]
    first, again, other = (calibration.draw_rows(rows, 20, seed) for seed in (3, 3, 4))
    assert first == again != other
    assert len({row["number"] for row in first}) == 20
    assert len(calibration.draw_rows(rows, 99, 3)) == 50
    cut = ("train.batch_size=1", "train.gradient_accumulation_steps=4", "train.gradient_checkpointing=true")
    recipe = make_recipe(*GRADIENT, *cut, "train.max_steps=1", output=tmp_path / "cut")
    run.train(recipe, console=console)
    ours, theirs = factors(tmp_path / "cut"), factors(started("generate")[1])
    for name in (name for name in ours if name.endswith(".duallora_D")):
        pairs = [t[name] @ t[name[:-1] + "C"] for t in (ours, theirs)]
        assert cosine(*(pair.double().numpy() for pair in pairs)) > 1 - 1e-6, name


@pytest.mark.parametrize("quantization", ["bnb-4bit", "torchao-int8"])
def test_on_a_quantized_base_the_gradient_is_that_of_what_it_computes(started, make_recipe, console, quantization):
    """Signs from rounded weights, but mostly those of the plain ones."""
    pytest.importorskip(models.QUANTIZATIONS[quantization])
    recipe = make_recipe(f"model.quantization={quantization}", *GRADIENT, "train.max_steps=1")
    run.train(recipe, console=console)
    starts = [factors(started("generate")[1]), factors(Path(recipe.output))]
    for name in (name for name in starts[0] if name.endswith(".duallora_D")):
        plain, rounded = (start[name] @ start[name[:-1] + "C"] for start in starts)
        assert 0.6 < cosine(plain.numpy(), rounded.numpy()) < 1 - 1e-9, name


def test_the_direction_group_gets_its_own_rate_from_the_run(make_recipe, console, monkeypatch):
    """Through Trainer's own choice of optimizer, whose groups would have one rate."""
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append([(group["lr"], len(group["params"]), group["weight_decay"]) for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    rate = ("train.max_steps=1", "train.lr_warmup_steps=0", "train.learning_rate=1e-2", "train.weight_decay=0.1")
    run.train(make_recipe(*rate, "train.direction_lr_ratio=0.3"), console=console)
    assert seen == [[(1e-2, 28, 0.1), (pytest.approx(3e-3), 28, 0.1)]]


def test_a_rate_of_the_direction_group_changes_no_weight_decay(make_recipe, console, tmp_path):
    """The head's bias is spared, as Trainer spares it where there is one rate for all."""
    found = []
    for ratio in (1.0, 3.0):
        folder = tmp_path / f"{ratio}"
        own = (f"train.direction_lr_ratio={ratio}", "train.max_steps=2", "train.weight_decay=0.1")
        run.train(make_recipe(*own, kind="classify", output=folder), console=console)
        state = torch.load(folder / "checkpoints" / "checkpoint-2" / "optimizer.pt", weights_only=True)
        sizes: dict[float, list[int]] = {}
        for group in state["param_groups"]:
            moments = [state["state"][index]["exp_avg"].numel() for index in group["params"]]
            sizes.setdefault(group["weight_decay"], []).extend(moments)
        found.append({decay: sorted(of) for decay, of in sizes.items()})
    assert found[0] == found[1]
    assert 2 in found[0][0.0]  # the bias of two classes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("adapter.init=gradient", "adapter.warmup=residual"), 'rebuilds dW\\(0\\) from a seed.*use adapter.warmup = "ramp"'),
        (("adapter.init=gradient-signs", "adapter.direction=fixed"), "has no C and D to start"),
        (("adapter.init=svd",), 'expected "gaussian", "lora", "gradient", "gradient-signs" or "gradient-magnitudes"'),
        (("adapter.method=lora", "adapter.r1=null", "adapter.warmup_steps=auto", "adapter.init=gradient"), "init = .gradient.: Dual LoRA.s, but"),
        (("adapter.method=lora", "adapter.r1=null", "adapter.warmup_steps=auto", "train.direction_lr_ratio=3"), "ratio = 3"),
    ],
)  # fmt: skip
def test_a_start_that_cannot_be_is_refused_as_the_recipe_is_read(make_recipe, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_recipe(*settings)

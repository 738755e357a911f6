"""Memory that runs out and losses that jump: the rows of each optimizer step stay what they were, or one is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from of_runs import equal, weights, without_model_dropout
from transformers import PreTrainedModel

from duallora.errors import DivergedError, OutOfMemoryError, is_disk_failure, is_out_of_memory
from duallora.store import record
from duallora.train import loop, run

NO_DROPOUT = "adapter.duallora_dropout=0"
CPU_WORDS = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: 8 bytes"


@pytest.fixture
def hold(monkeypatch):
    """``hold(rows, error, from_step)``: from that step on, more rows at once raise the error, half of the step done."""

    def plant(rows, error, from_step=0):
        plain = loop.RunTrainer.compute_loss

        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = plain(self, model, inputs, *args, **kwargs)
            if len(inputs["input_ids"]) > rows and self.state.global_step >= from_step:
                loss.backward()  # gradients of a part of the step are there already
                raise error
            return loss

        monkeypatch.setattr(loop.RunTrainer, "compute_loss", compute_loss)

    return plant


@pytest.mark.parametrize(
    ("error", "kind", "counts"),
    [
        (RuntimeError(CPU_WORDS), "generate", True),
        (MemoryError(), "classify", True),
        (MemoryError(), "generate", False),
    ],
)
def test_half_the_rows_at_once_is_the_same_run(error, kind, counts, make_recipe, console, hold, tmp_path, monkeypatch):
    """Also where the model's loss is a mean of the rows at once, as Gemma 3n's, which takes no count of a step's tokens."""
    if not counts:
        monkeypatch.setattr(PreTrainedModel, "accepts_loss_kwargs", False, raising=False)
    recipe = make_recipe(NO_DROPOUT, "train.batch_size=4", "train.auto_batch=true", "train.max_steps=5", kind=kind)
    if kind == "classify":
        recipe = without_model_dropout(recipe, tmp_path, 0.0)
    run.train(recipe.model_copy(update={"output": str(tmp_path / "straight")}), console=console)
    hold(1, error, from_step=3)
    result = run.train(recipe, console=console)
    assert result["metrics"]["rows_at_once"] == 1
    assert "out of memory: 2 rows at once from here" in console.file.getvalue()
    found, wanted = weights(tmp_path / "run"), weights(tmp_path / "straight")
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=0)


def test_a_row_that_does_not_fit_alone_and_a_recipe_that_forbids_it_end_the_run(make_recipe, console, hold):
    hold(0, MemoryError())
    with pytest.raises(OutOfMemoryError, match=r"train\.auto_batch=true"):
        run.train(make_recipe("train.auto_batch=true"), console=console)
    hold(1, MemoryError())
    with pytest.raises(OutOfMemoryError, match=r"train\.auto_batch=true"):
        run.train(make_recipe("train.auto_batch=false", "train.batch_size=2"), console=console)


@pytest.fixture
def jump(monkeypatch):
    """``jump(*steps)``: the losses of these steps, counted from 1, are a thousand times theirs."""

    def plant(*steps):
        plain = loop.RunTrainer.compute_loss

        def compute_loss(self, *args, **kwargs):
            loss = plain(self, *args, **kwargs)
            return loss * 1000 if self.state.global_step + 1 in steps else loss

        monkeypatch.setattr(loop.RunTrainer, "compute_loss", compute_loss)

    return plant


LONGER = (NO_DROPOUT, "train.max_steps=16", "train.save_steps=4")


def test_a_spike_is_told_and_learned_from(make_recipe, console, jump):
    jump(13)
    result = run.train(make_recipe(*LONGER), console=console)
    assert result["metrics"]["spikes"] == [13]
    assert "the loss of step 13 is" in console.file.getvalue()


def test_stopping_at_a_spike_leaves_its_step_unapplied(make_recipe, console, jump):
    jump(13)
    recipe = make_recipe(*LONGER, "train.on_spike=stop")
    with pytest.raises(DivergedError, match=r"the loss of step 13 is .*; the step was not applied"):
        run.train(recipe, console=console)
    kept = sorted(path.name for path in (Path(recipe.output) / "checkpoints").iterdir())
    assert kept == ["checkpoint-12", "checkpoint-8", "init"]
    assert record.read_json(Path(recipe.output) / "run.json")["kind"] == "diverged"


@pytest.mark.parametrize(("at", "go_back"), [(15, True), (13, False)])
def test_going_back_leaves_the_rows_of_the_step_out(at, go_back, make_recipe, console, jump, monkeypatch, tmp_path):
    """The oracle: the straight run in which the optimizer gets no gradient in that step."""
    settings = (*LONGER, *(() if go_back else ("train.save_steps=100",)), "train.on_spike=rollback")
    jump(at)
    result = run.train(make_recipe(*settings), console=console)
    monkeypatch.undo()
    assert result["metrics"]["left_out"] == [at]
    assert ("rollback to step" in " ".join(console.file.getvalue().split())) == go_back
    plain = torch.optim.AdamW.step
    count = iter(range(1, 100))

    def step(self, *args, **kwargs):
        if next(count) == at:
            self.zero_grad()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run.train(make_recipe(*LONGER, output=tmp_path / "oracle"), console=console)
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "oracle"))


def test_losses_that_jump_again_and_again_end_the_run(make_recipe, console, jump):
    jump(*range(11, 40))
    with pytest.raises(DivergedError, match=r"6 steps was a spike \(11, 12, 13, 14, 15, 16\)"):
        run.train(make_recipe(NO_DROPOUT, "train.max_steps=40", "train.on_spike=rollback"), console=console)


def test_what_a_spike_is():
    class Trainer:
        step_loss = 0.0

    trainer, told = Trainer(), []
    spikes = loop.Spikes("warn", (), lambda step: True, told.append)
    spikes.trainer = trainer

    class State:
        global_step = 0

    for loss in (*[50.0] * 9, 700.0, *[1.0] * 60, 9.9, 10.1, 0.002, *[0.001] * 60, 0.99, 1.1):
        trainer.step_loss = loss
        spikes.on_pre_optimizer_step(None, State, None, model=torch.nn.Linear(1, 1))
        State.global_step += 1
    # Nothing before ten losses are known, ten times the median, and never below one.
    assert spikes.found == [72, 135]
    assert len(told) == 2


def test_steps_without_a_gradient_are_told(make_recipe, console, monkeypatch):
    plain = loop.RunTrainer.compute_loss
    monkeypatch.setattr(
        loop.RunTrainer, "compute_loss",
        lambda self, *a, **k: plain(self, *a, **k) * (self.state.global_step < 7),
    )  # fmt: skip
    result = run.train(make_recipe(NO_DROPOUT), console=console)
    assert result["metrics"]["steps_without_gradient"] == 3
    assert "the gradient was 0 in the last 3 steps" in console.file.getvalue()


def test_the_systems_words_have_their_own_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."))
    assert is_out_of_memory(RuntimeError("can't start new thread"))
    assert is_disk_failure(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 37184 vs 37076"))
    assert not is_disk_failure(RuntimeError("size mismatch"))
    assert not is_out_of_memory(RuntimeError("size mismatch"))

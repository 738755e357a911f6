"""A run can be stopped, damaged and continued, and ends where it would have ended; what is wrong stops it, loudly."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from damage import half
from of_runs import WEIGHTS, equal, kill_with, log, weights, with_model, without_model_dropout
from rich.console import Console
from safetensors.torch import load_file

import duallora
from duallora.config.load import load_recipe
from duallora.errors import (
    ConfigError,
    DataError,
    DiskError,
    IntegrityError,
    LockedError,
    NonFiniteError,
    OutOfMemoryError,
)
from duallora.store import checkpoint, lock, record
from duallora.store.run_folder import RunFolder
from duallora.train import loop, prepare, run


@contextmanager
def at(step, micro_batch, action):
    """``action(trainer)`` comes before that micro-batch (both counted from 1)."""
    plain, seen = loop.RunTrainer.training_step, []

    def training_step(self, model, inputs, num_items_in_batch=None):
        seen.append(self.state.global_step + 1)
        if (seen[-1], seen.count(seen[-1])) == (step, micro_batch):
            action(self)
        return plain(self, model, inputs, num_items_in_batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.RunTrainer, "training_step", training_step)
        yield


@pytest.fixture(scope="module")
def reference(recipe_at, tmp_path_factory):
    """The uninterrupted run that the others are compared with: its folder and result, with every checkpoint."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return folder, run.train(recipe_at(folder, "train.save_total_limit=null"), console=Console(quiet=True))


@pytest.fixture
def halfway(reference, interrupted, tmp_path):
    """A copy of that run as if stopped after step 6."""
    return interrupted(reference[0], tmp_path / "run", at=6)


@pytest.mark.parametrize(
    ("step", "micro_batch", "number"), [(1, 1, signal.SIGINT), (4, 2, signal.SIGTERM), (10, 1, signal.SIGTERM)]
)
def test_a_stopped_and_resumed_run_equals_the_straight_one_bit_for_bit(
    make_recipe, console, reference, step, micro_batch, number
):
    """Dropout on, accumulation 2, stopped while the gate opens: factors, counters and the log must all come back."""
    straight, expected = reference
    recipe = make_recipe("train.save_steps=100")
    handler = signal.getsignal(signal.SIGINT)  # a shell ignores it for what it starts in the background
    with at(step, micro_batch, kill_with(number)), pytest.raises(run.Interrupted) as caught:
        run.train(recipe, console=console)
    assert caught.value.exit_code == 128 + number
    folder = Path(recipe.output)
    assert [found for found, _ in checkpoint.checkpoints(folder / "checkpoints")] == [step]
    assert record.read_json(folder / "run.json")["status"] == "interrupted"
    assert "--resume auto" in console.file.getvalue()
    assert signal.getsignal(signal.SIGINT) is handler
    result = run.train(recipe, resume="auto", console=console)
    assert equal(weights(folder), weights(straight))
    # Lines of the log are averages since the line before, so only those after the stop's own can be compared.
    assert log(folder)[-1]["gate"] == log(straight)[-1]["gate"] == 1.0
    for name in ("loss", "loss_before"):
        assert result["metrics"][name] == expected["metrics"][name]
    counters = {int(value) for name, value in weights(folder).items() if name.endswith("duallora_step")}
    assert counters == {10}


def test_training_learns_and_its_folder_tells_the_whole_story(make_recipe, console):
    recipe = make_recipe(
        "train.report_to=[tensorboard]", "eval.metrics=true", "train.eval_steps=5", "train.save_steps=4"
    )
    result = run.train(recipe, console=console)
    folder = Path(recipe.output)
    assert result["metrics"]["loss"] < result["metrics"]["loss_before"]
    assert {"bleu", "perplexity", "tokens_per_second", "train_loss"} <= set(result["metrics"])
    assert 10**8 < result["metrics"]["train_peak_memory"] < 10**12  # Python and torch alone are more than 100 MB
    kept = record.read_json(folder / "metrics.json")["answers"]
    assert len(kept) == 3
    assert all(one.keys() == {"prompt", "expected", "before", "after"} and one["prompt"] for one in kept)
    assert [one["before"] for one in kept] != [one["after"] for one in kept]
    assert load_recipe(folder / "recipe.yaml") == recipe
    facts = record.read_json(folder / "run.json")
    assert facts["status"] == "done"
    assert facts["result"] == result
    assert {"commit", "versions", "fingerprints", "parameters", "seed", "started", "finished"} <= set(facts)
    assert set(facts["fingerprints"]["data"]) == {"train", "validation"}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    assert list(steps) == [1, 3, 6, 9, 10]
    assert {"loss", "learning_rate", "grad_norm", "gate", "tokens_per_second", "seconds", "time"} <= set(steps[3])
    assert [steps[step]["gate"] for step in (1, 3, 6)] == pytest.approx([1 / 6, 3 / 6, 1])
    assert [line["step"] for line in lines if "eval_loss" in line] == [5, 10]
    assert list((folder / "tb").glob("events*"))
    assert [step for step, _ in checkpoint.checkpoints(folder / "checkpoints")] == [10, 8]
    sidecar = record.read_json(folder / "adapter" / "duallora.json")
    assert sidecar["gate"] == 1.0
    assert checkpoint.compare_files(folder / "adapter", sidecar["files"]) is None
    assert record.read_json(folder / "metrics.json")["metrics"] == result["metrics"]
    config = record.read_json(folder / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] == recipe.model.name
    assert not list(folder.rglob("training_args.bin"))


def test_what_is_measured_before_and_on_the_way_changes_nothing(make_recipe, console, reference):
    recipe = make_recipe("train.eval_steps=1", "train.save_steps=3", "train.logging_steps=1", "eval.before=false")
    metrics = run.train(recipe, console=console)["metrics"]
    assert equal(weights(recipe.output), weights(reference[0]))
    assert metrics["loss"] == reference[1]["metrics"]["loss"] != reference[1]["metrics"]["loss_before"]
    assert "loss_before" not in metrics


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(make_recipe, console, reference, halfway):
    half(halfway / "checkpoints" / "checkpoint-6" / "optimizer.pt")
    run.train(make_recipe(output=halfway), resume="auto", console=console)
    said = console.file.getvalue()
    assert "checkpoint-6: optimizer.pt" in said
    assert "from checkpoint-4" in said
    assert equal(weights(halfway), weights(reference[0]))
    assert [line["step"] for line in log(halfway)] == [1, 3, 6, 9, 10]


def test_other_settings_are_refused_by_name_and_free_ones_accepted(make_recipe, console, halfway, reference):
    changed = make_recipe("train.learning_rate=2e-2", "adapter.r=5", "seed=7", "train.batch_size=3", output=halfway)
    with pytest.raises(ConfigError) as caught:
        run.train(changed, resume="auto", console=console)
    for line in ("train.learning_rate: 0.01 -> 0.02", "adapter.r: 4 -> 5", "seed: 0 -> 7", "train.batch_size: 2 -> 3"):
        assert line in str(caught.value)
    free = make_recipe("train.save_steps=7", "train.logging_steps=1", "eval.metrics=true", output=halfway)
    run.train(free, resume="auto", console=console)
    assert equal(weights(halfway), weights(reference[0]))


def test_rows_and_a_tokenizer_that_were_changed_in_place_are_refused(make_recipe, console, tmp_path, sums):
    """A tokenizer even where the rows have the same tokens: what is generated and saved with it would be another."""
    data, model = tmp_path / "rows.jsonl", tmp_path / "model"
    data.write_text(sums.read_text())
    recipe = make_recipe(data=data)
    shutil.copytree(recipe.model.name, model)
    recipe = with_model(recipe, model)
    with at(3, 1, kill_with(signal.SIGINT)), pytest.raises(run.Interrupted):
        run.train(recipe, console=console)
    merge = ('"merges": []', '"merges": [["Q", "Q"]]'), ('"Q":', '"QQ":200,"Q":')
    for file, changes, words in [
        (data, [("plus", "minus")], r"data\.train: "),
        (model / "tokenizer.json", merge, "tokenizer and chat template: "),
        (model / "chat_template.jinja", [("assistant", "helper")], "tokenizer and chat template: "),
    ]:
        was = changed = file.read_text()
        for old, new in changes:
            changed = changed.replace(old, new, 1)
        assert changed != was
        file.write_text(changed)
        with pytest.raises(ConfigError, match=words):
            run.train(recipe, resume="auto", console=console)
        file.write_text(was)


def test_a_resume_names_its_checkpoint(make_recipe, console, halfway, tmp_path, reference):
    older = halfway / "checkpoints" / "checkpoint-4"
    run.train(make_recipe(output=halfway), resume=str(older), console=console)
    assert "from checkpoint-4" in console.file.getvalue()
    assert equal(weights(halfway), weights(reference[0]))
    with pytest.raises(ConfigError, match="checkpoint folders"):
        run.train(make_recipe(output=halfway), resume=str(tmp_path), console=console)
    with pytest.raises(ConfigError, match="needs the run's folder"):
        run.train(make_recipe().model_copy(update={"output": None}), resume="auto", console=console)


def nan_loss(trainer):
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * torch.nan


def infinite_gradient(trainer):
    """The loss stays finite: only the gradient tells."""
    parameter = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    parameter.register_hook(lambda gradient: gradient + torch.inf)


@pytest.mark.parametrize(("fault", "what"), [(nan_loss, "loss is nan"), (infinite_gradient, "grad norm is (inf|nan)")])
def test_a_non_finite_step_stops_the_run_and_saves_nothing_of_it(make_recipe, console, fault, what):
    recipe = make_recipe()
    with at(5, 1, fault), pytest.raises(NonFiniteError, match=rf"{what} in step 5"):
        run.train(recipe, console=console)
    folder = Path(recipe.output)
    assert not (folder / "adapter").exists()
    assert [step for step, _ in checkpoint.checkpoints(folder / "checkpoints")] == [4, 2]
    for file in folder.rglob(WEIGHTS):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())
    last = (folder / "log.jsonl").read_text().splitlines()[-1]
    assert "NaN" in last or "Infinity" in last
    assert json.loads(last)["stopped_in_step"] == 5
    assert record.read_json(folder / "run.json")["status"] == "failed"


def hold(folder, ready, release):
    with lock.locked(Path(folder)):
        ready.set()
        release.wait()
        os._exit(9)  # dies without letting go


def test_two_runs_cannot_share_a_folder_and_a_dead_holder_is_replaced(make_recipe, console):
    recipe = make_recipe("train.max_steps=1")
    fork = multiprocessing.get_context("fork")
    ready, release = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(recipe.output, ready, release))
    other.start()
    assert ready.wait(20)
    try:
        with pytest.raises(LockedError, match=rf"{recipe.output} is in use by another run"):
            run.train(recipe, console=console)
    finally:
        release.set()
        other.join()
    assert run.train(recipe, resume="auto", console=console)["steps"] == 1  # where there is no run it starts one


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (("data.eval_path=absent.jsonl",), DataError),
        (("adapter.target_modules=[absent]",), ConfigError),
        (("adapter.modules_to_save=[nosuch]",), ConfigError),
        ((), IntegrityError),
    ],
)
def test_a_failure_before_the_first_step_leaves_no_folder(make_recipe, console, tmp_path, settings, error):
    recipe = make_recipe(*settings)
    if error is IntegrityError:
        folder = shutil.copytree(recipe.model.name, tmp_path / "model")
        half(folder / "model.safetensors")
        recipe = with_model(recipe, folder)
    with pytest.raises(error):
        run.train(recipe, console=console)
    assert not Path(recipe.output).exists()


def fails(error):
    def action(trainer):
        raise error

    return action


@pytest.mark.parametrize(
    ("cause", "error", "words"),
    [
        (OSError(28, "No space left on device"), DiskError, r"No space left.*free there"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
            OutOfMemoryError,
            r"train\.batch_size=2.*gradient_accumulation_steps=4",
        ),
    ],
)
def test_a_full_disk_and_too_little_memory_are_said_in_words(make_recipe, console, cause, error, words):
    recipe = make_recipe()
    with at(3, 1, fails(cause)), pytest.raises(error, match=words):
        run.train(recipe, console=console)
    facts = RunFolder(recipe.output).facts()
    assert (facts["status"], facts["kind"]) == ("failed", error.kind)
    assert re.match(rf"{error.__name__}: .*{words}", facts["error"])


def test_a_run_of_another_version_or_with_other_settings_is_not_taken_up(trained, make_recipe, console, tmp_path):
    """One line each: which settings that version had, and what changed."""
    folder = tmp_path / "old"
    shutil.copytree(trained(), folder)
    facts = record.read_json(folder / "run.json")
    again = make_recipe("train.max_steps=8", output=folder)
    other = ("adapter.method=lora", "adapter.r1=null", "adapter.warmup_steps=auto")
    with pytest.raises(ConfigError, match=r'adapter.method: "duallora" -> "lora"'):
        run.train(make_recipe("train.max_steps=8", *other, output=folder), resume="auto", console=console)
    facts["recipe"]["adapter"]["gradient_tokens_by"] = "uniform"
    record.write_json(folder / "run.json", facts)
    with pytest.raises(
        ConfigError, match=r"run.json: the run is of another version .*adapter.gradient_tokens_by: Extra"
    ):
        run.train(again, resume="auto", console=console)


def test_a_lone_process_that_is_told_of_others_is_refused_before_anything_is_touched(make_recipe, console, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = make_recipe()
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2, but RANK, .* is not set: start with .*--launch 2"):
        run.train(recipe, console=console)
    assert not Path(recipe.output).exists()


def test_a_classifier_trains_its_head_and_accumulation_does_not_change_the_gradient(make_recipe, console, tmp_path):
    """transformers' BERT averages over the micro-batch, and Trainer does not divide: two would make steps twice as long."""
    plain = ("train.max_steps=4", "adapter.duallora_dropout=0", "train.max_grad_norm=0", "train.optimizer=sgd")
    whole = make_recipe(
        *plain, "train.batch_size=4", "train.gradient_accumulation_steps=1", kind="classify", output=tmp_path / "a"
    )
    parts = make_recipe(*plain, kind="classify", output=tmp_path / "b")
    # The encoder's own dropout would be drawn for other shapes.
    off = 0.0
    for recipe in (whole, parts):
        run.train(without_model_dropout(recipe, tmp_path, off), console=console)
    first, second = weights(whole.output), weights(parts.output)
    assert any("classifier" in name for name in first)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


def test_the_test_rows_are_scored_after_training_and_every_prediction_is_kept(make_recipe, console, tmp_path):
    """The held-out rows are training rows; the metrics follow from the predictions on file."""
    folder = tmp_path / "data" / "CoLA"
    folder.mkdir(parents=True)
    for name, count in (("train", 33), ("dev", 9)):
        lines = [f"x\t{number % 3 % 2}\t\t{'fine' if number % 3 % 2 else 'poor'} {number}\n" for number in range(count)]
        (folder / f"{name}.tsv").write_text("".join(lines))
    recipe = make_recipe(kind="classify")
    data = recipe.data.model_copy(
        update={"path": None, "task": "cola", "data_dir": str(folder.parent), "holdout": 11, "eval_limit": None}
    )
    recipe = recipe.model_copy(update={"data": data, "eval": recipe.eval.model_copy(update={"test": True})})
    metrics = run.train(recipe, console=console)["metrics"]
    lines = [json.loads(line) for line in (Path(recipe.output) / "predictions.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [number % 3 % 2 for number in range(9)]
    right = [line["prediction"] == line["label"] for line in lines]
    assert metrics["test"]["accuracy"] == pytest.approx(100 * sum(right) / 9)
    assert metrics["test"]["loss"] != metrics["loss"]
    facts = record.read_json(Path(recipe.output) / "metrics.json")
    assert facts["data"].keys() == {"train", "validation", "test"}
    assert facts["parameters"]["trainable"] > 0
    assert metrics["train_cpu_seconds"] > 0
    data = record.read_json(Path(recipe.output) / "run.json")["data"]
    assert (data["train"], data["validation"]) == (22, 11)


def test_a_files_held_out_rows_are_the_same_for_every_seed(make_recipe, console):
    """Or the runs of a study could not be compared."""
    recipe = make_recipe()
    data = recipe.data.model_copy(update={"holdout": 3})
    drawn = [
        prepare.load(recipe.model_copy(update={"data": data, "seed": seed}), console) for seed in (0, 1, 2**32 - 1)
    ]
    assert {*drawn[0].splits} == {"train", "validation", "test"}
    for split in drawn[0].splits:
        assert len({task.fingerprint(split) for task in drawn}) == 1


def test_test_rows_that_do_not_exist_are_missed_before_training(make_recipe, console):
    recipe = make_recipe()
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"test": True})})
    with pytest.raises(ConfigError, match=r"eval.test=true: .* has no test rows; it has train, validation"):
        run.train(recipe, console=console)
    assert not Path(recipe.output).exists()


@pytest.mark.parametrize(("rows", "batch_size"), [(103, 4), (5, 2), (3, 8)])
def test_batches_of_like_length_hold_every_row_once_and_repeat_with_the_epoch(rows, batch_size):
    lengths = [row * 37 % 101 for row in range(rows)]
    sampler = loop.LikeLengths(lengths, batch_size, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(rows))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert rows < 5 or list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert rows < 5 or list(loop.LikeLengths(lengths, batch_size, seed=4)) != first
    if rows > 50:
        batches = [[lengths[row] for row in first[at : at + batch_size]] for at in range(0, rows, batch_size)]
        padded = sum(len(batch) * max(batch) for batch in batches)
        assert padded < 1.2 * sum(lengths)


def test_a_bfloat16_base_keeps_float32_factors(make_recipe, console):
    recipe = make_recipe("model.dtype=bfloat16", "train.max_steps=2")
    run.train(recipe, console=console)
    stored = weights(recipe.output)
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith(tuple("ABCD"))} == {torch.float32}
    assert record.read_json(Path(recipe.output) / "adapter" / "duallora.json")["base"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        (285, [], (108, 11)),  # 36 steps a pass: three of them
        (96, [], (108, 11)),  # 12: nine
        (48, [], (60, 10)),  # 6: ten passes, no more
        (3, [], (10, 3)),  # warm for a third of a short run
        (801, [], (101, 11)),  # one pass from 100 steps on
        (96, ["train.batch_size=4", "train.gradient_accumulation_steps=3"], (80, 10)),  # 24 batches, 8 steps a pass
        (96, ["train.epochs=1", "train.lr_warmup_ratio=0.03"], (12, 1)),
        (96, ["train.lr_warmup_steps=0"], (108, 0)),
        (96, ["train.max_steps=30"], (30, 10)),
        (96, ["train.max_steps=2"], (2, 1)),
    ],
)
def test_few_rows_are_passed_over_more_often(rows, settings, expected):
    """(steps, those that warm up) by the number of rows: 96 rows once, 12 steps, left LoRA at chance (LOG.md)."""
    assert prepare.schedule(load_recipe(None, settings, data="mine.csv"), rows) == expected


def test_a_number_of_steps_leaves_the_passes_as_recorded_runs_have_them():
    """epochs was 1.0 in every recipe; with max_steps it has no effect, and a changed default may not stop a resume."""
    assert load_recipe(None, ["train.max_steps=30"], data="mine.csv").train.epochs == 1.0
    assert load_recipe(None, ["train.max_steps=30", "train.epochs=2"], data="mine.csv").train.epochs == 2.0
    assert load_recipe(None, data="mine.csv").train.epochs == "auto"


def test_auto_warm_up_is_the_learning_rates(make_recipe, console):
    recipe = make_recipe("adapter.warmup_steps=auto", "train.lr_warmup_ratio=0.25", "train.max_steps=2")
    run.train(recipe, console=console)
    config = record.read_json(Path(recipe.output) / "adapter" / "adapter_config.json")
    assert config["warmup_steps"] == 1
    assert duallora.DualLoraConfig(r=4).warmup_steps != 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [("train.optimizer=nonsense", "nonsense"), ("train.report_to=[comet_ml]", "report_to=.*comet")],
)
def test_what_transformers_would_refuse_is_refused_before_anything_is_loaded(
    make_recipe, console, monkeypatch, setting, message
):
    monkeypatch.setattr(run.prepare, "load", lambda *_: pytest.fail("the data were loaded first"))
    with pytest.raises(ConfigError, match=message):
        run.train(make_recipe(setting), console=console)


def test_a_batch_is_as_large_as_the_recipe_says_where_several_gpus_are_seen(monkeypatch, tmp_path):
    """One process trains on one device: transformers alone would take the batch size for that of each GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    recipe = load_recipe(overrides=["data.task=cola", "train.batch_size=6"])
    assert prepare.arguments(recipe, tmp_path, steps=1, lr_warmup=0).train_batch_size == 6

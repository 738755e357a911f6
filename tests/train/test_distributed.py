"""Several processes make the run that one would make: same rows, same weights, one folder, one voice, one end."""

import importlib.util
import io
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from of_runs import WEIGHTS, equal, kill_with, log, weights, without_model_dropout
from rich.console import Console
from safetensors.torch import load_file

from duallora import cli
from duallora.cli import training
from duallora.config.recipe import recipe_yaml
from duallora.console import explain
from duallora.errors import ConfigError, Interrupted, LostProcessError
from duallora.store import adapters, checkpoint, record
from duallora.train import launch, loop, run

slow = pytest.mark.skipif("DUALLORA_SLOW" not in os.environ, reason="slow: `make distributed` runs it")
FORK = multiprocessing.get_context("fork")
LIMIT = 100  # seconds for a pair of processes, on a busy machine


def one_of_a_pair(index, port, recipe, resume, plant, results):
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(meeting, RANK=str(index), LOCAL_RANK=str(index))
    console = Console(file=io.StringIO(), width=200)
    if plant is not None:
        plant(index)
    try:
        outcome = {"result": run.train(recipe, resume=resume, console=console), "code": 0}
    except BaseException as error:
        outcome = {"error": f"{type(error).__name__}: {error}", "code": explain(error)[0]}
    outcome |= {"said": console.file.getvalue(), "ended": time.time()}
    (results / f"{index}.json").write_text(json.dumps(outcome))
    os._exit(outcome["code"])


@pytest.fixture
def pair(tmp_path):
    """``pair(recipe, resume, plant)`` trains in two processes; their outcomes, None for one that was killed."""
    started = []

    def both(recipe, resume="never", plant=None):
        results = tmp_path / f"pair-{len(started)}"
        results.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = [
            FORK.Process(target=one_of_a_pair, args=(index, port, recipe, resume, plant, results)) for index in (0, 1)
        ]
        started.extend(processes)
        for process in processes:
            process.start()
        deadline = time.monotonic() + LIMIT
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        assert [process.exitcode is None for process in processes] == [False, False], "a process hangs"
        files = [results / f"{index}.json" for index in (0, 1)]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]

    yield both
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


def at_step(step, rank, action):
    """A plant: before ``step`` (counted from 1) process ``rank`` does ``action(trainer)``."""

    def plant(index):
        plain = loop.RunTrainer.training_step

        def training_step(self, model, inputs, num_items_in_batch=None):
            if index == rank and self.state.global_step + 1 == step:
                action(self)
            return plain(self, model, inputs, num_items_in_batch)

        loop.RunTrainer.training_step = training_step

    return plant


def relative_difference(first, second):
    """The largest over the tensors of |a - b| / |a|."""
    assert first.keys() == second.keys()
    a, b = ([tensors[name].double() for name in first] for tensors in (first, second))
    return max(float((x - y).norm() / x.norm().clamp(min=1e-12)) for x, y in zip(a, b, strict=True))


PLAIN = (
    "adapter.duallora_dropout=0",
    "train.learning_rate=1e-3",
    "train.batch_size=3",
    "train.gradient_accumulation_steps=2",
    "train.max_steps=20",
    "train.save_steps=100",
)


def test_two_processes_train_score_and_write_what_one_does(make_recipe, console, pair, tmp_path):
    """21 rows, 6 a step: each epoch ends with 3 rows for two processes, and 20 steps are five epochs."""
    own = ("data.eval_fraction=0.17", "train.eval_steps=7", "eval.metrics=true", "train.report_to=[tensorboard]")
    settings = (*PLAIN, *own)
    alone = run.train(make_recipe(*settings, output=tmp_path / "one"), console=console)
    first, second = pair(make_recipe(*settings, output=tmp_path / "two"))
    assert first["code"] == second["code"] == 0, (first, second)
    assert relative_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-6
    assert {int(v) for name, v in weights(tmp_path / "two").items() if name.endswith("duallora_step")} == {20}
    assert first["result"] == second["result"] == record.read_json(tmp_path / "two" / "run.json")["result"]
    assert second["said"] == ""
    assert "2 processes" in first["said"]
    found, expected = first["result"]["metrics"], alone["metrics"]
    assert found["loss_before"] == expected["loss_before"]  # the same batches, added in the same order
    assert found["bleu"] == expected["bleu"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for ours, theirs in zip(log(tmp_path / "two"), log(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    names = [
        sorted(str(p.relative_to(f)) for f in [tmp_path / n] for p in f.rglob("*") if "events" not in p.name)
        for n in ("one", "two")
    ]
    assert set(names[1]) - set(names[0]) == {f"checkpoints/checkpoint-20/rng_state_{index}.pth" for index in (0, 1)}
    assert set(names[0]) - set(names[1]) == {"checkpoints/checkpoint-20/rng_state.pth"}
    assert len(list((tmp_path / "two" / "tb").glob("events*"))) == 1
    assert record.read_json(tmp_path / "two" / "run.json")["processes"] == 2
    model, _ = adapters.load_adapter(tmp_path / "two", "generate")  # one process opens what two have written
    assert math.isfinite(sum(float(p.sum()) for p in model.parameters()))


def test_two_micro_batches_in_each_of_two_processes_make_the_step_of_one(make_recipe, console, pair, tmp_path):
    """12 rows a step as 4 x 3 are 3 x 2 in each; 21 rows leave a last step of 9, filled to 12. Codes, where torchao is."""
    quantization = "torchao-int8" if importlib.util.find_spec("torchao") else "null"
    own = ("train.batch_size=4", "train.gradient_accumulation_steps=3", "train.max_steps=6")
    settings = (*PLAIN, *own, f"model.quantization={quantization}")
    alone = run.train(make_recipe(*settings, output=tmp_path / "one"), console=console)
    first, second = pair(make_recipe(*settings, output=tmp_path / "two"))
    assert first["code"] == second["code"] == 0, (first, second)
    assert relative_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-6
    assert first["result"]["metrics"]["loss_before"] == alone["metrics"]["loss_before"]


def test_two_processes_start_from_the_gradient_as_one_does(make_recipe, console, pair, tmp_path):
    settings = (*PLAIN, "adapter.init=gradient", "train.max_steps=3")
    run.train(make_recipe(*settings, output=tmp_path / "one"), console=console)
    first, second = pair(make_recipe(*settings, output=tmp_path / "two"))
    assert first["code"] == second["code"] == 0, (first, second)
    assert relative_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-5


def test_a_classifier_in_two_processes_is_the_one_of_one_process(make_recipe, console, pair, tmp_path):
    """The head's loss is a mean over rows: 19 rows, 8 a step, leave a last step of 3, in micro-batches of 2 and 1 or 3."""
    own = ("train.batch_size=2", "train.gradient_accumulation_steps=4", "train.max_steps=12")
    settings = ("adapter.duallora_dropout=0", *own)
    recipe = without_model_dropout(make_recipe(*settings, kind="classify", output=tmp_path / "one"), tmp_path, 0.0)
    run.train(recipe, console=console)
    first, second = pair(recipe.model_copy(update={"output": str(tmp_path / "two")}))
    assert first["code"] == second["code"] == 0, (first, second)
    assert any("classifier" in name for name in weights(tmp_path / "one"))
    assert relative_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-5
    assert first["result"]["metrics"]["loss_before"] == record.read_json(tmp_path / "one" / "run.json")["loss_before"]


def test_stopped_then_killed_then_finished_equals_the_straight_run_bit_for_bit(make_recipe, pair, tmp_path):
    """Dropout and sampled tokens differ by process, so a resumed run needs the generators of each."""
    settings = ("train.batch_size=3", "train.max_steps=12", "train.save_steps=3", "adapter.gradient_tokens=0.5")
    straight = make_recipe(*settings, output=tmp_path / "straight")
    seeds = [tmp_path / f"seed-{index}" for index in (0, 1)]

    def note_seed(index):
        at_step(1, index, lambda trainer: seeds[index].write_text(str(torch.initial_seed())))(index)

    assert [outcome["code"] for outcome in pair(straight, plant=note_seed)] == [0, 0]
    assert [seed.read_text() for seed in seeds] == ["0", "1"]

    recipe = make_recipe(*settings)
    folder = Path(recipe.output)
    # The second process alone is asked to stop, in the second epoch.
    outcomes = pair(recipe, plant=at_step(5, 1, kill_with(signal.SIGTERM)))
    assert [outcome["code"] for outcome in outcomes] == [143, 143], outcomes
    assert "--resume auto" in outcomes[0]["said"]
    assert [step for step, _ in checkpoint.checkpoints(folder / "checkpoints")] == [5, 3]
    assert checkpoint.verify(folder / "checkpoints" / "checkpoint-5") is None
    assert record.read_json(folder / "run.json")["status"] == "interrupted"
    with pytest.raises(ConfigError, match=r"processes \(--launch\): 2 -> 1"):
        run.train(recipe, resume="auto", console=Console(quiet=True))

    began = time.time()
    survivor, victim = pair(recipe, resume="auto", plant=at_step(8, 1, kill_with(signal.SIGKILL)))
    assert victim is None
    assert survivor["code"] == LostProcessError.exit_code, survivor
    assert survivor["ended"] - began < 60
    facts = record.read_json(folder / "run.json")
    assert (facts["status"], facts["kind"]) == ("failed", "lost")

    outcomes = pair(recipe, resume="auto")
    assert [outcome["code"] for outcome in outcomes] == [0, 0], outcomes
    assert "from checkpoint-6" in outcomes[0]["said"]
    assert equal(weights(folder), weights(straight.output))
    assert [line["step"] for line in log(folder)] == [line["step"] for line in log(straight.output)]


def nan_loss(trainer):
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * torch.nan


def test_a_loss_that_is_nan_in_one_process_stops_both_before_the_step(make_recipe, pair):
    recipe = make_recipe("train.batch_size=4")
    outcomes = pair(recipe, plant=at_step(5, 1, nan_loss))
    assert [outcome["code"] for outcome in outcomes] == [5, 5], outcomes
    assert all("loss is nan in step 5" in outcome["error"] for outcome in outcomes)
    folder = Path(recipe.output)
    assert [step for step, _ in checkpoint.checkpoints(folder / "checkpoints")] == [4, 2]
    assert all(torch.isfinite(t).all() for f in folder.rglob(WEIGHTS) for t in load_file(f).values())


def test_a_mistake_that_the_first_process_finds_ends_all_with_its_error(make_recipe, pair, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    outcomes = pair(make_recipe("train.batch_size=4", output=tmp_path / "home"))
    assert [outcome["code"] for outcome in outcomes] == [2, 2]
    assert all("thesis.tex" in outcome["error"] for outcome in outcomes)


# -- without a second process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "expected"),
    [
        (8, 3, 1, (8, 3)),
        (8, 1, 2, (4, 1)),
        (4, 3, 2, (3, 2)),
        (1, 8, 4, (1, 2)),
    ],
)
def test_the_rows_of_a_step_are_shared_out_whole(batch_size, accumulation, processes, expected):
    assert launch.shares(batch_size, accumulation, processes) == expected
    batch, steps = expected
    assert batch * steps * processes == batch_size * accumulation
    assert batch <= batch_size  # what fits one process alone fits it here


def test_rows_that_cannot_be_shared_evenly_are_refused_with_the_number_to_choose():
    with pytest.raises(ConfigError, match=r"makes 9 rows a step, which 2 processes .* a multiple of 2"):
        launch.shares(3, 3, 2)


@pytest.mark.parametrize(("rows", "at_once"), [(21, 6), (24, 6), (1, 8)])
def test_an_epoch_holds_every_row_once_and_is_filled_at_its_end_only(rows, at_once):
    lengths = [row * 37 % 101 for row in range(rows)]
    order = list(loop.LikeLengths(lengths, at_once, seed=3, fill_to=at_once))
    assert order[:rows] == list(loop.LikeLengths(lengths, at_once, seed=3))
    assert sorted(order[:rows]) == list(range(rows))
    assert order[rows:] == [rows] * (-rows % at_once)
    assert len(order) == len(loop.LikeLengths(lengths, at_once, seed=3, fill_to=at_once))


@pytest.mark.parametrize("kind", ["classify", "regress"])
def test_the_shares_of_a_heads_loss_add_up_to_its_mean_over_rows(kind):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3 if kind == "classify" else 1, generator=generator, dtype=torch.float64)
    if kind == "classify":
        labels, filler = torch.tensor([0, 2, 1, 1, 0]), torch.tensor([-100, -100])
        rows = [-row.log_softmax(0)[label] for row, label in zip(logits, labels, strict=True)]
    else:
        labels, filler = torch.tensor([0.5, -100.0, 3.0, 1.0, 0.0]), torch.tensor([math.nan, math.nan])
        rows = [(row[0] - label) ** 2 for row, label in zip(logits, labels, strict=True)]
    mean = sum(float(row) for row in rows) / 5
    count = torch.tensor(5)
    parts = [
        loop.row_loss(kind, {"logits": logits[:3]}, labels[:3], count),
        loop.row_loss(kind, {"logits": torch.cat([logits[3:], logits[:2]])}, torch.cat([labels[3:], filler]), count),
        loop.row_loss(kind, {"logits": logits[:2]}, filler, count),
    ]
    assert float(sum(parts)) == pytest.approx(mean, rel=1e-6)
    assert parts[2] == 0


@pytest.mark.parametrize("variable", sorted(launch.SHARDING))
def test_strategies_that_shard_the_model_are_refused_by_name(make_recipe, monkeypatch, variable, console):
    meeting = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**meeting, variable: "true"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"{launch.SHARDING[variable]}.*examples/distributed"):
        run.train(make_recipe(), console=console)


def test_mixed_precision_is_the_recipes_to_decide():
    with pytest.raises(ConfigError, match=r"mixed_precision=bf16.*model\.dtype"):
        launch.refuse_sharding({"ACCELERATE_MIXED_PRECISION": "bf16"})
    launch.refuse_sharding({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "false"})


class Replaced(BaseException):
    """Where the program would have become another one."""


def launched(monkeypatch, how, arguments=("train",), **environment):
    """(arguments, environment) of the program that takes over; ``environment`` is what this one runs in."""
    told = []

    def execve(path, words, variables):
        told.append((words, variables))
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(Replaced):
        launch.launch(how, arguments)
    return told[0]


@pytest.mark.parametrize("how", ["1", "3", "FILE"])
def test_accelerates_own_parser_reads_what_it_is_called_with(monkeypatch, how, tmp_path):
    """A user's default accelerate configuration (FSDP, bf16, a port) must not decide: each of these is said here."""
    file = tmp_path / "a.yaml"
    file.touch()
    words, _ = launched(monkeypatch, str(file) if how == "FILE" else how, ["train", "-c", "f", "--json"])
    assert words[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    read = accelerate_launch.launch_command_parser().parse_args(words[3:])
    assert (read.module, read.training_script) == (True, "duallora.cli")
    assert read.training_script_args == ["train", "-c", "f", "--json"]
    if how == "FILE":
        assert read.config_file == str(file)
    else:
        assert (read.num_processes, read.num_machines, read.multi_gpu) == (int(how), 1, how != "1")
        assert (read.main_process_port, read.mixed_precision, read.use_fsdp) == (0, "no", False)


def test_launched_processes_share_the_cores_and_have_time_to_save(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    _, environment = launched(monkeypatch, "3")
    assert environment == {"OMP_NUM_THREADS": "2", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
    _, environment = launched(monkeypatch, "3", OMP_NUM_THREADS="5")
    assert environment["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("how", ["0", "1000000", "absent.yaml", "-1"])
def test_launch_says_what_it_takes(how):
    with pytest.raises(ConfigError, match=rf"--launch {how}: expected 1 to 1024 processes, .*accelerate config"):
        launch.launch(how, ["train"])


def test_a_launch_inside_of_a_launch_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--launch 4 inside of 2 processes"):
        launch.launch("4", ["train"])


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["train", "--launch", "2", "-o", "runs/a"], ["train", "-o", "runs/a"]),
        (["train", "--data", "a", "--launch=2"], ["train", "--data", "a"]),
        (["train", "--launch", "--launch", "-c", "f"], ["train", "-c", "f"]),
    ],
)
def test_the_processes_get_the_command_line_without_launch(arguments, kept):
    assert training._without_option("--launch", arguments) == kept


def test_a_failure_of_another_process_is_said_in_its_name_after_the_first_one_had_its_turn(monkeypatch, capsys):
    """The launcher ends it meanwhile where the first one has failed too; ends that all share are the first one's to tell."""
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    for error, code in ((ConfigError("x"), 2), (LostProcessError("x"), 9), (Interrupted(signal.SIGTERM, "x"), 143)):

        def fail(arguments, error=error):
            raise error

        monkeypatch.setattr(cli, "_invoke", fail)
        assert cli.run(["train", "--json"]) == code
        streams = capsys.readouterr()
        assert streams.out == ""
        assert streams.err == ("error in process 1: x\n" if code == 2 else "")
    assert waited == [cli.FIRST_WORD]


# -- the program itself -----------------------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(recipe, folder, *more):
    record.write_text(folder / "r.yaml", recipe_yaml(recipe))
    return [sys.executable, "-m", "duallora.cli", "train", "-c", str(folder / "r.yaml"), "--json", *more]


def launch_two(recipe, folder, how):
    line = command(recipe, folder, "--launch", how)
    return subprocess.run(line, capture_output=True, text=True, timeout=200, env=ENVIRONMENT)


@pytest.mark.parametrize("taken", [False, pytest.param(True, marks=slow)])
def test_launched_processes_print_one_line_of_json_and_the_failing_ones_message(make_recipe, tmp_path, taken):
    folder = tmp_path / "run"
    recipe = make_recipe("train.max_steps=2", "train.batch_size=2", output=folder)
    if taken:
        run.train(recipe, console=Console(quiet=True))
    done = launch_two(recipe, tmp_path, "2")
    assert done.returncode == taken, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["status"] == ("error" if taken else "done")
    assert done.stderr.count("trained  ") == (not taken)
    assert done.stderr.count("holds another run") == taken
    assert record.read_json(folder / "run.json")["processes"] == 2 - taken


@slow
def test_a_signal_to_the_launcher_saves_a_whole_checkpoint_and_says_so_once(make_recipe, tmp_path):
    recipe = make_recipe("train.max_steps=400", "train.batch_size=2", "train.save_steps=1000", output=tmp_path / "run")
    line = command(recipe, tmp_path, "--launch", "2", "--resume", "auto")
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        for _ in range(600):
            if (tmp_path / "run" / "log.jsonl").exists():
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode != 0
    assert json.loads(stdout)["status"] == "interrupted"
    assert stderr.count("interrupted: ") == 1
    (step, path) = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert checkpoint.verify(path) is None
    assert step < 400


@slow
def test_an_accelerate_config_starts_the_same_run(make_recipe, tmp_path):
    file = Path(__file__).parents[2] / "examples" / "distributed" / "ddp.yaml"
    done = launch_two(make_recipe("train.max_steps=2", output=tmp_path / "run"), tmp_path, str(file))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["exit_code"] == 0
    assert record.read_json(tmp_path / "run" / "run.json")["processes"] == 2

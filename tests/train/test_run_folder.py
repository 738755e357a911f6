"""One reader of a run folder: what is damaged, foreign or of another version is said; what a kill left is taken up."""

import json
import shutil

import pytest
import torch
from damage import bit_flip
from of_runs import equal, log, weights

from duallora.errors import ConfigError, IntegrityError
from duallora.store import checkpoint
from duallora.store.run_folder import Log, RunFolder
from duallora.train import run


@pytest.fixture
def done(trained, tmp_path):
    """A copy of a finished run of 8 steps."""
    return RunFolder(shutil.copytree(trained(), tmp_path / "run"))


def again(make_recipe, folder, console, *settings, resume="auto"):
    return run.train(make_recipe("train.max_steps=8", *settings, output=folder.path), resume=resume, console=console)


def test_a_kill_inside_the_first_save_is_started_anew(make_recipe, console, trained, interrupted, tmp_path):
    """As the 17 of 17 kills there left it: a folder half written, no manifest, a log of steps that will be taken again."""
    folder = RunFolder(interrupted(trained(), tmp_path / "run", at=6))
    half_written = (folder.checkpoints / "checkpoint-6").rename(folder.checkpoints / "checkpoint-2")
    for name in (checkpoint.MANIFEST, "optimizer.pt"):
        (half_written / name).unlink()
    (folder.path / ".run.json.4711.tmp").write_text("{")
    again(make_recipe, folder, console)
    assert "checkpoint-2: MANIFEST.json is missing" in console.file.getvalue()
    assert "no checkpoint was finished: from the first step" in console.file.getvalue()
    assert equal(weights(folder.path), weights(trained()))
    assert log(folder.path) == log(trained())
    assert not list(folder.path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("found", "resume", "message"),
    [
        ("holiday.jpg", "never", r"is not empty \(it holds holiday.jpg\) and is no run"),
        ("holiday.jpg", "auto", r"is not empty \(it holds holiday.jpg\) and is no run"),
        ("checkpoints/checkpoint-2/optimizer.pt", "auto", "holds checkpoints but no run.json"),
        ("adapter/adapter_model.safetensors", "auto", "holds adapter but no run.json"),
        ("log.jsonl", "never", "holds log.jsonl but no run.json"),
    ],
)
def test_what_is_no_run_is_never_taken_for_one(make_recipe, console, tmp_path, found, message, resume):
    path = tmp_path / "run" / found
    path.parent.mkdir(parents=True)
    path.write_text("x")
    with pytest.raises(ConfigError, match=message):
        again(make_recipe, RunFolder(tmp_path / "run"), console, resume=resume)
    assert path.read_text() == "x"
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_a_finished_run_is_finished_only_as_long_as_its_result_is_whole(make_recipe, console, done, trained):
    """The remedy that the error names makes it again to the bit."""
    moved = {"folder": str(done.path), "adapter": str(done.path / "adapter")}
    assert again(make_recipe, done, console) == {**done.facts()["result"], **moved}
    file = done.path / "adapter" / "adapter_model.safetensors"
    bit_flip(file)
    with pytest.raises(IntegrityError, match=r"adapter_model.safetensors is damaged"):
        again(make_recipe, done, console)
    (file.parent / "duallora.json").unlink()
    with pytest.raises(IntegrityError, match=r"duallora.json is gone"):
        again(make_recipe, done, console)
    shutil.rmtree(file.parent)
    with pytest.raises(IntegrityError, match=r"adapter: it is gone.*--resume .*checkpoint-8"):
        again(make_recipe, done, console)
    with pytest.raises(ConfigError, match="holds another run"):
        again(make_recipe, done, console, resume="never")
    last = done.checkpoints / "checkpoint-8"
    again(make_recipe, done, console, resume=str(last))
    assert equal(weights(done.path), weights(trained()))
    shutil.rmtree(last)
    shutil.copytree(done.checkpoints / "checkpoint-6", last)
    with pytest.raises(IntegrityError, match=r"checkpoint-8: MANIFEST.json is that of step 6"):
        again(make_recipe, done, console, resume=str(last))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layout": None}, ConfigError, "is the run of another version of duallora"),
        ({"status": "finished"}, IntegrityError, "status is 'finished', expected one of running"),
        ({"status": []}, IntegrityError, r"status is \[\], expected one of"),
        ({"result": None}, IntegrityError, "result is None"),
        ({"result": {}}, IntegrityError, "status is done, but the result is missing"),
        ({"recipe": "x"}, IntegrityError, "recipe is 'x'"),
        ({"steps": "8"}, IntegrityError, "steps is '8'"),
        ("[" * 9999, IntegrityError, "run.json is damaged: it is nested too deeply"),
        ("{", IntegrityError, "run.json is damaged: Expecting"),
        ("[1]", IntegrityError, "it holds a list, expected an object"),
        ("\xff", IntegrityError, "run.json is damaged: 'utf-8' codec"),
    ],
)
def test_a_run_json_that_cannot_be_used_says_why(make_recipe, console, done, change, error, message):
    file = done.path / "run.json"
    text = change if isinstance(change, str) else json.dumps({**json.loads(file.read_text()), **change})
    file.write_text(text, encoding="latin-1")
    with pytest.raises(error, match=message):
        again(make_recipe, done, console)


@pytest.mark.parametrize(
    ("line", "aside"),
    [
        (b'{"step": 3, "lo', False),  # at the end: what a kill leaves
        (b"\xff\xfe\n", True),
        (b"[1]\n", True),
        (b'{"step": "3"}\n', True),
        (b'{"step": 3, "loss": "x", "gate": 1}\n', True),
        (b"[" * 9999 + b"\n", True),
    ],
)
def test_a_damaged_log_is_set_aside_and_its_whole_lines_go_on(tmp_path, line, aside):
    found = Log(tmp_path / "log.jsonl")
    assert (found.lines(), found.drop_after(3), found.summary()) == ([], None, {})
    for step in (1, 2, 4):
        found.append(step, {"loss": 1.5, "gate": 1.0, "seconds": 2.0, "tokens_per_second": 5.0})
    with found.path.open("ab") as file:
        file.write(line)
    content = found.path.read_bytes()
    assert [step for step, _ in found.losses()] == [1, 2, 4]
    kept = found.drop_after(2)
    assert (kept is not None) is aside
    assert kept is None or kept.read_bytes() == content
    assert [step for step, _ in found.losses()] == [1, 2]
    assert found.summary()["train_seconds"] == 4.0


def test_a_damaged_log_does_not_keep_a_run_from_being_resumed(make_recipe, console, trained, interrupted, tmp_path):
    folder = RunFolder(interrupted(trained(), tmp_path / "run", at=6))
    folder.log.path.write_bytes(b"\xff[\n" + folder.log.path.read_bytes())
    again(make_recipe, folder, console)
    assert "log.jsonl was damaged: kept as log.damaged.jsonl" in console.file.getvalue()
    assert equal(weights(folder.path), weights(trained()))
    assert log(folder.path)[0] == log(trained())[0]


def test_half_the_batch_and_twice_the_accumulation_go_on_with_the_same_rows(make_recipe, console, tmp_path):
    """The remedy for too little memory. Without dropout the gradients of a step are the same sums."""
    plain = ("adapter.duallora_dropout=0", "train.save_total_limit=null")
    whole, halved = (RunFolder(tmp_path / name) for name in ("whole", "halved"))
    again(make_recipe, whole, console, *plain)
    shutil.copytree(whole.path, halved.path)
    shutil.rmtree(halved.path / "adapter")
    for step in (6, 8):
        shutil.rmtree(halved.checkpoints / f"checkpoint-{step}")
    halved.write_facts({**halved.facts(), "status": "interrupted"})
    smaller = ("train.batch_size=1", "train.gradient_accumulation_steps=4", "data.eval_limit=2")
    result = again(make_recipe, halved, console, *plain, *smaller)
    assert "from checkpoint-4" in console.file.getvalue()
    first, second = weights(whole.path), weights(halved.path)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)
    # On other held-out rows the loss before is taken anew.
    assert result["metrics"]["loss_before"] != whole.facts()["loss_before"]


def test_a_path_belongs_to_the_run_around_it(done, tmp_path):
    for inside in ("", "adapter", "checkpoints/checkpoint-8"):
        assert RunFolder.around(done.path / inside).path == done.path
    assert RunFolder.around(tmp_path) is RunFolder.around(done.path / "absent") is None


@pytest.mark.parametrize("kind", ["generate", "classify"])
def test_every_file_of_a_run_has_the_mode_of_any_new_file(trained, tmp_path, kind):
    """safetensors writes 0600 whatever the umask, which locks others out of a shared folder."""
    (tmp_path / "any").touch()
    usual = (tmp_path / "any").stat().st_mode
    assert [path for path in trained(kind).rglob("*") if path.is_file() and path.stat().st_mode != usual] == []

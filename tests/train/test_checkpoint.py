"""A checkpoint is whole or it is not one."""

import os

import pytest
import torch
from damage import bit_flip, empty, half, missing

from duallora.errors import ConfigError, IntegrityError, NonFiniteError
from duallora.store import checkpoint, record, sealed

FILES = ("adapter_config.json", checkpoint.WEIGHTS[0], *checkpoint.REQUIRED, *checkpoint.rng_files(1))


def make(folder, step, names=FILES):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in names:
        (path / name).write_bytes(f"{name} at {step}".encode() * 50)
    checkpoint.commit(path, step=step, fingerprints={"recipe": "r", "data": {"train": "d"}, "base": "b"})
    return path


DAMAGES = (missing, empty, half, bit_flip)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, checkpoint.MANIFEST])
def test_any_damage_to_any_file_is_found_and_the_previous_checkpoint_taken(tmp_path, name, damage):
    good, newest = make(tmp_path, 9), make(tmp_path, 10)  # steps are compared as numbers
    assert checkpoint.newest_verified(tmp_path) == (newest, [])
    damage(newest / name)
    found, reasons = checkpoint.newest_verified(tmp_path)
    assert found == good
    assert len(reasons) == 1
    assert name in reasons[0]
    assert "checkpoint-10" in reasons[0]


def test_the_optimizer_and_the_generators_of_every_process_belong_to_a_checkpoint(tmp_path):
    for count, present in ((2, 2), (3, 2)):
        path = tmp_path / f"checkpoint-{count}"
        path.mkdir()
        for name in (checkpoint.WEIGHTS[1], *checkpoint.REQUIRED, *checkpoint.rng_files(present)):
            (path / name).write_text(name)
        checkpoint.commit(path, step=count, fingerprints={"processes": count})
    assert checkpoint.verify(tmp_path / "checkpoint-2") is None
    assert checkpoint.verify(tmp_path / "checkpoint-3").startswith("rng_state_2.pth was not saved")
    without = make(tmp_path, 4, [name for name in FILES if name != "optimizer.pt"])
    assert checkpoint.verify(without).startswith("optimizer.pt was not saved")


def test_none_left_is_an_error_that_deletes_nothing(tmp_path):
    for step in (1, 2):
        bit_flip(make(tmp_path, step) / "optimizer.pt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(IntegrityError, match=r"(?s)checkpoint-2: optimizer.pt.*checkpoint-1: optimizer.pt"):
        checkpoint.require_resumable(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_sealed_checkpoint_is_no_error(tmp_path):
    """Else a run that was killed in its first save could never be taken up again."""
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "notes.txt").touch()
    assert checkpoint.require_resumable(tmp_path) == checkpoint.require_resumable(tmp_path / "absent") == (None, [])
    missing(make(tmp_path, 2) / checkpoint.MANIFEST)
    assert checkpoint.require_resumable(tmp_path) == (
        None, ["checkpoint-2: MANIFEST.json is missing: the save did not finish"]
    )  # fmt: skip


@pytest.mark.parametrize(
    "content", ["[" * 9999, '{"a": ' * 9999, "[]", "\xff", '{"digest": 1, "files": {}, "step": 2}']
)
def test_a_manifest_of_anything_else_is_damaged(tmp_path, content):
    path = make(tmp_path, 2)
    (path / checkpoint.MANIFEST).write_text(content, encoding="latin-1")
    assert checkpoint.verify(path) == "MANIFEST.json is damaged"


def test_a_checkpoint_under_another_number_is_refused(tmp_path):
    """Trainer would take the folder's number for the step that the weights are of."""
    make(tmp_path, 2).rename(tmp_path / "checkpoint-3")
    assert "is that of step 2" in checkpoint.verify(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "other/adapter_model.safetensors"])
def test_a_weights_file_slipped_in_later_is_refused(tmp_path, name):
    """Trainer loads files and subfolders by name, listed or not; a pickle among them would be read first."""
    path = make(tmp_path, 3)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(b"x")
    assert "added" in checkpoint.verify(path)


def test_a_manifest_cannot_reach_out_of_its_folder(tmp_path):
    path = make(tmp_path, 3)
    secret = tmp_path / "secret"
    secret.write_text("x")
    manifest = record.read_json(path / checkpoint.MANIFEST)
    del manifest["digest"]
    manifest["files"]["../secret"] = checkpoint.file_record(secret)
    record.write_json(path / checkpoint.MANIFEST, {**manifest, "digest": checkpoint._digest(manifest)})
    assert "../secret" in checkpoint.verify(path)
    weights = path / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    assert "plain file" in checkpoint.verify(path)


def test_the_manifest_covers_its_own_step_and_fingerprints(tmp_path):
    path = make(tmp_path, 3)
    manifest = record.read_json(path / checkpoint.MANIFEST)
    record.write_json(path / checkpoint.MANIFEST, {**manifest, "step": 4})
    assert "damaged" in checkpoint.verify(path)


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = make(tmp_path, 3)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


def test_only_whole_checkpoints_count_as_kept(tmp_path):
    """Rotation by number alone would delete the last good checkpoint behind two broken ones."""
    for step in (2, 4, 6, 8, 10):
        make(tmp_path, step)
    bit_flip(tmp_path / "checkpoint-10" / "optimizer.pt")
    missing(tmp_path / "checkpoint-8" / checkpoint.MANIFEST)
    checkpoint.rotate(tmp_path, 2)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [10, 8, 6, 4]
    checkpoint.rotate(tmp_path, None)
    assert len(checkpoint.checkpoints(tmp_path)) == 4


def test_drift_lists_what_matters_and_nothing_else():
    before = {"adapter": {"r": 4, "rank_pattern": {}}, "train": {"learning_rate": 1e-2, "save_steps": 5}, "seed": 0}
    before |= {"data": {"path": "a"}, "output": "x", "eval": {"metrics": True}}
    after = {
        "adapter": {"r": 8, "rank_pattern": {"q": 2}},
        "train": {"learning_rate": 1e-2, "save_steps": 9},
        "seed": 1,
    }
    after |= {"data": {"path": "b"}, "output": "y", "eval": {"metrics": False}}
    changed = checkpoint.drift(before, after)
    assert [line.partition(":")[0] for line in changed] == [
        "adapter.r", "adapter.rank_pattern", "adapter.rank_pattern.q", "data.path", "seed",
    ]  # fmt: skip
    assert "adapter.r: 4 -> 8" in changed
    with pytest.raises(ConfigError, match=r"adapter.r: 4 -> 8"):
        checkpoint.refuse_drift(before, after)
    checkpoint.refuse_drift(before, {**before, "output": "z"})


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "changed"), [(3, 4, 0), (12, 1, 0), (6, 3, 1), (5, 2, 1), (4, 4, 2)]
)
def test_as_many_rows_a_step_are_the_same_run(batch_size, accumulation, changed):
    before = {"train": {"batch_size": 6, "gradient_accumulation_steps": 2}}
    after = {"train": {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}}
    assert len(checkpoint.drift(before, after)) == changed


def test_a_non_finite_weight_is_named_and_frozen_ones_do_not_matter():
    model = torch.nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    with torch.no_grad():
        model.weight[0, 1] = torch.nan
    sealed.require_finite(model, "step 3")
    with torch.no_grad():
        model.bias[1] = -torch.inf
    with pytest.raises(NonFiniteError, match=r"bias.*step 3"):
        sealed.require_finite(model, "step 3")

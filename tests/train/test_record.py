"""A result can be traced and a file is never half-written."""

import json
import os
import subprocess

import pytest

from duallora.store import record


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout" / "src"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("1\n")
    (results := folder.parent / "results" / "bench").mkdir(parents=True)
    (results / "host.json").write_text("{}")
    git(folder.parent, "init", "-q")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-q", "-m", "first")
    return folder


def test_commit_is_that_of_the_checkout_and_an_edit_makes_it_dirty(checkout):
    """An edit of what is measured: what the measurement before this one wrote is none."""
    (checkout.parent / "results" / "bench" / "host.json").write_text("[]")
    assert record.git_state(checkout) == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False}
    (checkout / "a.py").write_text("2\n")
    assert record.git_state(checkout)["dirty"] is True


def test_no_commit_outside_a_checkout(tmp_path):
    assert record.git_state(tmp_path) == {"commit": None, "dirty": None}
    assert record.git_state(tmp_path / "absent") == {"commit": None, "dirty": None}


def test_no_commit_for_a_package_installed_inside_another_projects_checkout(checkout):
    """A virtual environment inside a user's repository: that repository's commit is not ours."""
    installed = checkout / "venv" / "duallora"
    installed.mkdir(parents=True)
    (installed / "b.py").write_text("1\n")
    assert record.git_state(installed) == {"commit": None, "dirty": None}


def test_a_result_says_what_ran_on_what_with_which_code():
    result = record.result(
        "train", {"seed": 3}, {"loss": 1.5}, seeds=[3], started=0.0, data={"train": "ab"}, base="cd", note="x"
    )
    assert json.loads(json.dumps(result)) == result
    expected = {"kind", "commit", "dirty", "versions", "device", "threads", "platform", "started", "seconds", "seeds"}
    assert expected | {"data", "base", "recipe", "metrics", "note"} == set(result)
    assert result["started"] == "1970-01-01T00:00:00+00:00"
    assert {"torch", "peft", "transformers", "duallora", "python"} <= set(result["versions"])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.json"
    record.write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        record.write_json(path, {"a": 2})
    with pytest.raises(TypeError):
        record.write_json(path, {"a": object()})
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]
    assert record.read_json(path) == {"a": 1}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path, umask, mode):
    """safetensors writes 0600 whatever the umask, which locks colleagues out of shared folders."""
    private = tmp_path / "weights"
    private.touch(mode=0o600)
    before = os.umask(umask)
    try:
        record.write_json(tmp_path / "a.json", {})
        record.follow_umask(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}

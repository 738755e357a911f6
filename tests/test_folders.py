"""The cache folder, also of a process that has no home."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from duallora.folders import cache_folder

VARIABLES = ("DUALLORA_CACHE", "XDG_CACHE_HOME", "HOME")


def test_cache_folder_order(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.setenv(name, str(tmp_path / name))
    for name, expected in zip(VARIABLES, ("", "duallora", ".cache/duallora"), strict=True):
        assert cache_folder() == tmp_path / name / expected
        monkeypatch.delenv(name)


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """No HOME, and a user id without an entry in the system's list; temporary files go to ``tmp_path``."""
    import pwd

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RuntimeError):
        Path.home()
    return tmp_path


@pytest.mark.skipif(os.name != "posix", reason="user ids")
@pytest.mark.parametrize("chosen", ["", "~/cache"])
def test_without_a_home_the_cache_is_the_users_own_among_the_temporary_folders(homeless, chosen, monkeypatch):
    if chosen:
        monkeypatch.setenv("DUALLORA_CACHE", chosen)
    folder = cache_folder()
    assert folder == homeless / f"duallora-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder  # and not another one each time


@pytest.mark.skipif(os.name != "posix", reason="user ids")
@pytest.mark.parametrize("taken", ["writable by others", "a link"])
def test_a_temporary_folder_that_others_can_write_to_is_not_trusted(homeless, taken, tmp_path_factory):
    place = homeless / f"duallora-{os.getuid()}"
    if taken == "a link":
        place.symlink_to(tmp_path_factory.mktemp("theirs"))
    else:
        place.mkdir()
        place.chmod(0o777)
    folder = cache_folder()
    assert folder != place
    assert folder.stat().st_mode & 0o777 == 0o700


PREAMBLE = """
import os, pwd, sys
def unknown(uid): raise KeyError(uid)
pwd.getpwuid = unknown
for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "DUALLORA_CACHE"): os.environ.pop(name, None)
"""


@pytest.mark.skipif(os.name != "posix", reason="user ids")
def test_a_process_without_a_home_imports_trains_and_is_examined(tmp_path, tiny_causal_folder):
    (tmp_path / "rows.csv").write_text("prompt,completion\n1 + 1 =, 2\n2 + 2 =, 4\n3 + 3 =, 6\n")
    code = f"""{PREAMBLE}
from duallora import cli
small = ["--set", "train.max_steps=1", "--set", "eval.metrics=false", "--set", "eval.before=false"]
codes = [cli.run(line) for line in (
    ["doctor"],
    ["train", "--data", "rows.csv", "--model", {str(tiny_causal_folder)!r}, "-o", "run", *small],
    ["data", "check", "~/rows.csv"],
)]
print(codes, [p.name for p in __import__("pathlib").Path(".").iterdir() if p.name not in ("rows.csv", "run", "temp")])
"""
    (tmp_path / "temp").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "TMPDIR": str(tmp_path / "temp")},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[0, 0, 2] []", done.stdout + done.stderr
    assert "set HOME, or write the path in full" in done.stderr
    assert "plain torch operators" not in done.stderr  # the kernel was compiled, or loaded, all the same

"""What merge and convert write is there whole or not at all, and what a killed one left goes with the next."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from duallora.errors import DiskError
from duallora.export import convert, merge


@pytest.mark.parametrize("verb", ["merge", "convert"])
def test_the_next_run_removes_what_a_killed_one_left_and_nothing_else(verb, native, tmp_path):
    with merge.beside(tmp_path / "o[ut") as folder:
        name = folder.name.replace(str(os.getpid()), "PID")
    shutil.rmtree(tmp_path / "o[ut")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / name.replace("PID", str(gone.pid))
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "model.safetensors").write_bytes(bytes(99))
    others = {name.replace("PID", str(os.getppid())), f".out.{gone.pid}.tmp", f".o[ut.x{gone.pid}.tmp", "mine"}
    for other in others:
        (tmp_path / other).mkdir()
    options = {"rank": 1} if verb == "convert" else {}
    getattr({"merge": merge, "convert": convert}[verb], verb)(native, tmp_path / "o[ut", **options)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "o[ut"}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), DiskError),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), DiskError),
        (SafetensorError("Error while serializing: invalid header"), SafetensorError),
        (OSError(errno.EINVAL, "Invalid argument"), OSError),
    ],
)
def test_only_a_failure_of_the_disk_is_called_one(error, kind, tmp_path):
    with pytest.raises(kind) as caught, merge.beside(tmp_path / "out"):
        raise error
    assert type(caught.value) is kind
    assert list(tmp_path.iterdir()) == []

"""benchmarks/gpu.sh calls verbs and options that exist, in its order, and a part that fails is told and does not stop the rest."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from duallora import cli

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def told(folder, **environment):
    done = subprocess.run(
        ["bash", str(SCRIPT), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("tiny", ["", "1"])
def test_every_command_is_one_that_the_verbs_take(tiny, tmp_path, capsys):
    code, lines = told(tmp_path, PYTHON="echo", TINY=tiny, DEVICE="cpu")
    commands = [shlex.split(line)[2:] for line in lines if line.startswith("-m duallora ")]
    assert code == 0
    assert [command[:2] for command in commands] == [["bench", name] for name in ("kernel", "layer", "host", "step")]
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            cli.main([*command[:2], "--help"])
        assert ended.value.code == 0
        known = set(re.findall(r"--?[a-z][a-z-]*", capsys.readouterr().out))
        assert {word for word in command if re.match(r"--?[a-z]", word)} <= known


def test_a_part_that_fails_is_told_and_the_others_run(tmp_path):
    code, lines = told(tmp_path, PYTHON="false", TINY="1", DEVICE="cpu")
    assert code == 1
    assert sum("ended with exit code 1" in line for line in lines) == 4


def test_without_time_left_nothing_is_begun(tmp_path):
    code, lines = told(tmp_path, PYTHON="echo", MINUTES="0", DEVICE="cpu")
    assert code == 1
    assert all("no time left" in line for line in lines)

"""The peak of a run is what it held at one moment above what was there before."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from duallora.bench import memory
from duallora.errors import DualLoraError

CPU = torch.device("cpu")
BLOCK = 64 << 20

pytestmark = pytest.mark.skipif(not memory.can_measure(CPU), reason="the peak cannot be reset here")

SCRIPT = f"""
import torch
from duallora.bench.memory import peak_above
cpu = torch.device("cpu")
def blocks(count):
    return [torch.ones({BLOCK}, dtype=torch.uint8) for _ in range(count)]
def one_after_another():
    for _ in range(3):
        blocks(1)
kept = blocks(2)  # resident before: not counted
print([peak_above(run, cpu) for run in (lambda: None, lambda: blocks(1), lambda: blocks(3), one_after_another)])
"""


def test_known_blocks_are_measured_to_a_tenth():
    """Three at once, one, three one after another, none: the peak is neither the sum nor what stays."""
    environment = {**os.environ, **memory.ALLOCATOR}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=environment)
    none, one, three, in_turn = json.loads(done.stdout)
    assert none < 0.1 * BLOCK
    assert one == pytest.approx(BLOCK, rel=0.1)
    assert three == pytest.approx(3 * BLOCK, rel=0.1)
    assert in_turn == pytest.approx(BLOCK, rel=0.1)


def test_a_method_is_measured_in_its_own_process(tiny_causal_folder):
    scene = {"model": str(tiny_causal_folder), "rank": 2, "rows": 2, "length": 16, "device": "cpu"}
    found = memory.measured(scene, "duallora")
    assert found["model_bytes"] > 0
    assert len(found["peaks"]) == memory.REPEATS


def test_a_process_that_fails_is_no_figure(monkeypatch, tmp_path):
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho first >&2\necho killed >&2\nexit 9\n")
    failing.chmod(0o755)
    monkeypatch.setattr(memory.sys, "executable", str(failing))
    with pytest.raises(DualLoraError, match="memory of duallora ended with exit code 9: killed"):
        memory.measured({}, "duallora")


def test_a_system_without_a_peak_to_reset_is_no_figure(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROC", tmp_path / "absent")
    assert not memory.can_measure(CPU)
    with pytest.raises(DualLoraError, match="clear_refs"):
        memory.peak_above(lambda: None, CPU)

"""Rounds, budgets and ratios, on a clock that the test winds."""

from __future__ import annotations

import gc

import pytest
import torch

from duallora.bench import timing
from duallora.bench.timing import Subject, figures, interleave, ratio

CPU = torch.device("cpu")


class Clock:
    """A clock that stands still but for `advance`."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_every_round_runs_each_subject_once_and_the_first_is_forgotten(clock):
    ran: list[str] = []

    def subject(name: str) -> Subject:
        def run():
            clock.advance(100.0 if len(ran) < 3 else 2.0)  # the warm-up is slow
            ran.append(name)

        return Subject(run, before=lambda: clock.advance(7.0))  # not timed

    times = interleave({name: subject(name) for name in "abc"}, CPU, rounds=5)
    assert times == {name: [2.0] * 5 for name in "abc"}
    assert all(sorted(ran[i : i + 3]) == ["a", "b", "c"] for i in range(0, 18, 3))
    assert len({tuple(ran[i : i + 3]) for i in range(3, 18, 3)}) > 1  # in another order each time
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_runs_that_follow_one_another_are_timed_together_and_divided(clock):
    """before, run, before, run, before, run: the first before is free, the device is waited for at both ends only."""
    subject = Subject(lambda: clock.advance(2.0), before=lambda: clock.advance(0.5), times=3)
    assert timing.timed(subject, CPU) == pytest.approx((3 * 2.0 + 2 * 0.5) / 3)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (39.0, 3), (40.0, 4), (65.0, 6), (1000.0, 8)])
def test_no_round_is_begun_that_would_end_after_the_budget_but_three_are_run(seconds, rounds, clock):
    times = interleave({"a": Subject(lambda: clock.advance(10.0))}, CPU, rounds=8, seconds=seconds)
    assert len(times["a"]) == rounds


def test_a_subject_that_fails_leaves_the_collector_as_it_was():
    with pytest.raises(ZeroDivisionError):
        interleave({"a": Subject(lambda: 1 / 0)}, CPU)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_ratios_are_of_medians_and_their_quartiles_go_round_by_round():
    """A slow spell (the last two rounds) doubles both: the ratio of one round to another round would see it."""
    slow, quick = [3.0, 3.0, 3.0, 6.0, 6.0], [2.0, 2.0, 2.0, 4.0, 4.0]
    assert ratio(slow, quick) == {"median": 1.5, "quartiles": [1.5, 1.5]}
    assert ratio([1.0, 2.0, 9.0], [1.0, 1.0, 3.0]) == {"median": 2.0, "quartiles": [1.5, 2.5]}
    found = figures({"lora": quick, "dual": [5.0, 1.0, 2.0, 4.0, 3.0]}, {"lora": "lora", "gemms": "absent"})
    assert found["dual"] | {"median_s": 3.0, "quartiles_s": [2.0, 4.0], "rounds": 5} == found["dual"]
    assert found["dual"]["ratio_to_lora"]["median"] == 1.5
    assert "ratio_to_gemms" not in found["dual"]


def test_what_cannot_be_captured_says_why_and_the_others_are_replayed(monkeypatch):
    """Where the device is no GPU nothing is captured at all."""

    def captured(subject):
        if subject.times == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return subject

    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    subjects = {"lora": Subject(lambda: None), "waits": Subject(lambda: None, times=2), "dual": Subject(lambda: None)}
    found, why = timing.replayed(subjects, torch.device("cuda"), {"lora": "lora"}, rounds=3, seconds=9)
    assert why == {"graph of waits": "operation not permitted when stream is capturing"}
    assert list(found) == ["lora", "dual"]
    assert found["dual"]["rounds"] == 3
    assert "ratio_to_lora" in found["dual"]
    assert timing.replayed(subjects, CPU, {}, rounds=3, seconds=9) == ({}, {})

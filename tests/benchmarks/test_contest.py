"""Contestants take turns, are halted in between, and leave nothing behind."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import psutil
import pytest

from megamug.benchmarks import _contest
from megamug.benchmarks._contest import Turn

HERE = "tests.benchmarks.contestants"


@pytest.fixture
def started(monkeypatch):
    workers = []

    class Kept(_contest.Worker):
        def __init__(self, *arguments):
            workers.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr(_contest, "Worker", Kept)
    monkeypatch.setattr(_contest, "product_rate", lambda dtype: 1e12)
    return workers


def report(steps: int):
    results = []
    add = lambda name, **figures: results.append({"name": name, **figures})  # noqa: E731
    options = argparse.Namespace(steps=steps, batch=7, profile=None)
    return SimpleNamespace(options=options, content={"benchmark": "test"}, say=lambda line: None, add=add), results


def test_a_race(started, monkeypatch):
    kept, take_turns = {}, _contest.take_turns
    monkeypatch.setattr(_contest, "take_turns", lambda *a, **k: kept.update(take_turns(*a, **k)) or kept)
    told, results = report(2)
    figures = _contest.race(told, HERE, ("quick", "slow"), "bf16", "images", 8)
    assert [result["name"] for result in results] == ["bf16 quick", "bf16 slow"]
    quick, slow = figures["quick"], figures["slow"]
    assert quick["images_per_second"] > 2 * slow["images_per_second"] > 0
    assert slow["megamug_times"] > 2 and slow["megamug_times_low"] <= slow["megamug_times"]
    assert quick["mfu"] == pytest.approx(4e9 / quick["step_seconds"] / 1e12)
    assert quick["mfu_denominator"] == "2048^3 product measured in this run: 1 TFLOP/s"
    assert quick["peak_gib"] > 0 and slow["data_wait"] is None
    # its counter goes up a thousand times a second, but not in the 0.4 seconds of the other one's turn
    first, second = (turn.wait for turn in kept["quick"])
    assert first < second < first + 200
    assert not any(psutil.pid_exists(worker.process.pid) for worker in started)


def test_a_contestant_that_fails_ends_the_race(started):
    told, _ = report(1)
    with pytest.raises(RuntimeError, match="the contestant broken of the benchmark ended with code 1"):
        _contest.race(told, HERE, ("quick", "broken"), "bf16", "images", 8)
    assert len(started) == 2 and not any(psutil.pid_exists(worker.process.pid) for worker in started)


def test_figures_of_turns():
    turns = [Turn(2.0, 0.5), Turn(4.0, 1.0), Turn(3.0, 0.3)]
    found = _contest.figures(turns, "tokens", 12, 6e12, 4e12, "fp32", processes=2)
    assert found["tokens_per_second"] == 4 and found["spread"] == pytest.approx(2 / 3)
    assert found["tflops_per_device"] == pytest.approx(1) and found["share_of_product_rate"] == pytest.approx(0.25)
    assert found["data_wait"] == pytest.approx(0.5 / 3)
    ratios = _contest.versus(turns, [Turn(4.0), Turn(4.0), Turn(9.0)])
    assert (ratios["megamug_times"], ratios["megamug_times_low"], ratios["megamug_times_high"]) == (2, 1, 3)

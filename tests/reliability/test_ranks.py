"""Ranks that go on with wrong numbers: T6, T7 and T11, and parameters that are spoiled."""

from __future__ import annotations

import re

import pytest

from tests.training.runs import checkpoints, metrics


def test_t6_a_gradient_that_is_not_finite_on_one_replica_is_skipped_by_all(runs, tmp_path):
    faults = [{"kind": "nan_gradient", "rank": 1, "step": 5}]
    results = runs.ranks(tmp_path / "run", 2, "train.compare_replicas_every=1", faults=faults)
    assert [code for code, _ in results] == [0, 0], results
    steps, _ = metrics(tmp_path / "run")
    assert [step["step"] for step in steps if step["skipped"]] == [5]
    assert "not finite on another rank" in results[0][1]


@pytest.mark.parametrize(("layout", "kind", "said"), [
    ([], "flip", r"the parameters of ranks 0, 1 differ from one another"),
    (["parallel.tensor=2"], "flip_whole", r"the unsplit parameters of ranks 0, 1 differ from one another"),
])  # fmt: skip
def test_t11_one_flipped_bit_in_a_copy_of_a_parameter_ends_the_run(runs, tmp_path, layout, kind, said):
    faults = [{"kind": kind, "rank": 1, "step": 8}]
    results = runs.ranks(tmp_path / "run", 2, *layout, "train.compare_replicas_every=4", faults=faults)
    assert [code for code, _ in results] == [1, 1], results
    assert all(re.search(f"after step 8 {said}", output) for _, output in results), results[0][1][-3000:]
    assert checkpoints(tmp_path / "run") == [3, 6]  # before the fault


def test_t11_without_the_comparison_it_would_not_be_noticed(runs, tmp_path):
    faults = [{"kind": "flip", "rank": 1, "step": 8}]
    results = runs.ranks(tmp_path / "run", 2, "train.compare_replicas_every=0", faults=faults)
    assert [code for code, _ in results] == [0, 0]


def test_t7_a_spike_is_skipped_where_it_is_asked_for(runs, tmp_path, monkeypatch):
    """After 32 steps that tell what is usual."""
    faults, long = [{"kind": "spike", "rank": "all", "step": 36}], ["train.steps=38", "checkpoint.every=0"]
    found = {}
    for sigmas in ("6", "0"):
        run = tmp_path / sigmas
        results = runs.ranks(run, 1, *long, f"optimizer.skip_spikes={sigmas}", faults=faults)
        assert [code for code, _ in results] == [0], results
        found[sigmas] = [step["step"] for step in metrics(run)[0] if step["skipped"]]
    assert found == {"6": [36], "0": []}


def test_a_run_whose_parameters_are_spoiled_saves_nothing_and_says_what_to_go_back_to(runs, tmp_path):
    """One parameter is NaN from step 8 on: every step is skipped, and the checkpoints before stay."""
    run, long = tmp_path / "run", ["train.steps=30"]
    faults = [{"kind": "nan_parameter", "rank": "all", "step": 8}]
    [(code, output)] = runs.ranks(run, 1, *long, faults=faults)
    assert code == 1 and checkpoints(run) == [3, 6]
    assert "no checkpoint of step 9: the last 2 steps were skipped" in output
    assert "The newest checkpoint, step 6, was saved before them" in output
    assert "checkpoint.go_back_to=STEP (3)" in output
    # Further back by the key, once: the same command, started again, goes on from what it saved since.
    [(code, output)] = runs.ranks(run, 1, *long, "checkpoint.go_back_to=3", "train.steps=6")
    assert code == 0 and "resuming after step 3" in output
    assert (run / "checkpoints" / "aside-step-00000006").is_dir()
    [(code, output)] = runs.ranks(run, 1, *long, "checkpoint.go_back_to=3", "train.steps=9")
    assert code == 0 and "resuming after step 6" in output and "was done before" in output
    [(code, output)] = runs.ranks(run, 1, *long, "checkpoint.go_back_to=4")
    assert code == 2 and "checkpoint.go_back_to(4)" in output and "those of steps 9, 6" in output

"""T3 and T5: killed at named points of a save, and saves onto a full disk."""

from __future__ import annotations

import subprocess

import pytest

from megamug.checkpoint.store import CheckpointStore
from tests.reliability.conftest import traces
from tests.reliability.faulty import _act, writes_common
from tests.reliability.recipe import STEPS
from tests.training.runs import checkpoints, fingerprint, metrics

# (point, rank, step of the save, step that is resumed after it). Rank 1 has no part in a commit.
KILLS = [
    ("shards", 0, 9, 6), ("shards", 1, 9, 6), ("written", 0, 9, 6), ("written", 1, 9, 6), ("metadata", 0, 9, 6),
    ("metadata", 1, 9, 6), ("commit", 0, 9, 6), ("pointer", 0, 9, 9), ("retention", 0, 12, 12),
]  # fmt: skip
MODES = pytest.mark.parametrize("asynchronous", ["false", "true"], ids=["sync", "async"])


@MODES
def test_t3_sigkill_at_every_point_of_a_save(runs, undisturbed, tmp_path, asynchronous):
    """One run, started again after each kill, and killed at the next point."""
    run, how = tmp_path / "run", f"checkpoint.asynchronous={asynchronous}"
    resumed = None
    for point, rank, step, then in KILLS:
        dead = runs.ranks(run, 2, how, faults=[{"kind": "kill", "rank": rank, "step": step, "at": point}])
        assert dead[rank][0] == -9 and dead[1 - rank][0] == 1, (point, rank, dead)
        assert "Traceback" not in dead[1 - rank][1], dead[1 - rank][1]
        assert "the run ends: another rank is gone" in dead[1 - rank][1]
        assert traces(dead) == []
        # What the kill before has left.
        assert resumed is None or f"resuming after step {resumed} " in (run / "log" / "rank-0.log").read_text()
        (run / "log" / "rank-0.log").unlink()
        resumed = then
    results = runs.ranks(run, 2, how)
    assert [code for code, _ in results] == [0, 0], results
    assert f"resuming after step {resumed} " in results[0][1]
    # Nothing half-made beside them. Step 3 was due behind step 6, at which the last kill came.
    assert checkpoints(run) == [3, 9, STEPS]
    assert fingerprint(run / "checkpoints" / f"step-{STEPS:08d}") == undisturbed


@MODES
def test_t3_a_save_starts_no_process(runs, tmp_path, asynchronous):
    """A process that a rank started would outlive it, and hold the port: a save writes in threads."""
    told = tmp_path / "children"
    points = ["begin", "shards", "written", "metadata", "commit", "retention"]
    faults = [{"kind": "children", "rank": "all", "step": 9, "at": at, "path": str(told)} for at in points]
    results = runs.ranks(tmp_path / "run", 2, f"checkpoint.asynchronous={asynchronous}", faults=faults)
    assert [code for code, _ in results] == [0, 0]
    lines = told.read_text().splitlines()
    assert {line.partition(":")[0] for line in lines} == set(points)
    assert [line for line in lines if not line.endswith(":")] == []


def test_t3_the_hook_can_see_a_child(tmp_path):
    """The test above can fail."""
    child = subprocess.Popen(["sleep", "60"])
    try:
        _act({"kind": "children", "at": "x", "path": str(tmp_path / "told")})
    finally:
        child.kill()
        child.wait()
    assert str(child.pid) in (tmp_path / "told").read_text()


TENSORS = {"kind": "full", "rank": "all", "step": 5, "bytes": 20_000}
FULL = [  # a fault, what its rank says of it, whether the save is asynchronous
    (TENSORS, "a file was cut short", "false"), (TENSORS, "a file was cut short", "true"),
    ({"kind": "full", "rank": 0, "at": "metadata", "step": 6, "bytes": 50_000}, "File too large", "false"),
    *[({"kind": "no_space", "rank": 0, "at": at, "step": 6}, "No space left on device", "false")
      for at in ("begin", "common", "shards", "metadata_file", "commit")],
    ({"kind": "no_space", "rank": 1, "at": "shards", "step": 6}, "No space left on device", "false"),
    ({"kind": "no_space", "rank": 1, "at": "shards", "step": 6}, "No space left on device", "true"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "said", "asynchronous"), FULL, ids=[
    f"{fault['kind']} {fault.get('at', '')} {fault['rank']} {'async' if mode == 'true' else 'sync'}"
    for fault, _, mode in FULL
])  # fmt: skip
def test_t5_a_full_disk_is_one_sentence_from_every_rank(runs, tmp_path, fault, said, asynchronous):
    if fault.get("at") == "common" and not writes_common():
        pytest.skip("this Megatron-core writes no common.pt")
    run = tmp_path / "run"
    results = runs.ranks(run, 2, f"checkpoint.asynchronous={asynchronous}", faults=[fault])
    assert [code for code, _ in results] == [1, 1], results
    for rank, (_, output) in enumerate(results):
        assert "Traceback" not in output, output
        (line,) = [line for line in output.splitlines() if "the run ends:" in line]
        who = fault["rank"] if fault["rank"] != "all" else 0
        assert line.startswith("rank 1: the run ends: " if rank else "the run ends: "), line
        assert f"the checkpoint of step 6 could not be written: rank {who}: {said}" in line
        assert f"are free in {run / 'checkpoints'}" in line and "Make room" in line, line
    assert "Traceback" in (run / "log" / f"rank-{who}.log").read_text()  # for who wants to know
    assert checkpoints(run) == [3] and (run / "checkpoints" / "latest").read_text() == "step-00000003\n"
    assert CheckpointStore(run, keep=0).newest_complete().step == 3
    if fault is TENSORS:
        [(code, output)] = runs.ranks(run, 1, "train.steps=6")
        assert code == 0 and "resuming after step 3" in output, output


def test_t5_lines_of_figures_and_of_the_log_wait_for_room(runs, tmp_path):
    """What is no checkpoint does not end the run: it is said once, and metrics.jsonl gets its lines later."""
    run = tmp_path / "run"
    faults = [{"kind": "full", "rank": 0, "step": 4, "bytes": 2200}, {"kind": "room", "rank": 0, "step": 11}]
    [(code, output)] = runs.ranks(run, 1, "checkpoint.every=0", "data.validation=null", faults=faults)
    assert code == 0, output
    assert "Traceback" not in output and "Logging error" not in output, output
    assert output.count("metrics.jsonl: File too large") == 1 and output.count("rank-0.log: File too large") <= 1
    assert [step["step"] for step in metrics(run)[0]] == list(range(1, STEPS + 1))


def test_t5_a_disk_that_is_full_before_the_start_is_the_users_mistake(runs, tmp_path):
    [(code, output)] = runs.ranks(tmp_path / "run", 1, faults=[{"kind": "full_lock", "rank": 0, "step": 0}])
    assert code == 2 and "megamug: error: run_dir: No space left on device" in output, output
    assert "make room, or set run_dir to another folder" in output and "Traceback" not in output

"""Signals, bad steps and hangs: what one rank meets, all decide alike, and nothing waits for ever."""

import faulthandler
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from megamug.distributed.stopping import StopRequest
from megamug.training.resilience import BadStepGuard, TooManyBadSteps, Watchdog
from tests.distributed.launch import environment


def run(script: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_sets_the_flag_and_a_second_is_ignored(number, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested and not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.requested and stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)  # would end the process
        assert stop.agreed()
    assert signal.getsignal(number) is before
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith(f"{number.name}: stopping") and lines[1].startswith("SIGTERM: already stopping")


def test_a_signal_that_was_blocked_at_the_start_is_heard(capfd):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, set())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert capfd.readouterr().err.startswith("SIGTERM: stopping")


def stopping_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    with StopRequest() as stop:
        for step in range(1, 100):
            if rank == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.agreed(torch.distributed.group.WORLD):
                break
    with open(f"{folder}/rank-{rank}", "w") as file:
        file.write(f"{step} {stop.requested}")
    torch.distributed.destroy_process_group()


def test_all_ranks_stop_at_the_same_step(tmp_path):
    torch.multiprocessing.spawn(stopping_rank, (str(tmp_path),), nprocs=3)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(3)] == ["5 False", "5 True", "5 False"]


NAN, INF = float("nan"), float("inf")


def test_bad_steps_are_skipped(caplog):
    guard = BadStepGuard(limit=3)
    steps = [(1.0, 1.0), (NAN, 1.0), (1.0, INF), (1.0, 1.0), (-INF, NAN), (2.0, 1.0)]
    with caplog.at_level(logging.WARNING):
        bad = [guard.is_bad(step, *values) for step, values in enumerate(steps, start=1)]
    assert bad == [False, True, True, False, True, False]
    assert guard.skipped == 3 and guard.in_a_row == 0
    assert "step 2 skipped: loss nan" in caplog.text and "gradient norm inf" in caplog.text


def test_too_many_in_a_row_end_the_run():
    guard = BadStepGuard(limit=3)
    guard.is_bad(10, NAN, 1.0)
    guard.is_bad(11, NAN, 1.0)
    with pytest.raises(TooManyBadSteps, match=r"3 steps in a row.*step 12 .*loss nan.*those of step 9.*learning_rate"):
        guard.is_bad(12, NAN, 1.0)


HANGING = {
    "sleep": "def hang():\n    time.sleep(60)",
    # gloo: rank 0 of two waits for a rank that never comes to the barrier
    "collective": """
import threading, torch.distributed as dist
def hang():
    store = dist.HashStore()
    def other():
        group = dist.distributed_c10d.ProcessGroupGloo(store, 1, 2)
        time.sleep(60)
    threading.Thread(target=other, daemon=True).start()
    group = dist.distributed_c10d.ProcessGroupGloo(store, 0, 2)
    group.barrier().wait()
""",
    # a C call that keeps the GIL, so that no other Python thread runs
    "GIL": "import ctypes\ndef hang():\n    ctypes.PyDLL(None).sleep(60)",
}
WATCHED = """
import sys, time
from megamug.training.resilience import Watchdog
{hang}
with Watchdog(1.0, sys.argv[1]) as watchdog:
    for _ in range(8):  # longer than the limit, but alive
        time.sleep(0.25)
        watchdog.beat()
    print("alive", flush=True)
    hang()
print("not reached")
"""


@pytest.mark.parametrize("kind", HANGING)
def test_watchdog_ends_a_hanging_process_and_prints_its_stacks(tmp_path, kind):
    log = tmp_path / "rank-0.log"
    start = time.monotonic()
    result = run(WATCHED.format(hang=HANGING[kind]), str(log))
    assert time.monotonic() - start < 40, "it slept to its end"
    assert result.returncode == 1 and result.stdout == "alive\n", result
    stacks = log.read_text()
    assert "in hang" in stacks
    if kind != "GIL":
        assert "watchdog: no step was finished for" in stacks
        assert "in hang" in result.stderr and str(log) in result.stderr


@pytest.mark.parametrize(("limit", "period", "ends"), [(2.0, 0.5, 4.0), (4.0, 1.0, 8.0), (60.0, 1.0, 64.0)])
def test_the_timer_that_needs_no_gil_comes_after_the_watchdog(tmp_path, monkeypatch, limit, period, ends):
    """The watchdog looks four times in its limit, at least once a second; the timer gives it four looks more."""
    armed = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *seconds, **more: armed.append((seconds, more)))
    with Watchdog(limit, tmp_path / "log") as watchdog:
        assert watchdog.period == period
    (seconds,), more = armed[0]
    assert seconds == ends and more["exit"] is True and more["file"].name == str(tmp_path / "log")


def test_watchdog_leaves_a_living_process_alone(tmp_path):
    with Watchdog(0.5, tmp_path / "log") as watchdog:
        for _ in range(6):
            time.sleep(0.15)
            watchdog.beat()
    time.sleep(0.8)  # left: nothing is due any more
    assert (tmp_path / "log").read_text() == ""


PATIENT = """
import sys, time
from megamug.distributed.stopping import StopRequest
with StopRequest() as stop:
    print("begun", flush=True)
    time.sleep(60)
    time.sleep(60)
    time.sleep(60)
"""


def test_the_third_ctrl_c_ends_at_once():
    """Nothing but a kill ended a run whose last checkpoint hung. What a launcher hands on at the same moment, and other
    signals, count as none."""
    process = subprocess.Popen([sys.executable, "-c", PATIENT], env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert process.stdout.readline() == "begun\n"
        said = []
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGTERM, None, signal.SIGINT, None):
            if number is None:
                time.sleep(StopRequest.ONE_PRESS + 0.1)
            else:
                process.send_signal(number)
                said.append(process.stderr.readline())
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert "stopping after this step" in said[0] and "Ctrl-C three times ends at once" in said[-1]
        assert process.stderr.read() == "SIGINT: ending at once; the same command goes on from what was last saved\n"
    finally:
        process.kill()

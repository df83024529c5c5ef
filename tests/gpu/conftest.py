"""What the tests marked `gpu` share in their one process: processes without GPUs, and demos, both started first."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys

import pytest

from tests.distributed.launch import ROOT, environment
from tests.gpu import cpu, parity, writing

DEMOS = {
    "mug": [
        "--train", "512", "--heldout", "32", "train.steps=20", "train.validate_every=10", "checkpoint.every=10",
        "optimizer.warmup_steps=5", "data.validation_samples=32", "log.every=5", "checkpoint.asynchronous=true",
    ],
    "jam": ["--quick"],
}  # fmt: skip


@pytest.fixture(scope="session")
def without_gpu():
    """A pool of processes that see no GPU."""
    with cpu.processes(3) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def cpu_curves(without_gpu):
    """By case, the future of its fp32 curve on the CPU."""
    return {case: without_gpu.submit(parity.train, case, "fp32-local") for case in parity.CASES}


@pytest.fixture(scope="session")
def cpu_runs(without_gpu, tmp_path_factory):
    """(folder of runs that a CPU makes, the future of what it writes by them and measures)."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, without_gpu.submit(writing.make_runs_and_write, folder)


@pytest.fixture(scope="session")
def transformer_engine():
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed (extra `te`)")


@pytest.fixture(scope="session")
def demos(request, tmp_path_factory):
    """By name, (process, folder) of each demo that is asked for, small. They take minutes of imports."""
    wanted = {item.callspec.params["told"] for item in request.session.items if "told" in item.fixturenames}
    running = {}
    try:
        for name in sorted(wanted):
            folder = tmp_path_factory.mktemp(f"demo-{name}")
            command = [sys.executable, str(ROOT / f"examples/{name}/demo.py"), "--folder", str(folder / "made")]
            with (folder / "told").open("w") as told:
                running[name] = subprocess.Popen(
                    [*command, *DEMOS[name]], env=environment(), cwd=ROOT, stdout=told, stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                ), folder  # fmt: skip
        yield running
    finally:
        for process, _ in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session", autouse=True)
def started_first(request):
    """What runs beside the tests starts with the first of them, whichever asks for it."""
    used = {name for item in request.session.items for name in item.fixturenames}
    for name in ("demos", "cpu_runs", "cpu_curves"):
        if name in used:
            request.getfixturevalue(name)


@pytest.fixture(scope="session", autouse=True)
def groups_end():
    yield
    if "megamug.distributed.setup" in sys.modules:
        sys.modules["megamug.distributed.setup"].stop()

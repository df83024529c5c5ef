"""What the tests marked `gpu` share in their one process: processes without GPUs, and demos, both started first."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests.distributed.launch import ROOT, environment
from tests.gpu import cpu, parity

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
def transformer_engine():
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed (extra `te`)")


@pytest.fixture(scope="session", autouse=True)
def demos(request, tmp_path_factory):
    """By name, (process, folder) of each demo, small. They take minutes of imports, so they run beside all else."""
    running = {}
    try:
        if any(item.path.name == "test_whole_programs.py" for item in request.session.items):
            for name, words in DEMOS.items():
                folder = tmp_path_factory.mktemp(f"demo-{name}")
                command = [sys.executable, str(ROOT / f"examples/{name}/demo.py"), "--folder", str(folder / "made")]
                with (folder / "told").open("w") as told:
                    running[name] = subprocess.Popen(
                        [*command, *words], env=environment(), cwd=ROOT, stdout=told, stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL, start_new_session=True,
                    ), folder  # fmt: skip
        yield running
    finally:
        for process, _ in running.values():
            process.kill()


@pytest.fixture(scope="session", autouse=True)
def groups_end():
    yield
    if "megamug.distributed.setup" in sys.modules:
        sys.modules["megamug.distributed.setup"].stop()

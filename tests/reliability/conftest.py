"""The run that everything goes wrong with: twelve steps of a tiny MUG, five steps an epoch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, environment, launch_forked
from tests.reliability.recipe import STEPS, make_recipe
from tests.training.runs import fingerprint

LOGGED = str(ROOT / "tests" / "training" / "runs.py")
WORKER = str(ROOT / "tests" / "reliability" / "faulty.py")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("data"))


class Runs:
    """Starts runs of the recipe."""

    def __init__(self, recipe: Path):
        self.recipe = recipe

    def words(self, run: Path, *overrides: str, faults: list[dict] = ()) -> list[str]:
        return [WORKER, json.dumps(list(faults)), "train", str(self.recipe), f"run_dir={run}", *overrides]

    def ranks(self, run: Path, processes: int, *overrides: str, faults: list[dict] = (), timeout: float = 120.0):
        """[(exit code, output)] of each rank."""
        return launch_forked(self.words(run, *overrides, faults=faults), processes, timeout)

    def logged(self, run: Path, ids: Path, processes: int, *overrides: str, **hooks) -> list[tuple[int, str]]:
        """As `ranks`, with each rank's samples written to `ids` and the hooks of tests/training/runs.py."""
        words = [LOGGED, json.dumps({"ids": str(ids), **hooks}), "train", str(self.recipe), f"run_dir={run}"]
        return launch_forked([*words, *overrides], processes, 120.0)

    def torchrun(self, run: Path, processes: int, *overrides: str, faults: list[dict] = (), restarts: int = 2):
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                 "--max-restarts", str(restarts), *self.words(run, *overrides, faults=faults)]  # fmt: skip
        return subprocess.run([sys.executable, *words], env=environment(), cwd=ROOT, capture_output=True, text=True,
                              timeout=240)  # fmt: skip


def traces(results: list[tuple[int, str]]) -> list[str]:
    """What the ranks of a dead run have left: their processes, the port they met at. Empty: nothing."""
    found = []
    for _, output in results:
        _, pid, *port = output.splitlines()[0].split()
        try:
            os.killpg(int(pid), 0)  # a rank leads a process group: whatever it started is in it
            found.append(f"process group {pid} lives")
        except ProcessLookupError:
            pass
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as TCPStore
            if port and s.connect_ex(("127.0.0.1", int(port[0]))) == 0:
                found.append(f"somebody listens on {port[0]}")
    return found


@pytest.fixture(scope="session")
def runs(recipe) -> Runs:
    return Runs(recipe)


@pytest.fixture(scope="session")
def undisturbed(runs, tmp_path_factory) -> dict[str, str]:
    """Hashes of the last checkpoint of two data-parallel processes that nothing happens to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert [code for code, _ in runs.ranks(run, 2)] == [0, 0]
    return fingerprint(run / "checkpoints" / f"step-{STEPS:08d}")

"""T10: ranks that end; torchrun starts all of them again."""

from __future__ import annotations

import pytest

from tests.reliability.recipe import STEPS
from tests.training.runs import fingerprint


def fault(attempt: int, kind: str, rank: int, step: int) -> dict:
    return {"attempt": attempt, "kind": kind, "rank": rank, "step": step}


@pytest.mark.parametrize("faults", [
    [fault(0, "exception", 1, 4), fault(1, "segfault", 0, 8)],
    [fault(0, "kill", 0, 5), fault(1, "stop", 1, 7)],  # a stopped rank is ended by the other's watchdog
], ids=["exception and segfault", "SIGKILL and SIGSTOP"])  # fmt: skip
def test_t10_torchrun_starts_again_and_the_bits_are_those_of_an_undisturbed_run(runs, undisturbed, tmp_path, faults):
    result = runs.torchrun(tmp_path / "run", 2, "parallel.timeout_minutes=0.3", faults=faults)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert fingerprint(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}") == undisturbed
    log = (tmp_path / "run" / "log" / "rank-0.log").read_text()
    assert log.count("resuming after step") == 2

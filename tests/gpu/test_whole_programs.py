"""The demos as a reader starts them, small: data, training on the GPU, evaluation, pictures. They run beside the other
tests from the first one on (`conftest.demos`)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture
def told(demos, request):
    """(what a demo printed, its folder)."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    process, folder = demos[request.param]
    code = process.wait(timeout=400)
    text = (folder / "told").read_text()
    assert code == 0, text[-6000:]
    return text, folder / "made"


@pytest.mark.parametrize("told", ["mug"], indirect=True)
def test_the_mug_demo(told):
    text, folder = told
    log = (folder / "run" / "log" / "rank-0.log").read_text()
    assert " over NCCL" in log and "finished: step 20 of 20" in log
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert "bf16: this machine has products for it" in text
    assert Path(re.search(r"Look at  (\S+)", text)[1]).is_file()


@pytest.mark.parametrize("told", ["jam"], indirect=True)
def test_the_jam_demo(told):
    text, folder = told
    rows = re.findall(r"^  (parent: \w+|JAM-\w+, \w+)((?: +\d+\.\d\d){3})$", text, flags=re.MULTILINE)
    assert len(rows) == 8
    assert all(figure > 1 for row in json.loads((folder / "perplexities.json").read_text()).values()
               for figure in row.values())  # fmt: skip
    for run in ("parents/text", "continued/cross", "instructed"):
        assert " over NCCL" in (folder / run / "log" / "rank-0.log").read_text()
    assert "draw this" in Path(re.search(r"Read\s+(\S+)", text)[1]).read_text()

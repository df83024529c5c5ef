"""Recording a step on a GPU does not wait for it."""

from __future__ import annotations

import pytest
import torch

from tests.telemetry.test_metrics import lines, make

pytestmark = pytest.mark.gpu


def test_record_does_not_synchronise_a_gpu(tmp_path):
    metrics = make(tmp_path)
    loss = torch.tensor(3.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 5):
            metrics.record(step, {"loss": loss})
            loss.mul_(2.0)
        with pytest.raises(RuntimeError, match="synchroniz"):
            metrics.flush()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    metrics.flush()
    assert [line["loss"] for line in lines(tmp_path)] == [3.0, 6.0, 12.0, 24.0]

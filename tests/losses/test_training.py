"""MUG learns the same with the compiled losses, which are its default, as with those in plain torch."""

from __future__ import annotations

import pytest
import torch

from megamug.losses import ops
from tests.distributed.cases.layout_worker import micro_batches, tiny
from tests.losses.common import need


def loss_curve(world, steps: int) -> list[float]:
    from megamug.models.init import initialise
    from megamug.models.mug.model import Mug
    from megamug.models.mug.plan import MugPlan

    config = tiny({"data": {"micro_batch_size": 8}})
    stage = Mug(MugPlan(config, vocabulary=70))
    initialise(stage.sharded_state_dict(), seed=0)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.05)
    (batch,), totals = micro_batches(0, stage.plan, config, world)
    curve = []
    for _ in range(steps):
        _, losses = stage(batch)
        loss = sum(losses[name][0] / totals[name] for name in losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss))
    return curve


def test_loss_curve_of_compiled_and_torch(world, monkeypatch):
    need("compiled")
    compiled = loss_curve(world, 15)
    monkeypatch.setattr(ops, "_LIBRARIES", ops.Libraries(False, False, "left out by this test"))
    plain = loss_curve(world, 15)
    assert compiled[-1] < 0.98 * compiled[0]
    assert compiled == pytest.approx(plain, rel=1e-5)

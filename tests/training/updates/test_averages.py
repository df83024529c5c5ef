"""Averages of the weights against a float64 loop; what takes their place comes back to the bit."""

from __future__ import annotations

import pytest
import torch

from megamug.checkpoint.optimizer_state import AVERAGE
from megamug.training.optim import Optimizer, wrap_chunks
from megamug.training.pipeline import run_batch
from megamug.training.updates import averages
from tests.distributed.cases.classifier_case import make_task, micro_batches, tiny


def started(world, dtype: str, distributed: bool = False, name: str = "adamw"):
    config = tiny({"classifier": {"classes": 7, "ema": 0.75}, "precision": {"dtype": dtype}})
    config.parallel.distributed_optimizer, config.optimizer.name = distributed, name
    task = make_task(config)
    task.join(world)
    chunks = task.build(world)
    models = wrap_chunks(chunks, config)
    return config, task, chunks, models, Optimizer(config, models)


@pytest.mark.parametrize("dtype, distributed, name", [
    ("fp32", False, "adamw"), ("bf16", False, "adamw"), ("bf16", True, "adamw"), ("fp32", False, "lars"),
])  # fmt: skip
def test_they_are_those_of_a_float64_loop_and_a_skipped_step_leaves_them(world, dtype, distributed, name):
    config, task, chunks, models, optimizer = started(world, dtype, distributed, name)
    expected = {one.name: one.main.detach().double() for one in optimizer.main_states()}
    assert optimizer.moments[-1] == AVERAGE
    for step, bad in enumerate((False, False, True, False), start=1):
        optimizer.zero_grad()
        batches, totals = micro_batches(step, task.plan, config, world)
        run_batch(models, batches, totals, backward=True)
        norm, _ = optimizer.prepare(step)
        optimizer.apply(norm * torch.inf if bad else norm)
        for one in optimizer.main_states():
            if not bad:
                expected[one.name] = 0.75 * expected[one.name] + 0.25 * one.main.detach().double()
            average = one.moment(AVERAGE)
            assert average.dtype == torch.float32 and average.shape == one.main.shape
            torch.testing.assert_close(average.double(), expected[one.name], rtol=1e-6, atol=1e-7, msg=one.name)
    before = [p.detach().clone() for p in chunks[0].parameters()]
    with averages.in_place(chunks, optimizer, world):
        for parameter, name in optimizer.names.items():
            one = next(state for state in optimizer.main_states() if state.name == name)
            assert torch.equal(parameter.view(-1), one.moment(AVERAGE).to(parameter.dtype).view(-1))
    assert all(torch.equal(p, q) for p, q in zip(chunks[0].parameters(), before, strict=True))

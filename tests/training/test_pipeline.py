"""A step's losses and gradients against plain autograd over the whole batch, however it is split."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamug.training.optim import wrap_chunks
from megamug.training.pipeline import reduce_losses, run_batch
from tests.distributed.cases.layout_worker import micro_batches, tiny

NAMES = ["image", "caption"]


def build(micro_batch: int, wrapped: bool = True):
    from megamug.models.init import initialise
    from megamug.models.mug.model import Mug
    from megamug.models.mug.plan import MugPlan

    config = tiny({"data": {"micro_batch_size": micro_batch}})
    stage = Mug(MugPlan(config, vocabulary=70))
    initialise(stage.sharded_state_dict(), seed=0)
    return stage, wrap_chunks([stage], config)[0] if wrapped else stage, config


def plain_gradients(world) -> tuple[dict, dict]:
    """Mean losses and the gradients of their weighted sum: one forward and backward over the global batch."""
    stage, _, config = build(8, wrapped=False)
    (batch,), totals = micro_batches(0, stage.plan, config, world)
    _, losses = stage(batch)
    means = {name: losses[name][0] / totals[name] for name in NAMES}
    sum(stage.plan.loss_weights[name] * means[name] for name in NAMES).backward()
    return {n: float(m) for n, m in means.items()}, {n: p.grad for n, p in stage.named_parameters()}


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_losses_and_gradients_do_not_know_the_micro_batches(world, micro_batch):
    """Captions have different lengths: a mean of the micro-batches' means would be another number."""
    expected, gradients = plain_gradients(world)
    stage, model, config = build(micro_batch)
    batches, totals = micro_batches(0, stage.plan, config, world)
    assert len(batches) == 8 // micro_batch
    model.zero_grad_buffer()
    sums = reduce_losses(run_batch([model], batches, totals, backward=True), NAMES, world)
    for name in NAMES:
        assert sums[name].dtype == torch.float64
        assert float(sums[f"{name}_count"]) == totals[name]
        assert float(sums[name] / sums[f"{name}_count"]) == pytest.approx(expected[name], rel=1e-6)
    for name, parameter in stage.named_parameters():
        torch.testing.assert_close(parameter.main_grad, gradients[name], rtol=1e-4, atol=1e-7, msg=name)


def test_forward_alone_leaves_no_gradient(world):
    stage, model, config = build(2)
    batches, totals = micro_batches(0, stage.plan, config, world)
    model.zero_grad_buffer()
    with torch.no_grad():
        sums = run_batch([model], batches, totals, backward=False)
    assert len(sums["image"]) == 4
    assert all(not parameter.main_grad.any() for parameter in stage.parameters())


@pytest.mark.parametrize("valid", [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4], [0, 1, 2, 3]], ids=len)
def test_padding_rows_take_no_part(world, valid):
    """Rows that do not count, even whole micro-batches of them, leave the loss and the gradients as without them."""
    stage, model, config = build(2)
    batches, _ = micro_batches(0, stage.plan, config, world)
    fields = ("images", "visible_ids", "masked_ids", "tokens")
    whole = dataclasses.replace(batches[0], **{f: torch.cat([getattr(b, f) for b in batches]) for f in fields})
    only = dataclasses.replace(whole, **{f: getattr(whole, f)[valid] for f in fields})
    _, losses = stage(only)
    totals = {name: float(losses[name][1]) for name in NAMES}
    expected = {name: float(losses[name][0]) for name in NAMES}
    sum(stage.plan.loss_weights[n] * losses[n][0] / totals[n] for n in NAMES).backward()
    model.collect()
    gradients = {n: p.main_grad.clone() for n, p in stage.named_parameters()}
    assert all(gradient.any() for name, gradient in gradients.items() if not name.endswith("linear_fc1.bias"))
    model.zero_grad_buffer()

    for i, batch in enumerate(batches):
        rows = [row for row in range(2) if 2 * i + row in valid]
        if len(rows) < 2:
            batch.rows = torch.tensor(rows, dtype=torch.int64)
            batch.tokens = torch.stack([batch.tokens[r] if r in rows else batch.tokens[r] * 0 for r in range(2)])
    sums = reduce_losses(run_batch([model], batches, totals, backward=True), NAMES, world)
    for name in NAMES:
        assert float(sums[f"{name}_count"]) == totals[name]
        assert float(sums[name]) == pytest.approx(expected[name], rel=1e-6)
    for name, parameter in stage.named_parameters():
        torch.testing.assert_close(parameter.main_grad, gradients[name], rtol=1e-4, atol=1e-7, msg=name)

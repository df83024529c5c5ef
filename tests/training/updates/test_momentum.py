"""LARS and SGD against plain float64 loops over the same gradients, by all of Megatron's optimizers that take them."""

from __future__ import annotations

import pytest
import torch

from megamug.checkpoint.optimizer_state import BUFFER
from megamug.training.optim import learning_rate
from tests.training.test_optim import backward, named_parameters, trainer_of

OPTIONS = {"momentum": 0.8, "weight_decay": 0.2, "learning_rate": 0.5, "warmup_steps": 2, "clip_grad": 0.0}
TRUST = 0.02


def reference_step(name: str, w, gradient, v, rate: float, matrix: bool):
    """One step on float64 arrays -> (weight, buffer)."""
    u = gradient + (OPTIONS["weight_decay"] if matrix else 0.0) * w
    if name == "lars" and matrix:
        norms = w.norm(), u.norm()
        u = u * (TRUST * norms[0] / norms[1] if min(norms) > 0 else 1.0)
    v = OPTIONS["momentum"] * v + u
    return w - rate * v, v


def started(name: str, dtype: str = "fp32", **more):
    trust = {"trust_coefficient": TRUST} if name == "lars" else {}
    stage, models, optimizer, config = trainer_of(dtype, name=name, **(OPTIONS | trust | more))
    with torch.no_grad():
        zero = next(p for n, p in named_parameters(stage) if n.endswith("linear_fc2.weight"))
        zero.zero_()  # a norm of 0: no factor
        for state in optimizer.main_states():
            state.main.copy_(state.parameter)
    return stage, models, optimizer, config


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_four_steps_equal_a_float64_loop(world, name, dtype):
    stage, models, optimizer, config = started(name, dtype)
    mine = dict(named_parameters(stage))
    weights = {state.name: state.main.detach().double() for state in optimizer.main_states()}
    buffers = {key: torch.zeros_like(w) for key, w in weights.items()}
    for step in range(1, 5):
        backward(stage, models, config, world, step)
        gradients = {key: p.main_grad.detach().double() for key, p in mine.items()}
        norm, rate = optimizer.prepare(step)
        assert rate == learning_rate(step, config.optimizer, config.train)
        optimizer.apply(norm)
        optimizer.zero_grad()
        assert optimizer.updates_done() == step
        for key, w in weights.items():
            weights[key], buffers[key] = reference_step(
                name, w, gradients[key], buffers[key], rate, not mine[key].no_weight_decay
            )
        for state in optimizer.main_states():
            torch.testing.assert_close(state.main.double(), weights[state.name], rtol=1e-5, atol=1e-6, msg=state.name)
            buffer = buffers[state.name]
            torch.testing.assert_close(state.moment(BUFFER[0]).double(), buffer, rtol=1e-5,
                                       atol=1e-6 * float(buffer.abs().max()), msg=state.name)  # fmt: skip


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_clips_skips_and_goes_on_to_the_bit(world, name):
    runs = [started(name, clip_grad=0.1), started(name, clip_grad=0.1)]
    stage, models, optimizer, config = runs[0]
    for step in (1, 2):
        backward(stage, models, config, world, step)
        optimizer.apply(optimizer.prepare(step)[0])
        optimizer.zero_grad()
    source, target = runs[0][2], runs[1][2]
    with torch.no_grad():
        for old, new in zip(source.main_states(), target.main_states(), strict=True):
            new.main.copy_(old.main)
            new.moment(BUFFER[0]).copy_(old.moment(BUFFER[0]))
    target.restore_step(source.updates_done())
    assert target.updates_done() == 2 and target.moments == BUFFER
    before = [p.detach().clone() for p in stage.parameters()]
    backward(stage, models, config, world, 3)
    assert not optimizer.apply(optimizer.prepare(3)[0] * torch.inf)
    assert all(torch.equal(p, q) for p, q in zip(stage.parameters(), before, strict=True))
    assert optimizer.updates_done() == 2
    optimizer.zero_grad()
    for one, models, optimizer, config in runs:
        backward(one, models, config, world, 3)
        norm, _ = optimizer.prepare(3)
        assert norm > 0.1
        optimizer.apply(norm)
    for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert not all(torch.equal(p, q) for p, q in zip(stage.parameters(), before, strict=True))
    clipped = torch.cat([p.grad.flatten() for p in optimizer.megatron.get_parameters()]).norm()
    assert float(clipped) == pytest.approx(0.1, rel=1e-4)

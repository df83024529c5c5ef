"""The schedule, what decays, and the update itself against torch's AdamW."""

from __future__ import annotations

import math

import pytest
import torch

from megamug.checkpoint.optimizer_state import MOMENTS
from megamug.configuration.sections import OptimizerConfig, TrainConfig
from megamug.training.optim import Optimizer, learning_rate, wrap_chunks
from tests.distributed.cases.layout_worker import micro_batches, tiny

# ---------------------------------------------------------------------------------------------- schedule


def rates(steps: int, **options) -> list[float]:
    optimizer = OptimizerConfig(learning_rate=1.0, **options)
    return [learning_rate(step, optimizer, TrainConfig(steps=steps)) for step in range(1, steps + 1)]


def test_schedule_warms_up_linearly_and_ends_at_the_minimum():
    found = rates(30, warmup_steps=10, min_learning_rate=0.1)
    assert found[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert found[9] == max(found) == 1.0
    assert found[-1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 20 / 21)) / 2)
    assert all(a > b for a, b in zip(found[9:], found[10:], strict=False))
    assert found[14] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 5 / 21)) / 2)


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (5, 5), (3, 10), (10, 0)])
def test_schedule_has_no_bad_corner(steps, warmup):
    found = rates(steps, warmup_steps=warmup)
    assert all(0.0 <= rate <= 1.0 for rate in found)
    if steps >= warmup:
        assert all(rate > 0 for rate in found)  # the last update counts: a run of one step trained nothing
    assert learning_rate(steps + 1, OptimizerConfig(warmup_steps=min(warmup, steps)), TrainConfig(steps=steps)) < 1e-12


def test_schedule_does_not_rise_again_after_the_last_step():
    optimizer, train = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.2), TrainConfig(steps=10)
    assert learning_rate(25, optimizer, train) == pytest.approx(0.2)


# ---------------------------------------------------------------------------------------------- update


def trainer_of(dtype: str = "fp32", distributed: bool = False, **options):
    from megamug.models.init import initialise
    from megamug.models.mug.model import Mug
    from megamug.models.mug.plan import MugPlan

    config = tiny({"optimizer": options, "precision": {"dtype": dtype}, "data": {"global_batch_size": 2}})
    config.parallel.distributed_optimizer = distributed
    stage = Mug(MugPlan(config, vocabulary=70))
    initialise(stage.sharded_state_dict(), seed=0)
    models = wrap_chunks([stage], config)
    return stage, models, Optimizer(config, models), config


def named_parameters(stage):
    """Under the optimizer's names: chunk 0 of one."""
    return torch.nn.ModuleList([stage]).named_parameters()


def backward(stage, models, config, world, step: int) -> None:
    from megamug.training.pipeline import run_batch

    batches, totals = micro_batches(step, stage.plan, config, world)
    for model in models:
        model.zero_grad_buffer()
    run_batch(models, batches, totals, backward=True)


@pytest.mark.parametrize("distributed", [False, True])
def test_decay_groups(world, distributed):
    stage, _, optimizer, config = trainer_of(distributed=distributed)
    optimizer.prepare(1)
    decay = {}
    for part in optimizer.parts:
        for group in part.optimizer.param_groups:
            decay.update({id(main): group["weight_decay"] for main in group["params"]})
    free = {state.name for state in optimizer.main_states() if decay[id(state.main)] == 0.0}
    tokens = {
        "0.encoder.cls_token", "0.encoder.register_tokens", "0.image_decoder.mask_token",
        "0.image_decoder.register_tokens", "0.text_decoder.text_positions",
    }  # fmt: skip
    assert free == tokens | {name for name, p in named_parameters(stage) if p.dim() == 1}
    decays = {state.name for state in optimizer.main_states()} - free
    assert "0.text_decoder.word_embeddings.weight" in decays and "0.encoder.patch_embedding.weight" in decays
    assert all(decay[id(s.main)] == config.optimizer.weight_decay for s in optimizer.main_states() if s.name in decays)
    assert {state.name for state in optimizer.main_states()} == {name for name, _ in named_parameters(stage)}


@pytest.mark.parametrize("distributed", [False, True])
def test_torchs_adamw_runs_fused(world, distributed):
    _, _, optimizer, _ = trainer_of(distributed=distributed)
    groups = [group for part in optimizer.parts for group in part.optimizer.param_groups]
    assert groups and all(group["fused"] is True and group["foreach"] is False for group in groups)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.3, 100.0])
def test_three_steps_equal_torchs_adamw(world, clip, distributed):
    options = dict(clip_grad=clip, weight_decay=0.1, learning_rate=1e-2, warmup_steps=2)
    stage, models, optimizer, config = trainer_of(distributed=distributed, **options)
    mine = dict(named_parameters(stage))
    reference = {name: p.detach().clone().requires_grad_() for name, p in mine.items()}
    plain = {name: p for name, p in reference.items() if mine[name].no_weight_decay}
    decayed = {name: p for name, p in reference.items() if name not in plain}
    adamw = torch.optim.AdamW(
        [dict(params=list(decayed.values()), weight_decay=0.1), dict(params=list(plain.values()), weight_decay=0.0)],
        betas=(config.optimizer.beta1, config.optimizer.beta2), eps=config.optimizer.eps, fused=False, foreach=False,
    )
    for step in range(1, 4):
        backward(stage, models, config, world, step)
        for name, parameter in reference.items():
            parameter.grad = mine[name].main_grad.detach().clone()
        optimizer_norm, rate = optimizer.prepare(step)
        norm = torch.nn.utils.get_total_norm([p.grad for p in reference.values()])
        assert optimizer_norm == pytest.approx(float(norm), rel=1e-5)
        assert rate == learning_rate(step, config.optimizer, config.train)
        if clip > 0:
            torch.nn.utils.clip_grads_with_norm_(list(reference.values()), clip, norm)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        optimizer.apply(optimizer_norm)
        optimizer.zero_grad()
        assert optimizer.updates_done() == step
        for name, parameter in reference.items():
            torch.testing.assert_close(mine[name].detach(), parameter.detach(), rtol=1e-5, atol=1e-6, msg=name)
    for state in optimizer.main_states():
        for which in MOMENTS:
            expected = adamw.state[reference[state.name]][which].view(-1)
            expected = expected if state.span is None else expected[slice(*state.span)]
            torch.testing.assert_close(state.moment(which).view(-1), expected, rtol=1e-5, atol=1e-9, msg=state.name)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_prepare_changes_no_parameter(world, dtype, distributed):
    """A step that is skipped after `prepare` leaves parameters, moments and the count of updates as they were."""
    stage, models, optimizer, config = trainer_of(dtype, distributed)
    backward(stage, models, config, world, 1)
    optimizer.apply(optimizer.prepare(1)[0])

    def tensors(state) -> list[torch.Tensor]:
        return [state.main, state.parameter, *map(state.moment, MOMENTS)]

    before = {s.name: [tensor.clone() for tensor in tensors(s)] for s in optimizer.main_states()}
    optimizer.zero_grad()
    backward(stage, models, config, world, 2)
    optimizer.prepare(2)
    for s in optimizer.main_states():
        for tensor, old in zip(tensors(s), before[s.name], strict=True):
            assert torch.equal(tensor, old), s.name
    assert optimizer.updates_done() == 1


@pytest.mark.parametrize("distributed", [False, True])
def test_bf16_keeps_fp32_main_parameters(world, distributed):
    """Updates far below bf16's resolution add up in the main parameters, and the model's are those, rounded."""
    stage, models, optimizer, config = trainer_of("bf16", distributed, learning_rate=1e-5, warmup_steps=1)
    start = {s.name: s.main.clone() for s in optimizer.main_states()}
    for step in range(1, 4):
        backward(stage, models, config, world, step)
        optimizer.apply(optimizer.prepare(step)[0])
        optimizer.zero_grad()
    moved = 0
    for s in optimizer.main_states():
        assert s.main.dtype == torch.float32 and s.parameter.dtype == torch.bfloat16, s.name
        assert s.parameter.main_grad.dtype == torch.float32
        whole = s.parameter.view(-1) if s.span is None else s.parameter.view(-1)[slice(*s.span)]
        assert torch.equal(s.main.view(-1).bfloat16(), whole), s.name
        moved += int((s.main != start[s.name]).any())
    assert moved == len(start)


def test_restored_step_goes_on_with_adams_correction(world):
    """Moments and count moved by name into a new optimizer: the next update is the same to the bit."""
    runs = [trainer_of(), trainer_of()]
    for step in (1, 2):
        stage, models, optimizer, config = runs[0]
        backward(stage, models, config, world, step)
        optimizer.apply(optimizer.prepare(step)[0])
        optimizer.zero_grad()
    source, target = runs[0][2], runs[1][2]
    with torch.no_grad():
        for old, new in zip(source.main_states(), target.main_states(), strict=True):
            new.main.copy_(old.main)
            for which in MOMENTS:
                new.moment(which).copy_(old.moment(which))
    target.restore_step(source.updates_done())
    assert target.updates_done() == 2
    for stage, models, optimizer, config in runs:
        backward(stage, models, config, world, 3)
        optimizer.apply(optimizer.prepare(3)[0])
    for (name, p), q in zip(runs[0][0].named_parameters(), runs[1][0].parameters(), strict=True):
        assert torch.equal(p, q), name

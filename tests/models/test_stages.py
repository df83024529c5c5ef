"""Cutting a model into stages: the cut is optimal, nothing is lost or doubled, and the numbers do not know of it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from megamug.models.mug.plan import MugPlan
from megamug.models.partition import cut
from megamug.models.stages import Boundary, attach_loss
from tests.distributed.cases.layout_worker import micro_batches, tiny

LOSSES = {
    "both": {},
    "no_captions": {"caption_loss_weight": 0.0},
    "no_pixels": {"image_loss_weight": 0.0},
    "untied": {"tie_vocabulary": False},
}


def heaviest(flops: list[float], bounds: list[int]) -> float:
    return max(sum(flops[a:b]) for a, b in itertools.pairwise(bounds))


def test_cut_is_optimal_against_every_cut():
    random.seed(1)
    for _ in range(200):
        count = random.randint(1, 9)
        flops = [float(random.choice([0, 1, 1, 2, 5, random.randint(1, 50)])) for _ in range(count)]
        stages = random.randint(1, count)
        ranges = cut(flops, stages)
        assert [i for run in ranges for i in run] == list(range(count))
        assert len(ranges) == stages and all(len(run) > 0 for run in ranges)
        best = min(
            heaviest(flops, [0, *inner, count]) for inner in itertools.combinations(range(1, count), stages - 1)
        )
        assert heaviest(flops, [0, *(run.stop for run in ranges)]) == best


def test_cut_is_the_same_every_time():
    flops = [1.0] * 12
    assert cut(flops, 5) == cut(flops, 5)


def test_more_stages_than_blocks_is_refused():
    with pytest.raises(ValueError, match="2 blocks cannot fill 3"):
        cut([1.0, 1.0], 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_boundary_round_trip(dtype):
    boundary = Boundary({"latent": (5, 2, 8), "image": (3, 2, 4), "text": (7, 2, 6)})
    carry = {name: torch.randn(shape).to(dtype) for name, shape in boundary.shapes.items()}
    packed = boundary.pack(carry)
    assert packed.shape == boundary.packed_shape == (1, 1, 5 * 2 * 8 + 3 * 2 * 4 + 7 * 2 * 6)
    unpacked = boundary.unpack(packed)
    assert list(unpacked) == list(carry)
    assert all(torch.equal(unpacked[name], carry[name]) for name in carry)


def test_a_single_tensor_is_packed_into_memory_of_its_own():
    boundary = Boundary({"latent": (5, 2, 8)})
    carry = {"latent": torch.randn(5, 2, 8)}
    packed = boundary.pack(carry)
    assert packed.untyped_storage().data_ptr() != carry["latent"].untyped_storage().data_ptr()


def test_attached_loss_gets_gradient_one_and_changes_nothing_else():
    x, y = (torch.randn(4, requires_grad=True) for _ in range(2))
    output = attach_loss(x * 2, (x * y).sum())
    assert torch.equal(output, x * 2)
    upstream = torch.randn(4)
    output.backward(upstream)
    torch.testing.assert_close(x.grad, 2 * upstream + y)
    torch.testing.assert_close(y.grad, x.detach())


def plan_of(pipeline: int, losses: str) -> MugPlan:
    return MugPlan(tiny({"model": LOSSES[losses], "parallel": {"pipeline": pipeline}}), vocabulary=70)


@pytest.mark.parametrize("losses", LOSSES)
def test_every_block_is_in_exactly_one_stage(losses):
    count = len(plan_of(1, losses).blocks)
    for pipeline in range(1, count + 1):
        plan = plan_of(pipeline, losses)
        held = []
        for stage in range(pipeline):
            for name, part in plan.parts(stage).items():
                held += [(name, "embedding", 0)] * part.embedding
                held += [(name, "layer", i) for i in range(part.first, part.last)]
                held += [(name, "head", 0)] * part.head
        assert held == [(block.part, block.name, block.index) for block in plan.blocks]


@pytest.mark.parametrize("losses", LOSSES)
def test_loss_and_gradients_do_not_know_the_stages(world, losses):
    """All stages in one process, one after another, against the uncut model; up to a stage for every block."""
    from megamug.models.init import initialise
    from megamug.models.mug.model import Mug

    weights = {"image": 0.7, "caption": 0.3}

    def run(pipeline: int):
        plan = plan_of(pipeline, losses)
        config = tiny({"data": {"global_batch_size": 2}})
        (batch,), _ = micro_batches(0, plan, config, world)
        packed, found, gradients = None, {}, {}
        stages = [Mug(plan, stage) for stage in range(pipeline)]
        for stage in stages:
            initialise(stage.sharded_state_dict(), seed=3)
            stage.set_input_tensor([packed])
            packed, terms = stage(batch)
            means = {name: weights[name] * total / count for name, (total, count) in terms.items()}
            assert not found.keys() & means.keys(), "a loss is computed twice"
            found.update(means)
            if packed is not None and means:
                packed = attach_loss(packed, sum(means.values()))
        assert packed is None and means, "the last stage ends in a loss"
        sum(means.values()).backward()
        for stage in stages:
            keys = {entry.data.data_ptr(): entry.key for entry in stage.sharded_state_dict().values()}
            for name, parameter in stage.named_parameters():
                assert parameter.grad is not None, f"{name} of {pipeline} stages got no gradient"
                key = keys[parameter.data_ptr()]
                gradients[key] = parameter.grad + gradients.get(key, 0)  # a tied weight may be there twice
        return plan, {name: value.detach() for name, value in found.items()}, gradients

    plan, expected, gradients = run(1)
    for pipeline in (2, 3, 5, len(plan.blocks)):
        _, found, others = run(pipeline)
        assert found.keys() == expected.keys() and gradients.keys() == others.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6, msg=f"{name}, {pipeline} stages")


def test_vocabulary_stages_are_those_that_hold_its_weight(world):
    from megamug.models.mug.model import Mug

    for losses in LOSSES:
        for pipeline in (1, 2, 3, 5, len(plan_of(1, losses).blocks)):
            plan = plan_of(pipeline, losses)
            holders = []
            for stage in range(pipeline):
                keys = {entry.key for entry in Mug(plan, stage).sharded_state_dict().values()}
                holders += [stage] if "text_decoder.word_embeddings.weight" in keys else []
            assert plan.vocabulary_stages == (holders if losses in ("both", "no_pixels") else [0])

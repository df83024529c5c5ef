"""Initialisation: by name and global shape alone, with the distributions that MAE and GPT-2 use."""

from __future__ import annotations

import math
import re

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megamug.configuration.presets import PRESETS
from megamug.configuration.sections import Config
from megamug.models.init import RULES, draw, initialise
from megamug.models.mug.plan import MugPlan
from tests.distributed.cases.layout_worker import tiny

NAME = "encoder.stack.layers.0.mlp.linear_fc1.weight"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [2, 4])
def test_slices_of_a_layout_are_slices_of_the_whole(axis, size):
    whole = draw(NAME, (16, 8), seed=5)
    shape = [16, 8]
    shape[axis] //= size
    parts = [torch.full(shape, torch.nan) for _ in range(size)]
    for rank, part in enumerate(parts):
        entry = ShardedTensor.from_rank_offsets(NAME, part, (axis, rank, size))
        initialise({"any.local.name": entry}, seed=5)
    assert torch.equal(torch.cat(parts, dim=axis), whole)


def test_a_rank_draws_its_slice_alone():
    """In place, of a parameter whose whole, 2^42 numbers, no machine could hold."""
    part = torch.full((4, 8), torch.nan)
    entry = ShardedTensor.from_rank_offsets(NAME, part, (0, 2**19 - 1, 2**19), (1, 5, 2**18))
    initialise({"any.local.name": entry}, seed=5, std_of=lambda name: 0.02)
    row = draw(NAME, (1, 2**21), seed=5, std=0.02)
    assert part.isfinite().all() and part.unique().numel() == 32 and part.abs().max() <= 0.06
    assert not torch.equal(part[0], row[0, 40:48])
    initialise({"any.local.name": ShardedTensor.from_rank_offsets(NAME, part, (1, 5, 2**18))}, seed=5,
               std_of=lambda name: 0.02)  # fmt: skip
    assert torch.equal(part[0], row[0, 40:48])


def test_a_parameter_is_a_function_of_seed_and_name():
    whole = draw(NAME, (64, 32), seed=5)
    assert torch.equal(whole, draw(NAME, (64, 32), seed=5))
    assert not torch.equal(whole, draw(NAME, (64, 32), seed=6))
    assert not torch.equal(whole, draw(NAME.replace("0", "1"), (64, 32), seed=5))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(NAME, (64, 32), seed=5)
    assert torch.equal(before, torch.get_rng_state()), "the global generator decides nothing"


def test_distributions():
    linear = draw(NAME, (600, 400), seed=1)
    bound = math.sqrt(6 / 1000)
    assert linear.abs().max() <= bound and linear.abs().max() > 0.999 * bound
    assert abs(float(linear.mean())) < 0.01 * bound
    assert float(linear.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)  # of a uniform distribution
    for name in ("encoder.cls_token", "text_decoder.text_positions", "text_decoder.word_embeddings.weight",
                 "text_decoder.output_layer.weight", "encoder.register_tokens", "image_decoder.mask_token"):
        normal = draw(name, (500, 400), seed=1)
        assert abs(float(normal.mean())) < 2e-4
        assert float(normal.std()) == pytest.approx(0.02, rel=0.01)
        assert 0.07 < normal.abs().max() < 0.12  # of 200,000 normal numbers, in units of 0.02: 3.5 to 6
    for name in ("encoder.patch_embedding.bias", "a.self_attention.linear_qkv.layer_norm_bias", "final_layernorm.bias"):
        assert torch.equal(draw(name, (8,), seed=1), torch.zeros(8))
    for name in ("a.mlp.linear_fc1.layer_norm_weight", "final_layernorm.weight", "a.pre_cross_attn_layernorm.weight"):
        assert torch.equal(draw(name, (8,), seed=1), torch.ones(8))


def test_a_name_without_a_rule_is_an_error():
    with pytest.raises(AssertionError, match="no initialisation rule.*strange_thing"):
        draw("encoder.strange_thing", (2, 2), seed=0)


def first_rule(name: str) -> str | None:
    return next((rule for pattern, rule in RULES if re.search(pattern, name)), None)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_of_every_preset_has_the_right_rule(world, preset):
    """Matrices are drawn, norms are one, other vectors zero; a token or a table is never taken for a matrix."""
    from megamug.models.mug.model import Mug

    config = Config()
    config.model.__dict__.update(PRESETS[preset], register_tokens=2, decoder_register_tokens=1)
    config.model.tie_vocabulary = preset == "demo"
    model = Mug(MugPlan(config, vocabulary=100))  # memory is reserved, not touched
    state = model.sharded_state_dict()
    assert len(state) == len(list(model.parameters()))
    for entry in state.values():
        rule = first_rule(entry.key)
        if len(entry.global_shape) == 1:
            assert rule == ("zero" if entry.key.endswith("bias") else "one"), entry.key
            assert ("norm" in entry.key) or rule == "zero", entry.key
        else:
            table = re.search(r"token|positions|word_embeddings|output_layer", entry.key)
            assert rule == ("normal" if table else "xavier"), entry.key
            assert len(entry.global_shape) == 2, entry.key


def test_initialise_fills_every_parameter(world):
    from megamug.models.mug.model import Mug

    model = Mug(MugPlan(tiny({}), vocabulary=70))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    initialise(model.sharded_state_dict(), seed=0)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name

"""Presets against published figures: parameters of MAE's models, FLOPs of a training image."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megamug.configuration import validate
from megamug.configuration.presets import PRESETS, VOCABULARY
from megamug.configuration.reading import resolve
from megamug.configuration.sections import Config
from megamug.models.mug.plan import MugPlan
from megamug.telemetry.flops import TRAINING, linear_flops
from tests.distributed.cases.layout_worker import micro_batches, tiny

# He et al. 2022: (encoder with class token and position table, decoder with mask token, position table and prediction).
VIT_B16_PARAMETERS = (85_798_656, 26_109_184)
MAE_GFLOPS = {"vit_b16": 59, "vit_l16": 125, "vit_h14": 291}  # one training image, three quarters masked


def plan_of(preset: str) -> MugPlan:
    config = Config()
    config.model.preset = preset
    config.model.caption_loss_weight = 0.0
    return MugPlan(resolve(config), vocabulary=0)


def parameter_counts(plan: MugPlan) -> tuple[int, int]:
    """Of encoder and image decoder, as MAE counts. Ours computes its positions; MAE stores a row for each patch and one
    for the class token."""
    from megamug.models.mug.model import Mug

    model = Mug(plan)  # memory is reserved, not touched
    counts = []
    for part, width in ((model.encoder, plan.model.width), (model.image_decoder, plan.model.decoder_width)):
        assert part.positions.shape == (plan.patches, width)
        assert not any(part.positions is parameter for parameter in part.parameters())
        counts.append(sum(p.numel() for p in part.parameters()) + (1 + plan.patches) * width)
    return tuple(counts)


def test_parameters_equal_published_mae(world):
    assert parameter_counts(plan_of("vit_b16")) == VIT_B16_PARAMETERS


@pytest.mark.parametrize("preset", ["vit_ti16", "vit_s16", "vit_l16", "vit_h14"])
def test_parameters_equal_vitmae(world, preset):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `dev`)")
    plan = plan_of(preset)
    m = plan.model
    with torch.device("meta"):
        model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
            hidden_size=m.width, num_hidden_layers=m.layers, num_attention_heads=m.heads, intermediate_size=m.ffn_width,
            image_size=224, patch_size=m.patch_size,
        ))  # fmt: skip
    theirs = tuple(sum(p.numel() for p in part.parameters()) for part in (model.vit, model.decoder))
    assert parameter_counts(plan) == theirs


@pytest.mark.parametrize("preset", MAE_GFLOPS)
def test_flops_equal_published_mae(preset):
    """MAE embeds all patches before it drops three quarters, and predicts the visible ones, too: we do neither."""
    plan = plan_of(preset)
    m, values = plan.model, 3 * plan.patch_size**2
    saved = linear_flops(plan.masked, values, m.width) + linear_flops(1 + plan.visible, m.decoder_width, values)
    assert round(TRAINING * (plan.forward_flops + saved) / 1e9) == MAE_GFLOPS[preset]


@pytest.mark.parametrize("weights", [{}, {"caption_loss_weight": 0.0}, {"image_loss_weight": 0.0}], ids=str)
def test_flops_equal_torchs_count(world, weights):
    from megamug.models.mug.model import Mug

    config = tiny({"model": weights, "data": {"global_batch_size": 2}})
    plan = MugPlan(config, vocabulary=70)
    model = Mug(plan)
    (batch,), _ = micro_batches(0, plan, config, world)
    # torch counts the fused attention of the CPU nowhere; its mathematical form is counted product by product.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(batch)
    assert counter.get_total_flops() == len(batch.images) * plan.forward_flops


def test_the_demo_is_small():
    config = Config()
    config.model.preset = "demo"
    config.data.image_size = 64
    plan = MugPlan(resolve(config), vocabulary=200)
    assert 3 * plan.forward_flops < 1.5e9  # a training pair in a fraction of a second on two cores


def test_every_preset_sets_every_size():
    assert {frozenset(sizes) for sizes in PRESETS.values()} == {frozenset(PRESETS["vit_b16"])}
    for preset in PRESETS:
        config = Config()
        config.model.preset = preset
        unset = [name for name, value in vars(resolve(config).model).items() if value is None]
        assert unset == ["initial", "initial_parts"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_one_that_trains(preset):
    config = Config()
    config.model.preset = preset
    config.data.image_size = 16 * PRESETS[preset]["patch_size"]
    validate.model(resolve(config))


def test_vocabularies_are_the_published_ones():
    """LLaMA's (arXiv 2302.13971) and CM3leon's (arXiv 2309.02591); classifiers and segmenters read no text."""
    assert VOCABULARY == {"mug": 32_000, "decoder_lm": 56_320, "jam_cross": 56_320, "classifier": 0, "segmenter": 0}


def test_whoever_has_a_table_of_kinds_knows_all_of_them():
    """A kind of model that one of them forgot would end there in a traceback, or be taken for another."""
    from megamug.configuration.presets import BY_KIND, DEFAULT
    from megamug.configuration.ranges import CHOICES
    from megamug.configuration.reading import towers
    from megamug.models.tasks import task_type
    from megamug.planner.model import model_of

    assert set(BY_KIND) == set(DEFAULT) == set(VOCABULARY) == set(CHOICES["model.kind"])
    for kind in BY_KIND:
        config = Config()
        config.model.kind = kind
        config = resolve(config)
        assert issubclass(task_type(kind).model, torch.nn.Module)
        assert model_of(config, 128).forward_flops > 0
        assert (kind in ("mug", "classifier", "segmenter")) == (towers(config) == {})

"""A segmenter against transformers' UperNet on the features of `VisionEncoder`: logits of both heads, losses,
gradients; what is counted against what was built."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megamug.errors import UserError
from megamug.evaluate.segmentation import window_logits
from megamug.models.init import initialise
from megamug.models.segmenter.model import IGNORED, SegmentBatch, Segmenter
from megamug.models.segmenter.plan import SegmenterPlan
from megamug.planner import parameters
from megamug.transfer.encoder import VisionEncoder, global_names
from tests.distributed.cases.segmenter_case import CLASSES, sample, tiny

# Names of transformers' modules by ours, of convolutions with a norm and of those without.
NORMED = {
    **{f"decode.pooling.{i}": f"decode_head.psp_modules.{i}.1" for i in range(4)},
    "decode.bottleneck": "decode_head.bottleneck", "decode.fusion": "decode_head.fpn_bottleneck",
    **{f"decode.laterals.{i}": f"decode_head.lateral_convs.{i}" for i in range(3)},
    **{f"decode.outputs.{i}": f"decode_head.fpn_convs.{i}" for i in range(3)},
    "auxiliary.convolution": "auxiliary_head.convs.0",
}  # fmt: skip
PLAIN = {"decode.classifier": "decode_head.classifier", "auxiliary.classifier": "auxiliary_head.classifier",
         "pyramid.doubled": "fpn.fpn2"}  # fmt: skip


class Reference(nn.Module):
    """transformers' neck and heads behind the blocks of a `VisionEncoder` whose positions are resampled."""

    def __init__(self, config):
        super().__init__()
        from transformers import BeitConfig, UperNetConfig
        from transformers.models.beit.modeling_beit import BeitFPNNeck
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

        own, width = config.segmenter, config.model.width
        upernet = UperNetConfig(hidden_size=own.channels, pool_scales=list(own.pool_scales), num_labels=own.classes,
                                auxiliary_channels=own.auxiliary_channels, auxiliary_in_channels=width)  # fmt: skip
        size = config.data.image_size
        config.data.image_size = own.position_image_size  # what it learned with
        self.encoder = VisionEncoder(config, size)
        config.data.image_size = size
        self.fpn = BeitFPNNeck(BeitConfig(hidden_size=width))
        self.decode_head = UperNetHead(upernet, [width] * 4)
        self.auxiliary_head = UperNetFCNHead(upernet, [width] * 4)

    def forward(self, images, blocks):
        features = self.encoder(images, layers=blocks).layers
        levels = self.fpn([x.permute(0, 3, 1, 2) for x in features])
        return self.decode_head(levels), self.auxiliary_head(levels)


def both(**segmenter):
    config = tiny({"segmenter": segmenter})
    plan = SegmenterPlan(config, 0)
    model, reference = Segmenter(plan), Reference(config)
    initialise(model.sharded_state_dict(), 3, plan.init_std)
    own = {entry.key: entry.data for entry in model.sharded_state_dict().values() if ".running_" not in entry.key}
    names = {f"encoder.{mine}": theirs for mine, theirs in global_names(config.model).items()
             if "final_layernorm" not in theirs}  # fmt: skip
    for ours, theirs in NORMED.items():
        names[f"{theirs}.conv.weight"] = f"head.{ours}.conv.weight"
        names |= {f"{theirs}.batch_norm.{kind}": f"head.{ours}.norm.{kind}" for kind in ("weight", "bias")}
    up = reference.fpn.fpn1.named_modules()
    first, norm, second = (name for name, module in up if list(module.parameters(False)))
    plain = {f"fpn.fpn1.{first}": "pyramid.first", f"fpn.fpn1.{norm}": "pyramid.norm", f"fpn.fpn1.{second}":
             "pyramid.second", **{theirs: ours for ours, theirs in PLAIN.items()}}  # fmt: skip
    for theirs, ours in plain.items():
        names |= {f"{theirs}.{kind}": f"head.{ours}.{kind}" for kind in ("weight", "bias")}
    assert set(names.values()) == set(own)
    pairs = {theirs: own[ours] for theirs, ours in names.items()}
    with torch.no_grad():
        for theirs, tensor in pairs.items():
            drawn = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(len(theirs)))
            tensor += 0.2 * (drawn - 0.5)  # biases, too
            reference.get_parameter(theirs).copy_(tensor)
    return plan, model, reference, pairs


def batch_of(plan, count: int = 4, start: int = 0):
    return SegmentBatch(*(torch.stack(x) for x in zip(*(sample(start + i, plan) for i in range(count)), strict=True)))


def test_logits_losses_and_gradients_are_those_of_transformers(world):
    plan, model, reference, pairs = both()
    assert plan.features == (0, 1, 1, 2) and plan.trained_grid == 3
    batch = batch_of(plan)
    logits = model.head(model.features(batch), None, both=True)
    wanted = reference(batch.images, plan.features)
    for found, expected in zip(logits, wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [x.shape for x in logits] == [(4, CLASSES, 16, 16), (4, CLASSES, 4, 4)]
    output, losses = model(batch)
    assert output is None and list(losses) == ["segmentation", "auxiliary"]
    maps = batch.maps.long()
    counted = (maps != IGNORED).sum()
    assert 0 < counted < maps.numel()
    total, expected_total = 0, 0
    for (name, (loss, count)), each in zip(losses.items(), wanted, strict=True):
        each = F.interpolate(each, maps.shape[1:], mode="bilinear", align_corners=False)
        expected = F.cross_entropy(each, maps, ignore_index=255)
        assert count == counted
        torch.testing.assert_close(loss / count, expected, rtol=1e-5, atol=0)
        total, expected_total = total + plan.loss_weights[name] * loss / count, expected_total + {
            "segmentation": 1, "auxiliary": 0.4}[name] * expected  # fmt: skip
    total.backward(), expected_total.backward()
    own = {p.data_ptr(): p.grad for p in model.parameters()}
    still = {f"fpn.{name}.bias" for name, module in reference.fpn.named_modules()
             if isinstance(module, nn.ConvTranspose2d)}  # fmt: skip
    assert len(still) == 3
    for theirs, tensor in pairs.items():
        found, expected = own[tensor.data_ptr()], reference.get_parameter(theirs).grad
        if theirs in still:  # a BatchNorm comes before anything that bends: what a bias adds, its mean takes off
            assert expected.abs().max() < 1e-6 and found.abs().max() < 1e-6, theirs
            continue
        assert expected.abs().max() > 1e-6, theirs
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4, theirs


def test_in_evaluation_they_are_those_of_running_statistics(world):
    plan, model, reference, _ = both()
    for start in (0, 4):
        model(batch_of(plan, start=start)), reference(batch_of(plan, start=start).images, plan.features)
    model.eval(), reference.eval()
    batch = batch_of(plan, 2, 8)
    expected = reference(batch.images, plan.features)[0]
    expected = F.interpolate(expected, (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.logits(batch.images), expected, rtol=1e-4, atol=1e-4)
    model(batch)
    guessed, maps, counts = expected.argmax(1), batch.maps.long(), torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for true, guess in zip(maps.flatten().tolist(), guessed.flatten().tolist(), strict=True):
        if true != IGNORED:
            counts[true, guess] += 1
    assert torch.equal(model.take_confusion(), counts) and not model.take_confusion().any()


def test_what_an_evaluation_counted_that_broke_off_is_forgotten(world):
    model = both()[1]
    model.eval()
    with torch.no_grad():
        model(batch_of(model.plan))
    model.train().eval()
    assert not model.take_confusion().any()
    with torch.no_grad():
        model(batch_of(model.plan))
    assert model.take_confusion().sum() == (batch_of(model.plan).maps != IGNORED).sum() > 0


def test_logits_that_are_no_numbers_are_no_class(world):
    model = both()[1].eval()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    data = SimpleNamespace(image_size=model.plan.grid[0] * model.plan.patch_size, micro_batch_size=2)
    run = SimpleNamespace(
        model=model, step=7, world=world, task=SimpleNamespace(plan=model.plan), config=SimpleNamespace(data=data)
    )
    with torch.no_grad(), pytest.raises(UserError, match="step 7: the logits of an image are not finite"):
        window_logits(run, torch.zeros(3, data.image_size, data.image_size, dtype=torch.uint8))


def test_a_channel_that_is_dropped_is_not_seen_in_training_alone(world):
    plan, model, _, _ = both()
    batch = batch_of(plan)
    batch.kept = torch.zeros(4, 24)
    biases = [head.classifier.bias for head in (model.head.decode, model.head.auxiliary)]
    for logits, bias in zip(model.head(model.features(batch), batch.kept, both=True), biases, strict=True):
        torch.testing.assert_close(logits, bias.view(1, -1, 1, 1).expand_as(logits))
    losses = [model.train(training)(batch)[1]["segmentation"][0] for training in (True, False)]
    assert abs(float(losses[0] - losses[1])) > 1e-3


@pytest.mark.parametrize("auxiliary", [0.4, 0.0])
def test_parameters_and_flops_are_those_that_are_counted(world, auxiliary):
    from torch.utils.flop_counter import FlopCounterMode

    plan = SegmenterPlan(tiny({"segmenter": {"auxiliary_weight": auxiliary}}), 0)
    model = Segmenter(plan)
    assert parameters.total(plan) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        features = [torch.randn(1, 32, 4, 4) for _ in range(4)]
        plan.data_group = None
        model.eval().head(features, None, both=True)
    assert counter.get_total_flops() == plan.blocks[-1].flops
    assert list(plan.loss_weights) == ["segmentation", "auxiliary"][: 1 + (auxiliary > 0)]


def test_weights_start_as_they_are_told_and_matrices_alone_decay(world):
    plan = SegmenterPlan(tiny({"segmenter": {"channels": 64, "layer_decay": 0.5}}), 0)
    model = Segmenter(plan)
    initialise(model.sharded_state_dict(), 1, plan.init_std)
    fusion = model.head.decode.fusion.conv.weight
    assert float(fusion.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)
    deconvolution = nn.ConvTranspose2d(32, 32, 2, 2).weight
    assert float(model.head.pyramid.first.weight.std()) == pytest.approx(float(deconvolution.std()), rel=0.05)
    assert float(model.head.decode.classifier.weight.std()) == pytest.approx(0.01, rel=0.2)
    norm = model.head.decode.fusion.norm
    assert (norm.weight == 1).all() and not norm.bias.any() and (norm.running_var == 1).all()
    for name, parameter in model.named_parameters():
        assert parameter.no_weight_decay == (parameter.dim() == 1 or "token" in name), name
        assert name.startswith("encoder.") or parameter.rate_scale == 1
    assert model.encoder.cls_token.rate_scale == 0.5**4

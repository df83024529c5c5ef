"""A classifier against the same in plain torch: `VisionEncoder`, LayerNorm, Linear, cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megamug.models.classifier.model import ClassBatch, Classifier
from megamug.models.classifier.plan import HEAD_STD, ClassifierPlan
from megamug.models.init import initialise
from megamug.transfer.encoder import VisionEncoder, global_names
from tests.distributed.cases.classifier_case import CLASSES, sample, tiny


class Reference(nn.Module):
    """The mean of the patches before the encoder's norm, or the class token behind it; bytes -> logits."""

    def __init__(self, config):
        super().__init__()
        self.encoder, self.mean = VisionEncoder(config), config.classifier.pool == "mean"
        self.norm = nn.LayerNorm(config.model.width, config.model.layer_norm_eps)
        self.linear = nn.Linear(config.model.width, CLASSES)
        if config.classifier.pool == "attention":
            self.key, self.value = (nn.Linear(config.model.width, config.model.width, bias=False) for _ in range(2))
            self.query = nn.Parameter(torch.zeros(1, config.model.width))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.mean:
            return self.linear(self.encoder(images).class_token)
        patches = self.encoder(images, layers=[-1]).layers[0].flatten(1, 2)
        return self.linear(self.norm(patches.mean(1)))


def both(pool: str, **classifier):
    config = tiny({"classifier": {"pool": pool, "classes": CLASSES, **classifier}})
    plan = ClassifierPlan(config, 0)
    model, reference = Classifier(plan), Reference(config)
    initialise(model.sharded_state_dict(), seed=3)  # the head's weights as large as the others
    state = model.sharded_state_dict().values()
    own = {entry.key: entry.data for entry in state if ".running_" not in entry.key}
    names = {f"encoder.{mine}": theirs for mine, theirs in global_names(config.model).items()}
    names |= {"norm.weight": "head.norm.weight", "norm.bias": "head.norm.bias", "linear.weight": "head.linear.weight",
              "linear.bias": "head.linear.bias"}  # fmt: skip
    names |= {f"{mine}.weight": f"head.attention.{mine}.weight" for mine in ("key", "value")}
    names["query"] = "head.attention.query_token"
    pairs = {mine: own[theirs] for mine, theirs in names.items() if theirs in own}
    assert len(pairs) == len(own)
    with torch.no_grad():
        for mine, tensor in pairs.items():
            tensor += 0.1 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(len(mine)))  # biases, too
            reference.get_parameter(mine).copy_(tensor)
    return plan, model, reference, pairs


def images_and_labels(plan, count: int = 5, start: int = 0):
    return [torch.stack(x) for x in zip(*(sample(start + i, plan) for i in range(count)), strict=True)]


@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_loss_and_gradients_are_those_of_plain_torch(world, pool):
    plan, model, reference, pairs = both(pool, label_smoothing=0.1)
    images, labels = images_and_labels(plan)
    output, losses = model(ClassBatch(images, labels))
    assert output is None
    total, count = losses["class"]
    expected = F.cross_entropy(reference(images), labels, reduction="sum", label_smoothing=0.1)
    assert count == 5
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    total.backward(), expected.backward()
    own = {entry.data_ptr(): p.grad for p in model.parameters() for entry in [p]}
    for mine, tensor in pairs.items():
        found, wanted = own[tensor.data_ptr()], reference.get_parameter(mine).grad
        assert wanted.abs().max() > 0, mine
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5, mine


def test_held_out_losses_are_not_smoothed_and_padding_does_not_count(world):
    plan, model, reference, _ = both("mean", label_smoothing=0.3)
    images, labels = images_and_labels(plan)
    model.eval()
    total, count = model(ClassBatch(images, labels, torch.tensor([0, 2, 3])))[1]["class"]
    assert count == 3
    expected = F.cross_entropy(reference(images)[[0, 2, 3]], labels[[0, 2, 3]], reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)


def test_the_head_starts_from_maes_weights_and_matrices_alone_decay(world):
    plan = ClassifierPlan(tiny({}), 0)
    model = Classifier(plan)
    initialise(model.sharded_state_dict(), 1, plan.init_std)
    assert 0.9 * HEAD_STD < float(model.head.linear.weight.std()) < 1.1 * HEAD_STD
    assert not model.head.linear.bias.any() and (model.head.norm.weight == 1).all()
    decays = {name for name, p in model.named_parameters() if not p.no_weight_decay}
    assert "head.linear.weight" in decays and "encoder.patch_embedding.weight" in decays
    assert all(name.endswith("weight") and "norm" not in name for name in decays)
    assert {"encoder.cls_token", "encoder.register_tokens"} & decays == set()


@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_a_probe_is_torchs_batch_norm_on_features_of_an_encoder_that_stays(world, pool):
    plan, model, reference, pairs = both(pool, frozen=True)
    norm = nn.BatchNorm1d(plan.model.width, eps=1e-6, affine=False)

    def logits(images):
        features = reference.encoder(images)
        return reference.linear(norm((features.mean if pool == "mean" else features.class_token).detach()))

    for start in (0, 6):
        images, labels = images_and_labels(plan, 6, start)
        total, _ = model(ClassBatch(images, labels))[1]["class"]
        expected = F.cross_entropy(logits(images), labels, reduction="sum", label_smoothing=0.1)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    total.backward(), expected.backward()
    found, wanted = model.head.linear.weight.grad, reference.linear.weight.grad
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-5  # the mean taken off makes rounding larger
    assert all(p.grad is None and not p.requires_grad for p in model.encoder.parameters())
    model.eval(), norm.eval()
    torch.testing.assert_close(model.logits(ClassBatch(images, labels)), logits(images), rtol=1e-5, atol=1e-5)
    state = model.sharded_state_dict()
    initialise(state, 1, plan.init_std)
    kept = {f"head.standardised.running_{name}" for name in ("mean", "var")}
    assert kept <= {entry.key for entry in state.values()}
    assert 0.009 < float(model.head.linear.weight.std()) < 0.011 and (model.head.standardised.running_var == 1).all()


@pytest.mark.parametrize("norm", [False, True])
def test_an_attentive_probe_is_one_query_over_standardised_patches(world, norm):
    plan, model, reference, pairs = both("attention", frozen=True, batch_norm=norm)
    standardised = nn.BatchNorm1d(plan.model.width, eps=1e-6, affine=False) if norm else nn.Identity()

    def logits(images):
        patches = reference.encoder(images).patches.flatten(1, 2).detach()
        patches = standardised(patches.flatten(0, 1)).view_as(patches)
        read = []
        whole = reference.query, reference.key(patches), reference.value(patches)
        for query, keys, values in zip(*(x.chunk(plan.model.heads, dim=-1) for x in whole), strict=True):
            weights = (keys @ query[0] / math.sqrt(len(query[0]))).softmax(dim=1)
            read.append((weights.unsqueeze(2) * values).sum(dim=1))
        return reference.linear(torch.cat(read, dim=1))

    images, labels = images_and_labels(plan, 6)
    total, _ = model(ClassBatch(images, labels))[1]["class"]
    expected = F.cross_entropy(logits(images), labels, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    total.backward(), expected.backward()
    learned = {mine: tensor for mine, tensor in pairs.items() if not mine.startswith("encoder.")}
    assert learned.keys() == {"query", "key.weight", "value.weight", "linear.weight", "linear.bias"}
    own = {p.data_ptr(): p for p in model.parameters()}
    for mine, tensor in learned.items():
        found, wanted = own[tensor.data_ptr()].grad, reference.get_parameter(mine).grad
        assert wanted.abs().max() > 1e-4 and float((found - wanted).abs().max() / wanted.abs().max()) < 2e-5, mine
    assert all(p.grad is None and not p.requires_grad for p in model.encoder.parameters())
    assert {name for name, p in model.head.named_parameters() if not p.no_weight_decay} == {
        "attention.key.weight", "attention.value.weight", "linear.weight"
    }
    model.eval(), standardised.eval()
    torch.testing.assert_close(model.logits(ClassBatch(images, labels)), logits(images), rtol=1e-5, atol=1e-5)


def test_a_part_that_is_left_out_adds_nothing_and_one_that_stays_adds_more(world):
    plan, model, reference, _ = both("mean", drop_path=0.5)
    images, labels = images_and_labels(plan, 2)
    scales = torch.tensor([[[1.0, 0.0], [2.0, 1.0]], [[0.0, 3.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 2.0]]])
    x = reference.encoder._embed(images)
    for block, (attention, ffn) in zip(reference.encoder.blocks, scales, strict=True):
        b, n, h = x.shape
        q, k, v = block.qkv(block.norm1(x)).view(b, n, block.heads, 3, h // block.heads).permute(3, 0, 2, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, h)
        x = x + attention.view(-1, 1, 1) * block.projection(attended)
        x = x + ffn.view(-1, 1, 1) * block.fc2(F.gelu(block.fc1(block.norm2(x))))
    expected = reference.linear(reference.norm(x[:, 4:].mean(1)))
    batch = ClassBatch(images, labels, scales=scales.unsqueeze(-1))
    torch.testing.assert_close(model.logits(batch), expected, rtol=1e-5, atol=1e-5)
    model.eval()
    torch.testing.assert_close(model.logits(batch), reference(images), rtol=1e-5, atol=1e-5)

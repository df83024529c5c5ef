"""Layer-wise learning rates: of ViT-B, written down by hand; off, no parameter has one."""

from __future__ import annotations

import pytest
import torch

from megamug.configuration.reading import load_config, resolve
from megamug.training.optim import Optimizer, _pairs, wrap_chunks
from tests.distributed.cases.classifier_case import tiny

# 0.65 to the power of 13, 12, ... 1, 0: embedding and tokens, blocks 0 to 11, norm and head.
EMBEDDING = 0.00369720589101871337890625
BLOCKS = [
    0.005688009063105712890625, 0.0087507831740087890625, 0.01346274334462890625, 0.020711912837890625,
    0.0318644812890625, 0.04902227890625, 0.075418890625, 0.1160290625, 0.17850625, 0.274625, 0.4225, 0.65,
]  # fmt: skip
HEAD = 1.0
OUTSIDE = {  # name: (share of the rate, decays)
    "encoder.cls_token": (EMBEDDING, False), "encoder.register_tokens": (EMBEDDING, False),
    "encoder.patch_embedding.weight": (EMBEDDING, True), "encoder.patch_embedding.bias": (EMBEDDING, False),
    "head.norm.weight": (HEAD, False), "head.norm.bias": (HEAD, False),
    "head.linear.weight": (HEAD, True), "head.linear.bias": (HEAD, False),
}  # fmt: skip
IN_A_BLOCK = {
    "input_layernorm.weight": False, "input_layernorm.bias": False, "self_attention.linear_qkv.weight": True,
    "self_attention.linear_qkv.bias": False, "self_attention.linear_proj.weight": True,
    "self_attention.linear_proj.bias": False, "pre_mlp_layernorm.weight": False, "pre_mlp_layernorm.bias": False,
    "mlp.linear_fc1.weight": True, "mlp.linear_fc1.bias": False, "mlp.linear_fc2.weight": True,
    "mlp.linear_fc2.bias": False,
}  # fmt: skip
RATE, DECAY = 2e-3, 0.05


def optimizer_of(config):
    from megamug.models.tasks import model_of

    plan, model = model_of(config.model.kind)
    return Optimizer(config, wrap_chunks([model(plan(config, 70))], config))


def rates(optimizer) -> dict[str, tuple[float, float]]:
    """By the name of every parameter, rate and decay of its next update."""
    optimizer.prepare(1)
    found = {}
    for part in optimizer.parts:
        of_main = {id(p): group for group in part.optimizer.param_groups for p in group["params"]}
        for parameter, main in _pairs(part):
            group = of_main[id(main)]
            found[optimizer.names[parameter].removeprefix("0.")] = group["lr"], group["weight_decay"]
    return found


def test_rates_and_decays_of_vit_b_are_those_written_down(world):
    config = resolve(load_config(None, (
        f"model.kind=classifier model.preset=vit_b16 model.register_tokens=3 classifier.classes=1000"
        f" classifier.layer_decay=0.65 optimizer.learning_rate={RATE} optimizer.weight_decay={DECAY}"
    ).split()))  # fmt: skip
    expected = {name: (RATE * share, DECAY if decays else 0.0) for name, (share, decays) in OUTSIDE.items()}
    for i, share in enumerate(BLOCKS):
        expected |= {f"encoder.stack.layers.{i}.{name}": (RATE * share, DECAY if decays else 0.0)
                     for name, decays in IN_A_BLOCK.items()}  # fmt: skip
    found = rates(optimizer_of(config))
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert found[name] == pytest.approx(pair, rel=1e-12), name


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_optimizer_knows_them(world, dtype, distributed):
    config = tiny({"classifier": {"classes": 7, "pool": "class_token", "layer_decay": 0.5}})
    config.precision.dtype, config.parallel.distributed_optimizer = dtype, distributed
    found = {name: rate / 2e-3 * 3 for name, (rate, _) in rates(optimizer_of(config)).items()}  # the first of 3 steps
    assert found["encoder.cls_token"] == pytest.approx(1 / 16)
    assert found["encoder.stack.layers.2.mlp.linear_fc1.weight"] == pytest.approx(1 / 2)
    assert found["encoder.stack.final_layernorm.weight"] == found["head.linear.weight"] == pytest.approx(1)


def test_off_there_are_the_groups_that_there_always_were(world):
    optimizer = optimizer_of(tiny({}))
    (part,) = optimizer.parts
    assert [(g["wd_mult"], g["lr_mult"]) for g in part.optimizer.param_groups] == [(1.0, 1.0), (0.0, 1.0)]
    assert not any(hasattr(p, "rate_scale") for p in torch.nn.ModuleList(optimizer.models).parameters())

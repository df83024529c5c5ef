"""FP8, overlapped tensor parallelism, CUDA graphs and the optimizer's kernel: what they need is told in words, and
following them mends it. The machine, where it matters, is made up."""

from __future__ import annotations

import dataclasses
import importlib.util
import re

import pytest

from megamug.configuration import validate_precision
from megamug.configuration.reading import load_config, resolve
from megamug.errors import UserError
from megamug.planner import search as planner

MUG = "model.preset=vit_b16 precision.dtype=bf16 data.micro_batch_size=16 "
LM = "model.kind=decoder_lm precision.dtype=bf16 data.context_length=64 data.micro_batch_size=2 "
JAM = LM.replace("decoder_lm", "jam_cross")
FP8, SHARED = "precision.fp8=current ", "parallel.distributed_optimizer=true "
TENSOR = "parallel.tensor=2 parallel.sequence=true "


def configured(text: str):
    return resolve(load_config(None, text.split()))


def refusal(text: str, here: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        validate_precision.check(configured(text), here)
    return str(caught.value)


def mends(text: str, message: str, here: bool = False) -> None:
    """Each way out of a message can be pasted behind the command; another reason may then come up."""
    ways = re.split(r",? or (?=set |[a-z]+\.)", message.rpartition("; ")[2])
    fixes = [found for way in ways if (found := re.findall(r"\b[a-z]+\.[a-z0-9_]+=[^\s;,]+", way))]
    assert fixes, message
    for fix in fixes:
        try:
            validate_precision.check(configured(" ".join([text, *fix])), here)
        except UserError as error:
            assert str(error)[:40] != message[:40], f"{fix} does not mend: {error}"


BAD = [
    (MUG + "precision.first_layers_bf16=1", ["first_layers_bf16(1) keeps layers out of FP8", "precision.fp8 is none"]),
    (MUG + "precision.last_layers_bf16=2", ["last_layers_bf16(2) keeps layers out of FP8"]),
    (MUG + "precision.fp8=delayed precision.last_layers_bf16=1", ["delayed scaling keeps one history"]),
    (MUG + FP8 + "precision.first_layers_bf16=1 precision.dtype=fp32", ["needs precision.dtype(bf16)"]),
    (MUG + FP8 + "precision.first_layers_bf16=5 precision.last_layers_bf16=3 model.register_tokens=6",
     ["first_layers_bf16(5) + last_layers_bf16(3) leave none of the 8 layers of model.decoder_layers in FP8"]),
    (JAM + FP8 + "precision.first_layers_bf16=1 text_tower.layers=1",
     ["leave none of the 1 layers of text_tower.layers", "precision.first_layers_bf16=0"]),
    (MUG + "precision.fp8_parameters=true", ["fp8_parameters(true) keeps weights in FP8, but precision.fp8 is none"]),
    (MUG + FP8 + "precision.fp8_parameters=true", ["needs parallel.distributed_optimizer(false) to be true"]),
    (MUG + FP8 + SHARED + "precision.fp8_parameters=true precision.dtype=fp32", ["needs precision.dtype(bf16)"]),
    *((JAM + FP8 + SHARED + f"precision.fp8_parameters=true fusion.freeze={tower}",
       [f"a frozen tower (fusion.freeze({tower}))"]) for tower in ("text", "image", "both")),
    (MUG + FP8 + "precision.layers=local", ["precision.layers is local", "precision.fp8=none"]),
    (LM + "parallel.overlap_tensor=true", ["none under parallel.tensor(1)"]),
    (LM + "parallel.overlap_tensor=true parallel.tensor=2", ["none under parallel.sequence(false)"]),
    (LM + TENSOR + "parallel.overlap_tensor=true precision.layers=local", ["precision.layers is local"]),
    (MUG + TENSOR + "parallel.overlap_tensor=true", ["the stacks of model.kind(mug) differ"]),
    (JAM + TENSOR + "parallel.overlap_tensor=true text_tower.width=512",
     ["text_tower.width(512) is not image_tower.width(1024)"]),
    (MUG + "parallel.cuda_graphs=true parallel.tensor=2", ["parallel.tensor(2) sends some", "parallel.tensor=1"]),
    (MUG + "parallel.cuda_graphs=true parallel.pipeline=2", ["parallel.pipeline(2) sends some"]),
    (MUG + "parallel.cuda_graphs=true parallel.overlap_grad_reduce=true",
     ["parallel.overlap_grad_reduce(true) sends some", "set parallel.overlap_grad_reduce=false or"]),
    (LM + "precision.compile=always precision.layers=local parallel.tensor=2", ["parallel.tensor is 2"]),
    # sizes
    # 40 rows, which are no multiple of 16, went forward on an H200 and died in backward.
    (MUG + FP8 + "data.micro_batch_size=8", ["image decoder tokens(197) x data.micro_batch_size(8) = 1576 is not"
                                             " divisible by 16", "set model.decoder_register_tokens=1"]),
    (MUG + FP8 + "data.micro_batch_size=4 model.register_tokens=2",
     ["image decoder tokens(197) x data.micro_batch_size(4) = 788", "set model.decoder_register_tokens=3"]),
    (MUG + FP8 + "data.micro_batch_size=1", ["visible tokens(50) x data.micro_batch_size(1) = 50 is",
                                             "set model.register_tokens=14"]),
    (MUG + FP8 + "data.micro_batch_size=4 model.register_tokens=2 model.image_loss_weight=0 data.caption_length=31",
     ["data.caption_length(31) x data.micro_batch_size(4) = 124", "set data.caption_length=32"]),
    (MUG + FP8 + TENSOR + "data.micro_batch_size=2 model.register_tokens=4 model.decoder_register_tokens=3",
     ["visible tokens(54) x data.micro_batch_size(2) / parallel.tensor(2) = 54", "set model.register_tokens=14"]),
    (MUG + FP8 + "model.width=776", ["model.width(776) is not divisible by 16 x parallel.tensor(1) = 16", "=784"]),
    (MUG + FP8 + "model.decoder_width=520", ["model.decoder_width(520)", "set model.decoder_width=528"]),
    (MUG + FP8 + "parallel.tensor=2 model.text_width=784", ["model.text_width(784)", "= 32", "model.text_width=800"]),
    (LM + FP8 + "data.context_length=63 data.micro_batch_size=1",
     ["data.context_length(63) x data.micro_batch_size(1) = 63 is not divisible by 16", "data.context_length=64"]),
    (LM + FP8 + "lm.ffn_width=260", ["lm.ffn_width(260)", "set lm.ffn_width=272"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BAD, ids=[text for text, _ in BAD])
def test_refusals(text, said):
    message = refusal(text)
    assert "\n" not in message
    for part in said:
        assert part in message
    mends(text, message)


def test_what_is_right_passes():
    for text in (MUG, MUG + FP8 + "precision.first_layers_bf16=1 precision.last_layers_bf16=1",
                 MUG + FP8 + SHARED + "precision.fp8_parameters=true", LM + TENSOR + "parallel.overlap_tensor=true",
                 JAM + TENSOR + FP8 + SHARED + "parallel.overlap_tensor=true precision.fp8_parameters=true",
                 JAM + "parallel.cuda_graphs=true", "precision.fp8=delayed precision.dtype=fp32"):  # fmt: skip
        config = configured(text)
        before = dataclasses.asdict(config)
        validate_precision.check(config, here=False)
        assert dataclasses.asdict(config) == before


@pytest.fixture
def machine(monkeypatch):
    """A machine that is made up: `packages` that are installed, `gpus`, their `capability`."""
    import torch

    has = {"packages": {"transformer_engine", "apex"}, "gpus": 1, "capability": (9, 0)}
    real = importlib.util.find_spec
    mine = ("transformer_engine", "apex")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: (name in has["packages"] or None) if name in mine
                        else real(name))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: has["gpus"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: has["capability"])
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    return has


NEEDS_GPU = [FP8, "precision.layers=te ", "parallel.overlap_tensor=true " + TENSOR, "parallel.cuda_graphs=true ",
             "optimizer.fused=te ", "optimizer.fused=apex "]  # fmt: skip


@pytest.mark.parametrize("option", NEEDS_GPU)
def test_without_a_gpu(machine, option):
    validate_precision.check(configured(LM + option))
    machine["gpus"] = 0
    message = refusal(LM + option, here=True)
    assert "needs a GPU and this machine has none that torch sees" in message
    fix = " ".join(re.findall(r"[a-z]+\.[a-z0-9_]+=\w+", message))
    validate_precision.check(configured(f"{LM} {option} {fix}"))
    validate_precision.check(configured(LM + option), here=False)  # a dry run for another machine


@pytest.mark.parametrize("option", [option for option in NEEDS_GPU if "graphs" not in option])
def test_without_the_package(machine, option):
    package = "apex" if "apex" in option else "transformer_engine"
    machine["packages"] -= {package}
    named = "apex" if "apex" in option else "Transformer Engine"
    assert f"needs {named}, which is not installed" in refusal(LM + option, here=True)


def test_generations(machine):
    machine["capability"] = (8, 0)
    assert "compute capability 9.0 (Hopper) and this GPU has 8.0" in refusal(LM + FP8, here=True)
    validate_precision.check(configured(LM + "parallel.cuda_graphs=true parallel.recompute=full"))


def test_a_plan_gives_up_what_a_layout_cannot_have():
    """Layouts without FP8 are compared although layers are kept in bf16, and the overrides say what has to change."""
    keys = ["precision.fp8=current", "precision.first_layers_bf16=1", "precision.fp8_parameters=true"]
    config = configured("model.preset=vit_l16 precision.dtype=bf16 data.global_batch_size=256 "
                        "model.register_tokens=6 model.decoder_register_tokens=3 " + " ".join(keys))  # fmt: skip
    found = planner.plan(config, 8, "h100").choices
    plain = next(choice for choice in found if choice.layout.fp8 == "none").overrides(config)
    assert {"precision.first_layers_bf16=0", "precision.fp8_parameters=false"} <= set(plain)
    shared = next(c for c in found if c.layout.fp8 == "current" and c.layout.distributed_optimizer).overrides(config)
    assert not any("bf16" in key or "fp8_parameters" in key for key in shared)
    fixed = [key.partition("=")[0] for key in keys]
    assert {choice.layout.fp8 for choice in planner.plan(config, 8, "h100", fixed=fixed).choices} == {"current"}

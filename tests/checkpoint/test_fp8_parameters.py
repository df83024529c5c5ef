"""Weights kept in FP8: training starts from the values they were given, and a checkpoint holds unrounded ones.

Transformer Engine's FP8 tensors need a GPU. Here a bf16 parameter stands in for one: Megatron is told that it is FP8
(so it keeps fp32 values of it and rounds it from those by the functions that it has for that), and those functions
round to e4m3 as Transformer Engine would. What is shown is whose values go where, not FP8's arithmetic.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megamug.checkpoint.state import load_tensors, save_tensors, sharded_state
from megamug.configuration.sections import Config
from megamug.models.init import draw, initialise
from megamug.training.optim import Optimizer, wrap_chunks
from tests.distributed.cases import mug_case

if importlib.util.find_spec("transformer_engine") is not None:
    pytest.skip("with Transformer Engine the layers' FP8 contexts want a GPU", allow_module_level=True)

NAME = "encoder.stack.layers.0.mlp.linear_fc1.weight"


def rounded(value: torch.Tensor) -> torch.Tensor:
    """To e4m3 with one scale, as current scaling does."""
    scale = 448.0 / value.abs().amax().float()
    return ((value.float() * scale).to(torch.float8_e4m3fn).float() / scale).to(torch.bfloat16)


@pytest.fixture
def stand_in(monkeypatch):
    """A mark on a parameter makes it FP8."""
    from megatron.core import fp8_utils
    from megatron.core.distributed import distributed_data_parallel, param_and_grad_buffer
    from megatron.core.optimizer import distrib_optimizer

    def is_fp8(tensor) -> bool:
        return getattr(tensor, "stands_for_fp8", False)

    def quantise(parameters, mains, offsets, *_) -> None:
        for parameter, main, offset in zip(parameters, mains, offsets, strict=True):
            assert offset == 0 and main.numel() == parameter.numel()  # one data-parallel rank
            parameter.data.copy_(rounded(main.view_as(parameter)))

    for module in (fp8_utils, distributed_data_parallel, param_and_grad_buffer, distrib_optimizer):
        for name, function in (("is_float8tensor", is_fp8), ("quantize_param_shard", quantise),
                               ("modify_underlying_storage", lambda *_: None)):  # fmt: skip
            if hasattr(module, name):
                monkeypatch.setattr(module, name, function)
    # One rank has nothing to gather, and gloo cannot join messages of two types, which Megatron asks of NCCL here.
    groups = param_and_grad_buffer._ParamAndGradBucketGroup
    monkeypatch.setattr(groups, "start_param_sync", lambda self, force_sync=False: None)


def configured(fp8: bool) -> Config:
    config = mug_case.tiny({"precision": {"dtype": "bf16"}, "parallel": {"distributed_optimizer": True}})
    if fp8:
        config.precision.__dict__.update(fp8="current", fp8_parameters=True, layers="local")
    return config


def built(config: Config, world, fp8: bool, seed: int = 3):
    task = mug_case.make_task(config)
    task.join(world)
    (chunk,) = task.build(world, initialised=False)
    if fp8:
        for name, parameter in chunk.named_parameters():
            if "linear_" in name and parameter.dim() == 2:
                parameter.stands_for_fp8 = True
                # As Transformer Engine marks what was made under fp8_model_init.
                parameter.get_high_precision_init_val = lambda p=parameter: p._high_precision_init_val
                parameter.clear_high_precision_init_val = lambda p=parameter: delattr(p, "_high_precision_init_val")
    initialise(chunk.sharded_state_dict(), seed)
    return task, chunk


def optimised(config: Config, chunk):
    models = wrap_chunks([chunk], config)
    return models, Optimizer(config, models)


def mains(optimizer) -> dict[str, torch.Tensor]:
    return {state.name: state.main.clone() for state in optimizer.main_states()}


def steps(task, models, optimizer, config, world, first: int, last: int) -> None:
    from megamug.training.pipeline import run_batch

    for step in range(first, last + 1):
        optimizer.zero_grad()
        batches, totals = mug_case.micro_batches(step, task.plan, config, world)
        run_batch(models, batches, totals, backward=True)
        norm, _ = optimizer.prepare(step)
        optimizer.apply(norm)


def test_training_starts_from_the_values_that_were_drawn(world, stand_in):
    config = configured(fp8=True)
    _, chunk = built(config, world, fp8=True)
    _, optimizer = optimised(config, chunk)
    weight = draw(NAME, (64, 32), seed=3).to(torch.bfloat16).float().flatten()
    assert torch.equal(mains(optimizer)[f"0.{NAME}"], weight)
    _, plain = built(configured(fp8=False), world, fp8=False)
    _, reference = optimised(configured(fp8=False), plain)
    found, wanted = mains(optimizer), mains(reference)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not any(hasattr(p, "_high_precision_init_val") for p in chunk.parameters())  # it was taken


def test_a_checkpoint_holds_unrounded_values_and_a_resumed_run_goes_on_the_same(world, stand_in, tmp_path):
    config = configured(fp8=True)
    task, chunk = built(config, world, fp8=True)
    models, optimizer = optimised(config, chunk)
    steps(task, models, optimizer, config, world, 1, 2)
    inside = sharded_state([chunk], optimizer, world)
    eights = {name: p for name, p in chunk.named_parameters() if getattr(p, "stands_for_fp8", False)}
    assert len(eights) > 20
    entry = inside["model"][NAME]
    main = inside["optimizer"][f"optimizer.main.{NAME}"].data
    weight = eights[NAME]
    assert torch.equal(weight, rounded(main)) and not torch.equal(weight, main.to(torch.bfloat16))
    assert entry.data is not weight and torch.equal(entry.data, main.to(torch.bfloat16))
    for key, stored in inside["model"].items():
        assert torch.equal(stored.data, inside["optimizer"][f"optimizer.main.{key}"].data.to(torch.bfloat16)), key
    save_tensors(inside, tmp_path)

    other_task, other = built(config, world, fp8=True, seed=4)
    other_models, other_optimizer = optimised(config, other)
    load_tensors([other], other_optimizer, world, tmp_path, 2)
    found, wanted = mains(other_optimizer), mains(optimizer)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for (name, mine), theirs in zip(other.named_parameters(), chunk.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    for run in ((task, models, optimizer), (other_task, other_models, other_optimizer)):
        steps(*run, config, world, 3, 3)
    for (name, mine), theirs in zip(other.named_parameters(), chunk.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_run_without_fp8_parameters_reads_the_same_weights_and_the_other_way_round(world, stand_in, tmp_path):
    """As `model.initial` does it: parameters alone, before there is an optimizer."""
    for writes in (True, False):
        folder = tmp_path / str(writes)
        folder.mkdir()
        config = configured(writes)
        task, chunk = built(config, world, writes)
        models, optimizer = optimised(config, chunk)
        steps(task, models, optimizer, config, world, 1, 1)
        save_tensors(sharded_state([chunk], optimizer, world), folder)
        wanted = {name: main.to(torch.bfloat16).float() for name, main in mains(optimizer).items()}

        config = configured(not writes)
        _, reader = built(config, world, not writes, seed=4)
        load_tensors([reader], None, world, folder, 1)
        found = mains(optimised(config, reader)[1])
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []

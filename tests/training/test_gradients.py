"""Gradients of many parameters at once: sums, norm, scaling, copies, against one by one."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from megamug.training import gradients
from megamug.training.gradients import GradientBuffers
from tests.distributed.cases.mug_case import tiny


@pytest.fixture
def pieces(monkeypatch):
    """Every gradient a piece of its own, or all in one."""
    return lambda size: monkeypatch.setattr(gradients, "PIECE", size)


def wrapped(dtype=torch.float32, **options) -> tuple[torch.nn.Module, GradientBuffers]:
    from megamug.models.mug.plan import MugPlan

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3), torch.nn.Linear(3, 2)).to(dtype)
    module[1].bias.requires_grad_(False)
    config = MugPlan(tiny({}), vocabulary=70).schedule_config
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, average_in_collective=False, **options)
    module.config = config
    return module, GradientBuffers(config, ddp, module)


@pytest.mark.parametrize("size", [1, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_micro_batches_are_fp32(world, pieces, size, dtype):
    """Each micro-batch's gradient is rounded to the parameter's type once, and added in float32."""
    pieces(size)
    module, model = wrapped(dtype)
    inputs = [torch.randn(4, 6).to(dtype) for _ in range(3)]
    wanted = {}
    for x in inputs:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(module(x).float().square().sum(), list(trained.values()))
        for name, g in zip(trained, found, strict=True):
            wanted[name] = wanted.get(name, 0) + g.float()
    for _ in range(2):  # the second time nothing of the first is left
        model.zero_grad_buffer()
        for x in inputs:
            model(x).float().square().sum().backward()
            model.collect()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.main_grad.dtype == torch.float32 and parameter.grad is None
                assert torch.equal(parameter.main_grad, wanted[name]), name


def test_what_a_product_has_added_itself_is_kept(world):
    """`grad_added_to_main_grad`: the gradient is a placeholder. `main_grad_begun`: the sum holds something already."""
    module, model = wrapped()
    model.zero_grad_buffer()
    first, last = module[0].weight, module[2].weight
    first.main_grad.fill_(2.0)
    first.grad_added_to_main_grad = True
    last.main_grad.fill_(3.0)
    last.main_grad_begun = True
    module(torch.randn(4, 6)).sum().backward()
    gradient = last.grad.clone()
    model.collect()
    assert torch.equal(first.main_grad, torch.full_like(first, 2.0)) and first.grad is None
    assert torch.equal(last.main_grad, 3.0 + gradient)
    model.zero_grad_buffer()
    assert not last.main_grad_begun and not last.main_grad.any()


def test_a_placeholder_that_says_it_is_zero_is_added(world):
    module, model = wrapped()
    model.zero_grad_buffer()
    weight = module[0].weight
    weight.main_grad.fill_(2.0)
    weight.grad_added_to_main_grad = weight.zero_out_wgrad = weight.main_grad_begun = True
    (module(torch.randn(4, 6)).sum() * 0).backward()
    model.collect()
    assert torch.equal(weight.main_grad, torch.full_like(weight, 2.0))


def test_overlapping_reductions_keep_megatrons_hooks(world):
    module, model = wrapped(overlap_grad_reduce=True)
    model.zero_grad_buffer()
    module(torch.randn(4, 6)).sum().backward()
    assert all(p.main_grad.any() for p in module.parameters() if p.requires_grad)  # without `collect`


def test_a_model_that_is_dropped_is_gone(world):
    module, model = wrapped()
    model.zero_grad_buffer()
    module(torch.randn(4, 6)).sum().backward()
    model.collect()
    weight = weakref.ref(module[0].weight)
    del module, model
    gc.collect()
    assert weight() is None


def test_a_step_has_no_operator_for_each_parameter(world):
    """Four layers more: their own operators of forward and backward alone (docs/benchmarks/gpu.md), none for the sums,
    the norm, the clipping, the update and the copies of their 48 parameters."""
    per_layer = (dispatched(6) - dispatched(2)) / 4
    assert per_layer <= 30, per_layer


VIEWS = ("view", "reshape", "transpose", "permute", "expand", "detach", "slice", "select", "squeeze", "t.default",
         "split", "alias", "chunk", "unbind", "as_strided", "narrow", "empty", "_local_scalar", "item",
         "set_")  # fmt: skip


def dispatched(layers: int) -> int:
    """Operators of a bf16 training step with so many encoder layers, as a GPU would get them; views left out."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megamug.models.attention import cpu as cpu_attention
    from megamug.models.blocks import cpu_linear
    from megamug.models.mug.model import Mug
    from megamug.models.mug.plan import MugPlan
    from megamug.training.optim import Optimizer, wrap_chunks
    from megamug.training.pipeline import run_batch
    from tests.distributed.cases.mug_case import micro_batches

    class Count(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.found += not any(view in str(function).split("aten.")[-1] for view in VIEWS)
            return function(*args, **(kwargs or {}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_linear, "AVAILABLE", False)
        patch.setattr(cpu_attention, "pays", lambda *_: False)
        config = tiny({"precision": {"dtype": "bf16"}, "model": {"layers": layers}, "data": {"micro_batch_size": 8}})
        stage = Mug(MugPlan(config, vocabulary=70))
        models = wrap_chunks([stage], config)
        optimizer = Optimizer(config, models)
        for step in (1, 2):
            batches, totals = micro_batches(step, stage.plan, config, SimpleNamespace(dp_rank=0, dp_size=1))
            with Count() as count:
                optimizer.zero_grad()
                run_batch(models, batches, totals, backward=True)
                norm, _ = optimizer.prepare(step)
                optimizer.apply(norm)
        return count.found

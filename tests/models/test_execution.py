"""Switches of `precision` and `parallel` in the layers: which of them FP8 leaves in bf16, which a CUDA graph holds.

Nothing here needs a GPU: Megatron decides both where layers are built and in a run's first step, which is not yet
replayed. The replay, and FP8 itself, are not tested here.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer import cuda_graphs as megatron_graphs

from megamug.config import Config
from megamug.models import layers, specs
from tests.distributed import jam_case, lm_case, mug_case

LAYERS = 7


@pytest.mark.parametrize("kept", [(0, 0), (1, 1), (2, 0), (0, 3), (3, 2)])
def test_layers_of_a_run_are_those_of_the_whole_stack(kept):
    config = Config()
    config.precision.__dict__.update(fp8="current", first_layers_bf16=kept[0], last_layers_bf16=kept[1])
    stack = specs.transformer_config(
        layers=LAYERS, width=32, heads=4, ffn_width=64, norm_eps=1e-6, dtype=torch.bfloat16, tensor=1, sequence=False,
        recompute=False, **specs.execution(config),
    )  # fmt: skip
    wanted = [i < kept[0] or i >= LAYERS - kept[1] for i in range(LAYERS)]
    assert [is_first_last_bf16_layer(stack, i) for i in range(LAYERS)] == wanted
    for first in range(LAYERS):
        for last in range(first + 1, LAYERS + 1):
            run = layers.config_of_run(stack, first, last)
            found = [is_first_last_bf16_layer(run, i) for i in range(last - first)]
            assert found == wanted[first:last], (first, last)
    assert stack.num_layers == LAYERS and layers.config_of_run(stack, 3, 3) is stack


def in_bf16(model: torch.nn.Module) -> dict[str, bool]:
    """Global name of every layer -> does Megatron leave it in bf16?"""
    found = {}
    for name, run in model.named_modules():
        if isinstance(run, layers.LayerRun):
            stack = name.partition(".")[0]
            for index, layer in enumerate(run.layers):
                found[f"{stack} {run.first_layer + index}"] = is_first_last_bf16_layer(
                    layer.config, layer.layer_number - 1
                )
    return found


@pytest.mark.parametrize("case, options, stacks", [
    (mug_case, {}, {"encoder": 2, "image_decoder": 3, "text_decoder": 3}),
    (lm_case, {"family": "llama"}, {"stack": 6}),
    (jam_case, {"pair": "unlike"}, {"text_tower": 4, "image_tower": 6}),
], ids=["mug", "lm", "jam"])  # fmt: skip
@pytest.mark.parametrize("stages", [1, 4])
def test_first_and_last_layers_of_every_stack_stay_in_bf16(world, case, options, stacks, stages):
    """Whatever the stage, and in a tower cut by cross blocks."""
    fp8 = {"dtype": "bf16", "fp8": "current", "first_layers_bf16": 1, "layers": "local"}
    config = case.tiny(options | {"precision": fp8, "parallel": {"pipeline": stages}})
    task = case.make_task(config)
    task.join(world)
    chunks, found = task.build(world, initialised=False), {}
    assert len(chunks) == stages
    for chunk in chunks:
        found |= in_bf16(chunk)
        assert not chunk.config.first_last_layers_bf16 or stages == 1
    assert found == {f"{stack} {i}": i == 0 for stack, count in stacks.items() for i in range(count)}


def test_switches_reach_megatron():
    """In the Megatron-core that is installed: its checks pass, and it takes them as meant."""
    config = Config()
    config.precision.__dict__.update(fp8="blockwise", fp8_parameters=True)
    config.parallel.__dict__.update(tensor=2, sequence=True, overlap_tensor=True, cuda_graphs=True)
    found = specs.transformer_config(
        layers=2, width=32, heads=4, ffn_width=64, norm_eps=1e-6, dtype=torch.bfloat16, tensor=2, sequence=True,
        recompute=False, **specs.execution(config),
    )  # fmt: skip
    assert found.fp8 and found.fp8_recipe == "blockwise" and found.fp8_param
    assert found.tp_comm_overlap and found.tp_comm_bootstrap_backend == "nccl"
    scope = found.cuda_graph_modules if hasattr(found, "cuda_graph_modules") else found.cuda_graph_scope
    assert found.cuda_graph_impl == "local" and scope == []  # the whole layer
    assert set(specs.execution(Config())) == {"fp8_param"}


# ---------------------------------------------------------------------------------------------- CUDA graphs


@pytest.fixture
def recording(monkeypatch):
    """Megatron's recording phase on a CPU: what it asks of CUDA when layers are built, and the end of it, where graphs
    would be captured: (kind, layer) in the order of execution is kept instead."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    record, seen = megatron_graphs._CudagraphGlobalRecord, []

    def create() -> None:
        seen.append([(entry[1], entry[0].base_module) for entry in record.cudagraph_record])
        record.cudagraph_record = []

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(get_cuda_rng_tracker(), "use_cudagraphable_rng", True)
    monkeypatch.setattr(schedules, "create_cudagraphs", create)
    yield seen
    record.cudagraph_record = []
    megatron_graphs.CudaGraphManager.global_mempool = None
    if hasattr(record, "_disable_saved_tensors_observer"):  # Megatron-core 0.19
        record._disable_saved_tensors_observer()


def losses_and_gradients(case, options: dict, world, train: bool) -> tuple[dict, dict, torch.nn.Module]:
    from megamug.pipeline import run_batch

    config = case.tiny(options)
    task = case.make_task(config)
    task.join(world)
    (chunk,) = task.build(world)
    batches, totals = case.micro_batches(1, task.plan, config, world)
    for parameter in chunk.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    if not train:
        with torch.no_grad():
            sums = run_batch([chunk.eval()], batches, totals, backward=False)
    else:
        chunk.config.finalize_model_grads_func = None
        sums = run_batch([chunk], batches, totals, backward=True)
    gradients = {name: p.grad for name, p in chunk.named_parameters() if p.grad is not None}
    return sums, gradients, chunk


@pytest.mark.parametrize("case, options, graphed", [
    (mug_case, {}, 2 + 3 + 1),  # not the two text layers with cross-attention
    (jam_case, {"pair": "unlike"}, 4 + 6),
], ids=["mug", "jam"])  # fmt: skip
def test_the_first_step_records_each_layer_once(world, recording, case, options, graphed):
    on = options | {"parallel": {"cuda_graphs": True}}
    _, wanted, _ = losses_and_gradients(case, options, world, train=True)
    assert recording == []
    sums, found, model = losses_and_gradients(case, on, world, train=True)
    assert found.keys() == wanted.keys() and len(found) > 20
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    (order,) = recording
    mine = [module for module in model.modules() if isinstance(module, layers.Layer)]
    forward = [layer for kind, layer in order if kind == "fwd"]
    backward = [layer for kind, layer in order if kind == "bwd"]
    assert len(forward) == len(set(forward)) == graphed and set(forward) <= set(mine)
    assert set(backward) == set(forward)
    assert all(order.index(("fwd", layer)) < order.index(("bwd", layer)) for layer in forward)


def test_validation_runs_without_graphs(world, recording):
    on = {"parallel": {"cuda_graphs": True}}
    wanted, _, _ = losses_and_gradients(mug_case, {}, world, train=False)
    found, _, _ = losses_and_gradients(mug_case, on, world, train=False)
    assert {k: [float(x) for x in v] for k, v in found.items()} == {k: [float(x) for x in v] for k, v in wanted.items()}
    assert recording == [[]]

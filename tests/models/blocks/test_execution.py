"""Switches of `precision` and `parallel` in the layers: which of them FP8 leaves in bf16, what Megatron is told.

Nothing here needs a GPU: Megatron decides that where layers are built. FP8 itself is not tested here.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer

from megamug.configuration.sections import Config
from megamug.models.blocks import layers, specs
from tests.distributed.cases import jam_case, lm_case, mug_case

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
    assert found.cuda_graph_impl == "none"  # a step is recorded whole, by `step_graph`
    assert set(specs.execution(Config())) == {"fp8_param"}

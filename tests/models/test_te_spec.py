"""The Transformer Engine spec, built without a GPU: the same parameters under the same names as the local spec's.

Transformer Engine's modules only ask whether there is a GPU when they are built; standing in for that question lets the
names, shapes and places of a checkpoint be compared here. Forward needs a GPU.
"""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.distributed.launch import launch

if importlib.util.find_spec("transformer_engine") is None:
    pytest.skip("Transformer Engine is not installed (extra `te`)", allow_module_level=True)

SCRIPT = """
import json, sys, types, warnings
warnings.simplefilter("ignore")
import torch
from megamug.distributed import cpu_backend, setup
from tests.distributed.layout_worker import tiny
options = json.loads(sys.argv[1])
config = tiny(options)
stages, config.parallel.pipeline = config.parallel.pipeline, 1  # all stages in turn, without a process for each
world = setup.start(config.parallel, seed=0)
config.parallel.pipeline = stages
# The three stand-ins: what Transformer Engine asks of the machine when a module is built.
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="stand-in"
)
from megamug.models.init import initialise
from megamug.models.mug import Mug
from megamug.models.mug_plan import MugPlan

def marks(parameter):
    "What Megatron's gradient reductions, norms and optimizers read off a parameter."
    named = ("tensor_model_parallel", "sequence_parallel", "shared_embedding", "shared", "no_weight_decay")
    return [bool(getattr(parameter, name, False)) for name in named]

found = {}
for spec in ("local", "te"):
    plan = MugPlan(config, vocabulary=70, spec=spec)
    plan.place_tensor(world.tp_rank, world.tp_group if world.tp_size > 1 else None)
    found[spec] = []
    for stage in range(plan.pipeline):
        model = Mug(plan, stage)
        state = model.sharded_state_dict()
        initialise(state, seed=0)
        parameters = {p.data_ptr(): p for p in model.parameters()}
        found[spec].append({
            entry.key: [list(entry.global_shape), list(entry.global_offset), list(entry.replica_id), str(entry.dtype),
                        float(entry.data.double().sum()), *marks(parameters[entry.data.data_ptr()])]
            for entry in state.values()
        })
        found[spec][-1]["parameters"] = len(parameters)
        if spec == "te":
            kinds = {type(m).__name__ for m in model.modules()}
            found["kinds"] = sorted(set(found.get("kinds", [])) | kinds)
print("RESULT " + json.dumps(found))
"""


@pytest.mark.parametrize("options", [
    {},
    {"parallel": {"pipeline": 3}},
    {"model": {"caption_loss_weight": 0.0}},
    {"precision": {"dtype": "bf16"}},
    {"parallel": {"tensor": 2}},
    {"parallel": {"tensor": 2, "sequence": True, "pipeline": 2}},
], ids=str)  # fmt: skip
def test_te_and_local_keep_the_same_parameters(options):
    processes = options.get("parallel", {}).get("tensor", 1)
    for code, output in launch(["-W", "ignore", "-c", SCRIPT, json.dumps(options)], processes, timeout=200):
        assert code == 0, output[-4000:]
        found = json.loads(output.split("RESULT ")[1].splitlines()[0])
        kinds = {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"}
        assert kinds <= set(found["kinds"]) and not any(kind.startswith("Local") for kind in found["kinds"])
        assert len(found["te"]) == len(found["local"])
        for te, local in zip(found["te"], found["local"], strict=True):
            assert te.keys() == local.keys()
            for key in local:
                assert te[key] == local[key], key

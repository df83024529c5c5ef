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
import importlib, json, pathlib, sys, types, warnings
warnings.simplefilter("ignore")
import torch
from megamug.distributed import cpu_backend, setup
options, folder = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
case = importlib.import_module(f"tests.distributed.cases.{options.pop('case')}_case")
config = case.tiny(options)
stages, config.parallel.pipeline = config.parallel.pipeline, 1  # all stages in turn, without a process for each
world = setup.start(config.parallel, seed=0)
config.parallel.pipeline = stages
# The three stand-ins: what Transformer Engine asks of the machine when a module is built.
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="stand-in"
)
from megamug.checkpoint.state import entries_of, load_tensors, save_tensors, sharded_state

def built(spec):
    config.precision.layers = spec
    task = case.make_task(config)
    task.join(world)
    return task.build(world)

def marks(parameter):
    "What Megatron's gradient reductions, norms and optimizers read off a parameter."
    named = ("tensor_model_parallel", "sequence_parallel", "shared_embedding", "shared", "no_weight_decay")
    return [bool(getattr(parameter, name, False)) for name in named]

def shards(entry):
    "A gated feed-forward stands for two."
    return entry.build() if hasattr(entry, "build_fn") else [entry]

def described(chunk):
    parameters = {p.data_ptr(): p for p in chunk.parameters()}
    found = {
        f"{entry.key} {number}": [
            list(shard.global_shape), list(shard.global_offset), list(shard.replica_id), str(shard.dtype),
            float(shard.data.double().abs().sum()), *marks(parameters[entry.data.data_ptr()]),
        ]
        for entry in chunk.sharded_state_dict().values() for number, shard in enumerate(shards(entry))
    }
    return found | {"parameters": len(parameters)}

chunks = {spec: built(spec) for spec in ("local", "te")}
found = {spec: [described(chunk) for chunk in both] for spec, both in chunks.items()}
found["kinds"] = sorted({  # the vocabulary's product is the same in both
    type(m).__name__ for chunk in chunks["te"] for name, m in chunk.named_modules() if name != "output_layer"
})
for writer, reader in (("local", "te"), ("te", "local")):
    path = folder / f"by_{writer}"
    path.mkdir(exist_ok=True)
    torch.distributed.barrier()
    save_tensors(sharded_state(chunks[writer], None, world), path)
    with torch.no_grad():
        for chunk in chunks[reader]:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
    load_tensors(chunks[reader], None, world, path, 0)
    found[f"{reader} after {writer}"] = [described(chunk) for chunk in chunks[reader]]
print("RESULT " + json.dumps(found))
"""

MUG, LLAMA, UNLIKE = {"case": "mug"}, {"case": "lm", "family": "llama"}, {"case": "jam", "pair": "unlike"}


@pytest.mark.parametrize("options", [
    MUG,
    MUG | {"parallel": {"pipeline": 3}},
    MUG | {"model": {"caption_loss_weight": 0.0}},
    MUG | {"model": {"text_objective": "masked"}, "parallel": {"tensor": 2, "sequence": True}},
    MUG | {"precision": {"dtype": "bf16"}},
    MUG | {"parallel": {"tensor": 2}},
    MUG | {"parallel": {"tensor": 2, "sequence": True, "pipeline": 2}},
    {"case": "lm", "family": "cm3leon", "parallel": {"pipeline": 2}},
    LLAMA,
    LLAMA | {"parallel": {"tensor": 2, "sequence": True}},
    {"case": "jam", "pair": "equal", "fusion": {"freeze": "text"}},
    UNLIKE,
    UNLIKE | {"parallel": {"tensor": 2, "sequence": True, "pipeline": 2}},
], ids=str)  # fmt: skip
def test_te_and_local_keep_the_same_parameters(options, tmp_path):
    """Names, shapes, places, initial values and marks; and a checkpoint of either is read by the other."""
    processes = options.get("parallel", {}).get("tensor", 1)
    arguments = ["-W", "ignore", "-c", SCRIPT, json.dumps(options), str(tmp_path)]
    for code, output in launch(arguments, processes, timeout=200):
        assert code == 0, output[-4000:]
        found = json.loads(output.split("RESULT ")[1].splitlines()[0])
        kinds = {"TERowParallelLinear", "DocumentAttention"}
        kinds |= {"TEColumnParallelLinear" if options.get("family") == "cm3leon" or options.get("pair") == "equal"
                  else "TELayerNormColumnParallelLinear"}  # fmt: skip
        assert kinds <= set(found["kinds"]) and not any(kind.startswith("Local") for kind in found["kinds"])
        for other in ("te", "te after local", "local after te"):
            assert len(found[other]) == len(found["local"])
            for theirs, local in zip(found[other], found["local"], strict=True):
                assert theirs.keys() == local.keys()
                for key in local:
                    assert theirs[key] == local[key], (other, key)


USER_BUFFERS = """
import inspect, types
import torch
from megamug.distributed import cpu_backend
cpu_backend.apply()
from transformer_engine.pytorch.module import base
from megamug.configuration.reading import load_config, resolve
from megamug.distributed.tensor_overlap import tensor_overlap
signature, calls = inspect.signature(base.initialize_ub), []
base.initialize_ub = lambda *a, **k: calls.append(signature.bind(*a, **k).arguments)
base.destroy_ub = lambda: calls.append("gone")
def run(*keys):
    keys = ["model.kind=jam_cross", "parallel.tensor=2", "parallel.sequence=true", "data.context_length=64", *keys]
    calls.clear()
    with tensor_overlap(resolve(load_config(None, ["data.micro_batch_size=4", "precision.dtype=bf16", *keys]))):
        assert "gone" not in calls
    return list(calls)
assert run() == []
on = "parallel.overlap_tensor=true"
modes = base.UserBufferQuantizationMode
given, gone = run(on)
assert gone == "gone" and given["shape"] == [256, 1024] and given["tp_size"] == 2, given
assert given["quantization_modes"] == [modes.NONE] and given["dtype"] == torch.bfloat16
assert run(on, "precision.fp8=current")[0]["quantization_modes"] == [modes.FP8]
both = run(on, "precision.fp8=current", "precision.last_layers_bf16=1")[0]["quantization_modes"]
assert both == [modes.FP8, modes.NONE], both
print("RIGHT")
"""


def test_user_buffers_are_asked_for_as_transformer_engine_takes_them():
    ((code, output),) = launch(["-W", "ignore", "-c", USER_BUFFERS], 1, timeout=200)
    assert code == 0 and "RIGHT" in output, output[-4000:]

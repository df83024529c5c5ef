"""Hostile pickles in every place of a checkpoint where there can be one: refused by name, and not run.

The places are poisoned in checkpoints that `dist_checkpointing.save` wrote; each is loaded with the guard and without.
A pickle that is run makes a folder (the canary). Loading needs a process group, and the writer starts its
helper by spawn, so this file is also the script that does both: `python test_guarded.py FOLDER` writes `results.json`.
"""

import inspect
import io
import json
import os
import pickle
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megamug.checkpoint.guarded import UntrustedCheckpoint, guarded_loading
from megamug.errors import UserError


class Hostile:
    """Its pickle makes the folder `canary` when it is read."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


class WithExtraState(torch.nn.Module):
    """Reads its extra state the way Transformer Engine's modules do: a byte tensor that holds a pickle."""

    def __init__(self, state: object = None):
        super().__init__()
        self.state = state

    def get_extra_state(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(self.state)), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.state = pickle.loads(state.numpy().tobytes())


GENUINE_STATE = {"scale_fwd": torch.full((2, 3), 0.5), "history": torch.ones(4).bfloat16(), "extra": {"fp8": True}}


def state_dict(common: object = None, byte_object: object = None, extra: object = GENUINE_STATE) -> dict:
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=0.125)
    return {
        "weight": ShardedTensor.from_rank_offsets("weight", torch.arange(6.0).reshape(2, 3)),
        "half": ShardedTensor.from_rank_offsets("half", torch.arange(4.0).bfloat16()),
        "extra": ShardedObject("layer._extra_state", WithExtraState(extra).get_extra_state(), (1,), (0,)),
        "wrapped": ShardedObject("layer._wrapped_state", io.BytesIO(b"bytes"), (1,), (0,)),
        "object": ShardedObject("layer.object", byte_object or {"dtype": torch.float32, "set": {1}}, (1,), (0,)),
        "optimizer": {"param_groups": optimizer.state_dict()["param_groups"], "step": 7},
        "common": common,
    }


def load(folder: Path) -> dict:
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(state_dict(), str(folder), strict="log_all")
    module = WithExtraState()
    module.load_state_dict({"_extra_state": loaded["extra"]})
    return {**loaded, "extra": module.state}


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """One checkpoint per case; the value is its canary."""
    from megatron.core import dist_checkpointing

    canaries = {name: folder / f"canary-{name}" for name in ("metadata", "common", "object", "extra", "outside")}
    contents = {
        "genuine": {},
        "metadata": {},
        "outside": {},
        "common": {"common": Hostile(canaries["common"])},
        "object": {"byte_object": Hostile(canaries["object"])},
        "extra": {"extra": Hostile(canaries["extra"])},
    }
    for name, content in contents.items():
        (folder / name).mkdir()
        dist_checkpointing.save(
            state_dict(**content), str(folder / name), content_metadata={"distrib_optim_sharding_type": "x"}
        )
    (folder / "metadata" / ".metadata").write_bytes(pickle.dumps(Hostile(canaries["metadata"])))
    metadata = pickle.loads((folder / "outside" / ".metadata").read_bytes())
    metadata.storage_data = {
        index: type(info)(**{**vars(info), "relative_path": f"../genuine/{info.relative_path}"})
        for index, info in metadata.storage_data.items()
    }
    (folder / "outside" / ".metadata").write_bytes(pickle.dumps(metadata))
    return canaries


def attempt(folder: Path, guard: bool) -> dict:
    try:
        if guard:
            with guarded_loading():
                load(folder)
        else:
            load(folder)
    except BaseException as error:  # CheckpointException is no Exception
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": None, "message": ""}


def main(folder: Path) -> None:
    from megamug.distributed import cpu_backend

    cpu_backend.apply()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    canaries = write_checkpoints(folder)
    results = {}
    for name, canary in canaries.items():
        for guard in (True, False):
            results[f"{name}-{guard}"] = {**attempt(folder / name, guard), "canary": canary.exists()}
    before = (pickle.load, pickle.loads, pickle.Unpickler, torch.load, set(torch.serialization.get_safe_globals()))
    with guarded_loading():
        loaded = load(folder / "genuine")
    after = (pickle.load, pickle.loads, pickle.Unpickler, torch.load, set(torch.serialization.get_safe_globals()))
    assert before == after
    assert torch.equal(loaded["weight"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(loaded["half"], torch.arange(4.0).bfloat16())
    assert loaded["wrapped"].getvalue() == b"bytes"
    assert loaded["object"] == {"dtype": torch.float32, "set": {1}}
    assert loaded["optimizer"]["step"] == 7 and loaded["optimizer"]["param_groups"][0]["lr"] == 0.125
    for name, value in GENUINE_STATE.items():
        same = torch.equal(loaded["extra"][name], value) if isinstance(value, torch.Tensor) else None
        assert same is not False and (same or loaded["extra"][name] == value), name
    results["genuine"] = True
    (folder / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("guarded")
    # Set by users whose old checkpoints torch refuses: torch.load then runs what it reads unless told otherwise.
    env = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(folder)],
        env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


def test_genuine_checkpoint_loads(results):
    assert results["genuine"]


@pytest.mark.parametrize("place", ["metadata", "common", "object", "extra"])
def test_hostile_pickle_is_refused_by_name(results, place):
    result = results[f"{place}-True"]
    assert result["error"] == "UntrustedCheckpoint" and "posix.mkdir" in result["message"], result
    assert "\n" not in result["message"]
    assert not result["canary"]


@pytest.mark.parametrize("place", ["metadata", "common", "object", "extra"])
def test_the_same_pickle_runs_without_the_guard(results, place):
    assert results[f"{place}-False"]["canary"]


def test_metadata_may_not_point_outside_the_folder(results):
    assert results["outside-False"]["error"] is None  # torch follows the path
    result = results["outside-True"]
    assert result["error"] == "UntrustedCheckpoint" and "../genuine/" in result["message"]


READERS = {
    "pickle.loads": lambda data: pickle.loads(data),
    "pickle.load": lambda data: pickle.load(io.BytesIO(data)),
    "pickle.Unpickler": lambda data: pickle.Unpickler(io.BytesIO(data)).load(),
    "pickle._Unpickler": lambda data: pickle._Unpickler(io.BytesIO(data)).load(),
    "torch.load": lambda data: torch.load(io.BytesIO(data), weights_only=False),
    "torch.load, module": lambda data: torch.load(io.BytesIO(data), weights_only=False, pickle_module=pickle),
}
REFUSED = ["posix.mkdir", "builtins.eval", "builtins.getattr", "torch.hub.load", "torch.storage._load_from_bytes.x"]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_reader_is_guarded(tmp_path, reader, zipped):
    canary = tmp_path / "canary"
    if reader.startswith("torch"):
        buffer = io.BytesIO()
        torch.save(Hostile(canary), buffer, _use_new_zipfile_serialization=zipped)
        data = buffer.getvalue()
    else:
        data = pickle.dumps(Hostile(canary), protocol=4 if zipped else 2)
    with pytest.raises(UntrustedCheckpoint, match="posix.mkdir") as caught, guarded_loading():
        READERS[reader](data)
    assert not canary.exists() and isinstance(caught.value, UserError)
    READERS[reader](data)
    assert canary.exists()


@pytest.mark.parametrize("name", REFUSED)
def test_globals_are_matched_whole(name):
    module, _, attribute = name.rpartition(".")
    strings = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, attribute))
    data = b"\x80\x04" + strings + b"\x93."  # STACK_GLOBAL
    with pytest.raises(UntrustedCheckpoint, match=re.escape(name)), guarded_loading():
        pickle.loads(data)


def test_a_pickled_tensor_may_not_hide_a_pickle(tmp_path):
    class Tensor:
        def __reduce__(self):
            buffer = io.BytesIO()
            torch.save(Hostile(tmp_path / "canary"), buffer)
            return torch.storage._load_from_bytes, (buffer.getvalue(),)

    with pytest.raises(UntrustedCheckpoint, match="posix.mkdir"), guarded_loading():
        pickle.loads(pickle.dumps(Tensor()))
    assert not (tmp_path / "canary").exists()


def test_a_swallowed_refusal_comes_up_and_the_guard_nests(tmp_path):
    with pytest.raises(UntrustedCheckpoint), guarded_loading():
        with guarded_loading():
            pass
        try:
            pickle.loads(pickle.dumps(Hostile(tmp_path / "canary")))
        except UserError:
            torch.zeros(1)
    assert not (tmp_path / "canary").exists()
    with guarded_loading():  # and does not stay
        assert pickle.loads(pickle.dumps({"a": [1, (2, "b")]})) == {"a": [1, (2, "b")]}


def test_a_refusal_on_another_rank_comes_up():
    failure = pickle.loads(pickle.dumps(UntrustedCheckpoint("refused on rank 1")))  # as torch gathers it
    with pytest.raises(UntrustedCheckpoint, match="on rank 1"), guarded_loading():
        raise CheckpointException("load", {1: (failure, None)})


def test_other_errors_pass_through():
    with pytest.raises(KeyError), guarded_loading():
        raise KeyError("x")


def test_the_loading_path_reads_pickles_only_through_guarded_names():
    """A reader bound at import (`from pickle import load`) or a new module would not see the guard."""
    bound = re.compile(r"from pickle import|import pickle as|import (c?_pickle|dill|cloudpickle)|= *pickle\.\w+$")
    found = []
    for package in ("megatron.core.dist_checkpointing", "torch.distributed.checkpoint"):
        root = import_module(package)
        for module in pkgutil.walk_packages(root.__path__, package + "."):
            if "examples" in module.name:
                continue
            path = Path(module.module_finder.find_spec(module.name, None).origin)
            found += [f"{path}: {line}" for line in path.read_text().splitlines() if bound.search(line)]
    assert not found
    assert "pickle.load(" in inspect.getsource(torch.distributed.checkpoint.FileSystemReader.read_metadata)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

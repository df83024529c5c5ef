"""Files of other projects' training scripts, read for their tensors: nothing in them is run, what is left is told."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megamug.checkpoint.tensors import TensorReader
from megamug.configuration.reading import load_config
from megamug.convert.conversion import to_megamug
from megamug.convert.inert import Inert, InertUnpickler
from megamug.convert.registry import FORMATS
from megamug.convert.source import ForeignTensors
from megamug.errors import UserError
from tests.convert.common import assert_same_bits

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2), "n": torch.tensor(3)}


def script_s_checkpoint(state: dict) -> dict:
    """As MAE's `misc.save_model` writes it, with what other scripts add."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "model": state, "optimizer": optimizer.state_dict(), "epoch": 399, "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(norm_pix_loss=False, mask_ratio=0.6, output_dir=pathlib.Path("out"), seed=0),
        "best": np.float64(0.25), "losses": np.arange(5.0),
        "counts": collections.defaultdict(list, {"x": [1]}), "seen": {1, 2}, "device": torch.device("cpu"),
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_the_script_s_arguments_beside_the_tensors(tmp_path, zipped):
    path = tmp_path / "checkpoint-399.pth"
    state = OrderedDict(STATE) | {"p": torch.nn.Parameter(torch.ones(2))}
    torch.save(script_s_checkpoint(state), path, _use_new_zipfile_serialization=zipped)
    found = ForeignTensors(path)
    assert_same_bits({name: found.read(name) for name in found.names}, {n: t.detach() for n, t in state.items()})
    assert found.arguments == {"norm_pix_loss": False, "mask_ratio": 0.6, "seed": 0}
    [remark] = found.remarks
    assert remark.startswith("read for its tensors alone; left out, and not run: ")
    assert "argparse.Namespace" in remark and "scalar" in remark and "pathlib" in remark


def test_mae_s_own_script_converts_and_its_arguments_count(tmp_path):
    """norm_pix_loss says what the decoder paints; tensors do not tell."""
    pytest.importorskip("transformers", reason="transformers is not installed (extra `dev`)")
    from tests.convert.test_vision import HEADS, mae_names, vitmae

    state = mae_names(vitmae().state_dict())
    torch.save(script_s_checkpoint(state), tmp_path / "checkpoint-399.pth")
    remarks = to_megamug(FORMATS["mae"], tmp_path / "checkpoint-399.pth", tmp_path / "run", HEADS)
    assert any("argparse.Namespace" in remark for remark in remarks)
    model = load_config(tmp_path / "run" / "config.yaml").model
    assert (model.norm_pix_loss, model.mask_ratio) == (False, 0.6)
    torch.save({"model": state}, tmp_path / "bare.pth")
    remarks = to_megamug(FORMATS["mae"], tmp_path / "bare.pth", tmp_path / "bare", HEADS)
    assert any(remark.startswith("model.norm_pix_loss=true is taken") for remark in remarks)
    bare, full = TensorReader(tmp_path / "bare"), TensorReader(tmp_path / "run")
    assert_same_bits({n: bare.read(n) for n in bare.names}, {n: full.read(n) for n in full.names})


@pytest.mark.parametrize("names", [
    ["module.{}"], ["_orig_mod.{}"], ["module._orig_mod.{}"], ["_orig_mod.module.{}"], ["module.module.{}"],
    ["_fsdp_wrapped_module._checkpoint_wrapped_module.{}"],
])  # fmt: skip
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_what_wrappers_put_before_names_is_taken_off_with_a_remark(tmp_path, names, kind):
    state = {names[0].format(name): tensor for name, tensor in STATE.items()}
    torch.save({"model": state}, tmp_path / "x.pth") if kind == "pth" else save_file(state, tmp_path / "x.safetensors")
    found = ForeignTensors(tmp_path / f"x.{kind}")
    assert_same_bits({name: found.read(name) for name in found.names}, STATE)
    [remark] = found.remarks
    assert remark.startswith("taken off the names of 3 tensors: ")


def test_wrappers_inside_names_and_names_that_only_look_like_it(tmp_path):
    save_file({"blocks.0._orig_mod.w": torch.ones(1), "module.b": torch.ones(1)}, tmp_path / "x.safetensors")
    assert ForeignTensors(tmp_path / "x.safetensors").names == ["blocks.0.w", "module.b"]
    save_file({"w": torch.ones(1), "_orig_mod.w": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="with and without what wrappers put before names"):
        ForeignTensors(tmp_path / "x.safetensors")


def test_which_of_two_models_is_taken_is_told(tmp_path):
    torch.save({"model": STATE, "model_ema": {n: t + 1 for n, t in STATE.items()}}, tmp_path / "x.pth")
    found = ForeignTensors(tmp_path / "x.pth")
    assert torch.equal(found.read("a.bias"), torch.ones(2))
    assert found.remarks == ["the weights under 'model' are taken; left out: 'model_ema'"]


class Call:
    """Its pickle calls `function` when it is read by a reader that runs pickles."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def _makes_a_folder(path: str) -> str:
    os.mkdir(path)
    return path


class Maker:
    """Every hook of pickle that runs code of a class."""

    def __new__(cls, *arguments):
        if arguments:
            os.mkdir(arguments[0])
        return super().__new__(cls)

    def __setstate__(self, state):
        os.mkdir(state["path"])


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(tmp_path, zipped):
    """Functions of modules, constructors, __setstate__: placeholders. The same file read by torch runs them."""
    canaries = [tmp_path / f"canary{i}" for i in range(3)]
    hostile = [
        Call(_makes_a_folder, str(canaries[0])), Call(Maker, str(canaries[1])),
        Call(Maker, state={"path": str(canaries[2])}), Call(np.fromfile, str(tmp_path / "x.pth"), np.float32),
        Call(torch.hub.load, "a/b", "c"), Call(torch.load, str(tmp_path / "x.pth")),
    ]  # fmt: skip
    path = tmp_path / "x.pth"
    torch.save({"model": STATE, "args": hostile}, path, _use_new_zipfile_serialization=zipped)
    found = ForeignTensors(path)
    assert_same_bits({name: found.read(name) for name in found.names}, STATE)
    assert not any(canary.exists() for canary in canaries)
    assert "_makes_a_folder" in found.remarks[0] and "torch.hub.load" in found.remarks[0]
    torch.save({"model": STATE, "args": hostile[:3]}, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)
    assert all(canary.exists() for canary in canaries)  # it would have


@pytest.mark.parametrize("function, arguments", [
    (os.system, ("true",)), (eval, ("1",)), (__import__, ("os",)), (os.path.exists, ("/",)), (exec, ("1",)),
])  # fmt: skip
def test_the_operating_system_is_refused_by_name(tmp_path, function, arguments):
    torch.save({"model": STATE, "x": Call(function, *arguments)}, tmp_path / "x.pth")
    if function is os.path.exists:  # of posixpath or genericpath: a placeholder like any other
        assert ForeignTensors(tmp_path / "x.pth").names == list(STATE)
        return
    with pytest.raises(UserError, match=rf"x.pth names \w+.{function.__name__}, which .* It was not run"):
        ForeignTensors(tmp_path / "x.pth")


def _opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


@pytest.mark.parametrize("data", [
    _opcodes(b"ctorch\nfloat32\n", b"(N}tb"),  # attributes of something that exists
    _opcodes(b"ctorch.storage\nUntypedStorage\n", b"K\x05\x85R"),  # a call of what is a name alone
    _opcodes(b"K\x01", b")R"), _opcodes(b"\x82\x01"), _opcodes(b"cbuiltins\nset\n)R", b"(K\x01e"),
], ids=["build", "call", "number", "extension", "append"])  # fmt: skip
def test_steps_that_reach_outside_of_the_file_are_not_taken(data):
    import io

    before = vars(torch.Tensor).copy()
    reader = type("Reader", (InertUnpickler,), {"unknown": {}})(io.BytesIO(data))
    try:
        assert reader.load() is torch.float32
    except pickle.UnpicklingError:
        pass
    assert vars(torch.Tensor).keys() == before.keys()


def test_placeholders_keep_what_was_pickled_and_can_be_filled():
    import io

    value = {"n": argparse.Namespace(a=1, b=[2]), "d": collections.deque([1, 2]), "e": np.dtype("float32")}
    reader = type("Reader", (InertUnpickler,), {"unknown": {}})(io.BytesIO(pickle.dumps(value)))
    found = reader.load()
    assert all(isinstance(x, Inert) for x in found.values())
    assert found["n"].state == {"a": 1, "b": [2]} and found["n"].named == "argparse.Namespace"


def test_what_is_no_dictionary_of_tensors_is_told(tmp_path):
    torch.save(argparse.Namespace(a=1), tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth holds a argparse.Namespace, not a dictionary of tensors"):
        ForeignTensors(tmp_path / "x.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    with pytest.raises(UserError, match="x.pt is a TorchScript archive, a program; save its state_dict"):
        ForeignTensors(tmp_path / "x.pt")
    for tensor, kind in ((torch.ones(2, dtype=torch.complex64), "complex64"), (torch.eye(2).to_sparse(), "sparse_coo")):
        torch.save({"w": tensor}, tmp_path / "x.pth")
        with pytest.raises(UserError, match=f"w is of type torch.{kind}, which megamug does not use"):
            ForeignTensors(tmp_path / "x.pth")
    import tarfile

    with tarfile.open(tmp_path / "y.pth", "w") as tar:
        tar.add(tmp_path / "x.pth", "storages")
    with pytest.raises(UserError, match=r"y.pth"):
        ForeignTensors(tmp_path / "y.pth")

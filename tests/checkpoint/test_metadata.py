"""`.metadata` that is no description of tensors, or describes what cannot be: a sentence, no file outside is opened."""

from __future__ import annotations

import collections
import copy
import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan

from megamug.checkpoint.guarded import UntrustedCheckpoint, guarded_loading
from megamug.checkpoint.metadata import check_format, hole_of, problem_of
from megamug.checkpoint.tensors import LazyTensor, TensorReader, write_run
from megamug.configuration.reading import load_config, resolve
from megamug.errors import UserError
from tests.checkpoint.test_tensors import remanifest

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    lazy = [LazyTensor(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in TENSORS.items()]
    return write_run(tmp_path / "run", resolve(load_config(None)), lazy)


def metadata_of(checkpoint: Path):
    return pickle.loads((checkpoint / "model" / ".metadata").read_bytes())


def put(checkpoint: Path, value: object) -> None:
    (checkpoint / "model" / ".metadata").write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))
    remanifest(checkpoint)


def outside(metadata) -> dict:
    """Places that lead to a file beside the checkpoint."""
    places = copy.deepcopy(metadata.storage_data)
    for info in places.values():
        info.relative_path = "../../secret"
    return places


def look_alike(metadata):
    """A class that the guard knows, with the attributes of another."""
    plan = object.__new__(SavePlan)
    plan.__dict__.update(vars(metadata) | {"storage_data": outside(metadata)})
    return plan


def hidden_values(metadata):
    """A dictionary whose `values()` are none, and that finds the paths all the same."""
    places = collections.OrderedDict(outside(metadata))
    places.values = collections.OrderedDict
    metadata.storage_data = places
    return metadata


def changed(where: str, value: object):
    def change(metadata):
        entry, place = metadata.state_dict_metadata["a"], metadata.storage_data[MetadataIndex("a", torch.Size([0, 0]))]
        target, _, name = where.rpartition(".")
        found = {"": metadata, "entry": entry, "place": place, "chunk": entry.chunks[0], "properties": entry.properties}
        object.__setattr__(found[target], name, value)
        return metadata

    return change


@pytest.mark.parametrize("change, said", [
    (look_alike, "holds a SavePlan where a description of tensors belongs"),
    (lambda metadata: [metadata], "holds a list where"), (lambda metadata: None, "holds a NoneType where"),
    (lambda metadata: StorageMeta(), "holds a StorageMeta where"),
    (hidden_values, "files by a OrderedDict, no dictionaries"),
    (changed("storage_data", None), "files by a NoneType"), (changed("state_dict_metadata", []), "tensors by a list"),
    (changed("state_dict_metadata", {-5: 1}), "has a tensor called -5"),
    (changed("state_dict_metadata", {"\x1b[2J": 1}), r"has a tensor called '\\x1b.2J'"),
    (changed("state_dict_metadata", {"a": None}), "says of 'a' that it is a NoneType, no tensor"),
    (changed("storage_data", {}), "does not say where the piece of 'a' at .0, 0. lies"),
    (changed("storage_data", {"a": 1}), "has a place of str"),
    (changed("place.relative_path", "../../secret"), "points to a file outside the checkpoint, '../../secret'"),
    *((changed("place.relative_path", path), "points to a file outside the checkpoint")
      for path in ("a/b", "a\\b", "a\0b", "", ".", "..")),
    (changed("place.relative_path", None), "points to a file outside the checkpoint, None"),
    (changed("place.relative_path", ["x"]), "outside the checkpoint"),
    (changed("place.offset", -5), "has bytes -5"), (changed("place.length", "7"), "has bytes 0 . '7'"),
    (changed("place.transform_descriptors", 7), "has transforms 7"),
    (changed("entry.size", [2, 3]), r"the size \[2, 3\] in pieces of a list"),
    (changed("entry.chunks", None), "in pieces of a NoneType"),
    (changed("entry.size", torch.Size([-5, 3])), "the size"), (changed("entry.chunks", []), "in pieces of a list"),
    (changed("entry.properties", None), "no type of numbers"), (changed("properties.dtype", "x"), "no type of numbers"),
    (changed("chunk.sizes", torch.Size([5, 3])), "a piece of .5, 3. at .0, 0., outside of .2, 3."),
    (changed("chunk.offsets", None), "a piece of"), (changed("entry.chunks", [1]), "a piece of int"),
])  # fmt: skip
def test_what_is_no_description_of_tensors_is_refused_in_a_sentence(checkpoint, change, said):
    """A look-alike passed the guard, and its paths were followed."""
    (checkpoint.parent.parent / "secret").write_bytes((checkpoint / "model" / "__0_0.distcp").read_bytes())
    put(checkpoint, change(metadata_of(checkpoint)))
    with pytest.raises(UserError, match=f"file .*.metadata .*{said}") as caught:
        reader = TensorReader(checkpoint)
        reader.read("a")
    assert "\n" not in str(caught.value)


def test_sizes_that_cannot_be_made_are_told(checkpoint):
    data = (checkpoint / "model" / ".metadata").read_bytes()
    number = b"\x8a\x09" + (2**63).to_bytes(9, "little")
    put(checkpoint, b"\x80\x04ctorch\nSize\n(" + number + b"t\x85R.")  # torch.Size((2**63,))
    with pytest.raises(UserError, match=r"metadata (cannot be made of what is in it .Overflow|holds a Size where)"):
        TensorReader(checkpoint)
    put(checkpoint, data[: len(data) // 2])
    with pytest.raises(UserError, match="its tensors cannot be read|cannot be made of what is in it"):
        TensorReader(checkpoint)


def test_sound_metadata_has_no_problem_and_any_reader_of_a_description_is_guarded(checkpoint):
    metadata = metadata_of(checkpoint)
    assert problem_of(metadata) is None
    with guarded_loading():
        assert pickle.loads(pickle.dumps(metadata)) == metadata
    with pytest.raises(UntrustedCheckpoint), guarded_loading():
        pickle.load(io.BytesIO(pickle.dumps(hidden_values(metadata))))


def pieces(size: int, *places: tuple[int, int]) -> SimpleNamespace:
    """A row of `size` numbers in pieces of (first, numbers)."""
    chunks = [ChunkStorageMetadata(torch.Size([first]), torch.Size([count])) for first, count in places]
    return SimpleNamespace(size=torch.Size([size]), chunks=chunks)


def test_pieces_that_lie_over_one_another():
    assert hole_of(pieces(6, (0, 4), (4, 2))) is None and hole_of(pieces(6, (4, 2), (0, 4), (0, 0))) is None
    for places in (((0, 4), (3, 2)), ((3, 2), (0, 4))):
        assert hole_of(pieces(6, *places)) == "two of its pieces lie over one another"
    assert hole_of(pieces(6, (0, 3), (0, 3))) == "two of its pieces lie in one place"
    many = [(n, 1) for n in range(510)]  # pairs are looked at up to 512 pieces
    assert hole_of(pieces(514, *many, (510, 3), (512, 1))) == "two of its pieces lie over one another"
    assert hole_of(pieces(515, *many, (514, 1), (510, 3), (512, 1))) is None


def test_pieces_that_leave_a_part_out_are_not_read(checkpoint):
    """The rest of the tensor would be what the memory held."""
    for sizes, offsets, said in (([1, 3], None, "its pieces have 3 of 6 values"),
                                 ([1, 3], [0, 0], "two of its pieces lie in one place")):  # fmt: skip
        metadata = metadata_of(checkpoint)
        entry = metadata.state_dict_metadata["a"]
        one = copy.deepcopy(entry.chunks[0])
        object.__setattr__(one, "sizes", torch.Size(sizes))
        entry.chunks[:] = [one, copy.deepcopy(one)] if offsets else [one]
        put(checkpoint, metadata)
        with pytest.raises(UserError, match=f"a is not whole .{said}"):
            TensorReader(checkpoint).read("a")
        write_back = metadata_of(checkpoint)
        write_back.state_dict_metadata["a"].chunks[:] = [entry.chunks[0]]
        object.__setattr__(write_back.state_dict_metadata["a"].chunks[0], "sizes", torch.Size([2, 3]))
        put(checkpoint, write_back)
    assert torch.equal(TensorReader(checkpoint).read("a"), TENSORS["a"])


@pytest.mark.parametrize("change", [
    None, [], {}, {"sharded_backend": None}, {"sharded_backend_version": "1"}, {"sharded_backend_version": -5},
    {"sharded_backend_version": 2**63}, {"common_backend": 7}, {"common_backend_version": None},
    {"sharded_backend": "zarr"},
])  # fmt: skip
def test_metadata_json_of_wrong_types(checkpoint, change):
    path = checkpoint / "model" / "metadata.json"
    check_format(checkpoint / "model")
    own = json.loads(path.read_text())
    path.write_text(json.dumps(own | change if isinstance(change, dict) and change else change))
    with pytest.raises(UserError, match="metadata.json is not what Megatron-core writes of a torch_dist folder"):
        check_format(checkpoint / "model")
    path.write_text("{")
    with pytest.raises(UserError, match="metadata.json cannot be read"):
        check_format(checkpoint / "model")

"""Checkpoints as streams: what Megatron wrote is read tensor by tensor, what is streamed is read by Megatron."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megamug.checkpoint.store import CheckpointStore
from megamug.checkpoint.tensors import LazyTensor, TensorReader, write_run
from megamug.configuration.reading import load_config
from megamug.configuration.sections import Config
from megamug.errors import UserError
from tests.distributed.cases.layout_worker import tiny
from tests.distributed.launch import python_path


def lazy(name: str, tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def mug(seed: int):
    from megamug.models.init import initialise
    from megamug.models.mug.model import Mug
    from megamug.models.mug.plan import MugPlan

    model = Mug(MugPlan(tiny({}), 70))
    initialise(model.sharded_state_dict(), seed)
    return model


def global_tensors(model) -> dict[str, torch.Tensor]:
    return {entry.key: entry.data for entry in model.sharded_state_dict().values()}


def test_reads_what_the_trainer_writes(tmp_path, world):
    from megamug.checkpoint.saver import Saver

    model = mug(1)
    saver = Saver(CheckpointStore(tmp_path, keep=0), world, asynchronous=False)
    saver.save(7, [model], None, {"step": 7})
    reader = TensorReader(tmp_path)
    expected = global_tensors(model)
    assert reader.step == 7 and set(reader.names) == set(expected) and not reader.optimizer_names
    for name, tensor in expected.items():
        assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.read(name), tensor), name
    assert TensorReader(reader.folder).names == reader.names


@pytest.mark.parametrize("file_bytes", [1, 50_000, 4 << 30])
def test_the_model_loads_what_is_streamed(tmp_path, world, file_bytes):
    from megamug.checkpoint import state

    source, target = mug(1), mug(2)
    path = write_run(
        tmp_path / "run", tiny({}), [lazy(*item) for item in global_tensors(source).items()], file_bytes=file_bytes
    )
    files = len(list((path / "model").glob("*.distcp")))
    assert {1: files == len(global_tensors(source)), 50_000: files > 2, 4 << 30: files == 1}[file_bytes], files
    assert CheckpointStore(tmp_path / "run", 0).newest_complete().path == path
    assert load_config(tmp_path / "run" / "config.yaml").model == tiny({}).model
    state.load_tensors([target], None, world, path / "model", step=0)
    expected, loaded = global_tensors(source), global_tensors(target)
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)


def test_pieces_of_several_ranks_make_one_tensor(tmp_path):
    """A tensor cut along both axes, in two files: as tensor-parallel ranks write it."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    whole = torch.arange(24.0).view(4, 6)
    path = write_run(tmp_path / "run", Config(), [lazy("weight", whole)])
    metadata = pickle.loads((path / "model" / ".metadata").read_bytes())
    metadata.storage_data, entry = {}, metadata.state_dict_metadata["weight"]
    entry.chunks = []
    for rank, rows in enumerate((slice(0, 3), slice(3, 4))):
        with open(path / "model" / f"__{rank}_0.distcp", "wb") as file:
            for columns in (slice(0, 2), slice(2, 6)):
                offset, piece = file.tell(), whole[rows, columns].clone()
                torch.save(piece, file)
                chunk = ChunkStorageMetadata(torch.Size([rows.start, columns.start]), piece.shape)
                entry.chunks.append(chunk)
                metadata.storage_data[MetadataIndex("weight", chunk.offsets, len(entry.chunks) - 1)] = _StorageInfo(
                    file_name(file), offset, file.tell() - offset
                )
    (path / "model" / ".metadata").write_bytes(pickle.dumps(metadata))
    remanifest(path)
    assert torch.equal(TensorReader(path).read("weight"), whole)


def file_name(file) -> str:
    return Path(file.name).name


def remanifest(path: Path) -> None:
    """A manifest that agrees with whatever now lies in the folder: malice, not damage."""
    from megamug.checkpoint.store import _write_manifest

    (path / "manifest.json").unlink()
    _write_manifest(path, 0)


def test_one_tensor_is_alive_at_a_time(tmp_path):
    made: list[StorageWeakRef] = []

    def make(value: int) -> torch.Tensor:
        assert all(storage.expired() for storage in made), f"an earlier tensor is alive when w{value} is asked for"
        tensor = torch.full((64, 64), float(value))
        made.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    tensors = (LazyTensor(f"w{i}", (64, 64), torch.float32, lambda i=i: make(i)) for i in range(20))
    path = write_run(tmp_path / "run", Config(), tensors)
    assert len(made) == 20
    assert all((TensorReader(path).read(f"w{i}") == i).all() for i in (0, 19))


PEAK = """
import resource, sys, torch
from megamug.checkpoint.tensors import LazyTensor, TensorReader, write_run
from megamug.configuration.sections import Config
count, folder = int(sys.argv[1]), sys.argv[2]
def tensors():
    for i in range(count):
        yield LazyTensor(f"w{i}", (1024, 4096), torch.float32, lambda i=i: torch.full((1024, 4096), float(i)))
path = write_run(folder, Config(), tensors())
reader = TensorReader(path)
for i in range(count):
    assert reader.read(f"w{i}")[5, 7] == i
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Peak resident memory of a process that writes and reads 32 MiB, then 160 MiB, of 16 MiB tensors."""
    def peak(count: int) -> int:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PEAK, str(count), str(tmp_path / f"run{count}")],
            capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return int(done.stdout) >> 10

    small, large = peak(2), peak(10)
    assert large - small < 40, f"{small} MiB, {large} MiB"


def test_a_hostile_pickle_does_nothing(tmp_path):
    path = write_run(tmp_path / "run", Config(), [lazy("weight", torch.ones(3))])
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    (path / "model" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    remanifest(path)
    with pytest.raises(UserError, match="posix.mkdir"):
        TensorReader(path)
    assert not canary.exists()
    pickle.loads((path / "model" / ".metadata").read_bytes())
    assert canary.exists()  # it would have


def test_damage_and_wrong_folders_end_in_a_sentence(tmp_path):
    path = write_run(tmp_path / "run", Config(), [lazy("weight", torch.ones(3))])
    with pytest.raises(UserError, match="holds a run already"):
        write_run(tmp_path / "run", Config(), [])
    with pytest.raises(UserError, match="has no tensor bias"):
        TensorReader(path).read("bias")
    file = path / "model" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged .*__0_0.distcp"):
        TensorReader(path)
    with pytest.raises(UserError, match="no complete checkpoint"):
        TensorReader(tmp_path / "run")
    with pytest.raises(UserError, match="neither a run folder"):
        TensorReader(tmp_path)


def test_a_write_that_fails_leaves_no_checkpoint_and_may_be_repeated(tmp_path):
    def fail() -> torch.Tensor:
        raise OSError("the source is gone")

    good = lazy("a", torch.ones(3))
    with pytest.raises(OSError, match="gone"):
        write_run(tmp_path / "run", Config(), [good, LazyTensor("b", (3,), torch.float32, fail)])
    assert CheckpointStore(tmp_path / "run", 0).newest_complete() is None
    path = write_run(tmp_path / "run", Config(), [good])
    assert json.loads((path / "state.json").read_text())["weights_only"] is True

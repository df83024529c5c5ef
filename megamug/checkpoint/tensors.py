"""Checkpoints as streams of whole tensors: one parameter in memory at a time, no process group, no model.

    reader = TensorReader("runs/mug")
    write_run("runs/fused", config, [tensor for tensor in reader.tensors()])

`TensorReader` reads what any layout wrote; `write_run` writes a run whose one checkpoint, `step-00000000`, holds only
weights. Files are those of Megatron-core's torch_dist format (torch.distributed.checkpoint): `.metadata` says where
each piece of each tensor lies, `__0_N.distcp` holds the pieces as `torch.save` writes them.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megamug.checkpoint import configured
from megamug.checkpoint.guarded import guarded_loading
from megamug.checkpoint.metadata import FILE as METADATA
from megamug.checkpoint.metadata import hole_of
from megamug.checkpoint.optimizer_state import AVERAGE
from megamug.checkpoint.store import STATE, STEP_FOLDER, CheckpointStore
from megamug.configuration.reading import absolute, save_config, to_yaml
from megamug.configuration.sections import Config
from megamug.errors import UserError

OPTIMIZER = "optimizer."  # what precedes the names of Adam's moments and of fp32 main parameters
FILE_BYTES = 4 << 30  # a file is closed when it has grown to this size
# Both read by Megatron-core 0.16 to 0.19; later ones write no common.pt of their own, and read it where there is one.
FORMAT = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1,
    "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip


class LazyTensor(NamedTuple):
    """A tensor that is made when it is needed: global name, shape and dtype, and what makes it (on the CPU)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorReader:
    """The tensors of a checkpoint under their global names and shapes, whatever layout and layer spec wrote it.

    Args:
        path: a run folder (its newest complete checkpoint) or a checkpoint folder `step-XXXXXXXX`.

    Every byte is checked against the manifest first, and what is pickled is read under `guarded_loading`. Raises
    UserError: no checkpoint there, a damaged one, one that names what no checkpoint needs.

    `names` are the model's tensors; `optimizer_names` what the optimizer keeps (Adam's moments, averages of weights)
    and the fp32 main parameters of bf16 runs.
    """

    def __init__(self, path: str | Path):
        self.step, self.folder = _find(Path(path))
        metadata = read_metadata(self.folder)
        entries = metadata.state_dict_metadata
        self._stored = {name: e for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}
        self._places = metadata.storage_data
        self.names = [name for name in self._stored if not name.startswith(OPTIMIZER)]
        self.optimizer_names = [name for name in self._stored if name.startswith(OPTIMIZER)]
        self._averages: dict[str, str] = {}  # of the model's tensors, the names of those that stand for them

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def take_averages(self) -> str | None:
        """From now on `read` and `dtype` of the model's tensors give averages of the weights where the checkpoint keeps
        some; then a remark that says so."""
        prefix = f"{OPTIMIZER}{AVERAGE}."
        stored = {name.removeprefix(prefix): name for name in self.optimizer_names if name.startswith(prefix)}
        self._averages = {name: average for name, average in stored.items() if name in self._stored}
        return averages_remark(len(self._averages)) if self._averages else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The global shape of a tensor. Raises UserError where there is none of that name."""
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(self._averages.get(name, name)).properties.dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`, on the CPU, put together from the pieces of all ranks."""
        name = self._averages.get(name, name)
        entry = self._entry(name)
        first = entry.chunks[0]
        if first.sizes == entry.size:
            return self._piece(name, first)
        if hole := hole_of(entry):
            raise UserError(f"{self.folder}: {name} is not whole ({hole}); take another checkpoint")
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            place = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place] = self._piece(name, chunk)
        return whole

    def tensors(self) -> Iterator[LazyTensor]:
        """The model's tensors, unread, of the types that they are stored in."""
        for name in self.names:
            dtype = self._entry(name).properties.dtype
            yield LazyTensor(name, self.shape(name), dtype, lambda name=name, dtype=dtype: self.read(name).to(dtype))

    def state(self) -> dict:
        """`state.json`: step, cursor, identity, and `origin` of a run that was not trained here."""
        return json.loads((self.folder / STATE).read_text(encoding="utf-8"))

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self._stored:
            raise UserError(f"{self.folder} has no tensor {name}; see megamug inspect {self.folder}")
        return self._stored[name]

    def _piece(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._places[MetadataIndex(name, chunk.offsets)]
        with guarded_loading(), open(self.folder / "model" / place.relative_path, "rb") as file:
            piece = torch.load(_create_file_view(file, place.offset, place.length), map_location="cpu")
        dtype = self._entry(name).properties.dtype
        if not isinstance(piece, Tensor) or piece.shape != chunk.sizes or piece.dtype != dtype:
            raise UserError(f"{self.folder}: {name} is not what its metadata says; take another checkpoint")
        return piece


def averages_remark(count: int) -> str:
    """How it is told that averages are read."""
    return f"averages of the weights are taken where the run keeps them (classifier.ema): {count} tensors"


def read_metadata(folder: Path) -> Metadata:
    """`.metadata` of the checkpoint folder `folder`, which is not verified here. Raises UserError where it cannot be
    read, or is not what it should be (`megamug.checkpoint.metadata`)."""
    try:
        with guarded_loading(), open(folder / "model" / METADATA, "rb") as file:
            return pickle.load(file)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{folder}: its tensors cannot be read: {error}; take another checkpoint") from None


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shapes of the model's tensors in the checkpoint folder `folder`, by name. Raises UserError as
    `read_metadata` does."""
    entries = read_metadata(folder).state_dict_metadata.items()
    return {name: tuple(entry.size) for name, entry in entries
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(OPTIMIZER)}  # fmt: skip


def _find(path: Path) -> tuple[int, Path]:
    """(step, folder) of the verified checkpoint that `path`, a run or a checkpoint folder, means."""
    match = STEP_FOLDER.fullmatch(path.name)
    if match and path.is_dir():
        problems = CheckpointStore(path.parent.parent, keep=0).verify(path)
        if problems:
            raise UserError(f"{path} is damaged ({problems[0]}); take another checkpoint")
        return int(match[1]), path
    if not (path / "checkpoints").is_dir():
        raise UserError(f"{path} is neither a run folder (with checkpoints/) nor a checkpoint (step-XXXXXXXX)")
    complete = CheckpointStore(path, keep=0).newest_complete()
    if complete is None:
        raise UserError(f"{path} has no complete checkpoint")
    return complete.step, complete.path


def write_run(
    run_dir: str | Path,
    config: Config,
    tensors: Iterable[LazyTensor],
    identity: dict | None = None,
    origin: dict | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Writes RUN/config.yaml and the complete checkpoint `step-00000000`, which holds `tensors` and no optimizer state.

    Each tensor is made, written and let go before the next one is made. `identity` (what the task compares before it
    goes on with a run: vocabulary, arithmetic) defaults to no tokenizer and the configured dtype; `origin` says where
    the weights are from. Returns the folder of the checkpoint; `model.initial` and `load_run` read it.

    Raises UserError where the folder holds another run, OSError where the disk fails: no checkpoint is visible then.
    """
    run_dir = Path(run_dir)
    config = dataclasses.replace(config, run_dir=str(run_dir))
    path, store = run_dir / "config.yaml", CheckpointStore(run_dir, keep=0)
    other = path.is_file() and path.read_text(encoding="utf-8") != to_yaml(absolute(config))
    if other or any(store.root.glob("step-*")):
        raise UserError(f"{run_dir} holds a run already; choose a folder that does not exist")
    save_config(config)
    folder = store.begin(0)
    _write_tensors(folder / "model", tensors, file_bytes)
    state = {
        "step": 0, "updates": 0, "cursor": None, "weights_only": True,
        "identity": identity or {"data.tokenizer": None, "precision.dtype": config.precision.dtype},
        "origin": origin or {}, configured.KEY: configured.recorded(config),
    }  # fmt: skip
    (folder / STATE).write_text(json.dumps(state, indent=1))
    return store.commit(0)


def _write_tensors(folder: Path, tensors: Iterable[LazyTensor], file_bytes: int) -> None:
    """The torch_dist files of `folder`. torch's own writer holds on to all tensors of a file until it is closed."""
    entries: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    count, file = 0, None
    try:
        for lazy in tensors:
            assert lazy.name not in entries, f"{lazy.name} is written twice"
            if file is None or file.tell() >= file_bytes:
                if file is not None:
                    file.close()
                file = open(folder / f"__0_{count}.distcp", "wb")
                count += 1
            size, first = torch.Size(lazy.shape), torch.Size([0] * len(lazy.shape))
            offset = file.tell()
            torch.save(_made(lazy), file)
            properties = TensorProperties(dtype=lazy.dtype)
            entries[lazy.name] = TensorStorageMetadata(properties, size, [ChunkStorageMetadata(first, size)])
            relative_path = f"__0_{count - 1}.distcp"
            places[MetadataIndex(lazy.name, first)] = _StorageInfo(relative_path, offset, file.tell() - offset)
    finally:
        if file is not None:
            file.close()
    metadata = Metadata(entries, storage_data=places, storage_meta=StorageMeta())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(FORMAT))


def _made(lazy: LazyTensor) -> Tensor:
    tensor = lazy.read().detach().contiguous()
    assert tuple(tensor.shape) == tuple(lazy.shape) and tensor.dtype == lazy.dtype, (
        f"{lazy.name}: {tuple(tensor.shape)} {tensor.dtype} made where {lazy.shape} {lazy.dtype} was promised"
    )
    # A view would be saved with all of the storage behind it.
    return tensor if tensor.untyped_storage().size() == tensor.nbytes else tensor.clone()

"""Safetensors written as a stream: the header follows from names, shapes and dtypes, so each tensor is made, written
and let go before the next one (https://github.com/huggingface/safetensors: header length, JSON header, bytes). On
request a model is a .pth of torch instead."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megamug.checkpoint.tensors import LazyTensor
from megamug.convert.source import DTYPES
from megamug.durable import fsync_folder
from megamug.errors import UserError

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_folder(
    output: str | Path, tensors: Sequence[LazyTensor], max_shard_bytes: int, files: dict[str, dict] | None = None
) -> list[Path]:
    """Writes OUTPUT/model.safetensors, or shards of at most `max_shard_bytes` (a larger tensor has one to itself) and
    their index, and the JSON `files`. The folder appears whole or not at all. Returns the tensor files.

    Raises UserError where the folder exists, OSError where the disk fails.
    """
    shards = _shards(tensors, max_shard_bytes)
    count = len(shards)
    names = ["model.safetensors"] if count == 1 else [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]  # fmt: skip
    files = dict(files or {})
    if count > 1:
        files["model.safetensors.index.json"] = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
    with _appearing(Path(output), files) as partial:
        for name, shard in zip(names, shards, strict=True):
            write_file(partial / name, shard)
    return [Path(output) / name for name in names]


def write_pth(output: str | Path, tensors: Sequence[LazyTensor], files: dict[str, dict] | None = None) -> Path:
    """Writes OUTPUT/model.pth as MAE's scripts read it, {"model": {name: tensor}}, and the JSON `files`; all tensors
    are in memory at once. Raises as `write_folder` does."""
    with _appearing(Path(output), files or {}) as partial, open(partial / "model.pth", "wb") as file:
        torch.save({"model": {tensor.name: tensor.read().detach().contiguous() for tensor in tensors}}, file)
        file.flush()
        os.fsync(file.fileno())
    return Path(output) / "model.pth"


@contextmanager
def _appearing(output: Path, files: dict[str, dict]) -> Iterator[Path]:
    """A folder to fill, which is `output` once it is whole, the JSON `files` in it."""
    if output.exists():
        raise UserError(f"{output} exists; choose another folder, or remove it")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for name, tree in files.items():
        (partial / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    fsync_folder(partial)
    os.rename(partial, output)
    fsync_folder(output.parent)


def _shards(tensors: Sequence[LazyTensor], limit: int) -> list[list[LazyTensor]]:
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_file(path: Path, tensors: Sequence[LazyTensor], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file. The widest types come first, so that every tensor stays aligned."""
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for tensor in tensors:
        assert tensor.name not in header, f"{tensor.name} is written twice"
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]
        }  # fmt: skip
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for lazy in tensors:
            file.write(_bytes_of(lazy))  # in one expression: no name holds on to it while the next one is made
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(lazy: LazyTensor) -> memoryview:
    tensor = lazy.read().detach().contiguous()
    assert tuple(tensor.shape) == tuple(lazy.shape) and tensor.dtype == lazy.dtype, lazy.name
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())

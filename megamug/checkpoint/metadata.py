"""What `.metadata` of a torch_dist folder must be before anything follows it: which tensors there are, in which pieces,
and in which file, where, each piece lies.

It is a pickle, and the guard decides which classes it may name. Their objects can still hold anything: a class that has
the attributes of `Metadata` and is not it, a dictionary whose `values` are not its values, a path that leads out of the
folder, a list where a size belongs. So every type is compared exactly, before a path is opened or a tensor made.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megamug.errors import UserError

FILE = ".metadata"
FORMAT_FILE, BACKEND = "metadata.json", "torch_dist"


def problem_of(value: object) -> str | None:
    """What is wrong with an unpickled `.metadata`, the end of a sentence that begins with the file; None if sound."""
    if type(value) is not Metadata:
        return f"holds a {type(value).__name__} where a description of tensors belongs"
    entries, places = vars(value).get("state_dict_metadata"), vars(value).get("storage_data")
    if type(entries) is not dict or type(places) is not dict:
        found = type(entries).__name__, type(places).__name__
        return f"describes tensors by a {found[0]} and files by a {found[1]}, no dictionaries"
    for index, info in places.items():
        if problem := _place_problem(index, info):
            return problem
    for name, entry in entries.items():
        if type(name) is not str or not name.isprintable():
            return f"has a tensor called {name!r:.60}"
        if type(entry) is BytesStorageMetadata:
            continue
        if problem := _entry_problem(entry):
            return f"says of {name!r:.200} {problem}"
        for chunk in entry.chunks:
            if MetadataIndex(name, chunk.offsets) not in places:
                return f"does not say where the piece of {name!r:.200} at {list(chunk.offsets)} lies"
    return None


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_size(value: object) -> bool:
    return type(value) is torch.Size and all(_is_count(number) for number in value)


def _place_problem(index: object, info: object) -> str | None:
    if type(index) is not MetadataIndex or type(vars(index).get("fqn")) is not str:
        return f"has a place of {type(index).__name__} where that of a tensor belongs"
    if type(info) is not _StorageInfo:
        return f"has a {type(info).__name__} where the place of {index.fqn!r:.200} belongs"
    found = vars(info)
    path = found.get("relative_path")
    if type(path) is not str or "/" in path or "\\" in path or "\0" in path or path in ("", ".", ".."):
        return f"points to a file outside the checkpoint, {path!r:.200}"
    if not _is_count(found.get("offset")) or not _is_count(found.get("length")):
        return f"has bytes {found.get('offset')!r:.40} + {found.get('length')!r:.40} of {path!r:.200}"
    transforms = found.get("transform_descriptors")
    if transforms is not None and not (type(transforms) in (list, tuple) and all(type(t) is str for t in transforms)):
        return f"has transforms {transforms!r:.60} of {path!r:.200}"
    return None


def _entry_problem(entry: object) -> str | None:
    if type(entry) is not TensorStorageMetadata:
        return f"that it is a {type(entry).__name__}, no tensor"
    found = vars(entry)
    size, chunks, properties = found.get("size"), found.get("chunks"), found.get("properties")
    if type(properties) is not TensorProperties or not isinstance(vars(properties).get("dtype"), torch.dtype):
        return "no type of numbers"
    if not _is_size(size) or type(chunks) is not list or not chunks:
        return f"the size {size!r:.60} in pieces of a {type(chunks).__name__}"
    for chunk in chunks:
        if type(chunk) is not ChunkStorageMetadata:
            return f"a piece of {type(chunk).__name__}"
        offsets, sizes = vars(chunk).get("offsets"), vars(chunk).get("sizes")
        if not (_is_size(offsets) and _is_size(sizes) and len(offsets) == len(sizes) == len(size)):
            return f"a piece of {sizes!r:.60} at {offsets!r:.60} in {list(size)}"
        if any(offset + part > whole for offset, part, whole in zip(offsets, sizes, size, strict=True)):
            return f"a piece of {list(sizes)} at {list(offsets)}, outside of {list(size)}"
    return None


def hole_of(entry: TensorStorageMetadata) -> str | None:
    """Whether the pieces of a sound entry lie over one another or leave a part of the tensor out: then it would be
    filled with what the memory held."""
    total = sum(chunk.sizes.numel() for chunk in entry.chunks)
    if total != entry.size.numel():
        return f"its pieces have {total} of {entry.size.numel()} values"
    chunks = [chunk for chunk in entry.chunks if chunk.sizes.numel()]
    seen = {tuple(chunk.offsets) for chunk in chunks}
    if len(seen) < len(chunks):
        return "two of its pieces lie in one place"
    if len(chunks) > 512:  # of that many ranks; pairs of them would be too many
        return None
    for i, one in enumerate(chunks):
        for other in chunks[:i]:
            if all(max(a, b) < min(a + m, b + n) for a, m, b, n in
                   zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)):  # fmt: skip
                return "two of its pieces lie over one another"
    return None


def check_format(folder: Path) -> None:
    """`metadata.json` of the torch_dist folder `folder`, which Megatron-core reads without a look at its types. Raises
    UserError where it is absent or not what Megatron-core writes."""
    path = folder / FORMAT_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); take another checkpoint") from None
    sound = isinstance(found, dict) and found.get("sharded_backend") == BACKEND
    for part in ("sharded_backend", "common_backend"):
        version = found.get(f"{part}_version", 1) if sound else None
        sound = sound and type(found.get(part, "torch")) is str and type(version) is int and 0 < version < 100
    if not sound:
        raise UserError(f"{path} is not what Megatron-core writes of a {BACKEND} folder; take another checkpoint")

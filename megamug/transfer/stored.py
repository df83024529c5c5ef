"""Features as they lie on disk: one row an image.

    features.safetensors    class_token, mean, layer_N: float32 [n, h]; labels int64 [n], -1 where there is none
    features.jsonl          a line a row: {"shard", "key", "label", "caption"}

or, with the ending .npz, one file of numpy arrays: those, and "shard: key" and caption of each row as `keys` and
`captions`, which `texts` reads: the UTF-8 of all rows one behind the other (`captions_utf8`, uint8), and where each
begins (`captions_starts`, int64 [n + 1], the last the end). An array of texts would take four bytes a character of the
longest one for each row.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from megamug.checkpoint.tensors import LazyTensor
from megamug.convert.safetensors_out import write_file
from megamug.durable import fsync_folder, replace_text, replacing
from megamug.errors import UserError

ENDINGS = (".safetensors", ".npz")
SETTINGS = "settings"  # of the header: what made them
TEXTS = ("keys", "captions")  # of .npz


@dataclass
class Summary:
    images: int
    left_out: int
    labelled: int
    width: int
    names: list[str]


@dataclass
class StoredFeatures:
    """`tensors`: by name, float32 [n, h]; `labels`: int64 [n], -1 for none; `settings`: what made them."""

    path: Path
    tensors: dict[str, Tensor]
    labels: Tensor
    settings: dict

    def __len__(self) -> int:
        return len(self.labels)

    def named(self, name: str) -> Tensor:
        """The features `name`, [n, h]. Raises UserError where there are none."""
        if name not in self.tensors:
            raise UserError(f"{self.path} has no feature {name!r}; it has {', '.join(self.tensors)}")
        return self.tensors[name]

    def labelled(self, name: str) -> tuple[Tensor, Tensor]:
        """(features `name`, labels) of the rows with a label. Raises UserError where there are none."""
        features = self.named(name)
        known = self.labels >= 0
        if not known.any():
            raise UserError(f"{self.path} has no labels: extract features of shards that have some (KEY.cls, or `label`"
                            " in KEY.json)")  # fmt: skip
        return features[known], self.labels[known]


@dataclass
class Rows:
    """What the rows are of: `keys`, "shard: key" each, and captions, "" for none."""

    keys: list[str]
    captions: list[str]


def write(output: Path, parts: Sequence[Path], settings: dict, describe: Callable[[int], dict]) -> Summary:
    """Puts the files `parts` together, in order; `describe(row)` is the line of a row. For .safetensors one kind of
    feature is in memory at a time."""
    rows = torch.cat([load_file(path)["rows"] for path in parts])
    if not len(rows):
        raise UserError(f"{output}: not one image decodes")
    lines = [describe(int(row)) for row in rows]
    labels = torch.tensor([-1 if line["label"] is None else line["label"] for line in lines], dtype=torch.int64)
    found = {name for path in parts for name in _names(path)}
    names = sorted(found, key=lambda name: (name.startswith("layer"), name == "mean", len(name), name))
    width = next(load_file(path)[names[0]].shape[1] for path in parts if names[0] in _names(path))

    def whole(name: str) -> Tensor:
        return torch.cat([load_file(path)[name] for path in parts if name in _names(path)])

    if output.suffix == ".npz":
        with replacing(output) as file:
            np.savez(
                file, **{name: whole(name).numpy() for name in names}, labels=labels.numpy(),
                **_packed("keys", [f"{line['shard']}: {line['key']}" for line in lines]),
                **_packed("captions", [line["caption"] for line in lines]),
                **{SETTINGS: np.array(json.dumps(settings))},
            )  # fmt: skip
    else:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        replace_text(output.with_suffix(".jsonl"), text)
        lazy = [LazyTensor(name, (len(rows), width), torch.float32, partial(whole, name)) for name in names]
        lazy.append(LazyTensor("labels", tuple(labels.shape), labels.dtype, lambda: labels))
        aside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        try:
            write_file(aside, lazy, {SETTINGS: json.dumps(settings)})
            os.replace(aside, output)
        finally:
            aside.unlink(missing_ok=True)
        fsync_folder(output.parent)
    return Summary(len(rows), settings["images"] - len(rows), int((labels >= 0).sum()), width, names)


def _packed(name: str, texts: list[str]) -> dict[str, np.ndarray]:
    rows = [text.encode() for text in texts]
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return {f"{name}_utf8": np.frombuffer(b"".join(rows), np.uint8), f"{name}_starts": starts}


def texts(path: str | Path, name: str) -> list[str]:
    """`keys` or `captions` of a .npz that `megamug features` wrote, a text a row. Raises UserError where there are
    none, and for a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data, starts = file[f"{name}_utf8"].tobytes(), file[f"{name}_starts"]
        if starts[0] != 0 or starts[-1] != len(data) or (np.diff(starts) < 0).any():
            raise ValueError(f"{name}_starts do not lead from 0 to {len(data)}")
        return [data[first:end].decode() for first, end in zip(starts[:-1], starts[1:], strict=True)]
    except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} has no {name} that can be read ({error}); extract the features again") from None


def _names(part: Path) -> set[str]:
    with safe_open(part, "pt") as file:
        return set(file.keys()) - {"rows"}


def is_of(path: Path, settings: dict) -> bool:
    """Whether `path` is whole and holds features that were made by these settings; its numbers are not read."""
    beside = path.suffix == ".npz" or path.with_suffix(".jsonl").is_file()
    try:
        return beside and path.is_file() and _settings(path) == settings
    except (SafetensorError, OSError, ValueError, zipfile.BadZipFile):  # damaged: it is written anew
        return False


def _settings(path: Path) -> dict:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file[SETTINGS])) if SETTINGS in file else {}
    with safe_open(path, "pt") as file:  # it compares the header with the length of the file
        return json.loads((file.metadata() or {}).get(SETTINGS, "{}"))


def rows_of(features: StoredFeatures) -> Rows | None:
    """What lies beside the features of each row; None where nothing does. Raises UserError: damaged, other rows."""
    path = features.path if features.path.suffix == ".npz" else features.path.with_suffix(".jsonl")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:  # `read` has read it
            if not {f"{name}_utf8" for name in TEXTS} <= set(file.files):
                return None
        rows = Rows(*(texts(path, name) for name in TEXTS))
    elif not path.is_file():
        return None
    else:
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            rows = Rows([f"{line['shard']}: {line['key']}" for line in lines], [line["caption"] for line in lines])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}); extract the features again") from None
    if not len(features) == len(rows.keys) == len(rows.captions):
        raise UserError(f"{path} describes {len(rows.keys)} rows and {features.path} has {len(features)}; extract the"
                        " features again")  # fmt: skip
    return rows


def read(path: str | Path) -> StoredFeatures:
    """Features that `megamug features` wrote, or arrays of others in the same form. Raises UserError: no such file,
    another ending, a damaged file, no labels array, rows that differ in number, numbers that are not finite."""
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise UserError(f"{path}: features lie in files that end in {' or '.join(ENDINGS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; write it: megamug features RUN --data SHARDS --output {path}")
    try:
        settings = _settings(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                beside = {SETTINGS, *TEXTS, *(f"{name}_{part}" for name in TEXTS for part in ("utf8", "starts"))}
                arrays = {n: file[n] for n in file.files if n not in beside}
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        else:
            tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); extract the features again") from None
    if "labels" not in tensors:
        raise UserError(f"{path} has no array `labels` (int64, -1 for none)")
    labels = tensors.pop("labels")
    if labels.dim() != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise UserError(f"{path}: labels are {labels.dtype} {list(labels.shape)}; whole numbers [n] wanted")
    labels = labels.long()
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or len(tensor) != len(labels) or not tensor.dtype.is_floating_point:
            raise UserError(f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}; numbers [{len(labels)}, h] wanted")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} has numbers that are not finite")
    return StoredFeatures(path, {name: tensor.float() for name, tensor in tensors.items()}, labels, settings)

"""Foreign checkpoints, read tensor by tensor: safetensors files, whole or in shards, and pickles through the guard."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamug.checkpoint.guarded import UntrustedCheckpoint, guarded_loading
from megamug.errors import UserError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
NESTED = ("model", "state_dict", "model_state_dict", "ema")  # under these keys training scripts keep the weights
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip


class ForeignTensors:
    """The tensors of a file, or of a folder as transformers writes it, and its `config.json` where it has one.

    Raises UserError: nothing there, a truncated or damaged file, a pickle that names more than tensors (it is not run).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.remarks: list[str] = []  # what was left out or read in another way, a sentence each
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._readers: dict[str, Callable[[str], Tensor]] = {}
        folder = self.path if self.path.is_dir() else self.path.parent
        self.config = _json(folder / "config.json")
        self.preprocessor = _json(folder / "preprocessor_config.json")
        for file in _files(self.path):
            if file.suffix == ".safetensors":
                self._add_safetensors(file)
            else:
                self._add_pickle(file)
        if not self._shapes:
            raise UserError(f"{self.path} holds no tensors")

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._shapes[name][1]

    def read(self, name: str) -> Tensor:
        return self._readers[name](name)

    def _add(self, name: str, shape, dtype: torch.dtype, reader: Callable[[str], Tensor]) -> None:
        self._shapes[name] = (tuple(shape), dtype)
        self._readers[name] = reader

    def _add_safetensors(self, path: Path) -> None:
        def read(name: str) -> Tensor:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)

        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise UserError(f"{path}: {name} is of type {part.get_dtype()}, which megamug does not use")
                    self._add(name, part.get_shape(), DTYPES[part.get_dtype()], read)
        except FileNotFoundError:
            raise UserError(f"{path} is missing; copy it again from where the checkpoint is from") from None
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a whole safetensors file ({error}): it is truncated or damaged; copy it again"
            ) from None

    def _add_pickle(self, path: Path) -> None:
        try:
            with guarded_loading():
                try:  # mapped: a tensor takes memory when it is read
                    content = torch.load(path, map_location="cpu", mmap=True)
                except RuntimeError:  # torch's format before 1.6 cannot be mapped
                    content = torch.load(path, map_location="cpu")
        except FileNotFoundError:
            raise UserError(f"{path} is missing; copy it again from where the checkpoint is from") from None
        except UntrustedCheckpoint:
            raise
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{path} is not a whole torch file ({first}): it is truncated or damaged; copy it again"
            ) from None
        for key in NESTED:
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
                break
        if not isinstance(content, dict):
            raise UserError(f"{path} holds {type(content).__name__}, not a dictionary of tensors")
        for name, tensor in content.items():
            if isinstance(tensor, Tensor):
                self._add(str(name), tensor.shape, tensor.dtype, lambda _, tensor=tensor: tensor)


def _files(path: Path) -> list[Path]:
    """The tensor files that `path` means."""
    if path.is_file():
        if path.suffix != ".safetensors" and path.suffix not in PICKLES:
            raise UserError(f"{path}: a file ends in .safetensors or one of {', '.join(PICKLES)}")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    for index, whole in zip(INDEXES, WHOLE, strict=True):
        weight_map = (_json(path / index) or {}).get("weight_map")
        if isinstance(weight_map, dict):
            files = sorted(set(weight_map.values()))
            if any("/" in str(file) for file in files):
                raise UserError(f"{path / index} points outside its folder")
            return [path / file for file in files]
        if (path / whole).is_file():
            return [path / whole]
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path} is a run folder of megamug, not another library's; say --from megamug")
    raise UserError(f"{path} holds none of {', '.join((*WHOLE, *INDEXES))}; name the file itself")


def _json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error})") from None
    return tree if isinstance(tree, dict) else None

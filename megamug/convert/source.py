"""Foreign checkpoints, read tensor by tensor: safetensors files, whole or in shards, and pickles through the guard, or,
where they hold more than tensors, inertly (`megamug.convert.inert`)."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamug.checkpoint.guarded import UntrustedCheckpoint, guarded_loading
from megamug.convert import inert
from megamug.convert.shown import shown
from megamug.errors import UserError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
# Under these keys training scripts keep the weights; the first one there is read.
NESTED = ("model", "state_dict", "model_state_dict", "module", "ema", "model_ema", "state_dict_ema")
# What data parallelism, torch.compile, FSDP and activation checkpointing put into names: in front, or anywhere.
IN_FRONT, ANYWHERE = "module.", ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip


class ForeignTensors:
    """The tensors of a file, or of a folder as transformers writes it, and its `config.json` where it has one.

    Names are those of the bare model: what wrappers put before them is taken off, and what a terminal would not print
    is escaped. `arguments`: of the script that wrote the file, where it kept them (`args`). `remarks`: a sentence on
    each thing that was left out or read otherwise.

    Raises UserError: nothing there, a truncated or damaged file, a pickle that names the operating system (no pickle is
    run, see `megamug.convert.inert`), tensors of a type that megamug does not use.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.remarks: list[str] = []
        self.arguments: dict[str, object] = {}
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
        self._unwrap()

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._shapes[name][1]

    def read(self, name: str) -> Tensor:
        return self._readers[name](name)

    def _unwrap(self) -> None:
        names = dict.fromkeys(self._shapes)
        for name in names:
            names[name] = name
            for wrapper in ANYWHERE:
                names[name] = names[name].replace(f".{wrapper}", ".").removeprefix(wrapper)
        while all(name.startswith(IN_FRONT) for name in names.values()):
            names = {name: inner.removeprefix(IN_FRONT) for name, inner in names.items()}
        changed = [name for name, inner in names.items() if name != inner]
        if not changed:
            return
        if len(set(names.values())) < len(names):
            raise UserError(f"{self.path} holds tensors with and without what wrappers put before names ({changed[0]});"
                            " which of them are meant it does not tell; remove some")  # fmt: skip
        found = {part for part in (IN_FRONT, *ANYWHERE) if any(part in name for name in changed)}
        self.remarks.append(f"taken off the names of {len(changed)} tensors: {', '.join(sorted(found))}")
        readers = {inner: (self._readers[name], name) for name, inner in names.items()}
        self._readers = {inner: lambda _, r=read, n=name: r(n) for inner, (read, name) in readers.items()}
        self._shapes = {inner: self._shapes[name] for name, inner in names.items()}

    def _add(self, name: str, shape, dtype: torch.dtype, reader: Callable[[str], Tensor]) -> None:
        key = shown(name)
        if key in self._shapes:
            raise UserError(f"{self.path} holds the tensor {key} twice; it does not tell which is meant; remove one")
        self._shapes[key] = (tuple(shape), dtype)
        self._readers[key] = reader if key == name else lambda _: reader(name)

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
        _check_archive(path)
        unknown: list[str] = []
        try:
            with guarded_loading():
                try:  # mapped: a tensor takes memory when it is read
                    content = torch.load(path, map_location="cpu", mmap=True)
                except RuntimeError:  # torch's format before 1.6 cannot be mapped
                    content = torch.load(path, map_location="cpu")
        except FileNotFoundError:
            raise UserError(f"{path} is missing; copy it again from where the checkpoint is from") from None
        except UntrustedCheckpoint:  # more than tensors, or noise
            content, unknown = inert.load(path)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{path} is not a whole torch file ({first}): it is truncated or damaged; copy it again"
            ) from None
        if unknown:
            self.remarks.append(f"read for its tensors alone; left out, and not run: {', '.join(unknown)}")
        if not isinstance(content, dict):
            raise UserError(f"{path} holds {_kind(content)}, not a dictionary of tensors")
        arguments = content.get("args")
        self.arguments = _plain(arguments.state if isinstance(arguments, inert.Inert) else arguments)
        under = [key for key in NESTED if isinstance(content.get(key), dict)]
        if len(under) > 1:
            others = ", ".join(map(repr, under[1:]))
            self.remarks.append(f"the weights under {under[0]!r} are taken; left out: {others}")
        content = content[under[0]] if under else content
        for name, tensor in content.items():
            if not isinstance(tensor, Tensor):
                continue
            if tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided:
                kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
                raise UserError(f"{path}: {name} is of type {kind}, which megamug does not use")
            self._add(str(name), tensor.shape, tensor.dtype, lambda _, tensor=tensor: tensor.detach())
        others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
        if under and others:
            self.remarks.append(f"left out, no tensors: {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}")


def _check_archive(path: Path) -> None:
    """Raises UserError for TorchScript, which is a program and not a dictionary."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise UserError(f"{path} is a TorchScript archive, a program; save its state_dict() with torch.save and"
                            " give that")  # fmt: skip


def _kind(content: object) -> str:
    """A class of another library is called by its name there."""
    return f"a {content.named}" if isinstance(content, inert.Inert) else type(content).__name__


def _plain(arguments: object) -> dict[str, object]:
    """What a script's arguments say in plain numbers, switches and texts."""
    pairs = arguments.items() if isinstance(arguments, dict) else ()
    return {key: value for key, value in pairs if isinstance(key, str) and isinstance(value, bool | int | float | str)}


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

"""Loading a checkpoint without trusting it.

A pickle is a program: it may call any function it can name. Megatron-core's torch_dist checkpoints hold pickles in
four places, read at these points (megatron-core 0.16 to 0.19, torch 2.10 to 2.13):

| where                                  | read by                                                                |
|----------------------------------------|------------------------------------------------------------------------|
| `.metadata`                            | `FileSystemReader.read_metadata`: `pickle.load`                        |
| `common.pt` (0.16), `common_state`     | `torch.load` in Megatron's `strategies/common.py`, `serialization.py`  |
| BYTE_IO objects in `*.distcp`          | `DefaultLoadPlanner.load_bytes`: `torch.load(weights_only=False)`      |
| Transformer Engine's `_extra_state`    | `set_extra_state`, in `load_state_dict`: `pickle.loads`, `torch.load`  |

Inside `guarded_loading()` all of these go through allow lists: `pickle.load(s)` and `pickle.Unpickler` know only what
`ALLOWED` names, and `torch.load` is forced to `weights_only=True` with no globals beyond torch's own but `io.BytesIO`
(Megatron's wrapper of an extra state). What a pickle names beyond that is never imported nor called.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megamug.checkpoint import metadata
from megamug.errors import UserError


class UntrustedCheckpoint(UserError):
    """A checkpoint names something that a checkpoint has no need of. The message names it; nothing of it was run."""


_RECIPES = "transformer_engine.common.recipe"
_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"

# What plain pickles may name: (module, name). Classes that only hold data, and torch's tensor rebuilding.
ALLOWED = frozenset(
    {
        *[("builtins", name) for name in ("set", "frozenset", "complex", "bytearray")],
        ("_codecs", "encode"),  # bytes in pickles of protocol 2
        ("collections", "OrderedDict"),
        ("io", "BytesIO"),
        ("_io", "BytesIO"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("torch._utils", "_rebuild_tensor_v2"),
        # .metadata
        *[(_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata")],
        *[(_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties")],
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        # the plans that Megatron keeps in .metadata to reuse them in the next save
        *[(_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")],
        (_PLANNER, "BytesIOWriteData"),
        # Transformer Engine's extra state: its FP8 recipe
        *[(_RECIPES, name) for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling")],
        *[(_RECIPES, name) for name in ("MXFP8BlockScaling", "Format", "_FormatHelper", "MMParams", "QParams")],
        ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
    }
)
# How pickle, unlike torch.save, writes a tensor's storage: a call of one of these on the bytes of a `torch.save`.
PICKLED_STORAGE = frozenset(
    {("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes")}  # 0.19 swaps it
)
TORCH_LOAD_GLOBALS = [io.BytesIO]

_lock = threading.RLock()
_depth = 0
_refused: list[str] = []  # what was refused since the outermost guard was entered
_originals: dict[tuple[Any, str], Any] = {}
_original_safe_globals: list = []


@contextlib.contextmanager
def guarded_loading() -> Iterator[None]:
    """Restrict unpickling in this process to what a checkpoint needs, while Megatron-core loads one.

    Around `dist_checkpointing.load` *and* the `load_state_dict` that follows it (Transformer Engine unpickles its
    extra state there). May be nested. The guard holds for all threads, so that a reader's helper threads are not a way
    around it. Raises UntrustedCheckpoint, also where the code in between wraps or swallows the refusal.
    """
    _enter()
    try:
        yield
    except BaseException as error:  # CheckpointException, which carries what happened on any rank, is no Exception
        refusal = _refusal_in(error)
        if refusal is not None and refusal is not error:
            raise refusal from error
        raise
    else:
        if _refused:
            raise _untrusted(_refused[0])
    finally:
        _leave()


def _enter() -> None:
    global _depth, _original_safe_globals
    with _lock:
        _depth += 1
        if _depth > 1:
            return
        _refused.clear()
        _original_safe_globals = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(TORCH_LOAD_GLOBALS)
        replacements = {
            (pickle, "load"): _load,
            (pickle, "loads"): _loads,
            (pickle, "Unpickler"): GuardedUnpickler,
            (pickle, "_Unpickler"): GuardedUnpickler,
            (torch, "load"): _torch_load,
        }
        for (module, name), replacement in replacements.items():
            _originals[module, name] = getattr(module, name)
            setattr(module, name, replacement)


def _leave() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth > 0:
            return
        for (module, name), original in _originals.items():
            setattr(module, name, original)
        _originals.clear()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(_original_safe_globals)


def _untrusted(what: str) -> UntrustedCheckpoint:
    return UntrustedCheckpoint(
        f"checkpoint refused: {what}, which no checkpoint of megamug holds. It was not run. "
        "If the checkpoint is from elsewhere do not load it; if it is your own, it is damaged: resume an earlier one"
    )


def _refuse(what: str) -> UntrustedCheckpoint:
    _refused.append(what)
    return _untrusted(what)


def _refusal_in(error: BaseException) -> UntrustedCheckpoint | None:
    """The refusal behind `error`: of this process, or of another rank whose failure torch has gathered."""
    if isinstance(error, UntrustedCheckpoint):
        return error
    if _refused:
        return _untrusted(_refused[0])
    if isinstance(error, CheckpointException):
        for failure, _ in error.failures.values():
            if isinstance(failure, UntrustedCheckpoint):
                return failure
    return None


def _name_of(source: Any) -> str:
    """How to call the file in a message."""
    name = getattr(source, "name", source)
    return f"file {name}" if isinstance(name, str) or hasattr(name, "__fspath__") else "an object inside it"


class GuardedUnpickler(pickle.Unpickler):
    """`pickle.Unpickler` that finds only `ALLOWED` globals and torch dtypes."""

    def __init__(self, file, **kwargs):
        super().__init__(file, **kwargs)
        self._source = _name_of(file)
        self._describes = self._source.endswith(metadata.FILE)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PICKLED_STORAGE:
            return _load_storage
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _refuse(f"{self._source} names {module}.{name}")

    def load(self) -> Any:
        try:
            value = super().load()
        except (UntrustedCheckpoint, pickle.UnpicklingError, EOFError, MemoryError):
            raise
        except Exception as error:  # a size of 2^63, a call with arguments that its class does not take, ...
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise _refuse(f"{self._source} cannot be made of what is in it ({said})") from error
        if self._describes or isinstance(value, Metadata):
            if problem := metadata.problem_of(value):
                raise _refuse(f"{self._source} {problem}")
        return value


def _load(file, **kwargs) -> Any:
    return GuardedUnpickler(file, **kwargs).load()


def _loads(data, /, **kwargs) -> Any:
    return GuardedUnpickler(io.BytesIO(data), **kwargs).load()


def _load_storage(data: bytes) -> Any:
    return _torch_load(io.BytesIO(data))


def _torch_load(f, map_location=None, pickle_module=None, *, weights_only=None, mmap=None, **kwargs) -> Any:
    """`torch.load`, always with `weights_only=True`; another pickle module is not heard of."""
    try:
        return _originals[torch, "load"](f, map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise _refuse(f"{_name_of(f)} {_reason(str(error))}") from error


def _reason(message: str) -> str:
    """The one clause of torch's long message that says what was refused."""
    for pattern in (r"GLOBAL (\S+) was not an allowed global", r"(?:Trying to load|import) unsupported GLOBAL (\S+)"):
        match = re.search(pattern, message)
        if match:
            return f"names {match[1]}"
    if match := re.search(r"Unsupported operand \d+", message):
        return f"is damaged, or no file of tensors: it holds something unknown ({match[0]})"
    clauses = [line.strip() for line in message.splitlines() if "WeightsUnpickler error:" in line]
    return f"asks for something unknown ({clauses[0] if clauses else message.splitlines()[0].strip()})"

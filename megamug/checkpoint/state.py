"""What a checkpoint holds, and how each rank's part of it gets its layout-free name.

Model parameters, fp32 main parameters (bf16 runs) and AdamW's two moments (SGD's or LARS's one) are tensors named after
the parameter, with global shape and offset; Megatron's torch_dist format stores them so that any layout can read them.
Step, cursor and configuration are JSON. Nothing is pickled by us; what the format itself pickles is read under a guard.
"""

from __future__ import annotations

import dataclasses
import inspect
import queue
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from torch import Tensor

from megamug.checkpoint.fp8_parameters import is_fp8, set_value, unrounded
from megamug.checkpoint.guarded import guarded_loading
from megamug.checkpoint.metadata import check_format
from megamug.checkpoint.optimizer_state import AVERAGE, MainState, SavedOptimizer

Entry = ShardedTensor | ShardedTensorFactory  # a factory: one parameter that is stored in parts (gated feed-forward)


def entries_of(chunks: list[torch.nn.Module]) -> list[Entry]:
    """This rank's part of every parameter of its chunks; `key` is the global name. A tied weight may come twice."""
    return [entry for chunk in chunks for entry in chunk.sharded_state_dict().values()]


def _by_key(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Each key once: of two copies on this rank the first, which is the one that is written."""
    found: dict[str, Entry] = {}
    for entry in entries:
        found.setdefault(entry.key, entry)
    return found


def _by_parameter(chunks: list[torch.nn.Module], entries: list[Entry]) -> dict[str, Entry]:
    """The entries under the names of `torch.nn.ModuleList(chunks)`, as the optimizer calls its parameters."""
    by_storage = {_storage(e.data): e for e in entries}
    return {name: by_storage[_storage(p)] for name, p in torch.nn.ModuleList(chunks).named_parameters()}


def _storage(tensor: Tensor) -> object:
    """The same for a parameter and for the tensor of its entry. An FP8 one has no storage; its entry holds itself."""
    return id(tensor) if is_fp8(tensor) else (tensor.data_ptr(), tensor.shape)


def _kinds(chunks: list[torch.nn.Module], optimizer: SavedOptimizer) -> list[str]:
    """What the optimizer keeps of a parameter in a checkpoint, beside the parameter itself."""
    return [*optimizer.moments, *(["main"] if next(chunks[0].parameters()).dtype != torch.float32 else [])]


def _of_optimizer(kind: str, entry: Entry, data: Tensor) -> Entry:
    """`data`, of the shape of the parameter of `entry`, under the optimizer's name for it."""
    dtype = {"dtype": data.dtype} if isinstance(entry, ShardedTensor) else {}
    return dataclasses.replace(entry, key=f"optimizer.{kind}.{entry.key}", data=data, **dtype)


def whole(state: MainState | None, kind: str, parameter: Tensor, optimizer: SavedOptimizer, world) -> Tensor:
    """One state tensor over this rank's whole part of the parameter; a collective under the distributed optimizer."""
    part = None if state is None else state.main if kind == "main" else state.moment(kind)
    if part is not None and state.span is None:
        full = part.detach()
    else:
        full = torch.zeros(parameter.numel(), dtype=torch.float32, device=world.device)
        if part is not None:
            full[slice(*state.span)] = part.detach().view(-1)
    if optimizer.distributed and world.dp_size > 1:
        dist.all_reduce(full, group=world.dp_group)  # each element stands on one rank, zeros elsewhere
    return full.view(parameter.shape)


def sharded_state(
    chunks: list[torch.nn.Module], optimizer: SavedOptimizer | None, world
) -> dict[str, dict[str, Entry]]:
    """{"model": ..., "optimizer": ...}: what is saved, by key. `chunks` are the bare ones of this rank."""
    if optimizer is None:
        return {"model": _by_key(entries_of(chunks))}
    optimizer.gather_parameters()
    entries = entries_of(chunks)
    by_parameter = _by_parameter(chunks, entries)
    states = {state.name: state for state in optimizer.main_states()}
    model, tensors = _by_key(entries), []
    for name in sorted(optimizer.names.values()):
        entry = by_parameter[name]
        for kind in _kinds(chunks, optimizer):
            data = whole(states.get(name), kind, entry.data, optimizer, world)
            tensors.append(_of_optimizer(kind, entry, data))
            if kind == "main" and is_fp8(entry.data):
                # As a run without FP8 parameters would store it: what reads the model has no use for FP8's rounding.
                model[entry.key] = dataclasses.replace(entry, data=data.to(entry.data.dtype))
    return {"model": model, "optimizer": _by_key(tensors)}


class TensorWrite:
    """The tensors of one checkpoint on their way into `folder` (exists, empty). All ranks make one, call `write`, and
    when all have returned call `finish`. `write` communicates with nobody: another thread may run it, if nothing
    changes the tensors meanwhile.
    """

    def __init__(self, state: dict, folder: Path):
        if filesystem_async._results_queue is None:
            # Megatron's own is in a helper process, so that its writer may be another process. Ours is not, and a
            # signal to all processes of a job, as schedulers send it, must not end what the last save needs.
            filesystem_async._results_queue = queue.Queue()
        self._errors: list[Exception] = []  # of what rank 0 writes for all
        options = {"validate_access_integrity": True, "async_sharded_save": True}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # Megatron-core above 0.16
            options["async_strategy"] = "mcore"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _kept(self._errors):
                self.request = dist_checkpointing.save(state, str(folder), ("torch_dist", 1), **options)

    def write(self) -> None:
        """Writes this rank's part. Raises OSError or RuntimeError where it cannot, on this rank alone: then no rank may
        call `finish`.

        In threads of this process: one that Megatron forked would outlive a rank that is killed, and keep what it
        inherited, the port that ranks meet at among it. The file system takes the time, and the interpreter's lock is
        free meanwhile.
        """
        if self._errors:
            raise self._errors[0]
        request = self.request
        if request.async_fn is None:  # nothing to write on this rank
            return
        _, buckets, results = request.async_fn_args
        transforms = request.async_fn.args[0]
        buckets = request.preload_fn() if request.preload_fn else buckets
        written: queue.Queue = queue.Queue()

        def write_bucket(index: int) -> None:
            at_work: queue.Queue = queue.Queue()
            at_work.put(index)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, index, buckets[index], written, at_work, use_fsync=False
            )  # the commit makes files durable

        with ThreadPoolExecutor(len(buckets)) as pool:
            list(pool.map(write_bucket, range(len(buckets))))
        found = dict(written.get() for _ in buckets)
        failed = next((outcome for outcome in found.values() if isinstance(outcome, Exception)), None)
        if failed is not None:
            raise failed
        results.put(found)

    def finish(self) -> None:
        """Writes what describes all parts. A collective. Raises OSError or RuntimeError on rank 0 if it cannot."""
        with _kept(self._errors):
            for finalize in self.request.finalize_fns:
                finalize()
        if self._errors:
            raise self._errors[0]


@contextmanager
def _kept(errors: list[Exception]) -> Iterator[None]:
    """Inside, a file that Megatron has rank 0 alone write fails into `errors`, between two collectives: raised there,
    it would leave the other ranks waiting."""

    def quiet(write):
        def wrapped(*arguments, **options):
            try:
                return write(*arguments, **options)
            except (OSError, RuntimeError) as error:
                errors.append(error)

        return wrapped

    originals = [(owner, name, getattr(owner, name)) for owner, name in _BY_RANK_0]
    for owner, name, write in originals:
        setattr(owner, name, quiet(write))
    try:
        yield
    finally:
        for owner, name, write in originals:
            setattr(owner, name, write)


_BY_RANK_0 = [(filesystem_async.FileSystemWriterAsync, "finish"), (serialization, "save_config")]
if hasattr(common, "TorchCommonSaveStrategy"):  # Megatron-core 0.16; later ones write no file of their own for it
    _BY_RANK_0.append((common.TorchCommonSaveStrategy, "save_common"))


def save_tensors(state: dict, folder: Path) -> None:
    """Writes the tensors into `folder` (exists, empty). A collective."""
    writing = TensorWrite(state, folder)
    writing.write()
    dist.barrier()
    writing.finish()


def of_parts(key: str, parts: tuple[str, ...]) -> bool:
    """Whether the tensor `key` is of one of some parts of a model; of none named, whatever it is."""
    return not parts or key.split(".", 1)[0] in parts


def load_averages(chunks: list[torch.nn.Module], folder: Path, names: set[str]) -> list[str]:
    """Loads the averages of weights that `folder` keeps (`names`: what it stores) in the place of the weights; returns
    the names of those that have one."""
    entries = [e for e in entries_of(chunks) if f"optimizer.{AVERAGE}.{e.key}" in names]
    wanted = _by_key(
        _of_optimizer(AVERAGE, e, torch.empty(e.data.shape, dtype=torch.float32, device=e.data.device)) for e in entries
    )
    if not wanted:
        return []
    with guarded_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = dist_checkpointing.load({"average": wanted}, str(folder))["average"]
    with torch.no_grad():
        for entry in entries:
            entry.data.copy_(loaded[f"optimizer.{AVERAGE}.{entry.key}"])
    return [entry.key for entry in entries]


def load_tensors(
    chunks: list[torch.nn.Module], optimizer: SavedOptimizer | None, world, folder: Path, step: int,
    parts: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Loads `folder` into the chunks (or some `parts` of them) and, unless None, the optimizer. Any layout reads what
    any layout wrote."""
    entries = [entry for entry in entries_of(chunks) if of_parts(entry.key, parts)]
    state = {"model": _by_key(unrounded(entry) for entry in entries)}
    if optimizer is not None:
        by_parameter = _by_parameter(chunks, entries)
        state["optimizer"] = _by_key(
            _of_optimizer(kind, entry, torch.empty(entry.data.shape, dtype=torch.float32, device=world.device))
            for entry in (by_parameter[name] for name in optimizer.names.values())
            for kind in _kinds(chunks, optimizer)
        )
    check_format(folder)
    with guarded_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = dist_checkpointing.load(state, str(folder))
    with torch.no_grad():
        for entry in entries_of(chunks):
            if of_parts(entry.key, parts):
                set_value(entry.data, loaded["model"][entry.key])
        if optimizer is None:
            return
        tensors = loaded["optimizer"]
        for main_state in optimizer.main_states():
            key = by_parameter[main_state.name].key
            for kind in (*optimizer.moments, "main"):
                if kind == "main":
                    if main_state.main is main_state.parameter:
                        continue
                    source = tensors.get(f"optimizer.main.{key}", main_state.parameter)
                    target = main_state.main
                else:
                    source, target = tensors[f"optimizer.{kind}.{key}"], main_state.moment(kind)
                flat = source.detach().reshape(-1)
                target.view(-1).copy_(flat if main_state.span is None else flat[slice(*main_state.span)])
        optimizer.round_parameters()
    optimizer.restore_step(step)

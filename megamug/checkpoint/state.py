"""What a checkpoint holds, and how each rank's part of it gets its layout-free name.

Model parameters, fp32 main parameters (bf16 runs) and Adam's two moments are tensors named after the parameter, with
global shape and offset; Megatron's torch_dist format stores them so that any layout can read them. Step, cursor and
configuration are JSON. Nothing is pickled by us; what the format itself pickles is read under a guard.
"""

from __future__ import annotations

import dataclasses
import inspect
import queue
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megamug.checkpoint.guarded import guarded_loading
from megamug.optim import MOMENTS, MainState, Optimizer


def _full(state: MainState, part: Tensor, group) -> Tensor:
    """A state tensor over the whole (tensor-parallel slice of the) parameter, joined over the data-parallel ranks."""
    if state.span is None:
        return part.detach().view(state.parameter.shape)
    full = torch.zeros(state.parameter.numel(), dtype=torch.float32, device=part.device)
    full[slice(*state.span)] = part.detach().view(-1)
    return full


def _optimizer_tensors(optimizer: Optimizer, model_shards: dict[str, ShardedTensor], world, dtype: torch.dtype) -> dict:
    """{"exp_avg.NAME": ShardedTensor, ...} over whole parameters; collective over the data-parallel group."""
    by_name = {state.name: state for state in optimizer.main_states()}
    kinds = [*MOMENTS, *(["main"] if dtype != torch.float32 else [])]
    tensors = {}
    for name in sorted(optimizer.names.values()):
        shard, state = model_shards[name], by_name.get(name)
        for kind in kinds:
            if state is not None:
                full = _full(state, state.main if kind == "main" else state.moment(kind), world.dp_group)
            else:
                full = torch.zeros(shard.data.numel(), dtype=torch.float32, device=world.device)
            if optimizer.distributed and world.dp_size > 1:
                dist.all_reduce(full, group=world.dp_group)  # each element stands on one rank, zeros elsewhere
            tensors[f"{kind}.{name}"] = dataclasses.replace(
                shard, key=f"optimizer.{kind}.{shard.key}", data=full.view(shard.data.shape), dtype=torch.float32
            )
    return tensors


def sharded_state(model: torch.nn.Module, optimizer: Optimizer | None, world) -> dict:
    """The nested dictionary of ShardedTensors that is saved and loaded. `model` is the bare stage."""
    if optimizer is not None:
        optimizer.gather_parameters()
    model_shards = model.sharded_state_dict()
    state = {"model": model_shards}
    if optimizer is not None:
        named = {name: entry for name, entry in model_shards.items() if isinstance(entry, ShardedTensor)}
        dtype = next(model.parameters()).dtype
        state["optimizer"] = _optimizer_tensors(optimizer, _by_parameter(model, named), world, dtype)
    return state


def _by_parameter(model: torch.nn.Module, entries: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    """The entries under the parameters' own names (checkpoint names differ where specs or stages differ)."""
    by_storage = {(e.data.data_ptr(), e.data.shape): e for e in entries.values()}
    return {name: by_storage[p.data_ptr(), p.shape] for name, p in model.named_parameters()}


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
        options = {"validate_access_integrity": True, "async_sharded_save": True}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # Megatron-core above 0.16
            options["async_strategy"] = "mcore"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.request = dist_checkpointing.save(state, str(folder), ("torch_dist", 1), **options)

    def write(self) -> None:
        """Writes this rank's part. An error in it is raised by `finish`, on all ranks."""
        request = self.request
        if request.async_fn is None:  # nothing to write on this rank
            return
        rank, buckets, results = request.async_fn_args
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            request.async_fn(rank, request.preload_fn() if request.preload_fn else buckets, results)

    def finish(self) -> None:
        """Writes what describes all parts. A collective. Raises RuntimeError on all ranks if one could not write."""
        try:
            for finalize in self.request.finalize_fns:
                finalize()
        except CheckpointException as error:  # not an Exception
            failures = "; ".join(f"rank {rank}: {reason}" for rank, (reason, _) in error.failures.items())
            raise RuntimeError(f"the checkpoint could not be written: {failures} (see log/rank-N.log)") from error


def save_tensors(state: dict, folder: Path) -> None:
    """Writes the tensors into `folder` (exists, empty). A collective."""
    writing = TensorWrite(state, folder)
    writing.write()
    dist.barrier()
    writing.finish()


def load_tensors(model: torch.nn.Module, optimizer: Optimizer | None, world, folder: Path, step: int) -> None:
    """Loads `folder` into the model and, unless None, the optimizer. Any layout reads what any layout wrote."""
    state = sharded_state(model, optimizer, world)
    with guarded_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = dist_checkpointing.load(state, str(folder))
    with torch.no_grad():
        targets = model.sharded_state_dict()
        for name, tensor in loaded["model"].items():
            targets[name].data.copy_(tensor)
        if optimizer is None:
            return
        tensors = loaded["optimizer"]
        for main_state in optimizer.main_states():
            for kind in (*MOMENTS, "main"):
                if kind == "main":
                    if main_state.main is main_state.parameter:
                        continue
                    source = tensors.get(f"main.{main_state.name}", main_state.parameter)
                    target = main_state.main
                else:
                    source, target = tensors[f"{kind}.{main_state.name}"], main_state.moment(kind)
                flat = source.detach().reshape(-1)
                target.view(-1).copy_(flat if main_state.span is None else flat[slice(*main_state.span)])
    optimizer.restore_step(step)

"""Saving and resuming on all ranks: the tensors by Megatron's torch_dist format, the folder by `CheckpointStore`."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megamug.checkpoint import state
from megamug.checkpoint.store import CheckpointStore
from megamug.errors import UserError

logger = logging.getLogger(__name__)

STATE = "state.json"


def read_state(folder: Path) -> dict:
    """`state.json` of a checkpoint: step, updates, cursor, and the parts of the configuration that must not change."""
    return json.loads((folder / STATE).read_text())


class Saver:
    """Writes checkpoints of one run; all ranks call every method alike.

    `asynchronous`: tensors are copied and written by a helper process while training goes on; `poll` (once a step)
    completes the checkpoint when all ranks have written, `wait` completes it now.
    """

    def __init__(self, store: CheckpointStore, world, asynchronous: bool):
        self.store, self.world, self.queue = store, world, None
        if asynchronous:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            self.queue = AsyncCallsQueue()

    def save(self, step: int, model: torch.nn.Module, optimizer, contents: dict) -> None:
        """Starts (and, unless asynchronous, ends) the checkpoint of `step`. `contents` becomes `state.json`."""
        self.wait()
        if self.world.is_first:
            folder = self.store.begin(step)
            (folder / STATE).write_text(json.dumps(contents, indent=1))
        dist.barrier()
        tensors = state.sharded_state(model, optimizer, self.world)
        folder = self.store.partial_path(step) / "model"
        if self.queue is None:
            state.save_tensors(tensors, folder)
            self._commit(step)
            return
        request = state.save_tensors(_copied(tensors), folder, asynchronous=True)
        request.add_finalize_fn(lambda: self._commit(step))
        self.queue.schedule_async_request(request)

    def _commit(self, step: int) -> None:
        dist.barrier()
        if self.world.is_first:
            logger.info("checkpoint saved: %s", self.store.commit(step))
        dist.barrier()

    def poll(self) -> None:
        if self.queue is not None:
            self.queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        if self.queue is not None:
            self.queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        """Completes what is under way."""
        if self.queue is not None:
            self.wait()
            self.queue.close()


def _copied(tensors: dict) -> dict:
    """Copies on the host: training goes on changing the originals."""
    return {
        section: {
            name: dataclasses.replace(entry, data=entry.data.detach().to("cpu", copy=True))
            if isinstance(entry, ShardedTensor)
            else entry
            for name, entry in entries.items()
        }
        for section, entries in tensors.items()
    }


def find(store: CheckpointStore, world) -> tuple[int, Path, str] | None:
    """The newest complete checkpoint, verified by rank 0, the same answer on every rank."""
    found = [None]
    if world.is_first:
        store.recover()
        complete = store.newest_complete()
        found = [None if complete is None else (complete.step, str(complete.path), complete.reason)]
    if world.size > 1:
        dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        return None
    step, path, reason = found[0]
    return step, Path(path), reason


def need_space(run_dir: Path, parameters: int, dtype_bytes: int) -> None:
    """Raises UserError where the disk cannot hold one checkpoint (model, two moments, main parameters)."""
    needed = parameters * (dtype_bytes + 8 + (4 if dtype_bytes < 4 else 0))
    free = shutil.disk_usage(run_dir).free
    if free < 1.1 * needed:
        raise UserError(
            f"run_dir: a checkpoint needs {needed / 2**30:.2f} GiB but {run_dir} has {free / 2**30:.2f} GiB free; "
            "free some space or choose another run_dir"
        )

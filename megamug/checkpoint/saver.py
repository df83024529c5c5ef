"""Saving and resuming on all ranks: the tensors by Megatron's torch_dist format, the folder by `CheckpointStore`."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import record_function

from megamug.checkpoint import state
from megamug.checkpoint.store import CheckpointStore, CompleteCheckpoint

logger = logging.getLogger(__name__)

STATE = "state.json"


def read_state(folder: Path) -> dict:
    """`state.json` of a checkpoint: step, updates, cursor, and the parts of the configuration that must not change."""
    return json.loads((folder / STATE).read_text())


class Saver:
    """Writes checkpoints of one run; all ranks call every method alike.

    `asynchronous`: tensors are copied to the host and a thread writes them while training goes on. `poll`, once a step,
    completes the checkpoint when all ranks have written; `wait` completes it now.
    """

    def __init__(self, store: CheckpointStore, world, asynchronous: bool):
        self.store, self.world, self.asynchronous = store, world, asynchronous
        self.pending: _Pending | None = None

    def save(self, step: int, chunks: list[torch.nn.Module], optimizer, contents: dict) -> None:
        """Starts (and, unless asynchronous, ends) the checkpoint of `step`. `contents` becomes `state.json`."""
        self.wait()
        on_first(self.world, lambda: self._begin(step, contents))
        with record_function("checkpoint: gather"):
            tensors = state.sharded_state(chunks, optimizer, self.world)
        folder = self.store.partial_path(step) / "model"
        if not self.asynchronous:
            with record_function("checkpoint: write"):
                state.save_tensors(tensors, folder)
            self._commit(step)
            return
        with record_function("checkpoint: copy to the host"):
            tensors = _copied(tensors)
        self.pending = _Pending(step, state.TensorWrite(tensors, folder))
        self.pending.thread.start()

    def _begin(self, step: int, contents: dict) -> None:
        (self.store.begin(step) / STATE).write_text(json.dumps(contents, indent=1))

    def _commit(self, step: int) -> None:
        dist.barrier()  # all have written
        with record_function("checkpoint: hash, fsync, rename"):
            path = on_first(self.world, lambda: str(self.store.commit(step)))
        logger.info("checkpoint saved: %s", path)

    def poll(self) -> None:
        if self.pending is None:
            return
        written = torch.tensor(int(not self.pending.thread.is_alive()), device=self.world.device)
        dist.all_reduce(written, dist.ReduceOp.MIN)
        if written.item():
            self.wait()

    def wait(self) -> None:
        """Completes what is under way."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        pending.thread.join()
        dist.barrier()
        pending.writing.finish()
        self._commit(pending.step)


class _Pending:
    """A checkpoint that a thread is writing. The interpreter does not exit before the thread has ended."""

    def __init__(self, step: int, writing: state.TensorWrite):
        self.step, self.writing = step, writing
        self.thread = threading.Thread(target=self._write, name="megamug-checkpoint")

    def _write(self) -> None:
        try:
            self.writing.write()
        except Exception:
            logger.exception("checkpoint of step %d: this rank could not write its part", self.step)  # `finish` raises


def _copied(tensors: dict) -> dict:
    """Copies on the host: training goes on changing the originals."""
    return {
        section: {
            key: dataclasses.replace(entry, data=entry.data.detach().to("cpu", copy=True))
            for key, entry in entries.items()
        }
        for section, entries in tensors.items()
    }


def on_first(world, action):
    """Runs `action` on rank 0 and returns its result on every rank. Where it fails, it fails on every rank: a rank that
    waited for one that raised would wait for ever."""
    outcome = [None, None]
    if world.is_first:
        try:
            outcome[0] = action()
        except Exception as error:
            if world.size == 1:
                raise
            logger.exception("rank 0 failed")
            outcome[1] = f"{type(error).__name__}: {error}"
    if world.size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise RuntimeError(f"rank 0 failed: {outcome[1]}")
    return outcome[0]


def share(found: CompleteCheckpoint | None, world) -> tuple[int, Path, str] | None:
    """What rank 0 found, on every rank. A collective."""
    answer = on_first(world, lambda: None if found is None else (found.step, str(found.path), found.reason))
    return None if answer is None else (answer[0], Path(answer[1]), answer[2])

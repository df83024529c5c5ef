"""Saving and resuming on all ranks: the tensors by Megatron's torch_dist format, the folder by `CheckpointStore`."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megamug.checkpoint import state
from megamug.checkpoint.store import STATE, CheckpointStore, CompleteCheckpoint, NotSaved
from megamug.data.spans import span
from megamug.durable import disk_words, free_words

logger = logging.getLogger(__name__)
details = logging.getLogger("details.checkpoint")  # to the log file alone


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
        """Starts (and, unless asynchronous, ends) the checkpoint of `step`. `contents` becomes `state.json`.

        Raises NotSaved on all ranks where one could not write, here or in `poll` or `wait`.
        """
        self.wait()
        self._together(step, lambda: self._begin(step, contents), first_only=True)
        with span("checkpoint: gather"):
            tensors = state.sharded_state(chunks, optimizer, self.world)
        folder = self.store.partial_path(step) / "model"
        if self.asynchronous:
            with span("checkpoint: copy to the host"):
                tensors = _copied(tensors)
        writing = state.TensorWrite(tensors, folder)
        if self.asynchronous:
            self.pending = _Pending(step, writing)
            self.pending.thread.start()
            return
        with span("checkpoint: write"):
            self._together(step, writing.write)
            self._together(step, writing.finish)
        self._commit(step)

    def _begin(self, step: int, contents: dict) -> None:
        (self.store.begin(step) / STATE).write_text(json.dumps(contents, indent=1))

    def _commit(self, step: int) -> None:
        with span("checkpoint: hash, fsync, rename"):
            self._together(step, lambda: self.store.commit(step), first_only=True)
        logger.info("checkpoint saved: %s", self.store.path(step))

    def _together(self, step: int, action: Callable[[], object], first_only: bool = False) -> None:
        """Runs `action` on all ranks, or on rank 0 alone; where it fails on one, NotSaved is raised on every one: a
        rank that went on would wait for the others for ever."""
        problem = None
        if self.world.is_first or not first_only:
            try:
                action()
            except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError of a file that was cut short
                problem = disk_words(error)
                details.warning("checkpoint of step %d: the error in full", step, exc_info=error)
        told = [problem]
        if self.world.size > 1:
            told = [None] * self.world.size
            dist.all_gather_object(told, problem)
        problems: dict[str, list[str]] = {}
        for rank, words in enumerate(told):
            if words is not None:
                problems.setdefault(words, []).append(str(rank))
        if not problems:
            return
        root = self.store.root
        said = "; ".join(f"rank {', '.join(ranks)}: {words}" for words, ranks in problems.items())
        sentence = f"the checkpoint of step {step} could not be written: {said}; {free_words(root)}"
        if self.world.is_first:
            self.store.abandon(step)
        raise NotSaved(f"{sentence}. Make room, then start the same command again")

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
        self._together(pending.step, pending.outcome)
        self._together(pending.step, pending.writing.finish)
        self._commit(pending.step)


class _Pending:
    """A checkpoint that a thread is writing. The interpreter does not exit before the thread has ended."""

    def __init__(self, step: int, writing: state.TensorWrite):
        self.step, self.writing = step, writing
        self.thread = threading.Thread(target=self._write, name="megamug-checkpoint")
        self._error: Exception | None = None

    def _write(self) -> None:
        try:
            self.writing.write()
        except Exception as error:  # of the main thread, when it asks
            self._error = error

    def outcome(self) -> None:
        """Raises what `TensorWrite.write` raised in the thread."""
        if self._error is not None:
            raise self._error


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

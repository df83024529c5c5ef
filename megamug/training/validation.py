"""Losses on held-out data while training. What cannot be read ends the validation on all ranks, not the run."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megamug.training.pipeline import bare, reduce_losses, run_batch

details = logging.getLogger("details.validation")  # to the log file alone; the trainer says it in a line


class DataFailed(RuntimeError):
    """Held-out data could not be read, on this rank or another."""


def held_out(
    models: list, task, world, most: int, beat: Callable[[], None]
) -> tuple[dict[str, Tensor], dict[str, float], int]:  # fmt: skip
    """(sums and counts of every loss over at most `most` held-out samples, figures of the task beside them, how many
    samples there were), the same on all ranks.

    Args:
        models: this rank's chunks in their gradient buffers; put into evaluation mode and back.
        beat: called after each batch.

    A collective. Raises DataFailed on all ranks, naming the one, where data could not be read.
    """
    loader = _together(lambda: task.loader(world, train=False, max_samples=most), world)
    gathered: dict[str, list] = {}
    chunks = torch.nn.ModuleList(bare(model) for model in models)
    chunks.eval()
    try:
        with torch.no_grad():
            while (pairs := _together(lambda: next(loader, None), world)) is not None:
                batches = [task.batch(micro) for micro in pairs.micro_batches]
                totals = dict.fromkeys(task.plan.loss_weights, 1.0)
                for name, values in run_batch(models, batches, totals, backward=False).items():
                    gathered.setdefault(name, []).extend(values)
                beat()
        figures = task.held_out(list(chunks), world)
    finally:
        chunks.train()
        loader.close()
    return reduce_losses(gathered, task.loss_names, world), figures, loader.total_samples


def _together(read: Callable, world) -> object:
    """What `read` returns, if no rank's raises. A rank that went on alone would wait for the others for ever."""
    result, problem = None, None
    try:
        result = read()
    except Exception as error:  # of whatever kind: no rank may leave the others waiting
        problem = error
        details.warning("held-out data could not be read", exc_info=error)
    failed = torch.tensor(0 if problem is None else world.rank + 1, device=world.device)
    if world.size > 1:
        dist.all_reduce(failed, dist.ReduceOp.MAX)
    rank = int(failed) - 1
    if rank >= 0:
        if problem is None and result is not None and hasattr(result, "close"):
            result.close()  # a loader
        raise DataFailed(str(problem) if problem is not None else f"rank {rank} could not read held-out data, see"
                         f" log/rank-{rank}.log")  # fmt: skip
    return result

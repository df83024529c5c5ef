"""Held-out pairs for a measurement: each exactly once, the padding of the last batch left out."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megamug.models.mug.model import MugBatch


def held_out(task, world, max_samples: int) -> Iterator[tuple[MugBatch, list[str]]]:
    """Micro-batches of held-out pairs and their captions as they stand in the shards, in the fixed order of validation.

    Masks are those of training (a pure function of seed and sample). `task` is a MugTask, `world` a single replica.
    """
    loader = task.loader(world, train=False, max_samples=max_samples)
    try:
        for pairs in loader:
            for micro in pairs.micro_batches:
                if micro.valid.any():
                    batch, rows = task.batch(micro), torch.from_numpy(micro.valid.nonzero()[0])
                    captions = micro.captions()
                    yield select(batch, rows), [captions[i] for i in rows.tolist()]
    finally:
        loader.close()


def select(batch: MugBatch, rows: torch.Tensor) -> MugBatch:
    """The rows `rows` of a batch."""
    rows = rows.to(batch.visible_ids.device)
    parts = (batch.visible_ids, batch.masked_ids, batch.images, batch.tokens)
    return MugBatch(*(None if part is None else part[rows] for part in parts))

"""A tiny segmenter for `layout_worker`: its configuration, its task, its batches."""

from __future__ import annotations

import numpy as np
import torch

from megamug.configuration.reading import resolve
from megamug.configuration.sections import Config

CLASSES = 5


def tiny(options: dict) -> Config:
    """Small enough for ten steps in seconds; 1 class token + 3 registers + 16 patches divide by 2."""
    config = Config()
    config.model.kind = "segmenter"
    config.model.__dict__.update(patch_size=8, layers=3, width=32, heads=4, ffn_width=64, register_tokens=3)
    config.segmenter.__dict__.update(classes=CLASSES, channels=16, auxiliary_channels=8, position_image_size=24)
    config.data.__dict__.update(image_size=32, global_batch_size=8, micro_batch_size=4)
    config.optimizer.__dict__.update(learning_rate=2e-3, warmup_steps=3)
    config.train.steps = 10
    for section, values in options.items():
        if isinstance(values, dict):
            getattr(config, section).__dict__.update(values)
    return resolve(config)


def make_task(config: Config):
    from megamug.models import tasks

    return tasks.make_task(config)


def sample(index: int, plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and map of sample `index`: a pure function of it. Blocks of 8 pixels of a class, some of none."""
    g = torch.Generator().manual_seed(1000 + index)
    side = plan.grid[0]
    blocks = torch.randint(0, plan.classes + 1, (side, side), generator=g)
    blocks = blocks.repeat_interleave(plan.patch_size, 0).repeat_interleave(plan.patch_size, 1)
    image = torch.randint(0, 100, (3, *blocks.shape), generator=g) + 25 * blocks
    return image.to(torch.uint8), torch.where(blocks == plan.classes, 255, blocks).to(torch.uint8)


def micro_batches(step: int, plan, config: Config, world):
    """(this replica's micro-batches of a step, totals of the whole global batch by loss name)."""
    from megamug.data.pairs.batch import GlobalBatch, PairBatch

    count, size = config.data.global_batch_size, config.data.micro_batch_size
    samples = [sample(step * count + i, plan) for i in range(count)]
    pairs = []
    for start in range(0, count // world.dp_size, size):
        # A micro-batch of all replicas is the same samples in every layout: BatchNorm sees them together.
        first = start * world.dp_size + world.dp_rank * size
        images, maps = (torch.stack(x) for x in zip(*samples[first : first + size], strict=True))
        indices = step * count + np.arange(first, first + size)
        epochs, valid = np.zeros_like(indices), np.ones(size, bool)
        pairs.append(PairBatch(images, None, epochs, indices, valid, maps=maps))
    task = make_task(config)
    batches = [task.batch(each) for each in pairs]
    return batches, task.totals(GlobalBatch(pairs, 0), batches, world)

"""A tiny classifier for `layout_worker`: its configuration, its task, its batches."""

from __future__ import annotations

import numpy as np
import torch

from megamug.configuration.reading import resolve
from megamug.configuration.sections import Config

CLASSES = 7


def tiny(options: dict) -> Config:
    """Small enough for ten steps in a second; 1 class token + 3 registers + 16 patches divide by 2."""
    config = Config()
    config.model.kind = "classifier"
    config.model.__dict__.update(patch_size=8, layers=3, width=32, heads=4, ffn_width=64, register_tokens=3)
    config.classifier.__dict__.update(classes=CLASSES)
    config.data.__dict__.update(image_size=32, global_batch_size=8, micro_batch_size=2)
    config.optimizer.__dict__.update(learning_rate=2e-3, warmup_steps=3)
    config.train.steps = 10
    for section, values in options.items():
        if isinstance(values, dict):
            getattr(config, section).__dict__.update(values)
    return resolve(config)


def make_task(config: Config):
    """Its task, whose head starts from weights like the others: with MAE's the encoder has nearly no gradient."""
    from megamug.models import tasks

    task = tasks.make_task(config)
    task.plan.init_std = lambda name: None
    return task


def sample(index: int, plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and class of sample `index`: a pure function of it."""
    g = torch.Generator().manual_seed(1000 + index)
    size = plan.grid[0] * plan.patch_size
    label = torch.randint(0, plan.classes, (), generator=g)
    image = torch.randint(0, 128, (3, size, size), generator=g) + 15 * label
    return image.to(torch.uint8), label


def micro_batches(step: int, plan, config: Config, world):
    """(this replica's micro-batches of a step, totals of the whole global batch by loss name)."""
    from megamug.data.pairs.mixing import path_scales
    from megamug.models.classifier.model import ClassBatch

    count, size = config.data.global_batch_size, config.data.micro_batch_size
    samples = [sample(step * count + i, plan) for i in range(count)]
    first, last = (rank * count // world.dp_size for rank in (world.dp_rank, world.dp_rank + 1))
    batches = []
    for start in range(first, last, size):
        batch = ClassBatch(*(torch.stack(x) for x in zip(*samples[start : start + size], strict=True)))
        if plan.drop_path > 0:
            indices = step * count + np.arange(start, start + size)
            drawn = path_scales(config.seed, np.zeros_like(indices), indices, plan.model.layers, plan.drop_path)
            batch.scales = torch.from_numpy(drawn)
        batches.append(batch)
    return batches, {"class": float(count)}

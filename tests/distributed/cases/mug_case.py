"""A tiny MUG for `layout_worker`: its configuration, its task, its batches."""

from __future__ import annotations

import types
from unittest import mock

import numpy as np
import torch

from megamug.configuration.sections import Config

VOCABULARY = 70


def tiny(options: dict) -> Config:
    """A MUG small enough for ten steps in a second, whose sizes divide by 2 everywhere."""
    config = Config()
    config.model.__dict__.update(
        patch_size=8, layers=2, width=32, heads=4, ffn_width=64, decoder_layers=3, decoder_width=32, decoder_heads=4,
        text_unimodal_layers=1, text_multimodal_layers=2, text_width=48, text_heads=4,
        register_tokens=3, decoder_register_tokens=3, caption_loss_weight=0.3,
    )
    config.data.__dict__.update(image_size=32, caption_length=8, global_batch_size=8, micro_batch_size=2)
    config.optimizer.__dict__.update(learning_rate=2e-3, warmup_steps=3)
    config.train.steps = 10
    for section, values in options.items():
        if isinstance(values, dict):
            getattr(config, section).__dict__.update(values)
    return config


def make_task(config: Config):
    """The task of `config`, without a tokenizer's file."""
    from megamug.data.text.marks import TRAINED_HERE
    from megamug.models import tasks
    from megamug.models.mug import task as mug_task

    tokenizer = types.SimpleNamespace(vocab_size=VOCABULARY, framing=TRAINED_HERE)
    with mock.patch.object(mug_task, "Tokenizer", lambda path: tokenizer):
        return tasks.make_task(config)


def sample(index: int, plan):
    """Pixels, mask and caption of sample `index`: a pure function of it."""
    from megamug.data.pairs.text import PAD

    g = torch.Generator().manual_seed(1000 + index)
    size = plan.grid[0] * plan.patch_size
    image = torch.randint(0, 256, (3, size, size), generator=g, dtype=torch.uint8)
    order = torch.randperm(plan.patches, generator=g)
    tokens = torch.randint(1, plan.vocabulary or VOCABULARY, (plan.caption_length + 1,), generator=g)
    tokens[int(torch.randint(3, plan.caption_length + 1, (), generator=g)) + 1 :] = PAD
    return image, order[: plan.visible].sort()[0], order[plan.visible :].sort()[0], tokens


def micro_batches(step: int, plan, config: Config, world):
    """(this replica's micro-batches of a step, totals of the whole global batch by loss name)."""
    from megamug.data.pairs.text import PAD
    from megamug.data.random import random_words
    from megamug.models.mug.model import MugBatch
    from megamug.models.mug.text_masks import hidden_tokens

    count = config.data.global_batch_size
    samples = [sample(step * count + i, plan) for i in range(count)]
    tokens = torch.stack([s[3] for s in samples])
    told = tokens[:, 1:] != PAD
    if plan.masked_text:
        words = random_words(config.seed, "text mask", 0, np.arange(step * count, (step + 1) * count), told.shape[1])
        noise = torch.from_numpy(words.astype("int64"))
        told = hidden_tokens(tokens, noise, plan.marks, plan.text_mask_ratio)
        samples = [(*s, mask) for s, mask in zip(samples, told, strict=True)]
    totals = {"image": float(count * plan.masked), "caption": float(told.sum())}
    mine = samples[world.dp_rank * count // world.dp_size : (world.dp_rank + 1) * count // world.dp_size]
    size = config.data.micro_batch_size
    batches = []
    for start in range(0, len(mine), size):
        parts = [torch.stack(x) for x in zip(*mine[start : start + size], strict=True)]
        image, visible, masked, tokens = parts[:4]
        batches.append(MugBatch(visible, masked, image, tokens, text_mask=parts[4] if plan.masked_text else None))
    return batches, totals

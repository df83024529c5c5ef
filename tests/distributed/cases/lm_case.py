"""A tiny DecoderLM for `layout_worker`: its configuration, its task, its batches. Option `family`: cm3leon | llama |
chameleon."""

from __future__ import annotations

import types
from collections.abc import Callable
from unittest import mock

import torch

from megamug.configuration.reading import resolve
from megamug.configuration.sections import Config
from megamug.data.documents.loader import IGNORE, TokenBatch

VOCABULARY, TOKENS = 200, 16
FAMILIES = {
    # tied vocabulary, learned positions, norms without parameters; the whole of a row is read
    "cm3leon": {"lm": {}},
    # an output of its own, grouped queries, normed heads, biases; documents apart, z-loss
    "llama": {
        "lm": {
            "norm": "rmsnorm", "activation": "swiglu", "positions": "rotary", "tie_vocabulary": False,
            "query_groups": 2, "qk_norm": True, "bias": True,
        },
        "model": {"z_loss_weight": 1e-2},
        "data": {"separate_documents": True},
    },
    # norms of its own for every head, the others behind attention and feed-forward
    "chameleon": {
        "lm": {
            "norm": "rmsnorm", "activation": "swiglu", "positions": "rotary", "tie_vocabulary": False,
            "query_groups": 2, "qk_norm": True, "qk_norm_per_head": True, "res_post_norm": True,
        },
    },
}  # fmt: skip


def tiny(options: dict) -> Config:
    """Six layers small enough for ten steps in a second, whose sizes divide by 2 everywhere."""
    config = Config()
    config.model.__dict__.update(kind="decoder_lm", preset="lm_tiny")
    config.lm.__dict__.update(layers=6, width=32, ffn_width=64, init_std=0.1, max_positions=TOKENS)
    config.data.__dict__.update(context_length=TOKENS, global_batch_size=8, micro_batch_size=2, tokenizer="none")
    config.optimizer.__dict__.update(learning_rate=1e-3, warmup_steps=3)
    config.train.steps = 10
    for sections in (FAMILIES[options["family"]], options):
        for section, values in sections.items():
            if isinstance(values, dict):
                getattr(config, section).__dict__.update(values)
    return resolve(config)


def make_task(config: Config, kind: type | None = None):
    """The task of `config` (of class `kind`, None: the trainer's), without a vocabulary's files."""
    from megamug.models import tasks
    from megamug.models.language import task as lm_task

    vocabulary = types.SimpleNamespace(load=lambda folder: types.SimpleNamespace(size=VOCABULARY))
    with mock.patch.object(lm_task, "Vocabulary", vocabulary):
        return (kind or tasks.make_task)(config)


def row(index: int) -> tuple[torch.Tensor, ...]:
    """Tokens, labels, document numbers and places in the document of row `index`: a pure function of it."""
    g = torch.Generator().manual_seed(1000 + index)
    tokens = torch.randint(0, VOCABULARY, (TOKENS + 1,), generator=g)
    tokens[1::2] = 7 * torch.randint(0, 5, (TOKENS // 2,), generator=g)  # something to learn
    labels = tokens[1:].masked_fill(torch.rand(TOKENS, generator=g) < 0.3, IGNORE)
    first = int(torch.randint(1, TOKENS, (), generator=g))
    segments = (torch.arange(TOKENS) >= first).int()
    return tokens[:-1], labels, segments, torch.cat([torch.arange(first), torch.arange(TOKENS - first)])


def micro_batches(step: int, plan, config: Config, world, row: Callable = row):
    """(this replica's micro-batches of a step, totals of the whole global batch by loss name)."""
    total, size = config.data.global_batch_size, config.data.micro_batch_size
    rows = [row(step * total + i) for i in range(total)]
    counted = float(sum((labels != IGNORE).sum() for _, labels, _, _ in rows))
    mine = rows[world.dp_rank * total // world.dp_size : (world.dp_rank + 1) * total // world.dp_size]
    batches = []
    for start in range(0, len(mine), size):
        tokens, labels, segments, positions = (torch.stack(x) for x in zip(*mine[start : start + size], strict=True))
        if not config.data.separate_documents:
            segments = positions = None
        batches.append(TokenBatch(tokens, labels, segments, positions))
    return batches, dict.fromkeys(plan.loss_weights, counted)

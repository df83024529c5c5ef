"""Tensor-parallel messages during matrix products (`parallel.overlap_tensor`): the buffers that Transformer Engine's
layers want set up around a run, as Megatron's own training loop does. GPUs only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megamug.configuration.sections import Config

logger = logging.getLogger(__name__)


@contextmanager
def tensor_overlap(config: Config) -> Iterator[None]:
    """Inside, layers find Transformer Engine's user buffers, of [tokens x micro-batch, width], on every rank.

    The process groups exist already. FP8 layers want buffers of their own kind, and layers left in bf16 the other kind
    beside them (Megatron-LM: `megatron/training/initialize.py`, `_initialize_tp_communicators`).
    """
    if not config.parallel.overlap_tensor:
        yield
        return
    from transformer_engine.pytorch.module import base

    from megamug.configuration.reading import towers

    precision, modes = config.precision, base.UserBufferQuantizationMode
    width = next(iter(towers(config).values())).width  # of every tower, see `validate_precision.overlap_tensor`
    shape = [config.data.context_length * config.data.micro_batch_size, width]
    wanted = [modes.FP8 if precision.fp8 != "none" else modes.NONE]
    # Cross blocks' feed-forwards are FP8 as well; heads and embeddings use no buffers.
    if modes.NONE not in wanted and precision.first_layers_bf16 + precision.last_layers_bf16 > 0:
        wanted.append(modes.NONE)
    base.initialize_ub(
        shape=shape, tp_size=config.parallel.tensor, quantization_modes=wanted,
        dtype=torch.bfloat16 if precision.dtype == "bf16" else torch.float32, bootstrap_backend="nccl",
    )  # fmt: skip
    logger.info("tensor-parallel messages overlap with products: buffers of %d x %d", *shape)
    try:
        yield
    finally:
        base.destroy_ub()


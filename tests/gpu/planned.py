"""What the planner says that a training step takes, and what it takes."""

from __future__ import annotations

import argparse
import gc

import torch

from megamug.benchmarks import jam, mug
from megamug.planner.execution import layers_of
from megamug.planner.memory import RESERVED, Layout, memory
from megamug.planner.model import model_of
from tests.gpu import parity

VOCABULARY = 32000


def mug_options(*overrides: str, preset: str = "vit_b16", batch: int = 64) -> argparse.Namespace:
    """Of `megamug benchmark mug`: MAE."""
    return argparse.Namespace(preset=preset, batch=batch, vocabulary=VOCABULARY, overrides=list(overrides))


def lm_options(*overrides: str, layers: int = 8, width: int = 1024, batch: int = 8) -> argparse.Namespace:
    """Of `megamug benchmark jam`: LLaMA's block."""
    return argparse.Namespace(
        layers=layers, width=width, heads=width // 64, ffn_width=width * 11 // 4, vocabulary=VOCABULARY, tokens=1024,
        batch=batch, overrides=list(overrides),
    )  # fmt: skip


def cases() -> dict[str, tuple]:
    """By name (configuration, size of the vocabulary, builder of a step, its options)."""
    found = {}
    kinds = {"te": ["precision.layers=te"], "local": ["precision.layers=local"]}
    kinds["recompute"] = ["parallel.recompute=full"]
    for name, more in kinds.items():
        # The configuration of `te` is made without the key, which wants the package: what is planned wants none.
        known = [] if name == "te" else more
        configs = mug.settings(mug_options(*known), "bf16"), jam.settings(lm_options(*known), "bf16", "decoder_lm")
        for config in configs:
            config.precision.layers = "te" if name == "te" else config.precision.layers
        found[f"vit-b16-{name}"] = configs[0], 0, mug.build_megamug, mug_options(*more)
        found[f"lm-8x1024-{name}"] = configs[1], VOCABULARY, jam.build_megamug, lm_options(*more)
    return found


def planned(config, vocabulary: int) -> int:
    """Bytes of tensors, by the planner: without its allowance for the CUDA context and NCCL."""
    data, parallel = config.data, config.parallel
    layout = Layout(
        micro_batch=data.micro_batch_size, micro_batches=data.global_batch_size // data.micro_batch_size,
        recompute=parallel.recompute == "full", distributed_optimizer=parallel.distributed_optimizer,
        fp8=config.precision.fp8, dtype=config.precision.dtype, layers=layers_of(config, 1, config.precision.fp8),
    )  # fmt: skip
    return memory(model_of(config, vocabulary), layout).total - RESERVED


def taken(build, options: argparse.Namespace, steps: int = 3) -> int:
    """The most bytes of tensors during training steps, beyond those that were there before."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    try:
        step, _ = build(options, "bf16")
        step()
        torch.cuda.reset_peak_memory_stats()  # what only building and the first step take is not what a layout needs
        for _ in range(steps - 1):
            step()
        return torch.cuda.max_memory_allocated() - before
    finally:
        step = None
        parity.layout_worker.leave_groups()
        gc.collect()
        torch.cuda.empty_cache()

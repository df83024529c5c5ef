"""Processes without GPUs, for what a test compares its own numbers on the GPU with.

They run beside the tests, which ask for the results late. Imports nothing that looks for GPUs.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor


def processes(count: int) -> ProcessPoolExecutor:
    """Of new interpreters, as this one may have touched its GPU; one thread each, as the tests of layouts have."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=hide_gpus)


def hide_gpus() -> None:
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        os.environ.pop(name, None)


def visible_gpus() -> int:
    """Of the process that runs it."""
    import torch

    return torch.cuda.device_count()

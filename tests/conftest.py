"""What several test files share, and who sees GPUs.

Tests build CPU tensors, so GPUs are hidden from this process before torch looks for them, and with that from all that
it starts: xdist's workers, commands, ranks. The tests marked `gpu` see them, in a run of their own that the option
`-m gpu` alone makes (`make test` does both).
"""

from __future__ import annotations

import os

import pytest


def pytest_configure(config):
    if not of_gpus(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def of_gpus(config) -> bool:
    """Whether this is the run of the tests marked `gpu`."""
    return config.getoption("markexpr") == "gpu"


def pytest_collection_modifyitems(config, items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := no_gpu(config)):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def no_gpu(config) -> str | None:
    """Why this run has no GPU; None where it has one."""
    if not of_gpus(config):
        return "needs a GPU, and a run of its own: pytest -m gpu tests/gpu"
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


@pytest.fixture(scope="module")
def world():
    """This process alone as the whole world: Megatron's groups of one rank each, without a launcher."""
    from megamug.configuration.sections import ParallelConfig
    from megamug.distributed import setup

    yield setup.start(ParallelConfig(), seed=0)
    setup.stop()

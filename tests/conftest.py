"""What several test files share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def world():
    """This process alone as the whole world: Megatron's groups of one rank each, without a launcher."""
    from megamug.config import ParallelConfig
    from megamug.distributed import setup

    yield setup.start(ParallelConfig(), seed=0)
    setup.stop()

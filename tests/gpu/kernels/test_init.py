"""Initialisation on a GPU: the CPU's numbers to the bit, and fast. Needs a GPU."""

from __future__ import annotations

import time

import pytest
import torch

from megamug.losses import ops
from megamug.models.init import MASS_OF_3
from megamug.models.random_numbers import Distribution, fill, fill_torch, key_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not ops.libraries().cuda, reason=ops.libraries().reason),
]
KINDS = pytest.mark.parametrize(
    "kind",
    [Distribution(False, 0.07), Distribution(True, 0.02), Distribution(True, 0.02, MASS_OF_3)],
    ids=["uniform", "normal", "truncated"],
)
KEY = key_of(1234, "encoder.stack.layers.0.mlp.linear_fc1.weight")
SLICES = [  # whole, offset, size
    ((1 << 22,), (0,), (1 << 22,)), ((1000,), (3,), (5,)), ((2048, 5632), (512, 0), (512, 5632)),
    ((2048, 5632), (0, 1408), (2048, 1408)), ((63, 47), (5, 7), (31, 1)), ((5, 6, 7), (1, 2, 3), (3, 2, 4)),
    ((5, 6, 7), (0, 2, 0), (5, 2, 7)), ((9, 3000), (1, 511), (7, 2000)), ((2**33, 8), (2**33 - 3, 0), (3, 8)),
    ((9, 9), (4, 4), (0, 3)), ((), (), ()),
]  # fmt: skip


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_numbers_are_those_of_the_cpu(kind, dtype):
    for whole, offset, size in SLICES:
        wanted = fill(torch.empty(size, dtype=dtype), KEY, kind, whole, offset)
        for function in (fill, fill_torch):
            found = function(torch.full(size, torch.nan, dtype=dtype, device="cuda"), KEY, kind, whole, offset)
            assert torch.equal(found.cpu(), wanted), (whole, offset, size, function)


@KINDS
def test_a_billion_numbers_take_no_time(kind):
    """1.2e9 numbers, as of a large model: seconds at most, and no memory beside the parameter."""
    count = 1_200_000_000
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("less than 6 GiB of free GPU memory")
    out = torch.empty(count, device="cuda")
    fill(out[:10], KEY, kind, (10,), (0,))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    fill(out, KEY, kind, (count,), (0,))
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 1
    assert torch.cuda.max_memory_allocated() == before
    for first in (0, count // 2 + 1, count - 1000):
        wanted = fill(torch.empty(1000), KEY, kind, (count,), (first,))
        assert torch.equal(out[first : first + 1000].cpu(), wanted)

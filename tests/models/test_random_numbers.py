"""The generator of parameters: its published answers, one set of bits everywhere, and that they look random."""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megamug.losses import ops
from megamug.models.init import MASS_OF_3
from megamug.models.random_numbers import Distribution, fill, fill_torch, key_of, philox, quantile

ROOT = Path(__file__).resolve().parents[2]
UNIFORM, NORMAL = Distribution(normal=False, scale=0.07), Distribution(normal=True, scale=0.02)
TRUNCATED = Distribution(normal=True, scale=0.02, mass=MASS_OF_3)
KINDS = pytest.mark.parametrize("kind", [UNIFORM, NORMAL, TRUNCATED], ids=["uniform", "normal", "truncated"])
KEY = key_of(1234, "encoder.stack.layers.0.mlp.linear_fc1.weight")
COMPILED = pytest.mark.skipif(not ops.libraries().cpu, reason=ops.libraries().reason)


def drawn(size, kind=UNIFORM, key=KEY, shape=None, offset=None, dtype=torch.float32, function=fill) -> Tensor:
    out = torch.full(size, torch.nan, dtype=dtype)
    return function(out, key, kind, shape or size, offset or (0,) * len(size))


def words(count: int, key=KEY) -> Tensor:
    """The generator's 32-bit words, from what is drawn of them without a loss: float64."""
    return (drawn((count,), Distribution(False, 1.0), key).double() + 1) * 2**31


# ---- the published definitions ----


@pytest.mark.parametrize(
    "counter, key, answer",
    [  # the authors' known answers (Random123, kat_vectors)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)  # fmt: skip
def test_philox(counter, key, answer):
    assert tuple(int(word) for word in philox([torch.tensor([word]) for word in counter], key)) == answer


def test_quantile():
    """Against Python's inverse, and back through the distribution function, out to the last word of 32 bits."""
    p = torch.cat([torch.linspace(1e-4, 0.5, 2001, dtype=torch.float64), 2.0 ** -torch.arange(2, 34).double()])
    found = quantile(p - 0.5)
    wanted = torch.tensor([statistics.NormalDist().inv_cdf(x) for x in p.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)  # p - 0.5 has lost some bits of p
    torch.testing.assert_close(torch.erfc(-found / math.sqrt(2)) / 2, p, rtol=1e-6, atol=0)
    assert torch.equal(quantile(0.5 - p), -found)
    assert float(quantile(torch.tensor([2.0**-33 - 0.5], dtype=torch.float64))) == pytest.approx(-6.337958, abs=1e-6)


# ---- the same bits everywhere ----

DIGEST = "31784a58861634b021541ca4844deb6753a6cebcc52e3dc20b320792e7882bc5"
PROGRAM = """
import hashlib, torch
from megamug.models.random_numbers import Distribution, fill, fill_torch, key_of
digest = hashlib.sha256()
for number, name in enumerate(("a.weight", "b.weight")):
    for kind in (Distribution(False, 0.07), Distribution(True, 0.02), Distribution(True, 0.3, 0.4986501019683699)):
        for dtype in (torch.float32, torch.bfloat16):
            out = {function}(torch.empty(37, 211, dtype=dtype), key_of(number, name), kind, (100, 223), (5, 12))
            digest.update(out.view(torch.int16).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("kernels", ["torch", "generic", "avx2", "avx512", "avx512_bf16"])
def test_numbers_never_change(kernels):
    """One digest for every instruction set, torch and Python: runs of one seed start alike for ever."""
    environment = {**os.environ, "MEGAMUG_CPU_KERNELS": kernels, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if kernels != "torch" and not ops.libraries().cpu:
        pytest.skip(ops.libraries().reason)
    program = PROGRAM.format(function="fill_torch" if kernels == "torch" else "fill")
    result = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == DIGEST, result.stderr[-2000:]


SLICES = [  # whole, offset, size
    ((1000,), (0,), (1000,)), ((1000,), (3,), (5,)), ((1000,), (997,), (3,)), ((64, 48), (16, 0), (16, 48)),
    ((64, 48), (0, 12), (64, 12)), ((63, 47), (5, 7), (31, 1)), ((7, 1), (2, 0), (3, 1)),
    ((5, 6, 7), (1, 2, 3), (3, 2, 4)), ((5, 6, 7), (1, 0, 0), (3, 6, 7)), ((5, 6, 7), (0, 2, 0), (5, 2, 7)),
    ((3, 4, 5, 6), (1, 1, 0, 2), (2, 2, 5, 3)), ((9, 3000), (1, 511), (7, 2000)),
    ((9, 9), (4, 4), (0, 3)), ((), (), ()),
]  # fmt: skip


@COMPILED
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_numbers_are_those_of_torch(kind, dtype):
    for whole, offset, size in SLICES:
        ours, theirs = (drawn(size, kind, KEY, whole, offset, dtype, f) for f in (fill, fill_torch))
        assert torch.equal(ours, theirs), (whole, offset, size)
        assert torch.isfinite(ours).all()
    ours, theirs = (drawn((50_003,), kind, dtype=dtype, function=f) for f in (fill, fill_torch))  # every branch, often
    assert torch.equal(ours, theirs)


@KINDS
@pytest.mark.parametrize("function", [fill, fill_torch])
def test_any_slice_is_a_slice_of_the_whole(kind, function):
    for whole, offset, size in SLICES:
        place = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
        everything = drawn(whole, kind, function=function)
        assert torch.equal(drawn(size, kind, KEY, whole, offset, function=function), everything[place])
        assert torch.equal(everything.flatten(), drawn((math.prod(whole),), kind, function=function))


def test_neither_threads_nor_chunks_nor_strides_change_a_bit(monkeypatch):
    wanted, threads = drawn((300, 211), NORMAL), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(drawn((300, 211), NORMAL), wanted)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr("megamug.models.random_numbers.CHUNK", 1001)
    assert torch.equal(drawn((300, 211), NORMAL, function=fill_torch), wanted)
    turned = torch.empty(211, 300).t()
    assert fill(turned, KEY, NORMAL, (300, 211), (0, 0)) is turned and torch.equal(turned, wanted)


@pytest.mark.parametrize("function", [fill, fill_torch])
def test_beyond_32_bits(function):
    """Counters of more than 32 bits; nothing of the whole's 2^36 elements is made but the slice."""
    whole, offset = (2**33, 8), (2**33 - 3, 0)
    far = drawn((3, 8), NORMAL, KEY, whole, offset, function=function)
    assert torch.equal(far.flatten(), drawn((24,), NORMAL, KEY, (2**36,), (2**36 - 24,), function=fill_torch))
    assert not torch.equal(far.flatten()[:8], drawn((8,), NORMAL, KEY, (2**36,), ((2**36 - 24) % 2**34,)))


def test_bfloat16_is_float32_rounded():
    for kind in (UNIFORM, NORMAL, TRUNCATED):
        assert torch.equal(drawn((9999,), kind, dtype=torch.bfloat16), drawn((9999,), kind).bfloat16())
        assert torch.equal(drawn((9999,), kind, dtype=torch.float64), drawn((9999,), kind).double())


@COMPILED
def test_what_does_not_fit_is_refused():
    with pytest.raises(RuntimeError, match=r"elements \[3, 7\) of axis 0, which has 6"):
        drawn((4, 2), shape=(6, 2), offset=(3, 0))
    with pytest.raises(RuntimeError, match="an offset for each axis"):
        drawn((4, 2), shape=(6, 2), offset=(3,))
    with pytest.raises(RuntimeError, match="mass must be in"):
        drawn((4,), Distribution(True, 1.0, 0.6))
    with pytest.raises(AssertionError):
        drawn((4, 2), shape=(6, 2), offset=(3, 0), function=fill_torch)


# ---- quality; every threshold is 4 or more standard deviations of what chance does ----

COUNT = 1 << 20


def furthest(values: Tensor, distribution_function) -> float:
    """Kolmogorov and Smirnov's statistic times sqrt(n): above 1.95 once in a thousand samples."""
    p = distribution_function(values.double().sort().values)
    steps = torch.arange(len(p) + 1, dtype=torch.float64) / len(p)
    return float(torch.maximum((p - steps[:-1]).max(), (steps[1:] - p).max())) * math.sqrt(len(p))


def phi(x: Tensor) -> Tensor:
    return torch.erfc(-x / math.sqrt(2)) / 2


def chi_square(values: Tensor, cells: int) -> float:
    """Deviation of the numbers of each of `cells` integers from equal ones, in its standard deviations."""
    counts = torch.bincount(values.long(), minlength=cells).double()
    wanted = len(values) / cells
    return (float(((counts - wanted) ** 2).sum() / wanted) - (cells - 1)) / math.sqrt(2 * (cells - 1))


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard deviations of that of independent numbers."""
    return float(torch.corrcoef(torch.stack([a, b]).double())[0, 1]) * math.sqrt(len(a))


@pytest.mark.parametrize("seed", [0, 1, 1234])
def test_distributions(seed):
    key = key_of(seed, "a.weight")
    uniform = drawn((COUNT,), UNIFORM, key) / UNIFORM.scale
    assert furthest(uniform, lambda x: (x + 1) / 2) < 1.95
    assert uniform.abs().max() <= 1 and abs(float(uniform.mean())) < 4 / math.sqrt(3 * COUNT)
    assert float(uniform.double().var()) == pytest.approx(1 / 3, abs=4 * math.sqrt(4 / 45 / COUNT))
    normal = drawn((COUNT,), NORMAL, key).double() / NORMAL.scale
    assert furthest(normal, phi) < 1.95
    assert abs(float(normal.mean())) < 4 / math.sqrt(COUNT)
    assert float(normal.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / COUNT))
    assert float((normal**3).mean()) == pytest.approx(0, abs=4 * math.sqrt(15 / COUNT))
    assert float((normal**4).mean()) == pytest.approx(3, abs=4 * math.sqrt(96 / COUNT))
    cut = drawn((COUNT,), TRUNCATED, key).double() / TRUNCATED.scale
    assert furthest(cut, lambda x: (phi(x) - (0.5 - MASS_OF_3)) / (2 * MASS_OF_3)) < 1.95
    assert 2.99 < cut.abs().max() <= 3 + 1e-6
    variance = 1 - 2 * 3 * math.exp(-4.5) / math.sqrt(2 * math.pi) / (2 * MASS_OF_3)  # of a normal cut at 3
    assert float(cut.var()) == pytest.approx(variance, abs=4 * math.sqrt(2 / COUNT))


@COMPILED
def test_tails():
    count, normal = 1 << 23, drawn((1 << 23,), Distribution(True, 1.0), KEY)
    for edge in (3.0, 4.0, 5.0):
        wanted = count * math.erfc(edge / math.sqrt(2)) / 2  # 5: 2.4
        for side in (normal > edge, normal < -edge):
            assert abs(int(side.sum()) - wanted) < 4 * math.sqrt(wanted), edge


def test_words_are_even():
    found = words(COUNT)
    high = found.div(2**24, rounding_mode="floor")
    assert abs(chi_square(high, 256)) < 4
    pairs = high[0::2].div(8, rounding_mode="floor") * 32 + high[1::2].div(8, rounding_mode="floor")
    assert abs(chi_square(pairs, 1024)) < 4
    low = torch.cat([torch.stack(philox([torch.arange(i, i + 1024), *[torch.zeros(1024).long()] * 3], KEY)).flatten()
                     for i in range(0, COUNT // 4, 1024)])  # fmt: skip
    for shift in (0, 8, 16, 24):
        assert abs(chi_square(low >> shift & 255, 256)) < 4


def test_neighbours_names_and_seeds_are_independent():
    a = drawn((COUNT,), NORMAL, key_of(1, "layers.0.weight"))
    for lag in (1, 2, 3, 4, 5, 8, 64, 512, 1024, 2048, 4096):
        assert abs(correlation(a[:-lag], a[lag:])) < 4, lag
        assert abs(correlation(a[:-lag].abs(), a[lag:].abs())) < 4, lag
    for seed, name in ((2, "layers.0.weight"), (1, "layers.1.weight"), (0, "layers.0.weight"), (11, "ayers.0.weight")):
        b = drawn((COUNT,), NORMAL, key_of(seed, name))
        assert abs(correlation(a, b)) < 4 and abs(correlation(a.abs(), b.abs())) < 4, (seed, name)
    names = [f"layers.{i}.weight" for i in range(500)]
    assert len({key_of(seed, name) for seed in range(20) for name in names}) == 20 * len(names)


def test_first_numbers_of_many_parameters_are_independent():
    """Across keys as along a parameter: the numbers at one place of 4096 names are a sample of the distribution too."""
    first = torch.stack([drawn((4,), NORMAL, key_of(7, f"name {i}")) for i in range(4096)]) / NORMAL.scale
    for place in range(4):
        assert furthest(first[:, place], phi) < 1.95
    assert abs(correlation(first[:-1, 0], first[1:, 0])) < 4


def test_the_key_is_a_hash_of_seed_and_name():
    digest = hashlib.sha256(b"5:a.weight").digest()
    assert key_of(5, "a.weight") == (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))

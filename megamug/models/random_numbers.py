"""The numbers that parameters start from, each a pure function of (seed, name, flat index in the whole parameter).

A counter-based generator: element i is word i mod 4 of Philox4x32-10 at counter i div 4, under a key that is a hash of
seed and name. So any slice is drawn alone, on its device, and every layout, device, number of threads, torch and Python
gives the same bits: only integers and single additions, products, quotients and square roots of float64 are used, each
rounded once, in a fixed order. `fill_torch` says all of it in torch; `csrc/draw.h` is the same compiled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamug.losses import ops

CHUNK = 1 << 16  # elements that `fill_torch` draws at a time: what a CPU's cache holds; a GPU takes 64 times as many
_WORD = 0xFFFFFFFF
_COMPILED_TYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Distribution:
    """Of s uniform in (-1, 1): scale s, or where `normal` scale Phi^-1(1/2 + mass s).

    mass = 1/2 is the whole normal distribution of standard deviation `scale`; mass = Phi(c) - 1/2 cuts it at c of them.
    32 bits an element: normal numbers reach 6.3 standard deviations.
    """

    normal: bool
    scale: float
    mass: float = 0.5


def key_of(seed: int, name: str) -> tuple[int, int]:
    """Two words of SHA-256(seed, name)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def fill(out: Tensor, key: tuple[int, int], what: Distribution, shape: Sequence[int], offset: Sequence[int]) -> Tensor:
    """Draws into `out`, in place and on its device: elements [offset, offset + its size) of a parameter of `shape`.

    Numbers are rounded to float32, then to the dtype of `out`. Returns `out`.
    """
    compiled = getattr(ops.libraries(), out.device.type, False) and out.dtype in _COMPILED_TYPES and out.is_contiguous()
    if not compiled:
        return fill_torch(out, key, what, shape, offset)
    torch.ops.megamug.draw_(out, *key, what.normal, what.scale, what.mass, list(shape), list(offset))
    return out


def fill_torch(
    out: Tensor, key: tuple[int, int], what: Distribution, shape: Sequence[int], offset: Sequence[int]
) -> Tensor:
    """`fill` in torch alone."""
    assert len(shape) == len(offset) == out.dim(), (shape, offset, out.shape)
    assert all(0 <= o and o + n <= g for o, n, g in zip(offset, out.shape, shape, strict=True)), (shape, offset)
    flat = out.detach() if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    flat = flat.view(-1)
    chunk = CHUNK if out.device.type == "cpu" else 64 * CHUNK
    for start in range(0, flat.numel(), chunk):
        places = torch.arange(start, min(start + chunk, flat.numel()), device=out.device)
        drawn = _values(_global_indices(places, out.shape, shape, offset), key, what)
        flat[start : start + len(places)] = drawn.float().to(out.dtype)
    if not out.is_contiguous():
        out.copy_(flat.view(out.shape))
    return out


def _global_indices(places: Tensor, local: Sequence[int], shape: Sequence[int], offset: Sequence[int]) -> Tensor:
    """Flat indices in a slice of size `local` -> flat indices in the whole of `shape`."""
    result, stride = torch.zeros_like(places), 1
    for size, whole, first in zip(reversed(local), reversed(shape), reversed(offset), strict=True):
        result += (places % size + first) * stride
        places, stride = places // size, stride * whole
    return result


def _values(indices: Tensor, key: tuple[int, int], what: Distribution) -> Tensor:
    """Flat indices int64 -> numbers, float64."""
    counter, place = torch.unique_consecutive(indices // 4, return_inverse=True)
    zeros = torch.zeros_like(counter)
    words = torch.stack(philox([counter & _WORD, counter >> 32, zeros, zeros], key))
    word = words[indices % 4, place]
    symmetric = (word - 2**31).double() * 2.0**-31 + 2.0**-32  # (2 word + 1) / 2^32 - 1, exact
    return (quantile(symmetric * what.mass) if what.normal else symmetric) * what.scale


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Four words a counter -> four random words, each in an int64 tensor. Products wrap in 64 bits as unsigned ones do.
    """
    a, b, c, d = counter
    key0, key1 = key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (second >> 32 & _WORD) ^ b ^ key0, second & _WORD
        c, d = (first >> 32 & _WORD) ^ d ^ key1, first & _WORD
        key0, key1 = key0 + 0x9E3779B9 & _WORD, key1 + 0xBB67AE85 & _WORD
    return [a, b, c, d]


# Algorithm AS 241, PPND16 (Wichura, Applied Statistics 37, 1988): lowest powers first. It has a third range below
# 1.4e-11, which 32 bits do not reach.
_CENTRAL = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
_TAIL = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip
_SERIES = tuple(1.0 / n for n in range(1, 23, 2))


def quantile(q: Tensor) -> Tensor:
    """[n] -> Phi^-1(1/2 + q) for |q| <= 1/2 - 2^-33, float64: the normal distribution's inverse, to 1e-15 relative."""
    result = _ratio(0.180625 - q * q, _CENTRAL, q)
    far = (q.abs() > 0.425).nonzero().squeeze(-1)
    q = q[far]
    tail = _ratio(_minus_log(0.5 - q.abs()).sqrt() - 1.6, _TAIL, 1.0)
    return result.index_copy(0, far, torch.copysign(tail, q))


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient  # two kernels, two roundings
    return result


def _ratio(x: Tensor, coefficients: tuple[Sequence[float], Sequence[float]], factor: Tensor | float) -> Tensor:
    above, below = (_polynomial(c, x) for c in coefficients)
    return above * factor / below


def _minus_log(p: Tensor) -> Tensor:
    """-log(p), 0 < p <= 1/2: p = m 2^e, sqrt(1/2) <= m < sqrt(2), log(m) = 2 artanh((m - 1) / (m + 1)), its series."""
    bits = p.view(torch.int64)
    mantissa = bits & (1 << 52) - 1
    upper = (mantissa >= 0x6A09E667F3BCD).long()
    e = ((bits >> 52) - 1023 + upper).double()
    m = (mantissa | (1023 - upper) << 52).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    return -(e * 0.69314718055994530942 + s * 2.0 * _polynomial(_SERIES, s * s))

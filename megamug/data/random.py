"""Randomness per sample: a counter-based generator, so that crop, flip and mask are pure functions.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), vectorised over samples in numpy.
Key = (seed, stream name), counter = (sample index, epoch, block). Nothing here has state, so nothing has to be saved:
a resumed run, on any number of ranks, draws the same crop and mask for the same sample.

Axes: b samples, n numbers per sample, N patches, V visible patches, M = N - V masked patches.
"""

from __future__ import annotations

import hashlib

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox4x32. `counter`: integers below 2**32 [..., 4]; `key`: two such words -> uint32 [..., 4]."""
    c0, c1, c2, c3 = (np.array(counter[..., i], dtype=np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c2 = (product1 >> _32) ^ c1 ^ np.uint64(k0), (product0 >> _32) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def stream_key(seed: int, stream: str) -> tuple[int, int]:
    """The generator's key for a named stream: 64 bits of BLAKE2b over the seed and the name."""
    digest = hashlib.blake2b(f"{int(seed)}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def random_words(seed: int, stream: str, epoch: np.ndarray, index: np.ndarray, n: int) -> np.ndarray:
    """Uniform 32-bit words, a pure function of (seed, stream, epoch, index) -> uint32 [b, n]."""
    index = np.atleast_1d(np.asarray(index)).astype(np.uint64)  # [b]
    epoch = np.broadcast_to(np.asarray(epoch), index.shape).astype(np.uint64)  # [b]
    blocks = -(-n // 4)
    counter = np.empty((len(index), blocks, 4), np.uint64)
    counter[..., 0] = (index & _LOW)[:, None]
    counter[..., 1] = (index >> _32)[:, None]
    counter[..., 2] = (epoch & _LOW)[:, None]
    counter[..., 3] = np.arange(blocks, dtype=np.uint64)
    return philox4x32(counter, stream_key(seed, stream)).reshape(len(index), blocks * 4)[:, :n]


def uniform(seed: int, stream: str, epoch: np.ndarray, index: np.ndarray, n: int) -> np.ndarray:
    """Uniform numbers in [0, 1) with 32 bits of resolution, a pure function of the arguments.

    `epoch` (integer or [b]) and `index` ([b]) are the sample's; `stream` names the use ("crop", "mask", ...), so that
    two uses of one sample are independent -> float64 [b, n].
    """
    return random_words(seed, stream, epoch, index, n) * 2.0**-32


def random_masks(
    seed: int, epochs: np.ndarray, indices: np.ndarray, num_patches: int, num_visible: int
) -> tuple[np.ndarray, np.ndarray]:
    """MAE's random masking (He et al. 2022: sort noise, keep the lowest) -> (visible, masked) patch ids.

    Both int64 and ascending: visible [b, V], masked [b, M]. A pure function of (seed, epoch, index) for each sample.
    """
    assert 0 < num_visible <= num_patches, f"num_visible {num_visible} of {num_patches} patches"
    noise = random_words(seed, "mask", epochs, indices, num_patches)  # [b, N]
    order = np.argsort(noise, axis=1, kind="stable")
    return np.sort(order[:, :num_visible], axis=1), np.sort(order[:, num_visible:], axis=1)

"""The one global order of samples: position -> (source, epoch, index), computed, never stored.

Blending: positions are dealt to the sources by an exact interleave (after every n positions each source has had its
share of n, to within one), then each source runs through its own epochs, each a seeded permutation of all its samples.

Shuffling: an epoch is a permutation of blocks of `BLOCK` neighbouring samples (a Feistel network with cycle walking,
Black and Rogaway 2002, "Ciphers with arbitrary finite domains"), and a full shuffle inside windows of `WINDOW_BLOCKS`
permuted blocks. So reading touches a few stretches of the shards at a time, memory is constant, and any position is
found without visiting those before it.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

import numpy as np

from megamug.data.random import stream_key
from megamug.errors import UserError

BLOCK = 128  # neighbouring samples read together
WINDOW_BLOCKS = 16  # blocks shuffled together
ORDER_VERSION = 1  # goes into the fingerprint: a change of the order's definition is another order


@dataclass(frozen=True)
class Cursor:
    """Where training stands in the order: all that a checkpoint must hold of the data."""

    fingerprint: str
    seed: int
    samples: int  # consumed so far

    def to_dict(self) -> dict:
        return {"fingerprint": self.fingerprint, "seed": self.seed, "samples": self.samples}

    @staticmethod
    def from_dict(state: dict) -> Cursor:
        return Cursor(str(state["fingerprint"]), int(state["seed"]), int(state["samples"]))


class GlobalOrder:
    """The order over sources of `sizes` samples each.

    `weights`: shares of the sources (any positive numbers), or None: in proportion to the sizes, so that all sources
    end their epochs together. `fingerprints`: what the sources contain, by which a resume recognises them.
    """

    def __init__(
        self, sizes: list[int], *, weights: list[float] | None = None, seed: int, fingerprints: list[str] | None = None
    ) -> None:
        assert sizes and all(size > 0 for size in sizes)
        self.sizes, self.seed = [int(size) for size in sizes], int(seed)
        shares = self.sizes if weights is None else _integer_weights(weights)
        divisor = functools.reduce(gcd, shares)
        self.shares = [share // divisor for share in shares]  # of `sum(shares)` positions
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)  # of a unique index
        description = [ORDER_VERSION, BLOCK, WINDOW_BLOCKS, self.sizes, self.shares, fingerprints or []]
        self.fingerprint = hashlib.sha256(repr(description).encode()).hexdigest()
        self._window = functools.lru_cache(maxsize=2 * len(sizes) + 2)(self._shuffled_window)

    def __len__(self) -> int:
        """Samples of all sources together."""
        return sum(self.sizes)

    def slice(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions start .. start + count -> (source ids, epochs, indices in the source), each int64 [count]."""
        sources, places = self._deal(np.arange(start, start + count, dtype=np.int64))
        epochs, indices = np.empty_like(places), np.empty_like(places)
        for source in np.unique(sources):
            mine = sources == source
            epochs[mine], within = np.divmod(places[mine], self.sizes[source])
            indices[mine] = self._permute(int(source), epochs[mine], within)
        return sources, epochs, indices

    def unique(self, sources: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """A number for each sample that no other sample of any source has, int64 [count]."""
        return self.offsets[sources] + indices

    def cursor(self, samples: int) -> Cursor:
        return Cursor(self.fingerprint, self.seed, samples)

    def check(self, cursor: Cursor) -> None:
        """Raises `UserError` where `cursor` belongs to another order."""
        if cursor.fingerprint != self.fingerprint:
            raise UserError(
                f"data: the checkpoint was made with other data (fingerprint {cursor.fingerprint[:12]}, here "
                f"{self.fingerprint[:12]}): shards, their order or weights changed, so the order of samples cannot be "
                "continued; restore data.train, or start a new run_dir"
            )
        if cursor.seed != self.seed:
            raise UserError(f"seed: the checkpoint's order has {cursor.seed}, here {self.seed}; set seed={cursor.seed}")

    def first_pass(self) -> int:
        """The longest start of the order in which no sample comes twice."""
        low, high = 0, len(self)  # positions; the answer is the last p with no source past its end
        while low < high:
            middle = (low + high + 1) // 2
            if all(count <= size for count, size in zip(self._counts(middle), self.sizes, strict=True)):
                low = middle
            else:
                high = middle - 1
        return low

    def _counts(self, position: int) -> list[int]:
        """How many of the first `position` positions each source has."""
        counts, rest, total = [], position, sum(self.shares)
        for share in self.shares:
            counts.append(rest * share // total)
            rest, total = rest - counts[-1], total - share
        return counts

    def _deal(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions [n] -> (source [n], place in that source's own sequence [n]).

        The first source takes position p where floor((p + 1) a) > floor(p a), a its share of the whole; the other
        positions, renumbered, are dealt to the rest in the same way.
        """
        sources = np.full_like(positions, len(self.shares) - 1)
        places = np.empty_like(positions)
        undecided, rest, total = np.arange(len(positions)), positions, sum(self.shares)
        for source, share in enumerate(self.shares[:-1]):
            before = _scaled_floor(rest, share, total)  # positions below this one that the source takes
            taken = _scaled_floor(rest + 1, share, total) > before
            sources[undecided[taken]], places[undecided[taken]] = source, before[taken]
            undecided, rest = undecided[~taken], (rest - before)[~taken]
            total -= share
        places[undecided] = rest
        return sources, places

    def _permute(self, source: int, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Places in an epoch [n] -> sample indices [n]."""
        indices = np.empty_like(places)
        windows = places // (BLOCK * WINDOW_BLOCKS)
        for epoch, window in sorted(set(zip(epochs.tolist(), windows.tolist(), strict=True))):
            mine = (epochs == epoch) & (windows == window)
            indices[mine] = self._window(source, epoch, window)[places[mine] - window * BLOCK * WINDOW_BLOCKS]
        return indices

    def _shuffled_window(self, source: int, epoch: int, window: int) -> np.ndarray:
        """The samples of one window of one epoch, in order, int64 [up to BLOCK x WINDOW_BLOCKS]."""
        size = self.sizes[source]
        key = stream_key(self.seed, f"order/{source}/{epoch}")
        first = window * BLOCK * WINDOW_BLOCKS
        slots = np.arange(first, min(first + BLOCK * WINDOW_BLOCKS, size), dtype=np.int64)
        indices = _permute_blocks(slots, size, key)
        # numpy guarantees the raw words of a bit generator to stay the same, not what Generator makes of them
        words = np.random.Philox(key=[key[0] << 32 | key[1], window]).random_raw(len(indices))
        return indices[np.argsort(words, kind="stable")]


def _permute_blocks(slots: np.ndarray, size: int, key: tuple[int, int]) -> np.ndarray:
    """Neighbouring slots [n] of an epoch -> samples, blocks of `BLOCK` permuted, the short last one anywhere."""
    full, tail = divmod(size, BLOCK)
    tail_block = (key[0] << 32 | key[1]) % (full + 1)
    past = slots - tail_block * BLOCK  # 0 .. tail: in the short block; beyond: shifted by it
    in_tail = (past >= 0) & (past < tail)
    if full == 0:
        return past
    blocks, within = np.divmod(np.where(past >= tail, slots - tail, slots), BLOCK)
    blocks = np.minimum(blocks, full - 1)  # of slots in the short block: not used
    run = np.arange(blocks[0], blocks[-1] + 1)  # slots are neighbours, so their blocks are too
    permuted = feistel_permutation(run, full, key)[blocks - blocks[0]]
    return np.where(in_tail, full * BLOCK + past, permuted * BLOCK + within)


def feistel_permutation(values: np.ndarray, size: int, key: tuple[int, int]) -> np.ndarray:
    """A seeded bijection of 0 .. size - 1, applied to int64 `values` [n]: eight Feistel rounds, walked into range."""
    bits = max((size - 1).bit_length(), 2)
    low_bits = bits // 2
    values = values.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        values[outside] = _feistel(values[outside], bits - low_bits, low_bits, key)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: np.ndarray, high_bits: int, low_bits: int, key: tuple[int, int]) -> np.ndarray:
    # Halves of unequal width keep their places: even rounds change the high half by the low one, odd ones vice versa.
    high, low = values >> np.uint64(low_bits), values & np.uint64((1 << low_bits) - 1)
    for step in range(8):
        word = key[step % 2] << 32 | key[1 - step % 2]
        salt = np.uint64(word ^ (step * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF))
        if step % 2 == 0:
            high = high ^ (_mix(low ^ salt) & np.uint64((1 << high_bits) - 1))
        else:
            low = low ^ (_mix(high ^ salt) & np.uint64((1 << low_bits) - 1))
    return high << np.uint64(low_bits) | low


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014), uint64 -> uint64, modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _scaled_floor(values: np.ndarray, numerator: int, denominator: int) -> np.ndarray:
    """floor(values * numerator / denominator) without overflow for non-negative int64 values."""
    whole, rest = np.divmod(values, denominator)
    if denominator < 1 << 31:
        return whole * numerator + rest * numerator // denominator
    exact = [int(r) * numerator // denominator for r in rest]
    return whole * numerator + np.array(exact, np.int64)


def _integer_weights(weights: list[float]) -> list[int]:
    """Weights as integers of the same proportions, to one part in a million of the total."""
    total = sum(weights)
    return [max(1, round(Fraction(weight) / Fraction(total) * 1_000_000)) for weight in weights]

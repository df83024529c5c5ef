"""What a loader of pairs gives: micro-batches of this rank, and which samples they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megamug.data.shards.sources import Source
from megamug.errors import printable


@dataclass
class PairBatch:
    """One micro-batch of b pairs."""

    images: torch.Tensor | None  # uint8 [b, 3, S, S] RGB
    tokens: torch.Tensor | None  # int64 [b, caption_length + 1]
    epochs: np.ndarray  # int64 [b]
    indices: np.ndarray  # int64 [b]: a number that no other sample of any source has
    valid: np.ndarray  # bool [b]: False for the padding at the end of a validation pass
    labels: torch.Tensor | None = None  # int64 [b]: the class of each sample; of padding, too
    train: bool = True  # of a training pass
    maps: torch.Tensor | None = None  # uint8 [b, S, S]: classes of pixels, see `megamug.data.segmentation.loader`
    _locations: list[tuple[Source, int]] = field(repr=False, default_factory=list)
    _lines: tuple[str, np.ndarray] = field(repr=False, default=("join", np.zeros(0)))  # which captions, and draws [b]

    def keys(self) -> list[str]:
        """`shard file: key` of each sample, read from the indexes when asked for."""
        return [f"{printable(path.name)}: {key}" for path, key in self.places()]

    def places(self) -> list[tuple[Path, str]]:
        """The shard and the key in there of each sample, read from the indexes when asked for."""
        places = [source.locate(index) for source, index in self._locations]
        return [(shard.path, shard.key(i)) for shard, i in places]

    def references(self) -> list[list[str]]:
        """All captions of each sample, see `Shard.captions_aside`."""
        places = [source.locate(index) for source, index in self._locations]
        return [shard.captions_aside(i, self._lines[0]) for shard, i in places]

    def captions(self) -> list[str]:
        """The captions as they stand in the shards, "" where there is none; of several, those that `tokens` hold."""
        places, (lines, draws) = [source.locate_caption(index) for source, index in self._locations], self._lines
        return [shard.caption_aside(i, lines, draw) for (shard, i), draw in zip(places, draws, strict=True)]


@dataclass
class GlobalBatch:
    """This rank's micro-batches of one global batch."""

    micro_batches: list[PairBatch]
    samples: int  # the cursor behind this batch: samples of the order consumed, by all ranks together
    wait_seconds: float = 0.0  # how long the caller of `next` was blocked
    failures: int = 0  # samples replaced on this rank since the loader was made

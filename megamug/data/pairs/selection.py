"""What of the training sets a run sees: a share of each, and each image's own caption or that of another.

Both are for experiments: how much data an encoder needs, and whether its captions tell it anything. They are pure
functions of the seed, and cost 8 bytes a sample each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megamug.data.order import feistel_permutation
from megamug.data.random import stream_key
from megamug.data.shards.sources import Source
from megamug.errors import UserError

CAPTIONS = ("own", "shuffled")


def selected(sources: Sequence[Source], seed: int, fraction: float = 1.0, captions: str = "own") -> list[Source]:
    """The sets as a run sees them.

    Args:
        fraction: of the samples of each set, at least one. Of one seed, a smaller share lies within a larger one.
        captions: `own`, or `shuffled`: each image has the caption of another image of its set, always the same one,
            and each caption is given once.

    Raises UserError: nothing to shuffle in a set of one sample.
    """
    check(sources, fraction, captions)
    return [_of_one(number, source, seed, fraction, captions) for number, source in enumerate(sources)]


def check(sources: Sequence[Source], fraction: float, captions: str) -> None:
    """Raises UserError where `selected` would."""
    for source in sources if captions == "shuffled" else ():
        if (count := _count(source, fraction)) < 2:
            raise UserError(f"data.captions: shuffled, but {source.name} has {count} sample"
                            + (f" at data.fraction={fraction:g}" if fraction < 1 else "")
                            + "; there is no other to take a caption of")  # fmt: skip


def _count(source: Source, fraction: float) -> int:
    return math.ceil(fraction * len(source))


def _of_one(number: int, source: Source, seed: int, fraction: float, captions: str) -> Source:
    if (count := _count(source, fraction)) < len(source):
        drawn = feistel_permutation(np.arange(count), len(source), stream_key(seed, f"fraction/{number}"))
        part = np.sort(drawn)  # neighbours in the shards are still read together
        source = replace(source, part=part, remarks=(*source.remarks, f"{count} by seed {seed}"))
    if captions == "shuffled":
        # one round through all: no sample meets itself, as it might in a permutation drawn at random
        order = feistel_permutation(np.arange(count), count, stream_key(seed, f"captions/{number}"))
        given = np.empty_like(order)
        given[order] = np.roll(order, -1)
        source = replace(source, given=given, remarks=(*source.remarks, f"captions shuffled by seed {seed}"))
    return source

"""Which part of an image and its map is trained on, and how large: scaled, cropped, flipped, as mmsegmentation does it
(Resize with a ratio range, RandomCrop with `cat_max_ratio`, RandomFlip, Pad).

What is drawn is a pure function of (seed, epoch, index). A placement is (top, left, height, width) of a region of the
image in its own pixels, and (height, width) of what that becomes, at most S x S; the rest of the S x S is padding, at
the right and the bottom.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megamug.data.random import uniform
from megamug.data.shards.maps import NO_CLASS

TRIES = 11  # one and ten more
LONGEST = 4  # times S: what a longer side becomes at most, at scale 1 (2048 of 512)


def scaled_crops(
    seed: int, epochs: np.ndarray, indices: np.ndarray, widths: np.ndarray, heights: np.ndarray, size: int,
    scale: Sequence[float] = (0.5, 2.0),
) -> np.ndarray:  # fmt: skip
    """Placements to choose from, int64 [b, TRIES, 6]: all of one scale.

    The shorter side becomes size x r, with r uniform in `scale` (less where the longer one would be above 4 size r);
    of that a window of size x size, anywhere. Regions are whole pixels of the image, so an edge may lie half a pixel
    away from where resizing first would have put it.
    """
    draws = uniform(seed, "scaled crop", epochs, indices, 1 + 2 * TRIES)
    sides = np.stack([heights, widths], axis=1).astype(np.float64)  # [b, 2]
    factor = scale[0] + draws[:, 0] * (scale[1] - scale[0])
    factor = size * factor * np.minimum(1 / sides.min(1), LONGEST / sides.max(1))
    scaled = sides * factor[:, None]
    whole = scaled < size
    lengths = np.where(whole, sides, np.clip(np.rint(size / factor[:, None]), 1, sides))
    targets = np.where(whole, np.maximum(np.rint(scaled), 1), size)
    starts = np.floor(draws[:, 1:].reshape(-1, TRIES, 2) * (sides - lengths + 1)[:, None])  # [b, TRIES, 2]
    same = np.broadcast_to(np.concatenate([lengths, targets], axis=1)[:, None], (len(sides), TRIES, 4))
    return np.concatenate([starts, same], axis=2).astype(np.int64)


def varied(values: np.ndarray, placements: np.ndarray, most: float) -> np.ndarray:
    """The first of the placements [TRIES, 6] in which no class has more than `most` of the pixels that have one; the
    last where none is so. `values`: the map, uint8 [height, width]."""
    if most >= 1:
        return placements[0]
    for placement in placements[:-1]:
        top, left, height, width = placement[:4]
        region = values[top : top + height, left : left + width]
        counts = np.bincount(region.ravel(), minlength=NO_CLASS + 1)[:NO_CLASS]
        if (counts > 0).sum() > 1 and counts.max() < most * counts.sum():
            return placement
    return placements[-1]


def placed(values: np.ndarray, placement: np.ndarray, flip: bool, size: int) -> np.ndarray:
    """The map as it is trained on, uint8 [size, size]: nearest pixels, mirrored where the image is; NO_CLASS as
    padding."""
    top, left, height, width, rows, columns = placement.tolist()
    y = top + ((np.arange(rows) + 0.5) * height / rows).astype(np.int64)
    x = left + ((np.arange(columns) + 0.5) * width / columns).astype(np.int64)
    found = np.full((size, size), NO_CLASS, np.uint8)
    found[:rows, :columns] = values[np.ix_(y, x[::-1] if flip else x)]
    return found


def without_zero(values: np.ndarray) -> np.ndarray:
    """A map in which 0 is no class as one in which it is the first: 1 becomes 0, 0 and 255 NO_CLASS."""
    return np.where((values == 0) | (values == NO_CLASS), NO_CLASS, values - 1).astype(np.uint8)

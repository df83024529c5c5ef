"""Images of a micro-batch mixed in pairs, mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019,
arXiv 1905.04899), random erasing and stochastic depth. What is drawn is a pure function of (seed, epoch, index).
"""

from __future__ import annotations

import numpy as np

from megamug.data.random import stream_key, uniform

_BOXES = 10  # that are tried


def kept_shares(
    seed: int, epochs: np.ndarray, indices: np.ndarray, size: int, mixup: float, cutmix: float
) -> np.ndarray:
    """Of every pixel, the share that is the image's own; the rest is its partner's -> float32 [b, size, size].

    mixup: one number for all pixels, of Beta(mixup, mixup). CutMix: 0 in a box whose area is 1 - Beta(cutmix, cutmix)
    of the image, as far as it lies inside, centred anywhere; 1 elsewhere. With both above 0 each image takes one or the
    other with the same chance.
    """
    assert mixup > 0 or cutmix > 0
    draws = uniform(seed, "mixing", epochs, indices, 3)
    cuts = draws[:, 0] < 0.5 if mixup > 0 and cutmix > 0 else np.full(len(draws), cutmix > 0)
    key = np.array(stream_key(seed, "mixing, beta"), np.uint64)
    shares = np.empty(len(draws))
    for row, (epoch, index, cut) in enumerate(zip(epochs.tolist(), indices.tolist(), cuts, strict=True)):
        counter = np.array([0, 0, epoch, index], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        alpha = cutmix if cut else mixup
        shares[row] = generator.beta(alpha, alpha)
    side = np.where(cuts, np.floor(size * np.sqrt(1 - shares)), 0)
    places, inside = np.arange(size), []
    for draw in draws[:, 1:].T:  # rows, columns
        first = np.floor(draw * size) - side // 2
        inside.append((places >= first[:, None]) & (places < (first + side)[:, None]))
    box = inside[0][:, :, None] & inside[1][:, None, :]
    return np.where(cuts[:, None, None], ~box, shares[:, None, None]).astype(np.float32)


def path_scales(seed: int, epochs: np.ndarray, indices: np.ndarray, layers: int, rate: float) -> np.ndarray:
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382) by sample: what each of a layer's two parts is times.

    A part is left out with a chance that grows linearly from 0 in the first layer to `rate` in the last, and divided by
    the chance that it stays otherwise -> float32 [layers, 2, b, 1], a pure function of (seed, epoch, index).
    """
    stays = 1 - np.linspace(0, rate, layers)[:, None, None]
    draws = uniform(seed, "drop path", epochs, indices, 2 * layers).reshape(-1, layers, 2).transpose(1, 2, 0)
    return ((draws < stays) / stays).astype(np.float32)[..., None]


def erased_boxes(seed: int, epochs: np.ndarray, indices: np.ndarray, size: int, chance: float) -> np.ndarray:
    """Random erasing (Zhong et al. 2020, arXiv 1708.04896) with timm's ranges: a box of 2 to 33.3% of the image, its
    aspect ratio log-uniform in 0.3 to 1 / 0.3, the first of ten that fits -> int64 [b, 4]: (top, left, height, width)
    in pixels, all 0 for the images that keep what they have."""
    draws = uniform(seed, "erasing", epochs, indices, 1 + 4 * _BOXES)
    erases, draws = draws[:, 0] < chance, draws[:, 1:].reshape(-1, 4, _BOXES)
    area = size * size * (1 / 50 + draws[:, 0] * (1 / 3 - 1 / 50))
    aspect = np.exp(np.log(0.3) * (1 - 2 * draws[:, 1]))
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # [b, boxes]
    fits = (heights < size) & (widths < size)
    first, rows = fits.argmax(axis=1), np.arange(len(draws))
    heights, widths = heights[rows, first], widths[rows, first]
    top = np.floor(draws[rows, 2, first] * (size - heights + 1))
    left = np.floor(draws[rows, 3, first] * (size - widths + 1))
    kept = ~(erases & fits.any(axis=1))
    boxes = np.stack([top, left, heights, widths], axis=1).astype(np.int64)
    boxes[kept] = 0
    return boxes


def erasing_noise(seed: int, epoch: int, index: int, height: int, width: int) -> np.ndarray:
    """What an erased box is filled with: normal numbers, of normalised pixels -> float32 [3, height, width]."""
    key = np.array(stream_key(seed, "erasing, noise"), np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, epoch, index], np.uint64)))
    return generator.standard_normal((3, height, width), dtype=np.float32)

"""Which region of an image is trained on, and decoding a batch of regions without being stopped by one bad file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megamug.data.dali import DECODE_ERRORS, CropDecoder
from megamug.data.random import uniform

_ATTEMPTS = 10
SHARE = 0.875  # of the shorter side that is seen in evaluation: 224 of 256 (MAE, timm's `crop_pct`)


def random_resized_crops(
    seed: int, epochs: np.ndarray, indices: np.ndarray, widths: np.ndarray, heights: np.ndarray,
    scale: Sequence[float] = (0.2, 1.0), ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> np.ndarray:  # fmt: skip
    """Inception's crop as torchvision's RandomResizedCrop draws it, as a pure function of (seed, epoch, index).

    Ten attempts at an area share in `scale` and a log-uniform aspect ratio in `ratio`; the first that fits is taken,
    else the largest centred region of an allowed ratio -> int64 [b, 4]: (top, left, height, width) in pixels.
    """
    widths, heights = np.asarray(widths, np.float64)[:, None], np.asarray(heights, np.float64)[:, None]
    draws = uniform(seed, "crop", epochs, indices, 4 * _ATTEMPTS).reshape(-1, 4, _ATTEMPTS)
    area = widths * heights * (scale[0] + draws[:, 0] * (scale[1] - scale[0]))
    log_low, log_high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(log_low + draws[:, 1] * (log_high - log_low))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # [b, attempts]
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
    first = fits.argmax(axis=1)
    rows = np.arange(len(first))
    w, h = w[rows, first], h[rows, first]
    top = np.floor(draws[rows, 2, first] * (heights[:, 0] - h + 1))
    left = np.floor(draws[rows, 3, first] * (widths[:, 0] - w + 1))
    chosen = np.stack([top, left, h, w], axis=1)
    widths, heights = widths[:, 0], heights[:, 0]
    w = np.clip(np.rint(heights * ratio[1]), 1, widths)
    h = np.clip(np.rint(widths / ratio[0]), 1, heights)
    fallback = np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)
    return np.where(fits.any(axis=1)[:, None], chosen, fallback).astype(np.int64)


def centre_squares(widths: np.ndarray, heights: np.ndarray, share: float = 1.0) -> np.ndarray:
    """The centred square of each image, `share` of its shorter side, int64 [b, 4] as above.

    Resizing it to S x S is resizing the shorter side to S / share and then cropping the centre, without the pixels
    thrown away.
    """
    widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    side = np.maximum(np.rint(np.minimum(widths, heights) * share).astype(np.int64), 1)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)


def random_flips(seed: int, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Mirror left and right with probability 1/2, bool [b]."""
    return uniform(seed, "flip", epochs, indices, 1)[:, 0] < 0.5


def decode_or_none(
    decoder: CropDecoder, images: list[bytes], regions: np.ndarray, flips: np.ndarray
) -> tuple[torch.Tensor, dict[int, str]]:
    """Decode a batch -> (uint8 [b, 3, S, S], reasons by the position of each image that does not decode).

    The pixels of a failed image are zeros. Only after a failure is each image of the batch decoded alone.
    """
    try:
        return decoder(images, regions, flips), {}
    except DECODE_ERRORS:
        pass  # a culprit is looked for below; an error that is none of the images' own is raised there again
    size = decoder.image_size
    pixels = torch.zeros(len(images), 3, size, size, dtype=torch.uint8, device=decoder.device)
    failed: dict[int, str] = {}
    for i, image in enumerate(images):
        try:
            pixels[i] = decoder([image], regions[i : i + 1], flips[i : i + 1])[0]
        except DECODE_ERRORS as error:
            failed[i] = str(error)
    if len(failed) == len(images) and len(images) > 1:
        raise RuntimeError(f"none of {len(images)} verified images decodes; the first reason: {failed[0]}")
    return pixels, failed

"""Random brightness, contrast, saturation and hue, as mmsegmentation's PhotoMetricDistortion draws them (after SSD,
Liu et al. 2016, arXiv 1512.02325): each with a chance of a half, contrast before saturation and hue or behind them.

What is drawn is a pure function of (seed, epoch, index).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megamug.data.random import uniform

BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18.0  # of 255; factors; degrees


def distorted(images: Tensor, seed: int, epochs: np.ndarray, indices: np.ndarray) -> Tensor:
    """uint8 [b, 3, H, W] of red, green and blue -> the same, rounded down after each change as there."""
    draws = torch.from_numpy(uniform(seed, "distortion", epochs, indices, 9)).float()
    return torch.stack([_one(image, row) for image, row in zip(images, draws.tolist(), strict=True)])


def _one(image: Tensor, draws: list[float]) -> Tensor:
    bright, by, first, contrast, factor, saturate, times, turn, angle = draws
    if bright < 0.5:
        image = _bytes(image.float() + (2 * by - 1) * BRIGHTNESS)
    contrasts = contrast < 0.5
    factor = CONTRAST[0] + factor * (CONTRAST[1] - CONTRAST[0])
    if contrasts and first < 0.5:
        image = _bytes(image.float() * factor)
    if saturate < 0.5 or turn < 0.5:
        hue, saturation, value = hsv(image.float())
        if saturate < 0.5:
            saturation = (saturation * (SATURATION[0] + times * (SATURATION[1] - SATURATION[0]))).clamp(0, 1)
        if turn < 0.5:
            hue = (hue + (2 * angle - 1) * HUE) % 360
        image = _bytes(rgb(hue, saturation, value))
    if contrasts and first >= 0.5:
        image = _bytes(image.float() * factor)
    return image


def _bytes(image: Tensor) -> Tensor:
    return image.clamp(0, 255).add(1e-3).to(torch.uint8)  # what rounding took from a whole number is given back


def hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[3, ...] of red, green, blue -> hue in 0..360, saturation in 0..1, value of their scale, [...] each."""
    red, green, blue = image
    value, low = image.amax(0), image.amin(0)
    spread = value - low
    safe = spread.clamp(min=1e-12)
    of_red, of_green, of_blue = (green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe
    hue = torch.where(value == red, of_red, torch.where(value == green, of_green, of_blue))
    return 60 * hue % 360, torch.where(value > 0, spread / value.clamp(min=1e-12), 0), value


def rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The inverse of `hsv`."""
    found = []
    for shift in (5, 3, 1):
        k = (shift + hue / 60) % 6
        found.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(found)

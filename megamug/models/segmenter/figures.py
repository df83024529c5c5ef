"""Figures of segmentation out of counts of pixels: nothing is averaged over images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SegmentationFigures:
    """Shares in 0..1; NaN where nothing was there to count."""

    iou: list[float]  # intersection over union of each class
    accuracy: list[float]  # share of each class's pixels that were given it
    mean_iou: float  # of the classes that are in a truth or in a prediction
    mean_accuracy: float  # of the classes that are in a truth
    pixel_accuracy: float


def of_confusion(confusion: Tensor) -> SegmentationFigures:
    """`confusion` [C, C]: pixels by true class (row) and predicted one (column)."""
    counts = confusion.cpu().double()  # whole numbers up to 2^53
    hits, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou, accuracy = hits / (true + predicted - hits), hits / true
    return SegmentationFigures(
        iou.tolist(), accuracy.tolist(), _mean(iou), _mean(accuracy), (hits.sum() / counts.sum()).item()
    )


def _mean(values: Tensor) -> float:
    return torch.nanmean(values).item()

"""Batches of images and maps of their classes, by the loader of pairs: its order, its threads, its replacements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megamug.data.dali import CropDecoder
from megamug.data.pairs.batch import GlobalBatch
from megamug.data.pairs.images import centre_squares, random_flips
from megamug.data.pairs.loader import PairLoader, Samples
from megamug.data.segmentation.crops import placed, scaled_crops, varied, without_zero
from megamug.data.segmentation.distortion import distorted
from megamug.data.shards.maps import NO_CLASS
from megamug.data.shards.reading import OpenShards
from megamug.data.shards.sources import Source, check_maps
from megamug.data.spans import span


class MapLoader(PairLoader):
    """Training: scaled, cropped, flipped (see `crops`), distorted where it is asked for. Validation: the centred square
    of the shorter side. `maps` of a micro-batch are uint8 [b, S, S], `NO_CLASS` all over where an image is padding.

    Images are decoded and resized on the CPU.
    """

    def __init__(
        self, sources: list[Source], *, scale: Sequence[float], most_of_one_class: float, distortion: bool,
        mean: Sequence[float], reduce_zero_label: bool, **arguments,
    ) -> None:  # fmt: skip
        """`mean`: of red, green, blue in 0..1, the colour of padding; the rest as `PairLoader`. Raises `UserError`
        where a sample has no map."""
        check_maps(sources)
        self.scale, self.most_of_one_class, self.distortion = scale, most_of_one_class, distortion
        self.colour, self.reduce_zero_label = [round(255 * x) for x in mean], reduce_zero_label
        super().__init__(sources, **arguments)

    def _decoder(self, step: int) -> CropDecoder:
        cpu = torch.device("cpu")
        return CropDecoder(self.image_size, step, self.threads, cpu, self.background, padding=self.colour)

    def _samples(self, start: int, part: int) -> Samples:
        samples = super()._samples(start, part)
        samples.maps = np.full((part, self.image_size, self.image_size), NO_CLASS, np.uint8)
        return samples

    def _read(self, samples: Samples, row: int, shards: OpenShards) -> tuple | Exception:
        """As there, with the map before the label."""
        found = super()._read(samples, row, shards)
        if isinstance(found, Exception):
            return found
        shard, i = self.sources[samples.sources[row]].locate(samples.indices[row])
        try:
            with shards.lock:
                shard = shards.use(shard)
                values = shard.map(shard.record(i))
        except (OSError, ValueError) as error:
            return error
        return *found[:3], without_zero(values) if self.reduce_zero_label else values, found[3]

    def _views(self, samples: Samples, rows: slice, read: list) -> tuple[np.ndarray, np.ndarray]:
        """Placements [b, 6] and flips [b] of some samples."""
        widths, heights = np.array([r[2] for r in read]).T
        if not self.train:
            whole = np.full((len(read), 2), self.image_size)
            return np.concatenate([centre_squares(widths, heights), whole], axis=1), np.zeros(len(read), bool)
        with span("loader: crops"):
            which = self.seed, samples.epochs[rows], self.order.unique(samples.sources[rows], samples.indices[rows])
            crops = scaled_crops(*which, widths, heights, self.image_size, self.scale)
            chosen = [varied(r[3], own, self.most_of_one_class) for r, own in zip(read, crops, strict=True)]
            flips = random_flips(*which) if self.flip else np.zeros(len(read), bool)
        return np.stack(chosen), flips

    def _finished(
        self, samples: Samples, rows: slice, read: list, pixels: torch.Tensor, regions: np.ndarray, flips: np.ndarray
    ) -> torch.Tensor:
        for row, sample, placement, flip in zip(range(rows.start, rows.stop), read, regions, flips, strict=True):
            if samples.valid[row]:
                samples.maps[row] = placed(sample[3], placement, flip, self.image_size)
        if self.train and self.distortion:
            unique = self.order.unique(samples.sources[rows], samples.indices[rows])
            new = distorted(pixels, self.seed, samples.epochs[rows], unique)
            for image, own, (*_, height, width) in zip(pixels, new, regions.tolist(), strict=True):
                image[:, :height, :width] = own[:, :height, :width]  # padding stays what it is
        return pixels.to(self.device)

    def _make_batch(self, samples: Samples, pixels: list[torch.Tensor], captions: list[str]) -> GlobalBatch:
        maps = torch.from_numpy(samples.maps).to(self.device)
        batch = super()._make_batch(samples, pixels, captions)
        for number, micro in enumerate(batch.micro_batches):
            micro.maps = maps[number * self.micro_batch_size :][: self.micro_batch_size]
        return batch

"""What the trainer knows of a segmenter: an encoder's, with maps of classes in the place of captions."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megamug.data.pairs.loader import GlobalBatch, PairBatch
from megamug.data.random import uniform
from megamug.data.segmentation.loader import MapLoader
from megamug.models.mug.finetuning import FineTuningTask
from megamug.models.segmenter.figures import of_confusion
from megamug.models.segmenter.model import IGNORED, SegmentBatch, Segmenter
from megamug.models.segmenter.plan import SegmenterPlan


class SegmenterTask(FineTuningTask):
    """Of images with a map of classes."""

    plan_type, model = SegmenterPlan, Segmenter

    def loader(self, world, train: bool, state: dict | None = None, max_samples: int | None = None) -> MapLoader:
        """Held-out images are seen as the centred square of the shorter side; `megamug evaluate` sees all of them."""
        own = self.config.segmenter
        return self.pairs(
            world, train, state, max_samples, captions=False, loader=MapLoader, scale=own.scale,
            most_of_one_class=own.most_of_one_class, distortion=own.distortion, mean=self.config.data.mean,
            reduce_zero_label=own.reduce_zero_label,
        )  # fmt: skip

    def batch(self, pairs: PairBatch) -> SegmentBatch:
        """What is drawn is a pure function of (seed, epoch, sample)."""
        if not pairs.train:
            return SegmentBatch(pairs.images, pairs.maps)
        plan, kept = self.plan, None
        if plan.dropout > 0:
            count = plan.channels + plan.auxiliary_channels
            draws = uniform(self.config.seed, "head dropout", pairs.epochs, pairs.indices, count)
            kept = torch.from_numpy(draws >= plan.dropout).to(pairs.images.device, torch.float32) / (1 - plan.dropout)
        return SegmentBatch(pairs.images, pairs.maps, scales=self.path_scales(pairs), kept=kept)

    def totals(self, pairs: GlobalBatch, batches: list[SegmentBatch], world) -> dict[str, float]:
        """The number of pixels with a class in the whole global batch. One small all-reduce over the replicas."""
        count = sum((batch.maps != IGNORED).sum(dtype=torch.float64) for batch in batches)
        if world.dp_size > 1:
            dist.all_reduce(count, group=world.dp_group)
        return dict.fromkeys(self.plan.loss_weights, count.item())

    def held_out(self, chunks: list[Segmenter], world) -> dict[str, float]:
        """Figures of the pixels that the chunks saw in evaluation since the last call, over all replicas."""
        total = chunks[0].take_confusion().to(world.device)
        if world.dp_size > 1:
            dist.all_reduce(total, group=world.dp_group)
        figures = of_confusion(total)
        return {"mean_iou": figures.mean_iou, "pixel_accuracy": figures.pixel_accuracy}

"""What the trainer knows of a classifier: MUG's, with classes in the place of captions."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megamug.configuration.counts import as_mug
from megamug.configuration.sections import Config
from megamug.data.order import GlobalOrder
from megamug.data.pairs.images import SHARE
from megamug.data.pairs.loader import GlobalBatch, PairBatch, PairLoader, order_of
from megamug.data.shards.sources import resolve_sources
from megamug.models.classifier.model import ClassBatch, Classifier
from megamug.models.classifier.plan import ClassifierPlan
from megamug.models.mug.task import MugTask


class ClassifierTask(MugTask):
    """Of images with classes."""

    plan_type, model = ClassifierPlan, Classifier

    def __init__(self, config: Config):
        super().__init__(as_mug(config))
        self.config = config
        self.plan = ClassifierPlan(config, 0, self.spec)
        self.loss_names = ["class"]

    def loader(self, world, train: bool, state: dict | None = None, max_samples: int | None = None) -> PairLoader:
        """Held-out images are seen as MAE evaluates: the centre, `SHARE` of the shorter side."""
        return self.pairs(world, train, state, max_samples, captions=False, need_labels=True, share=SHARE)

    def order(self) -> GlobalOrder:
        return order_of(resolve_sources(self.config.data.train), self.config.seed)

    def identity(self) -> dict:
        return super().identity() | {"classifier.classes": self.plan.classes}

    def join(self, world) -> None:
        super().join(world)
        self.plan.data_group = world.dp_group if world.dp_size > 1 else None

    @property
    def flops_per_sample(self) -> float:
        """As every model's; of a frozen encoder there is no backward."""
        if not self.plan.frozen_encoder:
            return super().flops_per_sample
        return self.plan.forward_flops + 2 * self.plan.blocks[-1].flops

    def batch(self, pairs: PairBatch) -> ClassBatch:
        rows = None if pairs.valid.all() else torch.from_numpy(pairs.valid.nonzero()[0]).to(pairs.images.device)
        return ClassBatch(pairs.images, pairs.labels, rows)

    def totals(self, pairs: GlobalBatch, batches: list[ClassBatch], world) -> dict[str, float]:
        """The number of images in the whole global batch. One small all-reduce over the replicas."""
        images = sum(int(p.valid.sum()) for p in pairs.micro_batches)
        count = torch.tensor(images, dtype=torch.float64, device=world.device)
        if world.dp_size > 1:
            dist.all_reduce(count, group=world.dp_group)
        return {"class": count.item()}

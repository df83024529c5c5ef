"""What the trainer knows of a classifier: MUG's, with classes in the place of captions."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megamug.data.pairs.images import SHARE
from megamug.data.pairs.loader import GlobalBatch, PairBatch, PairLoader
from megamug.data.pairs.mixing import erased_boxes, erasing_noise, kept_shares
from megamug.data.pairs.rand_augment import RandAugment
from megamug.models.classifier.model import ClassBatch, Classifier
from megamug.models.classifier.plan import ClassifierPlan
from megamug.models.mug.finetuning import FineTuningTask


class ClassifierTask(FineTuningTask):
    """Of images with classes."""

    plan_type, model = ClassifierPlan, Classifier

    def loader(self, world, train: bool, state: dict | None = None, max_samples: int | None = None) -> PairLoader:
        """Held-out images are seen as MAE evaluates: the centre, `SHARE` of the shorter side."""
        data, policy, augment = self.config.data, self.config.classifier.rand_augment, None
        if train and policy is not None:
            augment = RandAugment(policy, self.config.seed, data.image_size, data.mean, data.threads)
        return self.pairs(world, train, state, max_samples, captions=False, need_labels=True, share=SHARE,
                          augment=augment)  # fmt: skip

    @property
    def flops_per_sample(self) -> float:
        """As every model's; of a frozen encoder there is no backward."""
        if not self.plan.frozen_encoder:
            return super().flops_per_sample
        return self.plan.forward_flops + 2 * self.plan.blocks[-1].flops

    def batch(self, pairs: PairBatch) -> ClassBatch:
        """In training boxes are erased, images mixed and parts of layers left out, by draws that are a pure function of
        (seed, epoch, sample). The partner of a micro-batch's i-th image is its i-th from the end (timm's order)."""
        plan, device, images, labels = self.plan, pairs.images.device, pairs.images, pairs.labels
        if not pairs.train:
            rows = None if pairs.valid.all() else torch.from_numpy(pairs.valid.nonzero()[0]).to(device)
            return ClassBatch(images, labels, rows)
        sample = self.config.seed, pairs.epochs, pairs.indices
        if plan.random_erasing > 0:
            images = self._erased(images.float(), pairs)
        if plan.mixup > 0 or plan.cutmix > 0:
            kept = torch.from_numpy(kept_shares(*sample, images.shape[-1], plan.mixup, plan.cutmix)).to(device)
            own, shares = F.one_hot(labels, plan.classes).float(), kept.mean(dim=(1, 2)).unsqueeze(1)
            labels = shares * own + (1 - shares) * own.flip(0)
            images, kept = images.float(), kept.unsqueeze(1)
            images = kept * images + (1 - kept) * images.flip(0)
        return ClassBatch(images, labels, scales=self.path_scales(pairs))

    def _erased(self, images: torch.Tensor, pairs: PairBatch) -> torch.Tensor:
        """Noise in a box of some images [b, 3, H, W], as float32 in the range of bytes."""
        data, seed = self.config.data, self.config.seed
        mean, std = (255 * torch.tensor(x).view(3, 1, 1) for x in (data.mean, data.std))
        boxes = erased_boxes(seed, pairs.epochs, pairs.indices, data.image_size, self.plan.random_erasing)
        for row in boxes[:, 2].nonzero()[0].tolist():
            top, left, height, width = boxes[row].tolist()
            noise = erasing_noise(seed, int(pairs.epochs[row]), int(pairs.indices[row]), height, width)
            filled = (mean + std * torch.from_numpy(noise)).to(images.device)
            images[row, :, top : top + height, left : left + width] = filled
        return images

    def totals(self, pairs: GlobalBatch, batches: list[ClassBatch], world) -> dict[str, float]:
        """The number of images in the whole global batch. One small all-reduce over the replicas."""
        images = sum(int(p.valid.sum()) for p in pairs.micro_batches)
        count = torch.tensor(images, dtype=torch.float64, device=world.device)
        if world.dp_size > 1:
            dist.all_reduce(count, group=world.dp_group)
        return {"class": count.item()}

"""A segmenter: a class for every pixel of an image. A MUG's encoder on every patch, and UperNet behind it.

Axes: b images, S their side, C classes, g side of the grid of patches. Hidden states are [1 + registers + patches, b,
h].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megamug.models.blocks.layers import replicated
from megamug.models.mug.model import Encoder
from megamug.models.segmenter.plan import SegmenterPlan
from megamug.models.segmenter.uper_net import AuxiliaryHead, DecodeHead, Pyramid, resized
from megamug.models.stages import Stage, tensors_alone

IGNORED = 255  # in a map: no class, and no part of any loss or figure


@dataclass
class SegmentBatch:
    """One micro-batch."""

    images: Tensor  # [b, 3, S, S] uint8
    maps: Tensor | None = None  # [b, S, S] uint8: classes, IGNORED for none; all of it where an image is padding
    visible_ids: None = None  # the encoder sees every patch
    scales: Tensor | None = None  # [layers, 2, b, 1]: stochastic depth, see `megamug.data.pairs.mixing`
    kept: Tensor | None = None  # [b, channels of both heads]: what their last layers' inputs are times


class Head(MegatronModule):
    """Features of four blocks -> logits of both heads. Every tensor-parallel rank computes the same."""

    def __init__(self, plan: SegmenterPlan):
        super().__init__(config=plan.encoder_config)
        self.plan = plan
        self.pyramid, self.decode = replicated(Pyramid(plan), False), replicated(DecodeHead(plan), False)
        self.auxiliary = replicated(AuxiliaryHead(plan), False) if plan.auxiliary_channels else None

    def forward(self, features: list[Tensor], kept: Tensor | None, both: bool) -> tuple[Tensor, Tensor | None]:
        """[b, h, g, g] each -> logits [b, C, 4 g, 4 g], and if `both` are wanted [b, C, g, g]."""
        levels = self.pyramid(features)
        of_decode, of_auxiliary = (None, None) if kept is None else kept.split(
            [self.plan.channels, self.plan.auxiliary_channels], dim=1
        )  # fmt: skip
        logits = self.decode(levels, of_decode)
        return logits, self.auxiliary(levels, of_auxiliary) if both and self.auxiliary is not None else None


class Segmenter(Stage):
    """The whole model: it is one pipeline stage."""

    def __init__(self, plan: SegmenterPlan, stage: int = 0):
        super().__init__(plan, stage)
        self.encoder, self.head = Encoder(plan, plan.parts(stage)["encoder"]), Head(plan)
        self.confusion: Tensor | None = None  # of what was seen in evaluation, int64 [C, C]: true class, predicted one
        plan.mark(self, 0)

    def forward(self, batch: SegmentBatch) -> tuple[None, dict[str, tuple[Tensor, Tensor]]]:
        """(None, {"segmentation": (sum, count), "auxiliary": the same}): cross-entropy of pixels with a class, nat."""
        logits = self.head(self.features(batch), batch.kept if self.training else None, both=True)
        names, size, maps = ("segmentation", "auxiliary"), batch.maps.shape[1:], batch.maps.long()
        count, found = (maps != IGNORED).sum(), {}
        for name, each in zip(names, logits, strict=True):
            if each is not None:
                each = resized(each, size).float()
                found[name] = F.cross_entropy(each, maps, ignore_index=IGNORED, reduction="sum"), count
                if name == "segmentation" and not self.training:
                    own = confusion(maps, each.argmax(1), self.plan.classes)
                    self.confusion = own if self.confusion is None else self.confusion + own
        return None, found

    def features(self, batch: SegmentBatch) -> list[Tensor]:
        """Of the blocks `plan.features`, before any norm: [b, h, g, g] each."""
        hidden, plan = self.encoder.embed(batch), self.plan
        states = list(self.encoder.stack.states(hidden, scales=batch.scales if self.training else None))
        found = []
        for number in plan.features:
            patches = plan.gather(states[number])[1 + plan.registers :]
            found.append(patches.permute(1, 2, 0).unflatten(2, plan.grid).contiguous())
        return found

    def logits(self, images: Tensor) -> Tensor:
        """Of the decode head alone, resized to the images [b, 3, S, S] uint8: [b, C, S, S] float32."""
        batch = SegmentBatch(images)
        return resized(self.head(self.features(batch), None, both=False)[0], images.shape[2:]).float()

    def train(self, mode: bool = True) -> Segmenter:
        """As everywhere; what an evaluation that broke off has counted is forgotten."""
        self.confusion = None
        return super().train(mode)

    def take_confusion(self) -> Tensor:
        """The counts since the last call, int64 [C, C]: rows are true classes, columns predicted ones."""
        found, self.confusion = self.confusion, None
        return torch.zeros(self.plan.classes, self.plan.classes, dtype=torch.int64) if found is None else found

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state: dict = {}
        for name in ("encoder", "head"):
            state.update(getattr(self, name).sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return tensors_alone(state)


def confusion(true: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How many pixels of each true class (row) were given each class (column), int64 [C, C]; IGNORED ones left out."""
    counted = true != IGNORED
    places = true[counted].long() * classes + predicted[counted].long()
    return torch.bincount(places, minlength=classes**2).view(classes, classes)

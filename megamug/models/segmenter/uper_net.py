"""UperNet (Xiao et al. 2018, arXiv 1807.10221) on the features of a vision transformer, as BEiT (arXiv 2106.08254) and
MAE are fine-tuned on ADE20K: a feature pyramid of four blocks, pyramid pooling on its coarsest level, lateral
connections, and an auxiliary FCN head on its third level.

Axes: b images, c width of the encoder, g side of its grid of patches, k channels, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamug.models.blocks.batch_norm import BatchNorm
from megamug.models.segmenter.plan import SegmenterPlan


class ConvNorm(nn.Module):
    """Convolution without a bias, BatchNorm, ReLU; sizes by name out of `plan.convolutions`."""

    def __init__(self, plan: SegmenterPlan, name: str):
        super().__init__()
        own = plan.convolutions[name]
        self.conv = nn.Conv2d(own.inputs, own.outputs, own.kernel, padding=own.kernel // 2, bias=False,
                              dtype=plan.dtype)  # fmt: skip
        self.norm = BatchNorm(plan, own.outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


def _classifier(plan: SegmenterPlan, name: str) -> nn.Conv2d:
    own = plan.convolutions[name]
    return nn.Conv2d(own.inputs, own.outputs, 1, dtype=plan.dtype)


def _double(plan: SegmenterPlan) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(plan.model.width, plan.model.width, 2, stride=2, dtype=plan.dtype)


def resized(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """[b, c, ...] -> [b, c, *size], bilinear, corners not aligned."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """Features of four blocks, [b, c, g, g] each -> the same at 4 g, 2 g, g and g / 2."""

    def __init__(self, plan: SegmenterPlan):
        super().__init__()
        self.first, self.norm, self.second = _double(plan), BatchNorm(plan, plan.model.width), _double(plan)
        self.doubled = _double(plan)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        one, two, three, four = features
        finest = self.second(F.gelu(self.norm(self.first(one))))
        return [finest, self.doubled(two), three, F.max_pool2d(four, 2)]


class DecodeHead(nn.Module):
    """A pyramid -> logits [b, C, 4 g, 4 g]."""

    def __init__(self, plan: SegmenterPlan):
        super().__init__()
        self.scales = plan.pool_scales
        self.pooling = nn.ModuleList(ConvNorm(plan, f"decode.pooling.{i}") for i in range(len(self.scales)))
        self.bottleneck = ConvNorm(plan, "decode.bottleneck")
        self.laterals = nn.ModuleList(ConvNorm(plan, f"decode.laterals.{i}") for i in range(3))
        self.outputs = nn.ModuleList(ConvNorm(plan, f"decode.outputs.{i}") for i in range(3))
        self.fusion = ConvNorm(plan, "decode.fusion")
        self.classifier = _classifier(plan, "decode.classifier")

    def forward(self, levels: list[Tensor], kept: Tensor | None = None) -> Tensor:
        """`kept` [b, k]: what each channel is times before the last layer (dropout)."""
        *finer, coarse = levels
        pooled = [
            resized(layer(F.adaptive_avg_pool2d(coarse, scale)), coarse.shape[2:])
            for scale, layer in zip(self.scales, self.pooling, strict=True)
        ]
        states = [self.bottleneck(torch.cat([coarse, *pooled], dim=1))]
        for lateral, level in zip(reversed(self.laterals), reversed(finer), strict=True):
            own = lateral(level)
            states.insert(0, own + resized(states[0], own.shape[2:]))
        states = [*(layer(x) for layer, x in zip(self.outputs, states, strict=False)), states[-1]]
        fused = self.fusion(torch.cat([resized(x, states[0].shape[2:]) for x in states], dim=1))
        return self.classifier(_dropped(fused, kept))


class AuxiliaryHead(nn.Module):
    """The third level [b, c, g, g] -> logits [b, C, g, g]."""

    def __init__(self, plan: SegmenterPlan):
        super().__init__()
        self.convolution = ConvNorm(plan, "auxiliary.convolution")
        self.classifier = _classifier(plan, "auxiliary.classifier")

    def forward(self, levels: list[Tensor], kept: Tensor | None = None) -> Tensor:
        return self.classifier(_dropped(self.convolution(levels[2]), kept))


def _dropped(x: Tensor, kept: Tensor | None) -> Tensor:
    return x if kept is None else x * kept.to(x.dtype)[:, :, None, None]

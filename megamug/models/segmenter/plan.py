"""A segmenter's sizes: those of the encoder of a MUG that sees every patch, and of UperNet behind it."""

from __future__ import annotations

import math
from functools import cached_property

from torch import Tensor

from megamug.configuration.counts import segmenter_blocks
from megamug.configuration.sections import Config
from megamug.configuration.shapes import segmenter_convolutions
from megamug.models.blocks.positions import resampled_positions
from megamug.models.mug.finetuning import FineTuningPlan
from megamug.models.stages import Block, Part

CLASSIFIER_STD = 0.01  # of the last layers' weights, as in UperNet's usual code


class SegmenterPlan(FineTuningPlan):
    """Derived sizes of a segmenter under a layout. `config.segmenter.classes` and `position_image_size` are known."""

    final_norm = False  # features are taken as they stand behind a block

    def __init__(self, config: Config, vocabulary: int, spec: str = "local"):
        super().__init__(config, vocabulary, spec)
        own = config.segmenter
        self.features = segmenter_blocks(config)
        self.channels, self.pool_scales, self.dropout = own.channels, tuple(own.pool_scales), own.dropout
        self.auxiliary_channels = own.auxiliary_channels if own.auxiliary_weight > 0 else 0
        self.trained_grid = (own.position_image_size or config.data.image_size) // self.patch_size
        self.convolutions = segmenter_convolutions(config)
        self.loss_weights = {"segmentation": 1.0}
        if self.auxiliary_channels:
            self.loss_weights["auxiliary"] = own.auxiliary_weight

    def positions(self) -> Tensor:
        """Those that the encoder learned with, resampled: patches keep their place in the picture."""
        return resampled_positions(self.model.width, self.trained_grid, self.grid[0])

    @property
    def head_parameters(self) -> int:
        return sum(each.parameters for each in self.convolutions.values())

    def init_std(self, name: str) -> float | None:
        """He's (2015) by outputs before a ReLU; torch's own of transposed convolutions, whose numbers are uniform."""
        name = name.removeprefix("head.")
        own = self.convolutions.get(name.removesuffix(".weight").removesuffix(".conv"))
        if own is None:
            return None
        if own.transposed:
            return 1 / math.sqrt(3 * own.outputs * own.kernel**2)
        if name.endswith("classifier.weight"):
            return CLASSIFIER_STD
        return math.sqrt(2 / (own.outputs * own.kernel**2))

    @cached_property
    def blocks(self) -> list[Block]:
        """The model in order, with the forward FLOPs of one image."""
        head = Block("segment", "head", 0, sum(each.flops for each in self.convolutions.values()))
        return [*super().blocks, head]

    def parts(self, stage: int) -> dict[str, Part]:
        """All of it: a segmenter is one stage."""
        assert len(self.stages) == 1
        return {name: self.stack_part(stage, name) for name in ("encoder", "segment")}

    def boundary(self, stage: int) -> None:
        return None

"""DecoderLM's sizes: one tower, its blocks with their FLOPs, pipeline stages."""

from __future__ import annotations

from functools import cached_property

from megatron.core.transformer import TransformerConfig

from megamug.configuration.sections import Config
from megamug.models.language.tower import TowerPlan
from megamug.models.stages import Block, Boundary, Part, Plan


class LmPlan(Plan):
    """Derived sizes of a DecoderLM under a layout."""

    def __init__(self, config: Config, vocabulary: int, spec: str = "local"):
        super().__init__(config, vocabulary)
        self.tower = TowerPlan(config.lm, config, self.padded_vocabulary, spec)
        self.tie_vocabulary = config.lm.tie_vocabulary
        self.loss_weights = {"lm": 1.0}
        if config.model.z_loss_weight > 0:
            self.loss_weights["z"] = config.model.z_loss_weight

    def place_tensor(self, rank: int, group) -> None:
        super().place_tensor(rank, group)
        self.tower.place_tensor(rank, group)

    def init_std(self, name: str) -> float:
        """Standard deviation of the weight `name` (a global name), see `megamug.models.init`."""
        return self.tower.tower.init_std

    @cached_property
    def schedule_config(self) -> TransformerConfig:
        """The configuration that Megatron's schedules and gradient buffers read: the tower's, with all stages."""
        return self.tower.transformer_config(self.pipeline)

    # ------------------------------------------------------------------------------------------ blocks and stages

    @cached_property
    def blocks(self) -> list[Block]:
        """The model in order, with the forward FLOPs of one row."""
        layers = [Block("lm", "layer", i, self.tower.layer_flops) for i in range(self.tower.tower.layers)]
        return [Block("lm", "embedding", 0, 0.0), *layers, Block("lm", "head", 0, self.tower.head_flops)]

    def part(self, stage: int) -> Part:
        """What `stage` holds."""
        part = self.stack_part(stage, "lm")
        assert part is not None, "a stage has a block"
        return part

    def boundary(self, stage: int) -> Boundary | None:
        """What arrives at `stage` from the one before (None at both ends of the pipeline)."""
        return Boundary({"hidden": self.tower.hidden_shape}) if 0 < stage < len(self.stages) else None

    @property
    def vocabulary_stages(self) -> list[int]:
        """Stages that hold a copy of the tied vocabulary weight: the first, and the last where they are two."""
        return sorted({0, len(self.stages) - 1}) if self.tie_vocabulary else [0]

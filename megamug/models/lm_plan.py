"""DecoderLM's sizes: one tower, its blocks with their FLOPs, pipeline stages.

Everything here follows from the configuration and the layout; nothing is allocated.
"""

from __future__ import annotations

from functools import cached_property

from megatron.core.transformer import TransformerConfig

from megamug.config import Config
from megamug.models.mug_plan import VOCABULARY_MULTIPLE, Part
from megamug.models.stages import Block, Boundary, cut
from megamug.models.tower import TowerPlan


class LmPlan:
    """Derived sizes of a DecoderLM under a layout. `config` is resolved: every size is set."""

    def __init__(self, config: Config, vocabulary: int, spec: str = "local"):
        parallel = config.parallel
        self.vocabulary = vocabulary
        self.padded_vocabulary = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        self.tower = TowerPlan(config.lm, config, self.padded_vocabulary, spec)
        self.tie_vocabulary = config.lm.tie_vocabulary
        self.tensor, self.pipeline, self.virtual = parallel.tensor, parallel.pipeline, parallel.virtual
        self.sequence_parallel = parallel.sequence
        self.loss_weights = {"lm": 1.0}
        if config.model.z_loss_weight > 0:
            self.loss_weights["z"] = config.model.z_loss_weight

    def place_tensor(self, rank: int, group) -> None:
        """This process's rank in the tensor-parallel group (None: alone)."""
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

    @property
    def forward_flops(self) -> float:
        """Forward FLOPs of one row (matrix products)."""
        return sum(block.flops for block in self.blocks)

    @cached_property
    def stages(self) -> list[range]:
        """Blocks of each pipeline stage, virtual ones counted: rank r of P holds the stages r, P + r, 2 P + r, ..."""
        return cut(self.blocks, self.pipeline * self.virtual)

    def part(self, stage: int) -> Part:
        """What `stage` holds."""
        own = [self.blocks[i] for i in self.stages[stage]]
        layers = [block.index for block in own if block.name == "layer"]
        kinds = {block.name for block in own}
        # A stage may hold the embedding or the head alone: then its run of layers is empty.
        empty = self.tower.tower.layers if "head" in kinds else 0
        first, last = (layers[0], layers[-1] + 1) if layers else (empty, empty)
        return Part("embedding" in kinds, first, last, "head" in kinds)

    def boundary(self, stage: int) -> Boundary | None:
        """What arrives at `stage` from the one before (None at both ends of the pipeline)."""
        return Boundary({"hidden": self.tower.hidden_shape}) if 0 < stage < len(self.stages) else None

    @property
    def vocabulary_stages(self) -> list[int]:
        """Stages that hold a copy of the tied vocabulary weight: the first, and the last where they are two."""
        return sorted({0, len(self.stages) - 1}) if self.tie_vocabulary else [0]

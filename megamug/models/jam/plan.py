"""JamCross's sizes: where the cross blocks stand, what a pipeline stage holds.

Two towers of any depths are matched by relative depth (`partition.depth_slots`). The pipeline is cut between slots, so
it cuts both towers at one depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron.core.transformer import TransformerConfig

from megamug.configuration.sections import Config
from megamug.configuration.shapes import count, init_std, output_width, parameter_shapes
from megamug.models.language.tower import TowerPlan
from megamug.models.partition import Slot, depth_slots
from megamug.models.stages import Block, Boundary, Plan
from megamug.telemetry.flops import attention_flops, linear_flops, mlp_flops


@dataclass(frozen=True)
class JamPart:
    """What a pipeline stage holds: the embeddings?, its slots (joined up to each cross block), norms, mix and head?"""

    embedding: bool
    segments: list[Slot]
    head: bool


class JamPlan(Plan):
    """Derived sizes of a JamCross under a layout."""

    def __init__(self, config: Config, vocabulary: int, spec: str = "local"):
        super().__init__(config, vocabulary)
        self.config, self.fusion = config, config.fusion
        self.text, self.image = (
            TowerPlan(tower, config, self.padded_vocabulary, spec) for tower in (config.text_tower, config.image_tower)
        )
        self.towers = {"text": self.text, "image": self.image}
        self.output_width = output_width(config)
        self.shared_embedding = config.fusion.shared_embedding
        assert not self.shared_embedding or len({t.tower.width for t in self.towers.values()}) == 1, "see validate"
        self.recompute, self.dtype = self.text.recompute, self.text.dtype
        self.z_loss_weight = config.model.z_loss_weight
        self.loss_weights = {"lm": 1.0} | ({"z": self.z_loss_weight} if self.z_loss_weight > 0 else {})
        self.shapes = parameter_shapes(config, self.padded_vocabulary)

    def place_tensor(self, rank: int, group) -> None:
        super().place_tensor(rank, group)
        for tower in self.towers.values():
            tower.place_tensor(rank, group)

    @cached_property
    def schedule_config(self) -> TransformerConfig:
        """The configuration that Megatron's schedules and gradient buffers read: the text tower's, and that gradients
        of norms that heads share are summed over tensor-parallel ranks where either tower has them."""
        config = self.text.transformer_config(self.pipeline)
        config.qk_layernorm |= self.image.transformer_config().qk_layernorm
        return config

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return count(self.shapes.values())

    def frozen(self, name: str) -> bool:
        """Whether `fusion.freeze` keeps the parameter of this global name as it is."""
        towers = {"none": (), "text": ("text_tower.",), "image": ("image_tower.",)}
        return name.startswith(towers.get(self.fusion.freeze, ("text_tower.", "image_tower.")))

    def init_std(self, name: str) -> float:
        """Standard deviation from which the parameter of this global name is drawn."""
        return init_std(self.config, name)

    # ------------------------------------------------------------------------------------------ blocks and stages

    @cached_property
    def slots(self) -> list[Slot]:
        return depth_slots(self.text.tower.layers, self.image.tower.layers, self.fusion.cross_every)

    @property
    def cross_flops(self) -> float:
        """Forward FLOPs of a cross block, both directions, for one row."""
        tokens, total = self.text.context_length, 0
        for reads, read in ((self.text, self.image), (self.image, self.text)):
            tower = reads.tower
            total += attention_flops(tokens, tower.width, tokens, read.tower.width)
            if self.fusion.cross_ffn:
                total += mlp_flops(tokens, tower.width, tower.ffn_width, gated=tower.activation == "swiglu")
        return total

    @cached_property
    def blocks(self) -> list[Block]:
        """The model in order, with the forward FLOPs of one row."""
        blocks = [Block("jam", "embedding", 0, 0.0)]
        for index, slot in enumerate(self.slots):
            flops = sum(
                (last - first) * tower.layer_flops
                for (first, last), tower in ((slot.text, self.text), (slot.image, self.image))
            )
            blocks.append(Block("jam", "layer", index, flops + (self.cross_flops if slot.cross is not None else 0)))
        tokens, widths = self.text.context_length, self.text.tower.width + self.image.tower.width
        head = linear_flops(tokens, widths, self.output_width)
        head += linear_flops(tokens, self.output_width, self.padded_vocabulary)
        return [*blocks, Block("jam", "head", 0, head)]

    def part(self, stage: int) -> JamPart:
        """What `stage` holds."""
        own = [self.blocks[i] for i in self.stages[stage]]
        slots = [self.slots[block.index] for block in own if block.name == "layer"]
        names = {block.name for block in own}
        return JamPart("embedding" in names, _joined(slots), "head" in names)

    def boundary(self, stage: int) -> Boundary | None:
        """What arrives at `stage` from the one before (None at both ends): the states of both towers."""
        if not 0 < stage < len(self.stages):
            return None
        return Boundary({name: tower.hidden_shape for name, tower in self.towers.items()})

    @property
    def vocabulary_stages(self) -> list[int]:
        """Stages that share a vocabulary weight: the head has its own, so none does."""
        return [0]


def _joined(slots: list[Slot]) -> list[Slot]:
    """Slots up to and with a cross block as one, so that a tower's layers between two of them are one run."""
    joined: list[Slot] = []
    for slot in slots:
        if joined and joined[-1].cross is None:
            before = joined.pop()
            slot = Slot((before.text[0], slot.text[1]), (before.image[0], slot.image[1]), slot.cross)
        joined.append(slot)
    return joined

"""JamCross's sizes: where the cross blocks stand, what a pipeline stage holds, names and shapes of all parameters.

Two towers of any depths are matched by relative depth (`partition.depth_slots`). The pipeline is cut between slots, so
it cuts both towers at one depth.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from megatron.core.transformer import TransformerConfig

from megamug.config import Config, TowerConfig
from megamug.models.partition import Slot, depth_slots
from megamug.models.stages import Block, Boundary, Plan
from megamug.models.tower import TowerPlan
from megamug.telemetry.flops import attention_flops, linear_flops, mlp_flops

TOWERS = ("text", "image")


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


# ---------------------------------------------------------------------------------------------- names and shapes

Shapes = dict[str, tuple[int, ...]]


def output_width(config: Config) -> int:
    """Width of the linear over both towers' states: as configured, or the wider tower's."""
    return config.fusion.output_width or max(config.text_tower.width, config.image_tower.width)


def init_std(config: Config, name: str) -> float:
    """Of the tower that a parameter of this global name belongs to; of the text tower for mix and output."""
    image = name.startswith("image_tower.") or ".image." in name
    return (config.image_tower if image else config.text_tower).init_std


def count(shapes: Iterable[tuple[int, ...]]) -> int:
    total = 0
    for shape in shapes:
        numbers = 1
        for size in shape:
            numbers *= size
        total += numbers
    return total


def parameter_shapes(config: Config, padded_vocabulary: int) -> Shapes:
    """Global name -> global shape of every parameter of a `jam_cross` (`config`, resolved)."""
    shapes: Shapes = {}
    for name, tower in (("text_tower", config.text_tower), ("image_tower", config.image_tower)):
        words = name == "text_tower" or not config.fusion.shared_embedding
        shapes |= {f"{name}.{key}": shape for key, shape in tower_shapes(tower, padded_vocabulary, words).items()}
    shapes |= cross_shapes(config)
    width = output_width(config)
    shapes["mix.weight"] = (width, config.text_tower.width + config.image_tower.width)
    return shapes | {"output_layer.weight": (padded_vocabulary, width)}


def tower_shapes(tower: TowerConfig, padded_vocabulary: int, words: bool = True) -> Shapes:
    """The parameters of a tower without its output, named as in `DecoderLM`."""
    h, head = tower.width, tower.width // tower.heads
    shapes: Shapes = {}
    if words:
        shapes["embedding.word_embeddings.weight"] = (padded_vocabulary, h)
    if tower.positions == "learned":
        shapes["embedding.positions"] = (tower.max_positions, h)
    for index in range(tower.layers):
        attention = f"stack.layers.{index}.self_attention."
        mlp = f"stack.layers.{index}.mlp."
        places = f"{attention}linear_qkv.layer_norm_", f"{mlp}linear_fc1.layer_norm_"
        if tower.res_post_norm:
            places = tuple(f"stack.layers.{index}.post_{part}_layernorm." for part in ("self_attn", "mlp"))
        for place in places:
            shapes |= _norm(tower, place, h)
        shapes |= _linear(tower, f"{attention}linear_qkv.", h, (tower.heads + 2 * tower.query_groups) * head)
        if tower.qk_norm:
            for which, heads in (("q", tower.heads), ("k", tower.query_groups)):
                norm = f"{attention}{which}_layernorm."
                if tower.qk_norm_per_head:
                    shapes |= {f"{norm}weight": (heads, head), f"{norm}bias": (heads, head)}
                else:
                    shapes |= _norm(tower, norm, head, always=True)
        shapes |= _linear(tower, f"{attention}linear_proj.", h, h)
        shapes |= _mlp(tower, mlp)
    return shapes | _norm(tower, "stack.final_layernorm.", h)


def cross_shapes(config: Config) -> Shapes:
    """The parameters of the cross blocks."""
    fusion, towers = config.fusion, (config.text_tower, config.image_tower)
    blocks = min(tower.layers for tower in towers) // fusion.cross_every
    gate = {"gate": (1,)} if fusion.gate else {}
    shapes: Shapes = {}
    for m in range(blocks):
        for name, tower, other in zip(TOWERS, towers, towers[::-1], strict=True):
            reading = f"cross.{m}.{name}.reading."
            shapes |= _norm(tower, f"{reading}norm.", tower.width)
            shapes |= _norm(tower, f"{reading}context_norm.", other.width)
            shapes |= _linear(tower, f"{reading}attention.linear_q.", tower.width, tower.width)
            shapes |= _linear(tower, f"{reading}attention.linear_kv.", other.width, 2 * tower.width)
            shapes |= _linear(tower, f"{reading}attention.linear_proj.", tower.width, tower.width)
            shapes |= {f"{reading}{key}": shape for key, shape in gate.items()}
            if fusion.cross_ffn:
                ffn = f"cross.{m}.{name}.ffn."
                shapes |= _norm(tower, f"{ffn}norm.", tower.width) | _mlp(tower, f"{ffn}mlp.")
                shapes |= {f"{ffn}{key}": shape for key, shape in gate.items()}
    return shapes


def _norm(tower: TowerConfig, prefix: str, width: int, always: bool = False) -> Shapes:
    """`always`: a norm that has parameters although the tower's others have none."""
    if tower.norm == "layernorm_plain" and not always:
        return {}
    bias = {} if tower.norm == "rmsnorm" else {f"{prefix}bias": (width,)}
    return {f"{prefix}weight": (width,)} | bias


def _linear(tower: TowerConfig, prefix: str, inputs: int, outputs: int) -> Shapes:
    bias = {f"{prefix}bias": (outputs,)} if tower.bias else {}
    return {f"{prefix}weight": (outputs, inputs)} | bias


def _mlp(tower: TowerConfig, prefix: str) -> Shapes:
    first = tower.ffn_width * (2 if tower.activation == "swiglu" else 1)
    return _linear(tower, f"{prefix}linear_fc1.", tower.width, first) | _linear(
        tower, f"{prefix}linear_fc2.", tower.ffn_width, tower.width
    )

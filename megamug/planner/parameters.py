"""How many parameters a model has and what they weigh on one process, counted from its plan: nothing is built."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from megamug.configuration.shapes import tower_shapes

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Count:
    """Parameters of a piece of a model: tensor-parallel ranks share `split`, each of them holds all of `whole`."""

    split: int = 0
    whole: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.split + other.split, self.whole + other.whole)

    def __mul__(self, times: int) -> Count:
        return Count(self.split * times, self.whole * times)

    @property
    def total(self) -> int:
        return self.split + self.whole

    def on_rank(self, tensor: int) -> int:
        """Parameters that one of `tensor` ranks holds."""
        return self.split // tensor + self.whole


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one process that live as long as the run. Activations, buffers of collectives, the allocator's waste and
    the padding of Megatron's buffers (at most 64 elements a parameter) are not in here."""

    weights: int
    gradients: int
    main_parameters: int
    moments: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.main_parameters + self.moments


def state_memory(
    parameters: int, trained: int, dtype: str, replicas: int, distributed_optimizer: bool, kept: int = 2
) -> StateMemory:
    """What `parameters` on a process, `trained` of them, need: gradients are summed in fp32, the optimizer
    keeps `kept` fp32 values of each (`configuration.counts.kept_values`); bf16 weights have fp32 main parameters, fp32
    weights are their own. `distributed_optimizer` shares main parameters and what is kept out among `replicas`
    data-parallel ranks; the fullest rank is told."""
    held = -(-trained // replicas) if distributed_optimizer else trained
    return StateMemory(
        weights=BYTES[dtype] * parameters,
        gradients=4 * trained,
        main_parameters=4 * held if dtype == "bf16" else 0,
        moments=4 * kept * held,
    )


def linear(inputs: int, outputs: int, bias: bool = True) -> Count:
    """A linear that every rank holds whole."""
    return Count(0, inputs * outputs + outputs * bias)


def column_linear(inputs: int, outputs: int, bias: bool = True) -> Count:
    """A linear whose outputs are split: its bias, too."""
    return Count(inputs * outputs + outputs * bias)


def row_linear(inputs: int, outputs: int, bias: bool = True) -> Count:
    """A linear whose inputs are split: its bias is added after the sum, by all."""
    return Count(inputs * outputs, outputs * bias)


def norm(width: int) -> Count:
    """LayerNorm with scale and shift."""
    return Count(0, 2 * width)


def layer(width: int, ffn_width: int, context_width: int | None = None) -> Count:
    """A pre-norm transformer layer with biases; with cross-attention to a context of `context_width`, if given."""
    own = norm(width) + column_linear(width, 3 * width) + row_linear(width, width)
    mlp = norm(width) + column_linear(width, ffn_width) + row_linear(ffn_width, width)
    if context_width is None:
        return own + mlp
    cross = norm(width) + column_linear(width, width) + column_linear(context_width, 2 * width)
    return own + cross + row_linear(width, width) + mlp


def mug_stage(plan, stage: int) -> Count:
    """One pipeline stage of MUG (`megamug.models.mug.plan.MugPlan`), a second copy of the vocabulary included; or of a
    classifier or segmenter, whose plans are some, too."""
    model, values, count = plan.model, 3 * plan.patch_size**2, Count()
    sizes = {"encoder": (model.width, model.ffn_width, model.layers)}
    if plan.paints:
        sizes["image"] = model.decoder_width, 4 * model.decoder_width, model.decoder_layers
    if plan.writes:
        sizes["text"] = model.text_width, 4 * model.text_width, plan.unimodal_layers + plan.multimodal_layers
    for name, part in plan.parts(stage).items():
        if name == "segment":
            count += Count(0, plan.head_parameters)
            continue
        if name == "class":
            count += class_head(plan)
            continue
        width, ffn_width, layers = sizes[name]
        vocabulary = Count(plan.padded_vocabulary * width)
        if part.embedding:
            count += {
                "encoder": linear(values, width) + Count(0, (1 + plan.registers) * width),
                "image": linear(model.width, width) + Count(0, (1 + plan.decoder_registers) * width),
                "text": vocabulary + Count(0, (plan.caption_length + plan.masked_text) * width),
            }[name]
        # The text decoder's last layers attend to the latent.
        multimodal = max(0, part.last - max(part.first, plan.unimodal_layers)) if name == "text" else 0
        count += layer(width, ffn_width) * (part.last - part.first - multimodal)
        count += layer(width, ffn_width, context_width=model.width) * multimodal
        if part.first < part.last == layers and (plan.final_norm or name != "encoder"):
            count += norm(width)
        if part.head and name == "image":
            count += linear(width, values)
        if part.head and name == "text" and not (plan.tie_vocabulary and part.embedding):
            count += vocabulary
    return count


def class_head(plan) -> Count:
    """What a classifier has behind the encoder."""
    width, count = plan.model.width, linear(plan.model.width, plan.classes)
    if plan.attentive:  # a query, keys, values
        count += Count(0, width) + linear(width, width, bias=False) + linear(width, width, bias=False)
    return count + norm(width) if plan.head_norm else count


# What tensor parallelism splits in a language model; a linear split by its inputs has its bias whole.
SPLIT = re.compile(r"(linear_(qkv|q|kv|fc1)\.(weight|bias)|linear_(proj|fc2)\.weight"
                   r"|word_embeddings\.weight|output_layer\.weight)$")  # fmt: skip


def stage_counts(plan, stage: int) -> tuple[Count, Count]:
    """(all, trained) parameters of a pipeline stage of any model, copies of a tied vocabulary included."""
    from megamug.models.jam.plan import JamPlan
    from megamug.models.mug.plan import MugPlan

    if isinstance(plan, MugPlan):
        held = mug_stage(plan, stage)
        return held, class_head(plan) if plan.frozen_encoder else held
    if not isinstance(plan, JamPlan):
        own = _lm_shapes(plan, stage)
        return _counted(own), _counted(own)
    own = {name: shape for name, shape in plan.shapes.items() if _jam_holds(plan, stage)(name)}
    return _counted(own), _counted({name: shape for name, shape in own.items() if not plan.frozen(name)})


def total(plan) -> int:
    """Parameters of the whole model, each counted once."""
    copies, vocabulary = len(plan.vocabulary_stages) - 1, 0
    if copies:
        width = plan.model.text_width if hasattr(plan, "writes") else plan.tower.tower.width
        vocabulary = plan.padded_vocabulary * width
    return sum(stage_counts(plan, stage)[0].total for stage in range(len(plan.stages))) - copies * vocabulary


def _splits(name: str, shape: tuple[int, ...]) -> bool:
    per_head = len(shape) == 2 and re.search(r"[qk]_layernorm\.", name)  # a norm that heads share has one axis
    return bool(per_head or SPLIT.search(name))


def _counted(shapes: dict[str, tuple[int, ...]]) -> Count:
    split = sum(math.prod(shape) for name, shape in shapes.items() if _splits(name, shape))
    return Count(split, sum(math.prod(shape) for shape in shapes.values()) - split)


def _layer_number(name: str) -> int | None:
    found = re.search(r"stack\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _lm_shapes(plan, stage: int) -> dict[str, tuple[int, ...]]:
    """Parameters of a stage of DecoderLM (`LmPlan`) by name."""
    tower, part = plan.tower.tower, plan.part(stage)
    own = {}
    for name, shape in tower_shapes(tower, plan.padded_vocabulary).items():
        number = _layer_number(name)
        final = part.first < part.last == tower.layers
        if (part.first <= number < part.last) if number is not None else (
            part.embedding if name.startswith("embedding.") else final
        ):
            own[name] = shape
    if part.head and not (plan.tie_vocabulary and part.embedding):
        own["output_layer.weight"] = (plan.padded_vocabulary, tower.width)
    return own


def _jam_holds(plan, stage: int) -> Callable[[str], bool]:
    """Whether a stage of JamCross (`JamPlan`) holds the parameter of a global name."""
    part = plan.part(stage)

    def holds(name: str) -> bool:
        if ".embedding." in name:
            return part.embedding
        if name.startswith("cross."):
            return int(name.split(".")[1]) in {segment.cross for segment in part.segments}
        number = _layer_number(name)
        if number is None:  # final norms, mix, output
            return part.head
        spans = [segment.text if name.startswith("text_tower.") else segment.image for segment in part.segments]
        return any(first <= number < last for first, last in spans)

    return holds

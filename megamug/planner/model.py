"""A model as the planner sees it: blocks of units (`layers`), what crosses a boundary.

Nothing here imports torch or Megatron, whose import takes longer than planning. The sizes are those of
`megamug.models.{mug,lm,jam}_plan`; tests compare parameters, FLOPs, stages and boundaries with theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megamug.configuration import validate
from megamug.configuration.counts import as_mug
from megamug.configuration.sections import Config, TowerConfig
from megamug.configuration.shapes import segmenter_convolutions
from megamug.models.partition import depth_slots
from megamug.planner.layers import (
    SEQUENCE,
    STREAM,
    TENSOR,
    WHOLE,
    Kept,
    Product,
    Shape,
    Unit,
    cross_attention,
    joined,
    layer,
    mlp,
    norm_kept,
)
from megamug.planner.parameters import Count, linear, norm

CLASSES, PIXEL_CLASSES = 1000, 150  # of a classifier and a segmenter whose configurations leave them to the data


@dataclass(frozen=True)
class Block:
    """What a stage boundary may precede: as `megamug.models.stages.Block`, with its units."""

    part: str
    name: str  # embedding | layer | head
    units: tuple[Unit, ...]
    flops: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "flops", sum(p.flops for u in self.units for p in (*u.products, *u.attentions)))


@dataclass(frozen=True)
class Model:
    """`boundary[i]`: numbers of a sample that arrive at block i if a stage starts there, all under sequence sharing.
    `tied`: the vocabulary matrix and the numbers of the two blocks that share it, or None."""

    blocks: tuple[Block, ...]
    boundary: tuple[int, ...]
    tied: tuple[Count, int, int] | None

    @property
    def forward_flops(self) -> int:
        """Of one sample; matrix products, attention as a full square."""
        return sum(block.flops for block in self.blocks)


def model_of(config: Config, vocabulary: int) -> Model:
    """`config` is resolved; `vocabulary` is padded."""
    kinds = {"mug": _mug, "decoder_lm": _lm, "jam_cross": _jam, "classifier": _classifier, "segmenter": _segmenter}
    return kinds[config.model.kind](config, vocabulary)


# ---------------------------------------------------------------------------------------------- MUG


def _mug(config: Config, vocabulary: int) -> Model:
    model, values = config.model, 3 * config.model.patch_size**2
    visible, patches = validate.visible_patches(config), validate.patch_count(config)
    tokens, width = validate.visible_tokens(config), model.width
    painted, written = validate.decoder_tokens(config), config.data.caption_length
    latent, blocks, boundary, tied = tokens * width, [], [], None

    def stack(part: str, tokens: int, units: list[Unit], final: tuple[Kept, ...], carried: int) -> None:
        last = units.pop()
        w = last.input // tokens
        moved = ((SEQUENCE, 2 * tokens * w, 3 * tokens * w, STREAM),)
        end = Unit(norm(w), 2, kept=(*norm_kept(tokens, w), *final), moved=moved)
        blocks.extend(Block(part, "layer", (unit,)) for unit in units)
        blocks.append(Block(part, "layer", (last, end)))
        boundary.extend([carried] * (len(units) + 1))

    embedding = Unit(linear(values, width) + Count(0, (1 + model.register_tokens) * width),
                     3 + (model.register_tokens > 0), kept=(Kept(visible * values, WHOLE),),
                     products=(Product(visible, values, width, WHOLE, fp8=False),),
                     moved=((WHOLE, 4 * latent, 2 * latent, STREAM),))  # fmt: skip
    blocks.append(Block("encoder", "embedding", (embedding,)))
    boundary.append(0)
    shape = Shape(width, model.ffn_width, model.heads, model.heads)
    # The final norm's result is the latent, which the decoders' first linears keep: once.
    encoder = [layer(tokens, shape, causal=False)] * model.layers
    stack("encoder", tokens, encoder, (Kept(latent, SEQUENCE),), latent)
    if model.image_loss_weight > 0:
        w, masked = model.decoder_width, patches - visible
        hidden = painted * w
        start = Unit(linear(width, w) + Count(0, (1 + model.decoder_register_tokens) * w),
                     3 + (model.decoder_register_tokens > 0),
                     products=(Product(tokens, width, w, SEQUENCE, fp8=False),),
                     moved=((WHOLE, 6 * hidden, 4 * hidden, STREAM),))  # fmt: skip
        blocks.append(Block("image", "embedding", (start,)))
        boundary.append(latent)
        shape = Shape(w, 4 * w, model.decoder_heads, model.decoder_heads)
        rides = latent if model.caption_loss_weight > 0 else 0
        layers = [layer(painted, shape, causal=False)] * model.decoder_layers
        stack("image", painted, layers, (Kept(hidden, WHOLE),), rides + hidden)  # kept where hidden patches are taken
        head = Unit(linear(w, values), 2, products=(Product(masked, w, values, WHOLE, fp8=False),),
                    kept=(Kept(masked * w, WHOLE), Kept(2 * masked * values, WHOLE, logits=True)),  # and their gradient
                    moved=((WHOLE, 2 * masked * (w + values), 3 * masked * (w + values), STREAM),))  # fmt: skip
        blocks.append(Block("image", "head", (head,)))
        boundary.append(rides + hidden)
    if model.caption_loss_weight > 0:
        w = model.text_width
        hidden, words = written * w, Count(vocabulary * w)
        start = len(blocks)
        moved = ((SEQUENCE, 4 * hidden, 4 * hidden, STREAM),)
        masked = model.text_objective == "masked"
        table = Unit(words + Count(0, (written + masked) * w), 2 + masked, messages=hidden, moved=moved)
        blocks.append(Block("text", "embedding", (table,)))
        boundary.append(latent)
        shape = Shape(w, 4 * w, model.text_heads, model.text_heads)
        layers = [layer(written, shape, not masked)] * model.text_unimodal_layers
        layers += [layer(written, shape, not masked, context=(tokens, width))] * model.text_multimodal_layers
        stack("text", written, layers, (Kept(hidden, SEQUENCE),), latent + hidden)
        logits = Kept(written * vocabulary, TENSOR, logits=True)
        head = Unit(words, not model.tie_vocabulary, kept=(logits,), messages=hidden,
                    products=(Product(written, w, vocabulary, "columns", fp8=False),),
                    moved=((TENSOR, written * vocabulary, 2 * written * vocabulary, STREAM),))  # fmt: skip
        blocks.append(Block("text", "head", (head,)))
        boundary.append(hidden)
        tied = (words, start, len(blocks) - 1) if model.tie_vocabulary else None
    return Model(tuple(blocks), tuple(boundary), tied)


def _classifier(config: Config, vocabulary: int) -> Model:
    """Its parameters, FLOPs and boundaries. What it keeps for backward has not been held against a run, so `search`
    plans none."""
    encoder, width = _mug(as_mug(config), 0), config.model.width
    *blocks, last = encoder.blocks
    head = linear(width, config.classifier.classes or CLASSES)
    if config.classifier.pool == "mean" and not config.classifier.frozen:  # the norm stands behind the mean
        last, head = Block("encoder", "layer", last.units[:-1]), head + norm(width)
    head = Unit(head, 2, products=(Product(1, width, config.classifier.classes or CLASSES, WHOLE, fp8=False),))
    latent = validate.visible_tokens(config) * width
    return Model((*blocks, last, Block("class", "head", (head,))), (*encoder.boundary, latent), None)


def _segmenter(config: Config, vocabulary: int) -> Model:
    """As `_classifier`; it is not cut into stages."""
    if config.segmenter.classes is None:
        config = replace(config, segmenter=replace(config.segmenter, classes=PIXEL_CLASSES))
    *blocks, last = _mug(as_mug(config), 0).blocks
    convolutions = segmenter_convolutions(config).values()
    head = Unit(
        Count(0, sum(each.parameters for each in convolutions)),
        sum(1 + each.bias + 2 * each.norm for each in convolutions),
        products=tuple(Product(each.places, each.inputs * each.kernel**2, each.outputs, WHOLE, fp8=False)
                       for each in convolutions),
    )  # fmt: skip
    last = Block("encoder", "layer", last.units[:-1])  # without the final norm
    blocks = (*blocks, last, Block("segment", "head", (head,)))
    return Model(blocks, (0,) * len(blocks), None)


# ---------------------------------------------------------------------------------------------- language models


def _shape(tower: TowerConfig) -> Shape:
    head = tower.width // tower.heads
    head_norms = 2 * head * (1 if tower.norm == "rmsnorm" else 2)
    if tower.qk_norm_per_head:  # weights and biases of all query heads and all key heads
        head_norms = 2 * head * (tower.heads + tower.query_groups)
    return Shape(
        tower.width, tower.ffn_width, tower.heads, tower.query_groups,
        norm_parameters={"layernorm": 2, "rmsnorm": 1, "layernorm_plain": 0}[tower.norm],
        head_norm_parameters=head_norms * tower.qk_norm, per_head=tower.qk_norm_per_head,
        bias=tower.bias, activation=tower.activation, rotary=tower.positions != "learned",
    )  # fmt: skip


def _tower_embedding(tower: TowerConfig, tokens: int, vocabulary: int, words: bool, trained: bool) -> Unit:
    hidden = tokens * tower.width
    count = Count(vocabulary * tower.width * words) + Count(0, tower.max_positions * tower.width) * (
        tower.positions == "learned"
    )
    return Unit(count, words + (tower.positions == "learned"), trained, messages=hidden * words,
                moved=((SEQUENCE, 4 * hidden, 4 * hidden, STREAM),))  # fmt: skip


def _final_norm(tower: TowerConfig, tokens: int, trained: bool = True) -> Unit:
    numbers = tokens * tower.width
    shape = _shape(tower)
    return Unit(shape.norm(tower.width), shape.norm_parameters, trained, kept=norm_kept(tokens, tower.width),
                moved=((SEQUENCE, 2 * numbers, 3 * numbers, STREAM),))  # fmt: skip


def _output(config: Config, tokens: int, width: int, vocabulary: int, tied: bool) -> Unit:
    """Output projection and loss, joined unless the z-loss asks for the logits: of the joined form backward keeps both
    gradients, the weight's in fp32."""
    products = (Product(tokens, width, vocabulary, "columns", fp8=False),)
    if config.model.z_loss_weight > 0:  # logits, and the gradients of the two losses while they are summed
        kept, chunked = (Kept(tokens * width, SEQUENCE), Kept(3 * tokens * vocabulary, TENSOR, logits=True)), 0
    else:
        gradient = Kept(vocabulary * width, TENSOR, 4, logits=True, constant=True)
        kept, chunked = (Kept(tokens * width, WHOLE, logits=True), gradient), vocabulary
    return Unit(Count(vocabulary * width), not tied, products=products, kept=kept, messages=tokens * width,
                moved=((TENSOR, 3 * tokens * vocabulary, 0, STREAM),), chunked_logits=chunked)  # fmt: skip


def _lm(config: Config, vocabulary: int) -> Model:
    tower, tokens = config.lm, config.data.context_length
    block, hidden = layer(tokens, _shape(tower), causal=True), tokens * tower.width
    first = _tower_embedding(tower, tokens, vocabulary, True, True)
    head = _output(config, tokens, tower.width, vocabulary, tower.tie_vocabulary)
    middle = [Block("lm", "layer", (block,))] * (tower.layers - 1)
    last = Block("lm", "layer", (block, _final_norm(tower, tokens)))
    blocks = (Block("lm", "embedding", (first,)), *middle, last, Block("lm", "head", (head,)))
    tied = (head.count, 0, len(blocks) - 1) if tower.tie_vocabulary else None
    return Model(blocks, (0, *[hidden] * (len(blocks) - 1)), tied)


def _jam(config: Config, vocabulary: int) -> Model:
    tokens, fusion = config.data.context_length, config.fusion
    towers = {"text": config.text_tower, "image": config.image_tower}
    trained = {name: fusion.freeze not in (name, "both") for name in towers}
    layers = {name: layer(tokens, _shape(t), True, trained[name]) for name, t in towers.items()}
    depths = {name: t.layers for name, t in towers.items()}
    crossing = _cross_block(config, tokens)
    slots = []
    for slot in depth_slots(depths["text"], depths["image"], fusion.cross_every):
        runs = {name: getattr(slot, name) for name in layers}
        units = [layers[name] for name, (first, last) in runs.items() for _ in range(first, last)]
        units += [crossing] * (slot.cross is not None)
        slots.append(Block("jam", "layer", tuple(units)))
    first = tuple(
        _tower_embedding(t, tokens, vocabulary, name == "text" or not fusion.shared_embedding, trained[name])
        for name, t in towers.items()
    )
    widths = sum(t.width for t in towers.values())
    width = fusion.output_width or max(t.width for t in towers.values())
    mix = Unit(linear(widths, width, bias=False), 1, products=(Product(tokens, widths, width, SEQUENCE, fp8=False),),
               kept=(Kept(tokens * widths, SEQUENCE),),
               moved=((SEQUENCE, 2 * tokens * widths, 2 * tokens * widths, STREAM),))
    norms = [_final_norm(t, tokens, trained[name]) for name, t in towers.items()]
    head = Block("jam", "head", (*norms, mix, _output(config, tokens, width, vocabulary, False)))
    blocks = (Block("jam", "embedding", first), *slots, head)
    return Model(blocks, (0, *[tokens * widths] * (len(blocks) - 1)), None)


def _cross_block(config: Config, tokens: int) -> Unit:
    """Both directions, recomputed together."""
    gate, parts = config.fusion.gate, []
    for own, other in ((config.text_tower, config.image_tower), (config.image_tower, config.text_tower)):
        shape, hidden = _shape(own), tokens * own.width
        reading = cross_attention(tokens, shape, tokens, other.width, causal=True)
        # The context's norm keeps its statistics and its result; its input is kept by the other direction.
        of_context = (Kept(2 * tokens, SEQUENCE, 4), Kept(tokens * other.width, SEQUENCE, "fp8"))
        update = (Kept(hidden, SEQUENCE),) * gate
        own_parts = [reading] + [mlp(tokens, shape, True)] * config.fusion.cross_ffn
        for index, part in enumerate(own_parts):
            extra = update + (of_context if index == 0 else ())
            count = part.count + Count(0, gate) + (_shape(own).norm(other.width) if index == 0 else Count())
            tensors = part.tensors + gate + (_shape(own).norm_parameters if index == 0 else 0)
            parts.append(Unit(count, tensors, True, part.products, part.attentions, part.kept + extra, part.moved,
                              part.messages, part.input, True))  # fmt: skip
    unit = joined(parts)
    both = tokens * (config.text_tower.width + config.image_tower.width)
    return replace(unit, trained=True, input=both, layer=True)

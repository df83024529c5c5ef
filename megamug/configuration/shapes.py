"""Names and shapes of a model's parameters: what follows from a configuration alone, whatever the layout. Nothing here
imports torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megamug.configuration.sections import Config, TowerConfig

Shapes = dict[str, tuple[int, ...]]
TOWERS = ("text", "image")
GRID_PREFIX = 1  # tokens before a `rotary_grid`: the condition


def positions_of(tower: TowerConfig) -> int | None:
    """How many positions a tower knows: rows of a learned table, or the cells of a grid and what is before it; None
    for any number."""
    if tower.positions == "rotary_grid":
        return GRID_PREFIX + tower.grid**2
    return tower.max_positions if tower.positions == "learned" else None


def output_width(config: Config) -> int:
    """Width of the linear over both towers' states: as configured, or the wider tower's."""
    return config.fusion.output_width or max(config.text_tower.width, config.image_tower.width)


def init_std(config: Config, name: str) -> float:
    """Of the tower that a parameter of this global name belongs to; of the text tower for mix and output."""
    image = name.startswith("image_tower.") or ".image." in name
    return (config.image_tower if image else config.text_tower).init_std


def count(shapes: Iterable[tuple[int, ...]]) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(math.prod(shape) for shape in shapes)


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


@dataclass(frozen=True)
class Convolution:
    """A convolution of `kernel` x `kernel`, how many places of an image it computes, and what stands around it."""

    inputs: int
    outputs: int
    kernel: int
    places: int  # of its inputs where it is transposed: each makes kernel x kernel
    bias: bool = False
    norm: bool = True  # a BatchNorm behind it
    transposed: bool = False

    @property
    def parameters(self) -> int:
        weights = self.inputs * self.outputs * self.kernel**2
        return weights + self.outputs * self.bias + 2 * self.outputs * self.norm

    @property
    def flops(self) -> int:
        """Forward, of one image."""
        return 2 * self.inputs * self.outputs * self.kernel**2 * self.places


def segmenter_convolutions(config: Config) -> dict[str, Convolution]:
    """All of a segmenter's head, by name; `segmenter.classes` is known."""
    own, width, side = config.segmenter, config.model.width, config.data.image_size // config.model.patch_size
    wide, sides = own.channels, (4 * side, 2 * side, side, side // 2)
    fine = sides[0] ** 2
    found = {
        "pyramid.first": Convolution(width, width, 2, side**2, bias=True, transposed=True),
        "pyramid.second": Convolution(width, width, 2, sides[1] ** 2, bias=True, norm=False, transposed=True),
        "pyramid.doubled": Convolution(width, width, 2, side**2, bias=True, norm=False, transposed=True),
    }
    for i, scale in enumerate(own.pool_scales):
        found[f"decode.pooling.{i}"] = Convolution(width, wide, 1, scale**2)
    pooled = width + len(own.pool_scales) * wide
    found["decode.bottleneck"] = Convolution(pooled, wide, 3, sides[3] ** 2)
    for i, each in enumerate(sides[:3]):
        found[f"decode.laterals.{i}"] = Convolution(width, wide, 1, each**2)
        found[f"decode.outputs.{i}"] = Convolution(wide, wide, 3, each**2)
    found["decode.fusion"] = Convolution(4 * wide, wide, 3, fine)
    found["decode.classifier"] = Convolution(wide, own.classes, 1, fine, bias=True, norm=False)
    if own.auxiliary_weight > 0:
        found["auxiliary.convolution"] = Convolution(width, own.auxiliary_channels, 3, side**2)
        found["auxiliary.classifier"] = Convolution(own.auxiliary_channels, own.classes, 1, side**2, bias=True,
                                                    norm=False)  # fmt: skip
    return found

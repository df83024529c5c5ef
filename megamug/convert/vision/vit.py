"""The rows that every vision transformer shares: MUG's names and shapes, with the foreign names of a layer's parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megamug.configuration.presets import PRESETS
from megamug.convert.table import Row, batched, convolution, qkv, same, weight_and_bias
from megamug.errors import UserError
from megamug.models.blocks.positions import sincos_positions


@dataclass(frozen=True)
class LayerNames:
    """How a format calls the parts of a pre-norm layer. `qkv`: one name (fused), or those of query, key and value."""

    norm1: str
    qkv: tuple[str, ...]
    projection: str
    norm2: str
    fc1: str
    fc2: str


def stack(
    ours: str, theirs: Callable[[int], str], names: LayerNames, layers: int, width: int, heads: int, ffn_width: int
) -> list[Row]:
    """The rows of `layers` transformer layers; `theirs(i)` is what precedes the names in layer i."""
    rows = []
    for i in range(layers):
        mine, other = f"{ours}.layers.{i}", theirs(i)
        attention, mlp = f"{mine}.self_attention", f"{mine}.mlp"
        for kind, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
            rows += [
                same(f"{attention}.linear_qkv.layer_norm_{kind}", (width,), f"{other}{names.norm1}.{kind}"),
                qkv(f"{attention}.linear_qkv.{kind}", shape, [f"{other}{name}.{kind}" for name in names.qkv], heads),
                same(f"{mlp}.linear_fc1.layer_norm_{kind}", (width,), f"{other}{names.norm2}.{kind}"),
            ]
        rows += weight_and_bias(f"{attention}.linear_proj", (width, width), other + names.projection)
        rows += weight_and_bias(f"{mlp}.linear_fc1", (ffn_width, width), other + names.fc1)
        rows += weight_and_bias(f"{mlp}.linear_fc2", (width, ffn_width), other + names.fc2)
    return rows


def encoder(model, names: LayerNames, cls: str, patches: str, layer: Callable[[int], str], norm: str) -> list[Row]:
    """MUG's encoder without register tokens. `model` is the resolved section of the configuration."""
    width, patch = model.width, model.patch_size
    return [
        batched("encoder.cls_token", (1, width), cls),
        convolution("encoder.patch_embedding.weight", width, patch, f"{patches}.weight"),
        same("encoder.patch_embedding.bias", (width,), f"{patches}.bias"),
        *stack("encoder.stack", layer, names, model.layers, width, model.heads, model.ffn_width),
        *weight_and_bias("encoder.stack.final_layernorm", (width,), norm),
    ]


def decoder(model, names: LayerNames, mask: str, embed: str, layer: Callable[[int], str], norm: str, head: str):
    """MUG's image decoder without register tokens."""
    width = model.decoder_width
    return [
        batched("image_decoder.mask_token", (1, width), mask),
        *weight_and_bias("image_decoder.latent_embedding", (width, model.width), embed),
        *stack("image_decoder.stack", layer, names, model.decoder_layers, width, model.decoder_heads, 4 * width),
        *weight_and_bias("image_decoder.stack.final_layernorm", (width,), norm),
        *weight_and_bias("image_decoder.prediction", (3 * model.patch_size**2, width), head),
    ]


def positions(config, width: int, prefix: int) -> Tensor:
    """The fixed table as other libraries keep it, [1, prefix + N, width]; the prefix rows are zero."""
    grid = config.data.image_size // config.model.patch_size
    return sincos_positions(width, grid, grid, prefix)[None]


def position_tables(config, encoder_name: str, decoder_name: str) -> dict[str, Callable[[], Tensor]]:
    """By their foreign names, the fixed tables of the encoder and, where there is one, of the image decoder."""
    tables = {encoder_name: lambda: positions(config, config.model.width, 1)}
    if config.model.image_loss_weight > 0:
        tables[decoder_name] = lambda: positions(config, config.model.decoder_width, 1)
    return tables


def no_registers(config, format_name: str) -> None:
    """Raises UserError where the model has register tokens and the format has no place for them."""
    model = config.model
    if model.register_tokens or (model.image_loss_weight > 0 and model.decoder_register_tokens):
        raise UserError(
            f"{format_name} has no register tokens, and the model has {model.register_tokens} in its encoder and "
            f"{model.decoder_register_tokens} in its image decoder; `timm` takes an encoder with register tokens"
        )


def standard_eps(config, format_name: str) -> None:
    """Raises UserError where the norms are not those that the format's library builds."""
    if config.model.layer_norm_eps != 1e-6:
        raise UserError(
            f"{format_name} computes LayerNorm with 1e-6, and the model has layer_norm_eps"
            f" {config.model.layer_norm_eps}; `hf_vit` takes any"
        )


def heads_of(width: int, key: str) -> int:
    """Attention heads of the public models of this width. Shapes do not tell them."""
    known = {512: 16}  # MAE's decoder
    known.update({sizes["width"]: sizes["heads"] for name, sizes in PRESETS.items() if name.startswith("vit_")})
    if width not in known:
        raise UserError(
            f"a width of {width} does not tell the number of attention heads, and neither do the tensors; "
            f"say it: --config {key}=HEADS"
        )
    return known[width]


def image_size_of(rows: int, prefixes: tuple[int, ...], patch: int) -> int:
    """Side of the image in pixels, from the rows of a position table with one of these numbers of prefix rows."""
    for prefix in prefixes:
        side = math.isqrt(max(rows - prefix, 0))
        if side > 0 and side * side == rows - prefix:
            return side * patch
    raise UserError(f"a table of {rows} positions is of no square image (prefix rows: {prefixes}); only those convert")


def blocks(names, start: str, at: int) -> int:
    """How many layers there are: 1 + the largest number at place `at` of the dotted names that begin with `start`."""
    return 1 + max((int(name.split(".")[at]) for name in names if name.startswith(start)), default=-1)

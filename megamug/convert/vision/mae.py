"""facebook's MAE (`{"model": ...}`, github.com/facebookresearch/mae): encoder, and decoder where the file has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from megamug.configuration.sections import Config
from megamug.convert.formats import Format, View
from megamug.convert.table import Row
from megamug.convert.vision import classifier
from megamug.convert.vision.vit import (
    LayerNames,
    blocks,
    decoder,
    encoder,
    heads_of,
    image_size_of,
    no_registers,
    position_tables,
    standard_eps,
)
from megamug.errors import UserError

LAYER = LayerNames("norm1", ("attn.qkv",), "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def encoder_settings(view: View, prefixes: tuple[int, ...]) -> dict[str, object]:
    """Sizes of an encoder in MAE's (and timm's) names, from the shapes; `prefixes`: rows before the patches' positions.

    Heads are those of the public model of the same width.
    """
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if name not in view:
            raise UserError(f"it holds no {name}: it is no vision transformer in this format; give another --from")
    width, _, patch, _ = view.shape("patch_embed.proj.weight")
    view.remarks.append(
        "taken as MAE's, which tensors do not tell: GELU, LayerNorm with 1e-6, ImageNet's mean and std of pixels; say"
        " where it differs (--config model.layer_norm_eps=X data.mean=[R,G,B] data.std=[R,G,B])"
    )
    return {
        "model.kind": "mug",
        "model.layers": blocks(view.actual, "blocks.", 1),
        "model.width": width,
        "model.heads": partial(heads_of, width, "model.heads"),
        "model.ffn_width": view.shape("blocks.0.mlp.fc1.weight")[0],
        "model.patch_size": patch,
        "model.layer_norm_eps": 1e-6,
        "model.image_loss_weight": 0.0,
        "model.caption_loss_weight": 0.0,
        "data.image_size": image_size_of(view.shape("pos_embed")[1], prefixes, patch),
    }


def settings(view: View) -> dict[str, object]:
    found = encoder_settings(view, (1,))
    if "decoder_embed.weight" in view:
        width = view.shape("decoder_embed.weight")[0]
        found |= {
            "model.image_loss_weight": 1.0,
            "model.decoder_layers": blocks(view.actual, "decoder_blocks.", 1),
            "model.decoder_width": width,
            "model.decoder_heads": partial(heads_of, width, "model.decoder_heads"),
        }
        # MAE's script keeps its arguments in the file: what the decoder was taught to paint.
        told = view.source.arguments
        if isinstance(told.get("norm_pix_loss"), bool):
            found["model.norm_pix_loss"] = told["norm_pix_loss"]
        else:
            view.remarks.append("model.norm_pix_loss=true is taken, which the file does not tell; say if it is false")
        if isinstance(told.get("mask_ratio"), float):
            found["model.mask_ratio"] = told["mask_ratio"]
    return found


def encoder_rows(config: Config) -> list[Row]:
    return encoder(config.model, LAYER, "cls_token", "patch_embed.proj", lambda i: f"blocks.{i}.", "norm")


def rows(config: Config, _vocabulary: tuple[int, ...] = ()) -> list[Row]:
    no_registers(config, "mae")
    standard_eps(config, "mae")
    table = encoder_rows(config)
    if config.model.image_loss_weight > 0:
        table += decoder(
            config.model, LAYER, "mask_token", "decoder_embed", lambda i: f"decoder_blocks.{i}.", "decoder_norm",
            "decoder_pred",
        )  # fmt: skip
    return table


def fixed(config: Config) -> dict[str, Callable[[], Tensor]]:
    return position_tables(config, "pos_embed", "decoder_pos_embed")


FORMAT = Format(
    "mae", "facebook's MAE (.pth or safetensors)", "mug", ("encoder.", "image_decoder."), settings, rows, fixed
)
FORMAT = replace(FORMAT, of_classifiers=classifier.of(FORMAT))

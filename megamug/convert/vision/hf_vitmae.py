"""transformers' ViTMAEForPreTraining: encoder and image decoder, in the names of transformers 4 (`hf_vitmae`) or 5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from megamug.configuration.sections import Config
from megamug.convert.described import flag
from megamug.convert.formats import Format, View, as_it_is
from megamug.convert.table import Row
from megamug.convert.vision.hf_vit import (
    DESCRIBED,
    LAYER,
    encoder_config,
    encoder_rows,
    encoder_settings,
    newer,
    older,
    preprocessor,
)
from megamug.convert.vision.vit import blocks, decoder, no_registers, position_tables
from megamug.errors import UserError


def settings(view: View) -> dict[str, object]:
    found, sizes = view.config, encoder_settings(view, "vit.")
    if "decoder.decoder_embed.weight" not in view:  # ViTMAEModel
        return sizes
    width = view.shape("decoder.decoder_embed.weight")[0]
    if found.get("decoder_intermediate_size") != 4 * width:
        raise UserError(
            f"its config.json says decoder_intermediate_size {found.get('decoder_intermediate_size')}, and the "
            f"feed-forward of megamug's image decoder is 4 x its width = {4 * width}; such a decoder does not convert: "
            "save its encoder alone (ViTMAEModel)"
        )
    return sizes | {
        "model.image_loss_weight": 1.0,
        "model.decoder_layers": blocks(view.actual, "decoder.decoder_layers.", 2),
        "model.decoder_width": width,
        "model.decoder_heads": found.get("decoder_num_attention_heads"),
        "model.mask_ratio": float(found.get("mask_ratio", 0.75)),
        "model.norm_pix_loss": flag(found, "norm_pix_loss", False),
    }


def rows(config: Config, _vocabulary: tuple[int, ...] = ()) -> list[Row]:
    no_registers(config, "hf_vitmae")
    table = encoder_rows(config, "vit.")
    if config.model.image_loss_weight > 0:
        table += decoder(
            config.model, LAYER, "decoder.mask_token", "decoder.decoder_embed",
            lambda i: f"decoder.decoder_layers.{i}.", "decoder.decoder_norm", "decoder.decoder_pred",
        )  # fmt: skip
    return table


def fixed(config: Config) -> dict[str, Callable[[], Tensor]]:
    return position_tables(config, "vit.embeddings.position_embeddings", "decoder.decoder_pos_embed")


def files(config: Config, _vocabulary: tuple[int, ...] = ()) -> dict[str, dict]:
    model = config.model
    described = {"model_type": "vit_mae", "architectures": ["ViTMAEForPreTraining"]} | encoder_config(config)
    described |= {"mask_ratio": model.mask_ratio, "norm_pix_loss": model.norm_pix_loss}
    if model.image_loss_weight > 0:
        described |= {
            "decoder_hidden_size": model.decoder_width, "decoder_num_hidden_layers": model.decoder_layers,
            "decoder_num_attention_heads": model.decoder_heads, "decoder_intermediate_size": 4 * model.decoder_width,
        }  # fmt: skip
    return {"config.json": described, "preprocessor_config.json": preprocessor(config)}


FORMAT = Format(
    "hf_vitmae", "transformers' ViTMAEForPreTraining, names of transformers 4", "mug", ("encoder.", "image_decoder."),
    settings, rows, fixed, files, canonical=newer, spelled=older,
    described=replace(DESCRIBED, model_types=("vit_mae",)),
)  # fmt: skip
FORMAT5 = replace(
    FORMAT, name="hf_vitmae5", what="transformers' ViTMAEForPreTraining, names of transformers 5", spelled=as_it_is
)

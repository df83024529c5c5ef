"""transformers' ViTModel. Tables use the names of transformers 5; what is written is spelled as in transformers 4,
which both read (`hf_vit`), or as the modules of transformers 5 (`hf_vit5`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from megamug.configuration.sections import Config
from megamug.convert.described import Described, positive
from megamug.convert.formats import Format, View, as_it_is, is_count
from megamug.convert.table import Row
from megamug.convert.vision.classifier import of_transformers
from megamug.convert.vision.vit import LayerNames, blocks, encoder, no_registers, positions
from megamug.data.pairs.images import SHARE
from megamug.errors import UserError

LAYER = LayerNames(
    "layernorm_before", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention.o_proj",
    "layernorm_after", "mlp.fc1", "mlp.fc2",
)  # fmt: skip
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
# megamug's encoder computes ViTMAE's as well: it is ViT's, and saved alone (ViTMAEModel) it has ViT's names.
MAE_KEYS = frozenset("""
    decoder_hidden_size decoder_num_hidden_layers decoder_num_attention_heads decoder_intermediate_size mask_ratio
    norm_pix_loss
""".split())  # fmt: skip
DESCRIBED = Described(
    ("vit", "vit_mae"), frozenset({*SIZES, "layer_norm_eps"}),
    {"hidden_act": ("gelu",), "qkv_bias": (True,), "num_channels": (3,)},
    # The pooler and the head of masked image modelling (encoder_stride) are not of the encoder.
    frozenset({"hidden_dropout_prob", "attention_probs_dropout_prob", "encoder_stride", "pooler_act",
               "pooler_output_size"}) | MAE_KEYS,
)  # fmt: skip
# transformers 4 -> 5, in this order. The first is how transformers 5 spells ViTMAE's decoder in the files it writes.
_NEWER = [
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"^(vit\.)?encoder\.layer\.", r"\1layers."),
    (r"attention\.attention\.(q)uery|attention\.attention\.(k)ey|attention\.attention\.(v)alue", "attention.{}_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(layers\.\d+)\.output\.dense", r"\1.mlp.fc2"),
]
_OLDER = [
    (r"^(vit\.)?layers\.", r"\1encoder.layer."),
    (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.k_proj", "attention.attention.key"),
    (r"attention\.v_proj", "attention.attention.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
]


def newer(name: str) -> str:
    """The name in transformers 5 of a tensor in either spelling."""
    for pattern, replacement in _NEWER:
        if "{}" in replacement:
            name = re.sub(pattern, lambda m, r=replacement: r.format("".join(g for g in m.groups() if g)), name)
        else:
            name = re.sub(pattern, replacement, name)
    return name


def older(name: str) -> str:
    """The name in transformers 4 of a tensor that transformers 5 calls `name`."""
    for pattern, replacement in _OLDER:
        name = re.sub(pattern, replacement, name)
    return name


def encoder_settings(view: View, base: str) -> dict[str, object]:
    """Sizes from config.json, which knows the heads; they are checked against the shapes later."""
    found = view.config
    missing = [key for key in SIZES if not is_count(found.get(key))]
    if missing:
        raise UserError(f"its config.json has no whole number above 0 for {', '.join(missing)}; copy the whole folder")
    layers = blocks(view.actual, f"{base}layers.", 2 if base else 1)
    if layers != found["num_hidden_layers"]:
        raise UserError(
            f"its config.json says num_hidden_layers {found['num_hidden_layers']} and the tensors are of {layers}; copy"
            " config.json and tensors of one model"
        )
    return normalisation(view) | {
        "model.kind": "mug",
        "model.layers": layers,
        "model.width": found["hidden_size"],
        "model.heads": found["num_attention_heads"],
        "model.ffn_width": found["intermediate_size"],
        "model.patch_size": found["patch_size"],
        "model.layer_norm_eps": positive(found.get("layer_norm_eps", 1e-12), "layer_norm_eps"),  # transformers' default
        "model.image_loss_weight": 0.0,
        "model.caption_loss_weight": 0.0,
        "data.image_size": found["image_size"],
    }


def normalisation(view: View) -> dict[str, list[float]]:
    """data.mean and data.std by which (x - mean) / std of a pixel x in 0..1 is what the library's processor makes of
    it. That multiplies x * 255 by `rescale_factor` and takes (y - image_mean) / image_std; either may be switched off.
    """
    pixels = view.preprocessor
    if not {"image_mean", "image_std"} <= pixels.keys() and pixels.get("do_normalize", True):
        view.remarks.append(
            "nothing (preprocessor_config.json: image_mean, image_std) tells how pixels are normalised: data.mean and"
            " data.std are ImageNet's, or say them (--config)"
        )
        return {}
    factor = 255 * float(pixels.get("rescale_factor", 1 / 255)) if pixels.get("do_rescale", True) else 255.0
    mean, std = ([0.0] * 3, [1.0] * 3)
    if pixels.get("do_normalize", True):
        mean, std = ([float(x) for x in pixels[key]] for key in ("image_mean", "image_std"))
    if abs(factor - 1) < 1e-6:  # 1/255 as JSON has it, 0.00392156862745098 or shorter: numbers stay what they are
        return {"data.mean": mean, "data.std": std}
    return {"data.mean": [x / factor for x in mean], "data.std": [x / factor for x in std]}


def encoder_rows(config: Config, base: str) -> list[Row]:
    embeddings = f"{base}embeddings"
    return encoder(
        config.model, LAYER, f"{embeddings}.cls_token", f"{embeddings}.patch_embeddings.projection",
        lambda i: f"{base}layers.{i}.", f"{base}layernorm",
    )  # fmt: skip


def encoder_config(config: Config) -> dict:
    model = config.model
    return {
        "hidden_size": model.width, "num_hidden_layers": model.layers, "num_attention_heads": model.heads,
        "intermediate_size": model.ffn_width, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "layer_norm_eps": model.layer_norm_eps, "qkv_bias": True,
        "image_size": config.data.image_size, "patch_size": model.patch_size, "num_channels": 3,
    }  # fmt: skip


def preprocessor(config: Config) -> dict:
    """The transform of evaluation: the shorter side, the centre, bicubic. ViT's own processor squeezes pictures square.

    The library cuts an odd rest of 4n + 3 pixels one pixel from where timm, torchvision and megamug cut it.
    """
    size = config.data.image_size
    return {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": int(size / SHARE)}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(config.data.mean), "image_std": list(config.data.std),
    }  # fmt: skip


def rows(config: Config, _vocabulary: tuple[int, ...] = ()) -> list[Row]:
    no_registers(config, "hf_vit")
    return encoder_rows(config, "")


def fixed(config: Config) -> dict[str, Callable[[], Tensor]]:
    return {"embeddings.position_embeddings": lambda: positions(config, config.model.width, 1)}


def files(config: Config, _vocabulary: tuple[int, ...] = ()) -> dict[str, dict]:
    described = {"model_type": "vit", "architectures": ["ViTModel"]} | encoder_config(config)
    return {"config.json": described, "preprocessor_config.json": preprocessor(config)}


def without_base(name: str) -> str:
    """Models with a head keep the encoder under `vit.`."""
    return newer(name.removeprefix("vit."))


FORMAT = Format(
    "hf_vit", "transformers' ViTModel, names of transformers 4", "mug", ("encoder.",),
    lambda view: encoder_settings(view, ""), rows, fixed, files,
    canonical=without_base, spelled=older, described=DESCRIBED,
)  # fmt: skip
FORMAT5 = replace(FORMAT, name="hf_vit5", what="transformers' ViTModel, names of transformers 5", spelled=as_it_is)
FORMAT, FORMAT5 = (replace(one, of_classifiers=of_transformers(one, encoder_rows)) for one in (FORMAT, FORMAT5))

"""transformers' ViTModel. Tables use the names of transformers 5; what is written is spelled as in transformers 4,
which both read (`hf_vit`), or as the modules of transformers 5 (`hf_vit5`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from megamug.configuration.sections import Config
from megamug.convert.formats import Format, View, as_it_is, is_count
from megamug.convert.table import Row
from megamug.convert.vision.vit import LayerNames, blocks, encoder, no_registers, positions
from megamug.errors import UserError

LAYER = LayerNames(
    "layernorm_before", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention.o_proj",
    "layernorm_after", "mlp.fc1", "mlp.fc2",
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
    needed = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size"
    )  # fmt: skip
    missing = [key for key in needed if not is_count(found.get(key))]
    if missing:
        raise UserError(f"its config.json has no whole number above 0 for {', '.join(missing)}; copy the whole folder")
    for key, wanted in (("hidden_act", "gelu"), ("qkv_bias", True), ("num_channels", 3)):
        if found.get(key, wanted) != wanted:
            raise UserError(f"its config.json says {key} {found[key]!r}, and megamug's encoder has {wanted!r}; it does"
                            " not convert")
    layers = blocks(view.actual, f"{base}layers.", 2 if base else 1)
    if layers != found["num_hidden_layers"]:
        raise UserError(
            f"its config.json says num_hidden_layers {found['num_hidden_layers']} and the tensors are of {layers}; copy"
            " config.json and tensors of one model"
        )
    pixels = view.preprocessor
    normalise = {f"data.{ours}": [float(x) for x in pixels[key]]
                 for ours, key in (("mean", "image_mean"), ("std", "image_std")) if key in pixels}  # fmt: skip
    return normalise | {
        "model.kind": "mug",
        "model.layers": layers,
        "model.width": found["hidden_size"],
        "model.heads": found["num_attention_heads"],
        "model.ffn_width": found["intermediate_size"],
        "model.patch_size": found["patch_size"],
        "model.layer_norm_eps": float(found.get("layer_norm_eps", 1e-12)),  # transformers' default
        "model.image_loss_weight": 0.0,
        "model.caption_loss_weight": 0.0,
        "data.image_size": found["image_size"],
    }


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
    size = config.data.image_size
    return {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": config.data.mean,
        "image_std": config.data.std,
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
    canonical=without_base, spelled=older,
)  # fmt: skip
FORMAT5 = replace(FORMAT, name="hf_vit5", what="transformers' ViTModel, names of transformers 5", spelled=as_it_is)

"""timm's VisionTransformer (`vit_*_patch*`): the encoder, with register tokens (`reg_token`) where it has them.

    timm.create_model("local-dir:FOLDER", pretrained=True)

reads what is written here, with its preprocessing (`timm.data.resolve_model_data_config`). Its position table covers
class and register tokens, as timm's does unless `no_embed_class`; both kinds are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from megamug.configuration.sections import Config
from megamug.convert.formats import Format, View
from megamug.convert.table import Row, batched
from megamug.convert.vision import classifier
from megamug.convert.vision.mae import encoder_rows, encoder_settings
from megamug.convert.vision.vit import positions, standard_eps
from megamug.data.pairs.images import SHARE
from megamug.errors import UserError

# Architectures whose layers are MAE's: GELU, LayerNorm with 1e-6, norms before each block. Names that say more (clip,
# siglip, quickgelu, rope, parallel, rpn, xp, gap ...) are other functions, some of them with the same tensors.
ARCHITECTURE = re.compile(r"vit_(tiny|small|medium|base|large|huge|giant|gigantic)_patch\d+(_reg\d+)?(_\d+)?(\.\w+)?")
SIZES = {
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes", "reg_tokens", "in_chans",
    "no_embed_class", "dynamic_img_size", "global_pool", "fc_norm",
}  # fmt: skip
# (width, layers, heads) of timm's names, and the patches they come with.
KINDS = {(192, 12, 3): "tiny", (384, 12, 6): "small", (768, 12, 12): "base", (1024, 24, 16): "large",
         (1280, 32, 16): "huge"}  # fmt: skip
PATCHES = {"tiny": (16,), "small": (16, 32), "base": (8, 16, 32), "large": (14, 16, 32), "huge": (14,)}


def settings(view: View) -> dict[str, object]:
    registers = view.shape("reg_token")[1] if "reg_token" in view else 0
    found = encoder_settings(view, (1 + registers, 0)) | {"model.register_tokens": registers}
    return found | _described(view)


def _described(view: View) -> dict[str, object]:
    """What the config.json of timm's files on a hub tells: heads, and how pixels are normalised. Raises UserError for
    an architecture that is not known to be MAE's encoder, and for arguments that change what it computes."""
    config = view.config
    if "architecture" not in config:
        return {}
    if not isinstance(config["architecture"], str) or not ARCHITECTURE.fullmatch(config["architecture"]):
        raise UserError(f"its config.json says architecture {config['architecture']!r}, which is not known to be a"
                        " plain vision transformer (such as vit_base_patch16_224); it does not convert")  # fmt: skip
    arguments, pixels = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    unknown = [key for key in arguments if key not in SIZES]
    if unknown:
        raise UserError(f"its config.json says model_args.{unknown[0]} {arguments[unknown[0]]!r}, which timm does not"
                        " compute as megamug does; it does not convert")  # fmt: skip
    found: dict[str, object] = {f"data.{key}": [float(x) for x in pixels[key]] for key in ("mean", "std")
                                if key in pixels}  # fmt: skip
    return found | ({"model.heads": arguments["num_heads"]} if "num_heads" in arguments else {})


def rows(config: Config, _vocabulary: tuple[int, ...] = ()) -> list[Row]:
    standard_eps(config, "timm")
    table = encoder_rows(config)
    if registers := config.model.register_tokens:
        table.append(batched("encoder.register_tokens", (registers, config.model.width), "reg_token"))
    return table


def fixed(config: Config) -> dict[str, Callable[[], Tensor]]:
    return {"pos_embed": lambda: positions(config, config.model.width, 1 + config.model.register_tokens)}


def files(config: Config, _vocabulary: tuple[int, ...] = ()) -> dict[str, dict]:
    """config.json as timm's hub has it; whatever the name of the architecture says, `model_args` says again."""
    model, size = config.model, config.data.image_size
    kind = KINDS.get((model.width, model.layers, model.heads), "base")
    patch = model.patch_size if model.patch_size in PATCHES[kind] else 16
    cfg = {
        "input_size": [3, size, size], "fixed_input_size": True, "num_classes": 0, "pool_size": None,
        "interpolation": "bicubic", "crop_pct": SHARE, "crop_mode": "center", "mean": list(config.data.mean),
        "std": list(config.data.std), "first_conv": "patch_embed.proj", "classifier": "head",
    }  # fmt: skip
    arguments = {
        "img_size": size, "patch_size": model.patch_size, "embed_dim": model.width, "depth": model.layers,
        "num_heads": model.heads, "mlp_ratio": model.ffn_width / model.width, "reg_tokens": model.register_tokens,
    }  # fmt: skip
    return {"config.json": {
        "architecture": f"vit_{kind}_patch{patch}_224", "num_classes": 0, "num_features": model.width,
        "global_pool": "token", "model_args": arguments, "pretrained_cfg": cfg,
    }}  # fmt: skip


FORMAT = Format(
    "timm", "timm's VisionTransformer, class and register tokens", "mug", ("encoder.",), settings, rows, fixed, files
)
FORMAT = replace(FORMAT, of_classifiers=classifier.of(FORMAT))

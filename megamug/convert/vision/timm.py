"""timm's VisionTransformer (`vit_*_patch*`): the encoder, with register tokens (`reg_token`) where it has them.

    timm.create_model("vit_base_patch16_224", num_classes=0, reg_tokens=R)

reads what is written here. Its position table covers class and register tokens, as timm's does unless `no_embed_class`;
both kinds are read.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megamug.configuration.sections import Config
from megamug.convert.formats import Format, View
from megamug.convert.table import Row, batched
from megamug.convert.vision.mae import encoder_rows, encoder_settings
from megamug.convert.vision.vit import positions


def settings(view: View) -> dict[str, object]:
    registers = view.shape("reg_token")[1] if "reg_token" in view else 0
    return encoder_settings(view, (1 + registers, 0)) | {"model.register_tokens": registers}


def rows(config: Config, _vocabulary: tuple[int, ...] = ()) -> list[Row]:
    table = encoder_rows(config)
    if registers := config.model.register_tokens:
        table.append(batched("encoder.register_tokens", (registers, config.model.width), "reg_token"))
    return table


def fixed(config: Config) -> dict[str, Callable[[], Tensor]]:
    return {"pos_embed": lambda: positions(config, config.model.width, 1 + config.model.register_tokens)}


FORMAT = Format(
    "timm", "timm's VisionTransformer, class and register tokens", "mug", ("encoder.",), settings, rows, fixed
)

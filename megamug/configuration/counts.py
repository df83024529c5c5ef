"""Numbers that follow from a configuration by counting: ranks, patches, tokens, layers of stacks. Nothing of torch.

The formulas are those of `megamug.models.mug.plan`, which needs torch; a test compares them.
"""

from __future__ import annotations

from dataclasses import replace

from megamug.configuration.presets import FINE_TUNED
from megamug.configuration.reading import towers
from megamug.configuration.sections import Config


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below `number`."""
    return -(-number // multiple) * multiple


def data_parallel(config: Config, world_size: int) -> int:
    """Data-parallel ranks; `validate.layout` has passed."""
    return world_size // (config.parallel.tensor * config.parallel.pipeline)


def as_mug(config: Config) -> Config:
    """The configuration of a classifier or segmenter as that of a MUG without decoders that sees every patch, which is
    what its encoder is; any other one as it is."""
    if config.model.kind not in FINE_TUNED:
        return config
    model = replace(config.model, kind="mug", mask_ratio=0.0, image_loss_weight=0.0, caption_loss_weight=0.0)
    return replace(config, model=model)


def segmenter_blocks(config: Config) -> tuple[int, ...]:
    """The four blocks that a segmenter reads, from 0: at a third, a half, two thirds and the end, which are BEiT's and
    MAE's 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24."""
    if config.segmenter.blocks is not None:
        return tuple(config.segmenter.blocks)
    layers = config.model.layers
    return tuple(max(round(layers * share) - 1, 0) for share in (1 / 3, 1 / 2, 2 / 3, 1))


def patch_count(config: Config) -> int:
    """Patches of one image."""
    return (config.data.image_size // config.model.patch_size) ** 2


def visible_patches(config: Config) -> int:
    """Patches that the encoder sees, rounded as MAE rounds."""
    return int(patch_count(config) * (1 - as_mug(config).model.mask_ratio))


def visible_tokens(config: Config) -> int:
    """Tokens in the encoder: class, registers, visible patches."""
    return 1 + config.model.register_tokens + visible_patches(config)


def decoder_tokens(config: Config) -> int:
    """Tokens in the image decoder: class, registers, all patches."""
    return 1 + config.model.decoder_register_tokens + patch_count(config)


def stack_layers(config: Config) -> dict[str, int]:
    """Layers of each stack of the model, by the key (or keys) that set them."""
    model = as_mug(config).model
    if towers(config):
        return {f"{name}.layers": tower.layers for name, tower in towers(config).items()}
    layers = {"model.layers": model.layers}
    if model.image_loss_weight > 0:
        layers["model.decoder_layers"] = model.decoder_layers
    if model.caption_loss_weight > 0:
        key = "model.text_unimodal_layers + text_multimodal_layers"
        layers[key] = model.text_unimodal_layers + model.text_multimodal_layers
    return layers


def kept_values(config: Config) -> int:
    """fp32 values that the optimizer keeps of each parameter: moments, and the average of the weights."""
    averages = config.model.kind == "classifier" and config.classifier.ema > 0
    return (2 if config.optimizer.name == "adamw" else 1) + averages

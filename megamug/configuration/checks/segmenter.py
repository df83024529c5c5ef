"""Checks of `kind: segmenter` beside those that it shares with MUG, whose encoder it has, and with classifiers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from megamug.configuration.counts import patch_count, segmenter_blocks
from megamug.configuration.reading import load_config, resolve
from megamug.configuration.sections import Config
from megamug.configuration.validate_classifier import SIZES, enough_classes, labelled_sources, local_layers
from megamug.errors import UserError

if TYPE_CHECKING:
    from megamug.data.shards.sources import Source


def head(config: Config) -> None:
    """Blocks that are there, features that can be halved; what UperNet does not go with."""
    own, layers, parallel = config.segmenter, config.model.layers, config.parallel
    local_layers(config, "model.kind(segmenter)", "give no features of blocks")
    blocks = segmenter_blocks(config)
    if list(blocks) != sorted(blocks) or blocks[-1] != layers - 1:
        usual = list(segmenter_blocks(_without_blocks(config)))
        raise UserError(f"segmenter.blocks({list(blocks)}): four blocks in their order are wanted, of which the last is"
                        f" the encoder's last ({layers - 1}), as those behind it would learn nothing; set"
                        f" segmenter.blocks={usual}, or null")
    patch = config.model.patch_size
    if patch_count(config) < 4:
        raise UserError(f"data.image_size({config.data.image_size}) makes one patch, and the coarsest features have"
                        f" half as many a side; set data.image_size={8 * patch}")
    if (own.position_image_size or patch) % patch:
        fix = max(1, round(own.position_image_size / patch)) * patch
        raise UserError(f"segmenter.position_image_size({own.position_image_size}) is not divisible by"
                        f" model.patch_size({patch}); set segmenter.position_image_size={fix}")
    if not own.pool_scales:
        raise UserError("segmenter.pool_scales is empty; set segmenter.pool_scales=[1, 2, 3, 6]")
    others = {
        "parallel.pipeline": (parallel.pipeline, 1, "its features of four blocks are not sent between stages"),
        "parallel.cuda_graphs": (bool(parallel.cuda_graphs), False, "running means of features are kept outside"),
    }
    for key, (value, wanted, why) in others.items():
        if value != wanted:
            raise UserError(f"{key}({str(value).lower()}) does not go with model.kind(segmenter): {why}; set"
                            f" {key}={str(wanted).lower()}")


def files(config: Config) -> None:
    """Data sets are there and indexed, every image has a map, and the head an output for each of their classes."""
    from megamug.data.shards.sources import check_maps

    enough_classes(config, labelled_sources(config, check_maps), lambda source: classes_of(source, config))


def classes_of(source: Source, config: Config) -> int:
    """The classes of a set: its names where there are some, else as many as the values of its maps. Raises UserError
    where these are more than the names."""
    zero, names = config.segmenter.reduce_zero_label, source.class_names()
    found = source.map_values - zero
    if names is not None and found > len(names):
        said = "" if zero else "; where 0 in a map is no class, set segmenter.reduce_zero_label=true"
        raise UserError(f"{source.name}: its maps have values up to {source.map_values - 1}, which are {found} classes"
                        f" (segmenter.reduce_zero_label({str(zero).lower()})), and classes.txt names"
                        f" {len(names)}{said}")
    return found if names is None else len(names)


def filled(config: Config) -> Config:
    """A copy in which nothing about the head is null: the number of classes is that of data.train, positions are those
    of the run that is gone on with, of `model.initial`, or of these images. Raises UserError."""
    from megamug.data.shards.sources import resolve_sources

    config = copy.deepcopy(config)
    own = config.segmenter
    if own.classes is None:
        own.classes = max(classes_of(source, config) for source in resolve_sources(config.data.train))
    own.blocks = list(segmenter_blocks(config))
    if own.position_image_size is None:
        own.position_image_size = _learned_with(config)
        head(config)
    return config


def identity(config: Config) -> dict[str, object]:
    """What makes checkpoints of one model unfit for another; classes and positions once they are known."""
    found: dict[str, object] = {"model.kind": config.model.kind, "data.image_size": config.data.image_size}
    found |= {f"model.{name}": getattr(config.model, name) for name in SIZES}
    own = config.segmenter
    found |= {
        "segmenter.blocks": str(list(segmenter_blocks(config))), "segmenter.channels": own.channels,
        "segmenter.pool_scales": str(own.pool_scales), "segmenter.auxiliary_weight above 0": own.auxiliary_weight > 0,
        "segmenter.reduce_zero_label": str(own.reduce_zero_label).lower(),
    }  # fmt: skip
    if own.auxiliary_weight > 0:
        found["segmenter.auxiliary_channels"] = own.auxiliary_channels
    known = {f"segmenter.{key}": getattr(own, key) for key in ("classes", "position_image_size")}
    return found | {key: value for key, value in known.items() if value is not None}


def _without_blocks(config: Config) -> Config:
    config = copy.deepcopy(config)
    config.segmenter.blocks = None
    return config


def _learned_with(config: Config) -> int:
    """The side of the images whose positions the encoder knows."""
    run = Path(config.run_dir)
    if (run / "config.yaml").is_file() and any((run / "checkpoints").glob("step-*")):
        return _side(resolve(load_config(run / "config.yaml")))
    if config.model.initial is None or not Path(config.model.initial).is_dir():  # the trainer says what is not there
        return config.data.image_size
    initial = Path(config.model.initial)
    for folder in (initial, initial.parent.parent):  # of a run, of a checkpoint
        if (folder / "config.yaml").is_file():
            return _side(resolve(load_config(folder / "config.yaml")))
    raise UserError(f"model.initial: {initial} has no config.yaml that says how large the images were whose positions"
                    " it learned; set segmenter.position_image_size")


def _side(config: Config) -> int:
    side = config.segmenter.position_image_size if config.model.kind == "segmenter" else None
    return side or config.data.image_size

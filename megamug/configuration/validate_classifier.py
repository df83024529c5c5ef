"""Checks of `kind: classifier` beside those that it shares with MUG, whose encoder it has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from megamug.configuration.sections import Config
from megamug.data.shards.labels import CLASSES, read_classes
from megamug.errors import UserError

if TYPE_CHECKING:
    from megamug.data.shards.sources import Source

SIZES = ("patch_size", "layers", "width", "heads", "ffn_width", "register_tokens")


def head(config: Config) -> None:
    """Stochastic depth where layers have it, whole images in pairs; what a frozen encoder does not go with."""
    own, parallel, precision = config.classifier, config.parallel, config.precision
    if own.drop_path > 0 and (precision.layers == "te" or precision.fp8 != "none"):
        said = "precision.layers(te)" if precision.layers == "te" else f"precision.fp8({precision.fp8})"
        raise UserError(f"classifier.drop_path({own.drop_path:g}): Transformer Engine's layers have no stochastic"
                        f" depth, and {said} asks for them; set precision.layers=local precision.fp8=none, or"
                        " classifier.drop_path=0")
    if own.drop_path > 0 and parallel.tensor > 1 and precision.layers != "local":
        raise UserError(f"classifier.drop_path({own.drop_path:g}): under parallel.tensor({parallel.tensor})"
                        " precision.layers=auto may take Transformer Engine's layers, which have no stochastic depth;"
                        " set precision.layers=local")
    for key in ("mixup", "cutmix"):
        if getattr(own, key) > 0 and config.data.micro_batch_size == 1:
            raise UserError(f"classifier.{key}({getattr(own, key):g}) mixes the images of a micro-batch, and"
                            f" data.micro_batch_size is 1; set data.micro_batch_size=2 or classifier.{key}=0")
    if own.ema > 0 and precision.fp8 != "none":
        raise UserError(f"classifier.ema({own.ema:g}): averages of the weights take their place for held-out data, and"
                        f" precision.fp8({precision.fp8}) keeps copies of its own of them; set precision.fp8=none or"
                        " classifier.ema=0")
    if not own.frozen:
        if own.pool == "attention":
            raise UserError("classifier.pool(attention) is a probe of a frozen encoder, and classifier.frozen is false;"
                            " set classifier.frozen=true or classifier.pool=mean")
        if not own.batch_norm:
            raise UserError("classifier.batch_norm(false) is of a frozen encoder, and classifier.frozen is false; set"
                            " classifier.batch_norm=true or classifier.frozen=true")
        return
    if config.model.initial is None:
        raise UserError("classifier.frozen(true) reads a trained encoder, and model.initial is not set; name a run:"
                        " model.initial=RUN model.initial_parts=[encoder]")
    others = {
        "classifier.drop_path": (own.drop_path, 0.0, "what does not learn drops nothing"),
        "classifier.layer_decay": (own.layer_decay, 1.0, "the encoder has no learning rate"),
        "parallel.pipeline": (parallel.pipeline, 1, "stages would have nothing to learn"),
        "parallel.cuda_graphs": (bool(parallel.cuda_graphs), False, "running means of features are kept outside"),
        "precision.fp8_parameters": (config.precision.fp8_parameters, False, "a frozen weight has no fp32 value"),
    }  # fmt: skip
    for key, (value, wanted, why) in others.items():
        if value != wanted:
            raise UserError(f"{key}({str(value).lower()}) does not go with classifier.frozen(true): {why}; set"
                            f" {key}={str(wanted).lower()}")


def files(config: Config) -> None:
    """Data sets are there and indexed, every image has a class, and the head one for each of them."""
    sources = _sources(config)
    classes, found = config.classifier.classes, max(source.classes for source in sources)
    if classes is not None and found > classes:
        raise UserError(f"classifier.classes({classes}) is less than the classes of the data({found});"
                        f" set classifier.classes={found}, or null")
    if classes is None and found > _of_training(sources, config):
        raise UserError(f"data.validation has {found} classes and data.train {_of_training(sources, config)}; name the"
                        f" same {found} in classes.txt beside both, or set classifier.classes={found}")
    names, run = sources[0].class_names(), Path(config.run_dir)
    if any((run / "checkpoints").glob("step-*")) and names is not None and read_classes(run) not in (None, names):
        raise UserError(f"run_dir: {run} holds a run on other classes: its {CLASSES} is not that of the data; set"
                        " run_dir to a new folder")
    if found < 2:
        raise UserError(f"the data have {found} class; a classifier wants two at least")


def augmentation(config: Config) -> None:
    """A policy of RandAugment that timm can be asked for."""
    if config.classifier.rand_augment is not None:
        from megamug.data.pairs import rand_augment

        rand_augment.check(config.classifier.rand_augment)


def with_classes(config: Config) -> Config:
    """A copy whose `classifier.classes` says how many there are in data.train, where it was null."""
    if config.classifier.classes is not None:
        return config
    config = copy.deepcopy(config)
    config.classifier.classes = _of_training(_sources(config), config)
    return config


def identity(config: Config) -> dict[str, object]:
    """What makes checkpoints of one model unfit for another; the number of classes once it is known."""
    found: dict[str, object] = {"model.kind": config.model.kind, "data.image_size": config.data.image_size}
    found |= {f"model.{name}": getattr(config.model, name) for name in SIZES}
    own = config.classifier
    found["classifier.pool"] = own.pool
    found |= {f"classifier.{key}": str(getattr(own, key)).lower() for key in ("frozen", "batch_norm")}
    return found | ({} if config.classifier.classes is None else {"classifier.classes": config.classifier.classes})


def _sources(config: Config) -> list[Source]:
    """Of training, then of validation."""
    from megamug.data.shards.sources import check_labels, resolve_sources

    data, found = config.data, []
    if data.train is None:
        raise UserError("data.train is not set; give it a folder of tar shards, a glob, or a list of {path, weight}")
    for key, value in (("data.train", data.train), ("data.validation", data.validation)):
        try:
            own = [] if value is None else resolve_sources(value)
            check_labels(found + own)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        found += own
    return found


def _of_training(sources: list[Source], config: Config) -> int:
    count = len(config.data.train) if isinstance(config.data.train, list) else 1
    return max(source.classes for source in sources[:count])

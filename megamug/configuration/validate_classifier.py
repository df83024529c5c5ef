"""Checks of `kind: classifier` beside those that it shares with MUG, whose encoder it has."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
    if own.drop_path > 0:
        local_layers(config, f"classifier.drop_path({own.drop_path:g})", "have no stochastic depth",
                     "classifier.drop_path=0")  # fmt: skip
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


def local_layers(config: Config, wants: str, why: str, instead: str | None = None) -> None:
    """Raises UserError where the layers are, or may be, Transformer Engine's. `wants`: who cannot go with those, and
    `why`; `instead`: what could be set in place of other layers."""
    precision, tensor = config.precision, config.parallel.tensor
    if precision.layers == "te" or precision.fp8 != "none":
        said = "precision.layers(te)" if precision.layers == "te" else f"precision.fp8({precision.fp8})"
        other = "" if instead is None else f", or {instead}"
        raise UserError(f"{wants}: Transformer Engine's layers {why}, and {said} asks for them; set"
                        f" precision.layers=local precision.fp8=none{other}")
    if tensor > 1 and precision.layers != "local":
        raise UserError(f"{wants}: under parallel.tensor({tensor}) precision.layers=auto may take Transformer Engine's"
                        f" layers, which {why}; set precision.layers=local")


def files(config: Config) -> None:
    """Data sets are there and indexed, every image has a class, and the head one for each of them."""
    from megamug.data.shards.sources import check_labels

    enough_classes(config, labelled_sources(config, check_labels), lambda source: source.classes)


def enough_classes(config: Config, sources: list[Source], count: Callable[[Source], int]) -> None:
    """Raises UserError where the head has fewer outputs than the `sources` (of training, then of validation) have
    classes, or they are not those of the run that is there. `count`: the classes of one of them."""
    key = f"{config.model.kind}.classes"
    classes, found = getattr(config, config.model.kind).classes, max(map(count, sources))
    own = max(map(count, sources[: _sets(config)]))
    if classes is not None and found > classes:
        raise UserError(f"{key}({classes}) is less than the classes of the data({found}); set {key}={found}, or null")
    if classes is None and found > own:
        raise UserError(f"data.validation has {found} classes and data.train {own}; name the same {found} in"
                        f" classes.txt beside both, or set {key}={found}")
    names, run = sources[0].class_names(), Path(config.run_dir)
    if any((run / "checkpoints").glob("step-*")) and names is not None and read_classes(run) not in (None, names):
        raise UserError(f"run_dir: {run} holds a run on other classes: its {CLASSES} is not that of the data; set"
                        " run_dir to a new folder")
    if found < 2:
        raise UserError(f"the data have {found} class; a {config.model.kind} wants two at least")


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
    from megamug.data.shards.sources import resolve_sources

    config.classifier.classes = max(source.classes for source in resolve_sources(config.data.train))
    return config


def identity(config: Config) -> dict[str, object]:
    """What makes checkpoints of one model unfit for another; the number of classes once it is known."""
    found: dict[str, object] = {"model.kind": config.model.kind, "data.image_size": config.data.image_size}
    found |= {f"model.{name}": getattr(config.model, name) for name in SIZES}
    own = config.classifier
    found["classifier.pool"] = own.pool
    found |= {f"classifier.{key}": str(getattr(own, key)).lower() for key in ("frozen", "batch_norm")}
    return found | ({} if config.classifier.classes is None else {"classifier.classes": config.classifier.classes})


def labelled_sources(config: Config, check: Callable[[list[Source]], None]) -> list[Source]:
    """Of training, then of validation; `check` raises UserError where a sample lacks what is learned from it."""
    from megamug.data.shards.sources import resolve_sources

    data, found = config.data, []
    if data.train is None:
        raise UserError("data.train is not set; give it a folder of tar shards, a glob, or a list of {path, weight}")
    for key, value in (("data.train", data.train), ("data.validation", data.validation)):
        try:
            own = [] if value is None else resolve_sources(value)
            check(found + own)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        found += own
    return found


def _sets(config: Config) -> int:
    """Of data.train."""
    return len(config.data.train) if isinstance(config.data.train, list) else 1

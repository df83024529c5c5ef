"""Classifiers with their heads, as timm, MAE's scripts and transformers have them: the encoder, and a linear behind the
class token or behind the mean of the patches.

What standardises the features of a frozen encoder is a linear map and is multiplied into the linear; averages of the
weights stand for them where the run keeps some.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megamug.checkpoint.tensors import TensorReader
from megamug.checkpoint.tokenizer_copy import kept_classes
from megamug.configuration.counts import as_mug
from megamug.configuration.sections import Config
from megamug.convert.formats import Format
from megamug.convert.table import Row, weight_and_bias
from megamug.convert.vision.vit import no_registers, positions
from megamug.errors import UserError

STATISTICS = "head.standardised."
EPS = 1e-6  # `megamug.models.classifier.model.STANDARDISED_EPS`, which a test compares


class Folded:
    """The tensors of a probe, as a `TensorReader` gives them, whose linear reads features that are not standardised:
    w (x - mean) / sqrt(var + eps) + b = w' x + b'."""

    def __init__(self, reader: TensorReader):
        self._reader, self.folder = reader, reader.folder
        self.names = [name for name in reader.names if not name.startswith(STATISTICS)]
        self.state, self.shape = reader.state, reader.shape

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name.startswith("head.linear.") else self._reader.dtype(name)

    def read(self, name: str) -> Tensor:
        if not name.startswith("head.linear."):
            return self._reader.read(name)
        weight, mean, var = (
            self._reader.read(one).double()
            for one in ("head.linear.weight", f"{STATISTICS}running_mean", f"{STATISTICS}running_var")
        )
        scaled = weight * (var + EPS).rsqrt()
        if name == "head.linear.weight":
            return scaled.float()
        return (self._reader.read(name).double() - scaled @ mean).float()


def plain(reader: TensorReader, config: Config) -> TensorReader | Folded:
    """What gives a classifier's tensors. Raises UserError for a head that no format has."""
    if config.classifier.pool == "attention":
        raise UserError("the head is an attentive probe, which no other library has; megamug.load_encoder reads the"
                        " encoder alone, and the run that it began with converts")
    if config.classifier.frozen and config.classifier.batch_norm:
        return Folded(reader)
    return reader


def norm_of_the_mean(config: Config) -> bool:
    """Whether the norm behind the blocks is the mean's (fc_norm), and no token's."""
    return config.classifier.pool == "mean" and not config.classifier.frozen


def rows(encoder: list[Row], config: Config, pooled_norm: str, linear: str) -> list[Row]:
    """Those of `encoder`, and of the head's parts by their foreign names."""
    width = config.model.width
    if norm_of_the_mean(config):
        encoder = with_norm_of_the_mean(encoder, config, pooled_norm)
    return encoder + weight_and_bias("head.linear", (config.classifier.classes, width), linear)


def with_norm_of_the_mean(encoder: list[Row], config: Config, theirs: str) -> list[Row]:
    """The rows of an encoder whose last norm is the head's."""
    kept = [row for row in encoder if not row.ours.startswith("encoder.stack.final_layernorm.")]
    return kept + weight_and_bias("head.norm", (config.model.width,), theirs)


def of(form: Format) -> Format:
    """timm's or MAE's format `form` of an encoder, with its head."""

    def own_rows(config: Config, vocabulary: tuple[int, ...]) -> list[Row]:
        return rows(form.rows(as_mug(config), vocabulary), config, "fc_norm", "head")

    def own_fixed(config: Config) -> dict[str, Callable[[], Tensor]]:
        return form.fixed(as_mug(config))

    def own_files(config: Config, vocabulary: tuple[int, ...]) -> dict[str, dict]:
        files = form.files(config, vocabulary)
        if not files:
            return files
        described, own = files["config.json"], config.classifier
        pool = "token" if own.pool == "class_token" else "avg"
        described |= {"num_classes": own.classes, "global_pool": pool}
        described["pretrained_cfg"]["num_classes"] = own.classes
        if norm_of_the_mean(config) != (pool == "avg"):
            described["model_args"]["fc_norm"] = norm_of_the_mean(config)
        described["model_args"] |= {"global_pool": pool}
        if names := class_names(config):
            described["label_names"] = names
        return files

    return replace(form, kind="classifier", parts=("encoder.", "head."), rows=own_rows, fixed=own_fixed,
                   files=own_files)  # fmt: skip


def of_transformers(form: Format, encoder_rows: Callable[[Config, str], list[Row]]) -> Format:
    """transformers' ViTForImageClassification, whose linear reads the class token behind the encoder's norm."""

    def own_rows(config: Config, _vocabulary: tuple[int, ...]) -> list[Row]:
        no_registers(as_mug(config), form.name)
        if config.classifier.pool != "class_token":
            raise UserError(f"{form.name} classifies by the class token, and the model by classifier.pool="
                            f"{config.classifier.pool}; `timm` has the mean of the patches")  # fmt: skip
        return rows(encoder_rows(config, "vit."), config, "", "classifier")

    def own_fixed(config: Config) -> dict[str, Callable[[], Tensor]]:
        return {"vit.embeddings.position_embeddings": lambda: positions(config, config.model.width, 1)}

    def own_files(config: Config, vocabulary: tuple[int, ...]) -> dict[str, dict]:
        files = form.files(config, vocabulary)
        names = class_names(config) or [f"LABEL_{number}" for number in range(config.classifier.classes)]
        files["config.json"] |= {
            "architectures": ["ViTForImageClassification"], "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
        }  # fmt: skip
        return files

    return replace(form, kind="classifier", parts=("encoder.", "head."), rows=own_rows, fixed=own_fixed,
                   files=own_files)  # fmt: skip


def class_names(config: Config) -> list[str] | None:
    """Of the run, where its data name them all."""
    names = kept_classes(Path(config.run_dir))
    return names if names is not None and len(names) == config.classifier.classes else None

"""The three fusions of two parents, one parameter at a time (JAM: *Jointly Training Large Autoregressive Multimodal
Models*, arXiv 2309.15564, section 3).

    uniform   every parameter is the mean of the parents': a `decoder_lm` of the same sizes
    width     the width doubles, and with it heads, query groups and feed-forward; every projection becomes 2 x 2 blocks
    cross     the towers are the parents, bit by bit; what joins them is new: a `jam_cross`

A parent is a run of `kind: decoder_lm` in any layout. A fusion is a configuration and a list of tensors that are made
when they are written (`checkpoint.tensors`), so no more than one fused parameter and what it is made of is in memory.

Axes: V padded vocabulary, h width, n heads, g query groups, d head width, f feed-forward width, w output width.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megamug.checkpoint import configured
from megamug.checkpoint.tensors import LazyTensor, TensorReader, write_run
from megamug.configuration import validate_lm
from megamug.configuration.reading import resolve
from megamug.configuration.sections import Config, FusionConfig, TowerConfig
from megamug.data.documents.vocabulary import Vocabulary
from megamug.errors import UserError
from megamug.models.jam.fuse_cross import WORDS, cross_tensors

logger = logging.getLogger(__name__)

EMBEDDINGS = (WORDS, "embedding.positions", "output_layer.weight")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Parent:
    """One of the two models to fuse."""

    path: Path
    config: Config  # resolved
    reader: TensorReader
    identity: dict  # what the checkpoint says of vocabulary and arithmetic

    @classmethod
    def load(cls, path: str | Path) -> Parent:
        """From a run folder or a checkpoint folder of one. Raises UserError: none there, or no `decoder_lm`."""
        path = Path(path)
        reader = TensorReader(path)
        run, state = reader.folder.parent.parent, reader.state()
        config, changes = configured.read(run, reader.folder, state)
        for remark in changes:
            logger.warning(remark)
        if config.model.kind != "decoder_lm":
            raise UserError(f"{run} is of model.kind {config.model.kind}; only parents of kind decoder_lm are fused")
        return cls(path, config, reader, state["identity"])


@dataclass(frozen=True)
class Fusion:
    """What `write_run` wants: a configuration, and tensors that are not made yet."""

    config: Config
    tensors: list[LazyTensor]

    @property
    def parameters(self) -> int:
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors)


def uniform(text: Parent, image: Parent) -> Fusion:
    """Every parameter the mean of the parents'. Raises UserError for parents of unlike sizes."""
    check_same_sizes(text, image, "uniform")
    return Fusion(_config(text), list(_pairwise(text, image, lambda name: mean, lambda name, shape: shape)))


def width(text: Parent, image: Parent, off_diagonal: str = "copy") -> Fusion:
    """Twice the width. Raises UserError for parents of unlike sizes.

    Hidden units, heads, query groups and feed-forward units of the text parent come first, then the image parent's.
    Embeddings, learned positions and the output are concatenated along the width, so a logit is the sum of what the
    parents' blocks of the state give. A projection from (x_text, x_image) to (y_text, y_image) is

        copy     [[T, T], [I, I]]    each half of the outputs reads both halves with its own parent's matrix
        average  [[T, M], [M, I]]    M = (T + I) / 2

    Norms and biases are concatenated, those that each head has of its own as well; a norm of query or key heads that is
    one for all heads is the mean.
    """
    check_same_sizes(text, image, "width")
    assert off_diagonal in ("copy", "average"), off_diagonal
    config = _config(text)
    for key in ("width", "heads", "query_groups", "ffn_width"):
        setattr(config.lm, key, 2 * getattr(text.config.lm, key))
    gated, per_head = text.config.lm.activation == "swiglu", text.config.lm.qk_norm_per_head

    def how(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        if _is_head_norm(name):
            return concatenate_rows if per_head else mean
        if name in EMBEDDINGS:
            return concatenate_columns
        halves = 2 if gated and ".linear_fc1." in name and "layer_norm" not in name else 1
        return partial(joined, off_diagonal=off_diagonal, halves=halves)

    def shape_of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if _is_head_norm(name):
            return (2 * shape[0], shape[1]) if per_head else shape
        return (shape[0], 2 * shape[1]) if name in EMBEDDINGS else tuple(2 * size for size in shape)

    return Fusion(config, list(_pairwise(text, image, how, shape_of)))


def cross(text: Parent, image: Parent, fusion: FusionConfig, first_code: int, seed: int) -> Fusion:
    """Both towers as they are, joined as `fusion` says; `first_code`: the vocabulary's first id that is no text piece.

    See `fuse_cross` for what the output reads at the first step. Raises UserError for towers that cannot be joined.
    """
    if fusion.shared_embedding and text.config.lm.width != image.config.lm.width:
        raise UserError(
            f"--shared-embedding needs equal widths: lm.width is {text.config.lm.width} in {text.path} and"
            f" {image.config.lm.width} in {image.path}; leave it out"
        )
    config = copy.deepcopy(text.config)
    config.model.kind, config.model.preset, config.model.initial = "jam_cross", None, None
    config.lm = TowerConfig()
    config.text_tower, config.image_tower = copy.deepcopy(text.config.lm), copy.deepcopy(image.config.lm)
    config.fusion = copy.deepcopy(fusion)
    config = resolve(config)
    validate_lm.fusion(config)
    return Fusion(config, list(cross_tensors(text.reader, image.reader, config, first_code, seed)))


def write(
    fusion: Fusion, run_dir: str | Path, text: Parent, written: Callable[[str], None] = lambda name: None
) -> Path:
    """Writes the fusion as a run whose checkpoint `model.initial` starts from; returns the checkpoint's folder.

    `written` is called with each parameter's name. Raises UserError where the folder holds a run.
    """

    def tensors() -> Iterator[LazyTensor]:
        for tensor in fusion.tensors:
            yield tensor
            written(tensor.name)

    return write_run(run_dir, fusion.config, tensors(), identity=text.identity)


# ---------------------------------------------------------------------------------------------- pairs of parameters


def mean(text: Tensor, image: Tensor) -> Tensor:
    return (text + image) / 2


def concatenate_rows(text: Tensor, image: Tensor) -> Tensor:
    return torch.cat([text, image])


def concatenate_columns(text: Tensor, image: Tensor) -> Tensor:
    return torch.cat([text, image], dim=1)


def joined(text: Tensor, image: Tensor, off_diagonal: str, halves: int) -> Tensor:
    """Vectors one behind the other, matrices as 2 x 2 blocks.

    `halves` = 2: the rows are those of SwiGLU's gate, then those of its linear part; each of the two is joined by
    itself. The fused q, k, v rows lie query group by query group, so joining whole matrices keeps groups together.
    """
    parts = []
    for t, i in zip(text.chunk(halves), image.chunk(halves), strict=True):
        if t.dim() == 1:
            parts += [t, i]
            continue
        above, below = (t, i) if off_diagonal == "copy" else (mean(t, i),) * 2
        parts += [torch.cat([t, above], dim=1), torch.cat([below, i], dim=1)]
    return torch.cat(parts)


def _is_head_norm(name: str) -> bool:
    return name.endswith(("q_layernorm.weight", "q_layernorm.bias", "k_layernorm.weight", "k_layernorm.bias"))


def _pairwise(text: Parent, image: Parent, how: Callable, shape_of: Callable) -> Iterator[LazyTensor]:
    """Every parameter of the parents, joined in float32 by `how(name)`."""
    dtype = DTYPES[text.config.precision.dtype]
    for name in text.reader.names:

        def read(name: str = name) -> Tensor:
            return how(name)(text.reader.read(name).float(), image.reader.read(name).float()).to(dtype)

        yield LazyTensor(name, shape_of(name, text.reader.shape(name)), dtype, read)


# ---------------------------------------------------------------------------------------------- checks


def one_vocabulary(text: Parent, image: Parent, folder: str | Path | None = None) -> Vocabulary | None:
    """The parents' vocabulary: that of `folder`, or of the text parent's `data.tokenizer`; None where neither is set.

    Raises UserError: parents of different vocabularies, by their checkpoints' fingerprints or their embeddings' rows.
    """
    rows = [parent.reader.shape(WORDS)[0] for parent in (text, image)]
    marks = [parent.identity.get("data.tokenizer") for parent in (text, image)]
    remedy = "ids must mean the same in both: train both parents with one vocabulary folder"
    if rows[0] != rows[1]:
        raise UserError(f"{text.path} has a vocabulary of {rows[0]} rows and {image.path} of {rows[1]}; {remedy}")
    if marks[0] != marks[1]:
        raise UserError(f"{text.path} has vocabulary {marks[0]} and {image.path} has {marks[1]}; {remedy}")
    folder = folder or text.config.data.tokenizer
    if folder is None:
        return None
    vocabulary = Vocabulary.load(folder)
    if vocabulary.padded_size != rows[0]:
        raise UserError(
            f"{folder} has {vocabulary.size} ids ({vocabulary.padded_size} rows) and the parents have {rows[0]} rows;"
            " give the parents' own by --vocabulary FOLDER"
        )
    return vocabulary


def check_same_sizes(text: Parent, image: Parent, kind: str) -> None:
    """Raises UserError with the first key of the towers, in their order, that differs."""
    for field in fields(TowerConfig):
        one, other = (getattr(parent.config.lm, field.name) for parent in (text, image))
        if field.name != "init_std" and one != other:
            raise UserError(
                f"lm.{field.name} is {one} in {text.path} and {other} in {image.path}; --kind {kind} needs parents of"
                " the same sizes (--kind cross does not)"
            )
    _check_names(text, image)


def _check_names(text: Parent, image: Parent) -> None:
    for name in text.reader.names:
        if name not in image.reader or text.reader.shape(name) != image.reader.shape(name):
            found = list(image.reader.shape(name)) if name in image.reader else "nothing"
            raise UserError(
                f"{name} is {list(text.reader.shape(name))} in {text.path} and {found} in {image.path};"
                " take parents of one vocabulary and one set of sizes"
            )


def _config(text: Parent) -> Config:
    config = copy.deepcopy(text.config)
    config.model.initial = None
    return config

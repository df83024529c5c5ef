"""`model.initial`: the weights of another run start this one; its optimizer, cursor and layout do not matter.

With `model.initial_parts` only some parts of it are taken (a MUG's encoder, say); the others are drawn anew.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from megamug.checkpoint import configured
from megamug.checkpoint.converted import check_vocabulary, vocabulary_rows
from megamug.checkpoint.saver import on_first
from megamug.checkpoint.state import entries_of, load_tensors, of_parts
from megamug.checkpoint.store import STATE, STEP_FOLDER
from megamug.checkpoint.tensors import TensorReader
from megamug.command_line import launcher
from megamug.configuration import validate
from megamug.configuration.parts import PARTS, initial_parts
from megamug.configuration.presets import FINE_TUNED
from megamug.configuration.reading import load_config, resolve
from megamug.configuration.sections import Config
from megamug.errors import UserError

logger = logging.getLogger(__name__)

# What a model of the same parameters may differ in: MUG's patch positions are computed, so images may grow.
FREE = {"data.image_size"}
ENCODERS = ("mug", *FINE_TUNED)  # kinds of model with the same encoder


def check(config: Config, task) -> None:
    """Raises UserError where the weights are missing, damaged, or those of a model of other sizes or vocabulary.

    Needs no process group. Process 0 reads and verifies the whole checkpoint, the others look at the configuration.
    """
    path, parts = Path(config.model.initial), initial_parts(config)
    is_checkpoint = STEP_FOLDER.fullmatch(path.name) is not None
    if not path.is_dir() or not (is_checkpoint or (path / "checkpoints").is_dir()):
        raise UserError(
            f"model.initial: {path} is neither a run folder (with checkpoints/) nor a checkpoint (step-XXXXXXXX)"
        )
    written = (path.parent.parent if is_checkpoint else path) / "config.yaml"
    if written.is_file():
        before, now = (validate.model_identity(c) for c in (resolve(load_config(written)), config))
        if parts:
            wanted = {f"model.{key}" for part in parts for key in PARTS[part]} | {"model.kind"}
            if before["model.kind"] in ENCODERS and now["model.kind"] in ENCODERS:
                wanted.discard("model.kind")
            now = {key: value for key, value in now.items() if key in wanted}
        # A part that this model lacks may be in the other: a False or None here fits anything.
        other = {
            key: (before.get(key), value) for key, value in now.items()
            if key not in FREE and value not in (None, False) and before.get(key) != value
        }  # fmt: skip
        if other:
            raise _other_model(path, other, before, config)
    if launcher.rank() == 0:
        reader = _reader(path)
        state = reader.state()
        if written.is_file():
            try:
                trained_with, changes = configured.read(written.parent, reader.folder, state)
            except UserError as error:
                raise UserError(f"model.initial: {error}") from None
            for remark in changes + configured.other_function(trained_with, config):
                logger.info("model.initial: %s", remark)
        trained = state["identity"].get("data.tokenizer")
        own = task.identity().get("data.tokenizer")
        rows = vocabulary_rows(state)
        if rows is not None and getattr(task, "vocabulary", None) is not None:
            if remark := check_vocabulary(rows, task.vocabulary.size, config.data.tokenizer):
                logger.info("model.initial: %s", remark)
        reads_words = not parts or "text_decoder" in parts
        if reads_words and trained != own and trained is not None and own is not None:
            raise UserError(
                f"data.tokenizer: the weights of model.initial={path} belong to another vocabulary (SHA-256 {trained},"
                f" that of {config.data.tokenizer} is {own}); give the one that they were trained with"
            )


def load(config: Config, chunks: list, world) -> None:
    """Loads the weights into this rank's chunks, whatever layout wrote them. Call it before the optimizer is made.

    Raises UserError on every rank where a parameter is missing there or has another shape.
    """

    def survey():
        reader = _reader(Path(config.model.initial))
        return str(reader.folder), reader.step, {name: reader.shape(name) for name in reader.names}

    folder, step, shapes = on_first(world, survey)
    parts = initial_parts(config)
    problems: list = [None] * world.size
    dist.all_gather_object(problems, misfits(chunks, shapes, parts))
    if other := {name: sizes for problem in problems for name, sizes in problem.items()}:
        raise _other_model(Path(config.model.initial), other)
    load_tensors(chunks, None, world, Path(folder) / "model", step, parts)
    taken = f"the {' and the '.join(parts)} of step" if parts else "weights of step"
    logger.info("%s %d from %s start this run (model.initial)", taken, step, folder)


def misfits(
    chunks: list, shapes: dict[str, tuple[int, ...]], parts: tuple[str, ...] = ()
) -> dict[str, tuple[object, object]]:
    """The parameters of these chunks, or of some `parts`, that are missing or of another shape: {name: (found,
    wanted)}."""
    wrong = {}
    for entry in entries_of(chunks):
        pieces = entry.build() if hasattr(entry, "build") else entry
        for piece in pieces if isinstance(pieces, list) else pieces.values() if isinstance(pieces, dict) else [pieces]:
            found, wanted = shapes.get(piece.key), tuple(piece.global_shape)
            if found != wanted and of_parts(piece.key, parts):
                wrong[piece.key] = (found, wanted)
    return wrong


MOST_TOLD = 6


def _other_model(
    path: Path, other: dict[str, tuple[object, object]], before: dict | None = None, config: Config | None = None
) -> UserError:
    """`other`: {what differs: (there, here)}; `before`: identity of the model there."""
    told = [
        f"{key} {'is not in it' if found is None else f'is {found} there'} and {wanted} here"
        for key, (found, wanted) in [*other.items()][:MOST_TOLD]
    ]
    if len(other) > MOST_TOLD:
        told.append(f"{len(other) - MOST_TOLD} more")
    fix = "give the weights of a model of these sizes, or set model.initial=null"
    if config is not None and config.model.kind in FINE_TUNED and before["model.kind"] in ENCODERS:
        if config.model.initial_parts is None:
            fix = "set model.initial_parts=[encoder] to take its encoder alone"
    return UserError(f"model.initial: {path} holds the weights of another model: {', '.join(told)}; {fix}")


def _reader(path: Path) -> TensorReader:
    try:
        reader = TensorReader(path)
    except UserError as error:
        raise UserError(f"model.initial: {error}") from None
    if not (reader.folder / STATE).is_file():
        raise UserError(f"model.initial: {reader.folder} has no {STATE}; it is no checkpoint of megamug")
    return reader

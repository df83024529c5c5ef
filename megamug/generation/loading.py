"""A trained run, read back for looking at: plain layers, evaluation mode, whatever layout trained it.

MUG is read by one process; a language model by one, or by several that share its tensors (torchrun).

    with load_run("runs/mug") as run:
        latent = encode(run.model, batch)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megamug.checkpoint import configured, tokenizer_copy
from megamug.checkpoint.converted import check_vocabulary, vocabulary_rows
from megamug.checkpoint.store import CheckpointStore
from megamug.checkpoint.tensors import averages_remark, read_metadata, stored_shapes
from megamug.command_line.launcher import world_size
from megamug.configuration import validate_lm
from megamug.configuration.reading import load_config, resolve, towers
from megamug.configuration.sections import Config, ParallelConfig
from megamug.distributed import cpu_backend, setup
from megamug.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class LoadedRun:
    """A model with its weights, and what belongs to it."""

    config: Config  # the run's, with the layout it is read in
    task: object  # of its kind, see megamug.models.tasks
    model: torch.nn.Module  # all of it, or a tensor-parallel rank's share; in evaluation mode
    world: setup.World
    step: int
    checkpoint: Path
    averaged: bool = False  # its weights are averages (`classifier.ema`)


@contextmanager
def load_run(run_dir: str | Path, step: int | None = None, dtype: str | None = None) -> Iterator[LoadedRun]:
    """The newest complete checkpoint of `run_dir`, or that of `step`, verified; leaves the process group at the end.
    `dtype`: in the place of the run's precision.dtype.

    Raises `UserError`: more processes than can share the model, no run, no complete checkpoint, a damaged one, another
    tokenizer.
    """
    config = reading_layout(read_config(Path(run_dir)), world_size())
    validate_lm.reading(config, Path(run_dir))
    found, path = find_checkpoint(Path(run_dir), step)
    cpu_backend.apply()
    from megamug.checkpoint import initial, saver, state
    from megamug.models.tasks import make_task

    contents = saver.read_state(path)
    for remark in configured.check(config, Path(run_dir) / "config.yaml", path, contents):
        logger.info(remark)
    config.precision.dtype = dtype or config.precision.dtype
    task = make_task(config)
    trained, found_now = contents["identity"], task.identity()
    if trained["data.tokenizer"] not in (None, found_now["data.tokenizer"]):  # None: nobody wrote down which it was
        raise UserError(
            f"data.tokenizer: {config.data.tokenizer} is not what {run_dir} was trained with (SHA-256 "
            f"{found_now['data.tokenizer']}, then {trained['data.tokenizer']}); put the tokenizer of the run back"
        )
    converted = vocabulary_rows(contents)
    if converted is not None and getattr(task, "vocabulary", None) is not None:
        if remark := check_vocabulary(converted, task.vocabulary.size, config.data.tokenizer):
            logger.info(remark)
    shapes = stored_shapes(path)
    rows, tensor = task.plan.padded_vocabulary, config.parallel.tensor
    if rows % tensor:
        raise UserError(
            f"WORLD_SIZE is {tensor}, which does not divide the {rows} rows of the vocabulary; start as many processes"
            " as divide them"
        )
    world = setup.start(config.parallel, config.seed, task.plan.vocabulary_stages)
    try:
        task.join(world)
        (model,) = task.build(world, initialised=False)
        if wrong := initial.misfits([model], shapes):
            name, (there, here) = next(iter(wrong.items()))
            raise UserError(
                f"{path} holds another model than {run_dir}/config.yaml and its data.tokenizer make: {name} is"
                f" {'not there' if there is None else list(there)} and {list(here)} here; put back what the run was"
                " trained or converted with"
            )
        state.load_tensors([model], None, world, path / "model", step=found)
        averages = state.load_averages([model], path / "model", set(read_metadata(path).state_dict_metadata))
        if averages:
            logger.info(averages_remark(len(averages)))
        yield LoadedRun(config, task, model.eval(), world, found, path, bool(averages))
    finally:
        setup.stop()


def one_process(config: Config) -> Config:
    """`config` with the layout of one process and the layers that run everywhere: neither changes a number learned."""
    config.parallel = ParallelConfig(timeout_minutes=config.parallel.timeout_minutes)
    config.precision.layers, config.precision.fp8 = "local", "none"
    config.data.global_batch_size = config.data.micro_batch_size
    return config


def reading_layout(config: Config, processes: int) -> Config:
    """`one_process`, or a language model's tensors shared by `processes`. Raises `UserError` where they cannot be."""
    config = one_process(config)
    if processes == 1:
        return config
    if not towers(config):
        raise UserError(
            f"a trained model of kind {config.model.kind} is read by one process, but WORLD_SIZE is {processes};"
            " start it without torchrun"
        )
    config.parallel.tensor = processes
    try:
        validate_lm.tensor_parallel(config)
    except UserError as error:
        raise UserError(f"WORLD_SIZE is {processes}, so many share the model's tensors: {error}") from None
    return config


def find_checkpoint(run_dir: Path, step: int | None) -> tuple[int, Path]:
    """(step, folder) of the newest complete checkpoint, or of `step`. Reads every byte of it once. Raises `UserError`.

    Changes nothing: the run may be in training.
    """
    store = CheckpointStore(run_dir, keep=0)
    if step is None:
        complete = store.newest_complete()
        if complete is None:
            raise UserError(
                f"{run_dir} has no complete checkpoint; train first: megamug train {run_dir / 'config.yaml'}"
            )
        return complete.step, complete.path
    path = store.path(step)
    if not path.is_dir():
        raise UserError(f"{run_dir} has no checkpoint of step {step}: there is no {path}; name another, or none")
    problems = store.verify(path)
    if problems:
        raise UserError(f"{path} is damaged ({problems[0]}); name another step, or none for the newest complete one")
    return step, path


def read_config(run_dir: Path) -> Config:
    """Of a run folder, resolved; its tokenizer is the copy in there, where there is one. Raises `UserError`."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml; give run_dir of the configuration")
    config = resolve(load_config(path))
    own = tokenizer_copy.kept(run_dir)
    if own is not None and config.data.tokenizer is not None:
        config.data.tokenizer = str(own)
    return config

"""Steps of megamug's own training, as the trainer takes them, on batches that are there already or come from data."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable

import torch
from torch.profiler import record_function

from megamug.command_line.launcher import world_size
from megamug.configuration import validate, validate_precision
from megamug.configuration.reading import load_config, resolve
from megamug.configuration.sections import Config
from megamug.errors import UserError


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The options, with `overrides`: the words `section.key=value`, which may stand anywhere."""
    overrides = [word for word in argv if re.match(r"[a-z]\w*(\.\w+)?=", word)]
    options = parser.parse_args([word for word in argv if word not in overrides])
    options.overrides = overrides
    return options


def settings(own: Iterable[str], batch: int, dtype: str, overrides: list[str]) -> Config:
    """The configuration of a benchmark: its `own` overrides, then the user's. `batch` samples are a step's, over all
    processes; one micro-batch for each data-parallel rank unless `data.micro_batch_size` is given.

    Raises UserError where the sizes or the layout do not fit.
    """
    arithmetic = ["precision.dtype=bf16", "precision.fp8=delayed"] if dtype == "fp8" else [f"precision.dtype={dtype}"]
    whole = [*own, f"data.global_batch_size={batch}", *arithmetic, *overrides]
    parallel = load_config(None, whole).parallel
    share = batch * parallel.tensor * parallel.pipeline // world_size()  # of one data-parallel rank
    config = load_config(None, [f"data.micro_batch_size={max(1, share)}", *whole])
    if config.data.global_batch_size != batch:
        raise UserError(f"data.global_batch_size={config.data.global_batch_size}: give the size of a step by --batch")
    config = resolve(config)
    validate.sizes(config, world_size())
    validate.devices(config)
    validate_precision.check(config)
    return config


def layout(config: Config) -> dict:
    """What a report says of the layout."""
    parallel, size = config.parallel, world_size()
    return {
        "processes": size, "tensor": parallel.tensor, "pipeline": parallel.pipeline, "virtual": parallel.virtual,
        "data": validate.data_parallel(config, size), "sequence": parallel.sequence,
        "distributed_optimizer": parallel.distributed_optimizer, "micro_batch_size": config.data.micro_batch_size,
        "recompute": parallel.recompute, "fp8": config.precision.fp8, "layers": config.precision.layers,
    }  # fmt: skip


def built(task, config: Config) -> tuple:
    """(this process's place, its bare chunks, the same wrapped for training, the optimizer), in `config`'s layout."""
    from megamug.distributed import setup
    from megamug.training.optim import Optimizer, wrap_chunks

    world = setup.start(config.parallel, config.seed, task.plan.vocabulary_stages)
    task.join(world)
    chunks = task.build(world)
    models = wrap_chunks(chunks, config)
    return world, chunks, models, Optimizer(config, models)


def training_step(task, config: Config, made: Callable) -> tuple[Callable[[], float | None], float]:
    """(one step of `task`, its FLOPs over all processes): forward, backward, gradient norm, AdamW.

    `made(world)` -> (this rank's micro-batches, totals by loss) are used where no `data.train` is named; from there
    the batches come otherwise, and the step returns the seconds that it waited for them.
    """
    from megamug.training.pipeline import reduce_losses
    from megamug.training.step_graph import step_runner

    world, _, models, optimizer = built(task, config)
    runner = step_runner(config, models, world)
    loader = task.loader(world, train=True) if config.data.train is not None else None
    batches, totals = made(world) if loader is None else (None, None)
    done, untold = 0, None

    def step() -> float | None:
        nonlocal done, batches, totals, untold
        done += 1
        pairs = None
        if loader is not None:
            pairs = loader.next()
            batches = [task.batch(micro) for micro in pairs.micro_batches]
            totals = task.totals(pairs, batches, world)
        with record_function("optimizer"):
            optimizer.zero_grad()
        sums = runner.run(batches, totals, loader)
        losses = torch.stack(list(reduce_losses(sums, task.loss_names, world).values()))
        with record_function("optimizer"):
            norm, _ = optimizer.prepare(done)
            optimizer.apply(norm, losses.isfinite().all())
        if untold is not None:  # as the trainer: of the step before
            untold.tolist()
        untold = losses
        return None if pairs is None else pairs.wait_seconds

    return step, config.data.global_batch_size * task.flops_per_sample

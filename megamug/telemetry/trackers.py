"""Where curves and pictures go beside metrics.jsonl: TensorBoard's files in RUN/tensorboard, Weights & Biases.

Each tracker has `scalars(step, {tag: number})`, `picture(step, pixels, tag)`, `flush()` and `close()`. The first rank
alone has them. What made the run (RUN/environment.json) and its settings go to each of them at the start.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

import numpy as np

from megamug.configuration.sections import Config
from megamug.telemetry import environment

logger = logging.getLogger(__name__)

FIGURES = ("train/loss", "validation/loss")  # in TensorBoard's table of runs (HPARAMS), by their last values
PROJECT = "megamug"


def names(config: Config) -> list[str]:
    """The trackers of `config`: `log.trackers`, or, where that is not set, what `log.tensorboard` says."""
    if config.log.trackers is None:
        return ["tensorboard"] if config.log.tensorboard else []
    return list(dict.fromkeys(config.log.trackers))


def settings(config: Config) -> dict[str, object]:
    """Every key of `config` with its value: numbers, words and truths as they are, the rest as JSON."""
    found = {}
    for name, value in vars(config).items():
        for key, item in (asdict(value) if is_dataclass(value) else {"": value}).items():
            plain = item is not None and isinstance(item, int | float | str)
            found[f"{name}.{key}".removesuffix(".")] = item if plain else json.dumps(item)
    return found


class TensorBoard:
    """Raises ImportError where the package is missing."""

    def __init__(self, run_dir: Path, resume_step: int, about: dict[str, object]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = str(run_dir / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=resume_step + 1 if resume_step else None)
        made = environment.read(run_dir)
        self._writer.add_text("environment", _as_block(made["lives"][-1:] or {}), resume_step)
        self._writer.add_text("configuration", _as_block(about), resume_step)
        # `SummaryWriter.add_hparams` would begin a run of its own, beside the one with the curves. The figures of the
        # table are the last values of these curves, also where the run is killed.
        experiment, session, self._end = hparams(about, dict.fromkeys(FIGURES, 0.0))
        for summary in (experiment, session):
            self._writer.file_writer.add_summary(summary)
        self._writer.flush()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def picture(self, step: int, pixels: np.ndarray, tag: str) -> None:
        self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.file_writer.add_summary(self._end)
        self._writer.close()


class WandB:
    """A run of Weights & Biases, the same one in every life. Raises what `wandb.init` raises."""

    def __init__(self, run_dir: Path, resume_step: int, about: dict[str, object]) -> None:
        import wandb

        made = environment.read(run_dir)
        self._image = wandb.Image
        self._run = wandb.init(
            project=PROJECT, name=run_dir.name, dir=str(run_dir), id=made["id"], resume="allow",
            config={**about, "environment": made["lives"][-1:]},
            settings=wandb.Settings(console="off", silent=True),  # the console is for this program's own lines
        )  # fmt: skip
        # A run that resumes does some steps again, which its own counter would refuse: curves are drawn over ours.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, step: int, pixels: np.ndarray, tag: str) -> None:
        self._run.log({"step": step, tag: self._image(pixels)})

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._run.finish(exit_code=1 if sys.exc_info()[0] is not None else 0)


KINDS = {"tensorboard": TensorBoard, "wandb": WandB}


class Trackers:
    """All trackers of a run. One that fails is told of in the log and left out; the run goes on."""

    def __init__(self, wanted: Sequence[str], run_dir: Path, resume_step: int, about: dict[str, object]) -> None:
        self._all: dict[str, object] = {}
        for name in wanted:
            try:
                self._all[name] = KINDS[name](run_dir, resume_step, about)
            except ImportError as error:
                titles = {"tensorboard": "TensorBoard files", "wandb": "Weights & Biases"}
                logger.warning("no %s: %s. metrics.jsonl holds the same; pip install %s", titles[name], error, name)
            except Exception as error:  # no network, no account, a disk that is full: of no weight beside the run
                logger.warning("log.trackers: %s cannot be used (%s); metrics.jsonl holds the same", name, error)

    def __bool__(self) -> bool:
        return bool(self._all)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._each("scalars", step, values)

    def picture(self, step: int, pixels: np.ndarray, tag: str) -> None:
        self._each("picture", step, pixels, tag)

    def flush(self) -> None:
        self._each("flush")

    def close(self) -> None:
        self._each("close")
        self._all.clear()

    def _each(self, what: str, *arguments: object) -> None:
        for name, tracker in list(self._all.items()):
            try:
                getattr(tracker, what)(*arguments)
            except Exception as error:
                del self._all[name]
                logger.warning("log.trackers: %s fails (%s) and is left out from here on; metrics.jsonl holds the same",
                               name, error)  # fmt: skip


def _as_block(value: object) -> str:
    """JSON as a block of Markdown, which TensorBoard shows as it stands."""
    return "\n".join(f"    {line}" for line in json.dumps(value, indent=1).splitlines())

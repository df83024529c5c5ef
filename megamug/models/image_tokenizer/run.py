"""A training run of an image tokenizer: data, steps, held-out error, pictures, and a state to continue from.

OUTPUT holds the tokenizer (config.json, model.safetensors) once it is trained, metrics.jsonl, round_trip.png and
training/state.pt, from which the same command continues.
"""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megamug.command_line import launcher
from megamug.command_line.console import counted
from megamug.data.dali import WHITE
from megamug.data.order import Cursor
from megamug.data.pairs.loader import PairLoader, order_of
from megamug.data.shards.sources import Source, resolve_sources
from megamug.distributed.setup import meeting_store
from megamug.distributed.stopping import StopRequest
from megamug.durable import replace_text, replacing
from megamug.errors import UserError
from megamug.models.image_tokenizer.model import CONFIG_FILE, ImageTokenizerConfig, from_bytes, read_config, to_bytes
from megamug.models.image_tokenizer.training import ImageTokenizerTrainer, TrainingOptions, round_trip_error
from megamug.telemetry.pictures import PictureRow, save_grid

STATE = Path("training", "state.pt")  # below OUTPUT
STOPPED = 3  # exit code of a run that was asked to stop, and can be continued
_BAD_STEPS = 10  # in a row end the run
_SHOWN = 8  # images in round_trip.png


@dataclass
class RunOptions:
    """What is read and written, and how often."""

    data: list[str]  # folders of shards, globs or shards
    output: Path
    validation: list[str] = field(default_factory=list)  # the same; none: no held-out error
    batch_size: int = 32  # images per step, over all processes
    crop_scale: tuple[float, float] = (0.5, 1.0)  # area share of the random crop
    flip: bool = True
    validation_samples: int = 512  # at most so many held-out images
    validate_every: int = 0  # steps; 0: only after the last
    checkpoint_every: int = 200  # steps between saved states
    log_every: int = 50  # steps between lines
    threads: int = 2  # that decode, per process


def train(config: ImageTokenizerConfig, options: TrainingOptions, run: RunOptions) -> int:
    """Train, or go on training. Returns the exit code: 0 trained, STOPPED. Raises `UserError`.

    Started by torchrun, each process works on its part of the batch.
    """
    rank, size = launcher.rank(), launcher.world_size()
    if run.batch_size % size:
        raise UserError(f"--batch-size {run.batch_size} is not a multiple of {size} processes; change either")
    _check_output(run.output, config)
    sources = resolve_sources(run.data)
    held_out = resolve_sources(run.validation) if run.validation else []
    description = _describe(config, options, run)
    state = _saved_state(run.output, description)
    if state is not None:
        order_of(sources, options.seed).check(Cursor.from_dict(state["cursor"]))
    device = _device()
    trainer = ImageTokenizerTrainer(config, options, device)
    try:
        if size > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            timeout = timedelta(minutes=10)
            store = meeting_store(rank, size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        return _Run(trainer, run, sources, held_out, description, state, rank, size).train()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _device() -> torch.device:
    """Of this process."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _check_output(output: Path, config: ImageTokenizerConfig) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; --output names a folder")
    if (output / CONFIG_FILE).exists() and read_config(output) != config:
        raise UserError(f"{output} holds an image tokenizer of other sizes; give another folder, or remove it")


def _describe(config: ImageTokenizerConfig, options: TrainingOptions, run: RunOptions) -> dict[str, dict]:
    """What must be the same for a run to be continued; the data are recognised by their cursor."""
    described = {"sizes": asdict(config), "training": asdict(options)} | {
        "run": {"batch_size": run.batch_size, "crop_scale": list(run.crop_scale), "flip": run.flip}
    }
    return json.loads(json.dumps(described))


def _saved_state(output: Path, description: dict[str, dict]) -> dict | None:
    """What `_Run._save` wrote, on the CPU; None where there is nothing. Raises `UserError`: damaged, another run's."""
    path = output / STATE
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums into its files, and does not read them
            if (name := archive.testzip()) is not None:
                raise UserError(f"{path}: damaged ({name} does not agree with its checksum); remove it to start anew")
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = json.loads(state["description"])
        found["sizes"].setdefault("background", list(WHITE))  # not in those from before there was a choice
        for section, values in description.items():
            for name, value in values.items():
                if found[section].get(name) != value:
                    raise UserError(
                        f"{path}: made with {name} {found[section].get(name)!r}, now {value!r}; give the former value "
                        "to go on, or another --output to start anew"
                    )
        return {key: state[key] for key in ("cursor", "trainer")}
    except UserError:
        raise
    except Exception as error:  # torch.load raises what pickle, zipfile and itself raise
        raise UserError(f"{path}: damaged ({type(error).__name__}); remove it to start anew") from None


class _Run:
    def __init__(
        self, trainer: ImageTokenizerTrainer, run: RunOptions, sources: list[Source], held_out: list[Source],
        description: dict[str, dict], state: dict | None, rank: int, size: int,
    ) -> None:  # fmt: skip
        self.trainer, self.run, self.sources, self.held_out = trainer, run, sources, held_out
        self.description, self.state, self.rank, self.size = description, state, rank, size

    def train(self) -> int:
        run, steps = self.run, self.trainer.options.steps
        (run.output / STATE).parent.mkdir(parents=True, exist_ok=True)
        cursor = self._resume()
        if self.trainer.step >= steps:
            self._say(f"{run.output}: trained for {steps} steps already")
            if not (run.output / CONFIG_FILE).exists():  # the run ended between its last state and its tokenizer
                self._finish()
            return 0
        loader = PairLoader(
            self.sources, seed=self.trainer.options.seed, crop_scale=run.crop_scale, flip=run.flip, state=cursor,
            micro_batch_size=run.batch_size // self.size, **self._loading(),
        )  # fmt: skip
        try:
            with StopRequest() as stop:
                if self._steps(loader, stop):
                    return STOPPED
        finally:
            loader.close()
        self._finish()
        return 0

    def _loading(self) -> dict:
        return dict(
            tokenizer=None, need_captions=False, caption_length=0, image_size=self.trainer.config.image_size,
            global_batch_size=self.run.batch_size, dp_rank=self.rank, dp_size=self.size,
            device=self.trainer.device, threads=self.run.threads, background=self.trainer.config.background,
        )  # fmt: skip

    def _steps(self, loader: PairLoader, stop: StopRequest) -> bool:
        """Train until the last step. Returns whether the run was asked to stop before it."""
        run, trainer = self.run, self.trainer
        parameters = sum(p.numel() for p in trainer.model.parameters())
        c = trainer.config
        self._say(
            f"image tokenizer: {parameters:,} parameters, {c.image_size} pixels a side -> {c.grid} x {c.grid} of "
            f"{c.codes} codes; {counted(self.size, 'process')}, {trainer.device}"
        )
        bad, since, started = 0, trainer.step, time.perf_counter()
        while trainer.step < trainer.options.steps:
            batch = loader.next()
            losses = trainer.train_step(from_bytes(batch.micro_batches[0].images))
            bad = 0 if torch.isfinite(losses["gradient norm"]) else bad + 1
            if bad == _BAD_STEPS:
                raise UserError(
                    f"the gradient was not finite in {bad} steps in a row, the last being {trainer.step}; lower "
                    "--learning-rate and train into another folder"
                )
            last = trainer.step == trainer.options.steps
            if last or trainer.step % run.log_every == 0:
                rate = (trainer.step - since) * run.batch_size / (time.perf_counter() - started)
                since, started = trainer.step, time.perf_counter()
                self._log({name: float(loss) for name, loss in losses.items()} | {"images/s": rate})
            stopping = stop.agreed()
            if last or stopping or (run.checkpoint_every and trainer.step % run.checkpoint_every == 0):
                self._save(loader.state())
            if stopping and not last:
                self._say(f"stopped after step {trainer.step}; the same command continues")
                return True
            if run.validate_every and trainer.step % run.validate_every == 0 and not last:
                self._validate()
        return False

    def _finish(self) -> None:
        self._validate()
        if self.rank == 0:
            self.trainer.model.save(self.run.output)
        self._say(f"{self.run.output}: image tokenizer written, fingerprint {self.trainer.model.fingerprint()[:12]}")

    def _validate(self) -> None:
        """Held-out error and picture; without held-out images only the picture, of images that were trained on."""
        if self.held_out:
            error = round_trip_error(self.trainer.model, self._images(self.held_out, self.run.validation_samples))
            self._write({"step": self.trainer.step} | {f"held-out {name}": value for name, value in error.items()})
            self._say(
                f"step {self.trainer.step} | held-out: PSNR {error['psnr']:.2f} dB | MSE {error['mse']:.5f} | "
                f"{error['usage']:.0%} of the codes, perplexity {error['perplexity']:.1f} | {error['images']} images"
            )
        else:
            self._say("no held-out error: no --validation was given")
        images = next(self._images(self.held_out or self.sources, min(_SHOWN, self.run.batch_size // self.size)))[0]
        if self.rank == 0:
            made = self.trainer.model.decode(self.trainer.model.encode(images[:_SHOWN]))
            pairs = zip(to_bytes(images[:_SHOWN]), to_bytes(made), strict=True)
            rows = [PictureRow([x.permute(1, 2, 0).cpu().numpy() for x in pair]) for pair in pairs]
            save_grid(rows, ["original", "round trip"], self.run.output / "round_trip.png")

    def _images(self, sources: list[Source], samples: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images in [-1, 1], which of them count) of this process, centre squares in a fixed order."""
        loader = PairLoader(
            sources, seed=0, train=False, max_samples=samples, micro_batch_size=self.run.batch_size // self.size,
            **self._loading(),
        )  # fmt: skip
        try:
            for batch in loader:
                part = batch.micro_batches[0]
                yield from_bytes(part.images), torch.from_numpy(part.valid).to(part.images.device)
        finally:
            loader.close()

    def _save(self, cursor: dict) -> None:
        """training/state.pt. On rank 0; all hold the same."""
        if self.rank:
            return
        state = {"description": json.dumps(self.description), "cursor": cursor, "trainer": self.trainer.state_dict()}
        with replacing(self.run.output / STATE) as file:
            torch.save(state, file)

    def _resume(self) -> dict | None:
        """The cursor of the saved state, which is loaded; None where there is none."""
        state, self.state = self.state, None
        if state is None:
            return None
        self.trainer.load_state_dict(state["trainer"])
        if self.rank == 0 and (metrics := self.run.output / "metrics.jsonl").exists():
            lines = [line for line in metrics.read_text().splitlines() if _step_of(line) <= self.trainer.step]
            replace_text(metrics, "".join(line + "\n" for line in lines))
        self._say(f"resumed from {self.run.output / STATE} at step {self.trainer.step}")
        return state["cursor"]

    def _log(self, values: dict[str, float]) -> None:
        usage, perplexity = self.trainer.statistics.usage()
        self._write({"step": self.trainer.step} | values | {"usage": usage, "perplexity": perplexity})
        parts = [f"{name} {values[name]:.4f}" for name in values if name not in ("total", "images/s", "gradient norm")]
        self._say(
            f"step {self.trainer.step}/{self.trainer.options.steps} | {' | '.join(parts)} | codes in use {usage:.0%}, "
            f"perplexity {perplexity:.1f} | gradient norm {values['gradient norm']:.2f} | "
            f"{values['images/s']:.1f} images/s"
        )

    def _write(self, values: dict) -> None:
        if self.rank == 0:
            with open(self.run.output / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def _step_of(line: str) -> float:
    """Of a line of metrics.jsonl; one that a crash cut short belongs to no step that is kept."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")

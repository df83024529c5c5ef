"""Training: build, resume, then step, validate, save and log until the last step or a request to stop.

    megamug train CONFIG.yaml section.key=value
    torchrun --nproc-per-node 8 -m megamug train CONFIG.yaml parallel.tensor=2
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack

import torch

from megamug.checkpoint import configured, tokenizer_copy
from megamug.checkpoint.store import CheckpointStore, CompleteCheckpoint
from megamug.command_line import launcher
from megamug.command_line.console import counted
from megamug.configuration.sections import Config
from megamug.distributed import cpu_backend, setup
from megamug.distributed.lock import RunLock
from megamug.distributed.stopping import StopRequest
from megamug.distributed.tensor_overlap import tensor_overlap
from megamug.errors import UserError
from megamug.telemetry import environment, trackers
from megamug.telemetry.metrics import MetricsLogger, setup_logging
from megamug.telemetry.peaks import peak_flops
from megamug.training import replicas, resuming
from megamug.training.resilience import (
    BadStepGuard,
    Watchdog,
    before_the_start,
    in_a_sentence,
    keep_traceback,
)

logger = logging.getLogger(__name__)

FINISHED, FAILED, STOPPED = 0, 1, 3


def train(config: Config) -> int:
    """Runs `config` (resolved, validated). Returns the exit code: 0 finished, 1 failed, 3 stopped on request and saved.

    Raises UserError only before any process group exists, so that exit code 2 always means: nothing was begun.
    """
    cpu_backend.apply()
    from megamug.checkpoint import initial
    from megamug.models.tasks import make_task

    task = make_task(config)
    task.check_data()
    store = CheckpointStore(config.run_dir, config.checkpoint.keep)
    rank = launcher.rank()
    with ExitStack() as stack:
        with before_the_start(config.run_dir):
            if rank == 0:
                stack.enter_context(RunLock(config.run_dir))
            log_path = setup_logging(config.run_dir, rank)
            found = resuming.choose(config, task, store, first=rank == 0)
            if found is None and config.model.initial is not None:
                initial.check(config, task)
            watchdog = stack.enter_context(Watchdog(60 * config.parallel.timeout_minutes, log_path))
        try:
            world = setup.start(config.parallel, config.seed, task.plan.vocabulary_stages)
            with StopRequest() as stop, tensor_overlap(config), environment.life(config.run_dir, world) as life:
                trainer = Trainer(config, task, store, found, world, stop, watchdog)
                life["from_step"] = trainer.step
                try:
                    life["code"] = trainer.run()
                finally:
                    life["to_step"] = trainer.step
                return life["code"]
        except Exception as error:
            told = in_a_sentence(error, config.run_dir, log_path)
            keep_traceback(error)
            if told is None:
                raise
            logger.error("the run ends: %s", told)
            return FAILED
        finally:
            setup.stop()


class Trainer:
    """One rank of a run."""

    def __init__(
        self, config: Config, task, store: CheckpointStore, found: CompleteCheckpoint | None, world, stop: StopRequest,
        watchdog: Watchdog,
    ):
        """`found`: what process 0 goes on from."""
        from megamug.checkpoint import initial, saver, state
        from megamug.generation.pictures import TrainingPictures
        from megamug.training.optim import Optimizer, wrap_chunks
        from megamug.training.step_graph import step_runner

        self.config, self.task, self.world, self.stop, self.watchdog = config, task, world, stop, watchdog
        self.store = store
        task.join(world)
        found = saver.share(found, world)
        if world.is_first:
            resuming.keep_history(config, 0 if found is None else found[0])
            tokenizer_copy.keep(config)
        fresh = found is None and (config.model.initial is None or config.model.initial_parts is not None)
        self.chunks = task.build(world, initialised=fresh)
        if found is None and config.model.initial is not None:
            initial.load(config, self.chunks, world)
        self.models = wrap_chunks(self.chunks, config)
        self.optimizer = Optimizer(config, self.models)
        self.saver = saver.Saver(store, world, config.checkpoint.asynchronous)
        self.guard, self.runner = BadStepGuard(), step_runner(config, self.models, world)
        self.pictures = TrainingPictures(task, config.run_dir)
        self._say_hello()
        self.step, cursor = 0, None
        self.untold: tuple | None = None  # of the last step, whose figures are still on the device
        if found is not None:
            if config.model.initial is not None:
                logger.info("model.initial=%s is not read: the run has a checkpoint of its own", config.model.initial)
            self.step, path, reason = found
            contents = saver.read_state(path)
            cursor, updates = contents["cursor"], contents["updates"]
            state.load_tensors(self.chunks, self.optimizer, world, path / "model", updates)
            if self.optimizer.spikes is not None:
                self.optimizer.spikes.restore(contents.get("gradient_norms", []), world.device)
            logger.info("resuming after step %d from %s (%s)", self.step, path, reason)
        self.loader = task.loader(world, train=True, state=cursor)
        self.metrics = MetricsLogger(
            config.run_dir,
            log_every=config.log.every,
            trackers=trackers.names(config),
            settings=trackers.settings(config),
            is_writer=world.is_first,
            total_steps=config.train.steps,
            world_size=world.size,
            samples_per_step=config.data.global_batch_size,
            flops_per_sample=task.flops_per_sample,
            peak_flops=_peak(config, world),
            resume_step=self.step,
            unit=task.unit,
        )

    def run(self) -> int:
        config, last = self.config, self.config.train.steps
        pictures_every = config.train.pictures_every
        if pictures_every is None:
            pictures_every = max(100, last // 10)
        saved, owed, begun = self.step, False, self.step
        stopped = False
        try:
            self.metrics.restart_clock()
            while self.step < last and not stopped:
                self.step += 1
                stopped = self._train_step()
                self.watchdog.beat()
                self.saver.poll()
                done = self.step == last
                validates = done or (not stopped and _due(self.step, config.train.validate_every))
                saves = owed or done or stopped or _due(self.step, config.checkpoint.every)
                compares = saves or _due(self.step, config.train.compare_replicas_every)
                if validates or compares or self.world.device.type == "cpu":
                    self._tell()
                if compares:
                    self._compare_replicas()
                # The checkpoint comes first: whatever happens in a validation, what was trained is safe.
                owed = saves and self.guard.in_a_row > 0
                if owed:
                    self._say_owed(saved)
                elif saves:
                    with self.metrics.paused():
                        self._save()
                    saved = self.step
                if validates:
                    with self.metrics.paused():
                        self._validate()
                if done or (not stopped and _due(self.step, pictures_every)):
                    with self.metrics.paused():
                        self._draw()
            self.saver.wait()
        finally:
            self.loader.close()
            self.metrics.close()
        if owed and self.step == last:
            raise RuntimeError(
                f"the last {self.guard.in_a_row} steps were skipped, so there is no checkpoint of step {last}."
                f" {self._way_back()}"
            )
        if stopped and self.step < last:
            logger.info("stopped on request after step %d; start the same command again to go on", saved)
            return STOPPED
        if begun == last:
            logger.info("this run was finished before: set train.steps above %d to go on, run_dir to begin another one,"
                        " or look at it by: megamug evaluate %s", last, config.run_dir)  # fmt: skip
        logger.info("finished: step %d of %d, run folder %s", self.step, last, config.run_dir)
        return FINISHED

    def _train_step(self) -> bool:
        """One optimizer step over the global batch. Returns whether to stop after it."""
        from megamug.training.pipeline import reduce_losses

        pairs = self.loader.next()
        self.optimizer.zero_grad()
        batches = [self.task.batch(micro) for micro in pairs.micro_batches]
        totals = self.task.totals(pairs, batches, self.world)
        sums = self.runner.run(batches, totals, self.loader)
        sums = reduce_losses(sums, self.task.loss_names, self.world)
        norm, rate = self.optimizer.prepare(self.step)
        updated = self.optimizer.apply(norm, torch.stack(list(sums.values())).isfinite().all())
        stop = self.stop.agreed()
        self._tell()  # of the step before, while the device does this one
        self.untold = self.step, sums, norm, updated, {
            "learning_rate": rate, "samples_seen": pairs.samples, "data_failures": pairs.failures,
            "data_seconds": pairs.wait_seconds,
        }  # fmt: skip
        return stop

    def _tell(self) -> None:
        """Writes down the last step, once. On a GPU the next one is under way by then: a host that waited for each step
        before it starts the next would leave the device idle in between."""
        if self.untold is None:
            return
        (step, sums, norm, updated, known), self.untold = self.untold, None
        losses, norm, updated = self._read(sums, norm, updated)
        skipped = self.guard.is_bad(step, losses["loss"], norm, bool(updated), self._way_back)
        self.metrics.record(step, {**losses, "grad_norm": norm, "skipped": skipped, **known})

    def _read(self, sums: dict[str, torch.Tensor], *more: torch.Tensor) -> tuple:
        """(losses as `_losses` gives them, further scalars as numbers): the one wait for the device in a step."""
        values = torch.stack([*sums.values(), *(scalar.double() for scalar in more)]).tolist()
        return self._losses(dict(zip(sums, values[: len(sums)], strict=True))), *values[len(sums) :]

    def _losses(self, sums: dict[str, float]) -> dict[str, float]:
        """The weighted loss and its parts, from global sums and counts."""
        parts = {name: sums[name] / max(sums[f"{name}_count"], 1.0) for name in self.task.loss_names}
        weighted = sum(self.task.plan.loss_weights[name] * value for name, value in parts.items())
        return {"loss": weighted, **{f"{name}_loss": value for name, value in parts.items()}}

    def _validate(self) -> None:
        """Losses on held-out data. Data that cannot be read are told, and training goes on."""
        if self.config.data.validation is None:
            return
        from megamug.training import validation
        from megamug.training.updates import averages

        started, most = time.perf_counter(), self.config.data.validation_samples
        try:
            with averages.in_place(self.chunks, self.optimizer, self.world):
                sums, figures, samples = validation.held_out(
                    self.models, self.task, self.world, most, self.watchdog.beat
                )
        except validation.DataFailed as error:
            logger.error("no validation after step %d: %s; training goes on", self.step, error)
            return
        (losses,) = self._read(sums)
        seconds = time.perf_counter() - started
        self.metrics.validation(self.step, {**losses, **figures, "samples": samples, "seconds": seconds})

    def _draw(self) -> None:
        """A picture of held-out pairs, where there are any; a drawing takes no part in training."""
        if self.config.data.validation is None:
            return
        try:
            picture = self.pictures.draw(self.chunks[0], self.world, self.step)
        except (UserError, OSError, RuntimeError) as error:  # drawn by one rank alone, for which nobody waits
            logger.error("no picture after step %d: %s; training goes on", self.step, error)
            return
        self.watchdog.beat()
        if picture is not None:
            self.metrics.picture(self.step, picture)

    def _save(self) -> None:
        self.saver.save(self.step, self.chunks, self.optimizer, {
            "step": self.step,
            "updates": self.optimizer.updates_done(),
            "cursor": self.loader.state(),
            "identity": self.task.identity(),
            "layout": self._layout(),
            **({"gradient_norms": self.optimizer.spikes.state()} if self.optimizer.spikes is not None else {}),
            configured.KEY: configured.recorded(self.config),
        })  # fmt: skip
        self.watchdog.beat()

    def _say_owed(self, saved: int) -> None:
        """While steps are skipped nothing is saved: parameters that make every loss infinite must not take the place of
        a good checkpoint, nor make the store retire one."""
        logger.warning(
            "no checkpoint of step %d: the last %d steps were skipped. It is written after the next good step; step %d "
            "is the newest saved", self.step, self.guard.in_a_row, saved,
        )  # fmt: skip

    def _way_back(self) -> str:
        """Which checkpoints there are, and how to go on from them."""
        steps = self.store.steps()
        if not steps:
            return "There is no checkpoint to go back to"
        earlier = f" ({', '.join(map(str, steps[1:]))})" if steps[1:] else ""
        return (f"The newest checkpoint, step {steps[0]}, was saved before them: start again to go on from it. If it"
                f" leads here again, go back further by checkpoint.go_back_to=STEP{earlier}")  # fmt: skip

    def _compare_replicas(self) -> None:
        """Ranks that share parameters share them still."""
        if self.config.train.compare_replicas_every == 0:
            return
        self.optimizer.gather_parameters()
        replicas.compare(self.chunks, self.world, self.step)

    def _layout(self) -> dict[str, int | bool]:
        """What writes this checkpoint, in the words of section `parallel`; for people, as any layout reads it."""
        parallel, world = self.config.parallel, self.world
        return {
            "tensor": world.tp_size, "pipeline": world.pp_size, "virtual": parallel.virtual, "data": world.dp_size,
            "sequence": parallel.sequence, "distributed_optimizer": parallel.distributed_optimizer,
        }  # fmt: skip

    def _say_hello(self) -> None:
        world, plan = self.world, self.task.plan
        parameters = list(torch.nn.ModuleList(self.chunks).parameters())
        count = sum(p.numel() for p in parameters)
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
        stages = str(world.pp_size) + (f" x {len(self.chunks)} virtual" if len(self.chunks) > 1 else "")
        logger.info(
            "%s: tensor %d%s x pipeline %s x data %d; %s",
            counted(world.size, "process"), world.tp_size, " (sequence parallel)" if plan.sequence_parallel else "",
            stages, world.dp_size, world.reason,
        )  # fmt: skip
        task, how = self.task, "compiled" if self.task.compiled else "not compiled"
        logger.info("layers: %s (%s), %s (%s)", task.spec, task.spec_reason, how, task.compiled_reason)
        logger.info("optimizer: %s (%s); torch's kernels for many tensors at once sum, measure and clip gradients",
                    self.optimizer.kernel_name, self.optimizer.kernel_reason)  # fmt: skip
        if self.optimizer.averages is not None:
            logger.info("held-out losses are those of averages of the weights (classifier.ema=%g), which evaluation and"
                        " exports read, too", self.optimizer.averages.decay)  # fmt: skip
        flops = self.task.flops_per_sample / 1e9
        told = f" ({frozen / 1e6:.2f} M of them frozen)" if frozen else ""
        logger.info("this rank holds %.2f M parameters%s; %.2f GFLOP a training sample", count / 1e6, told, flops)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _peak(config: Config, world) -> float | None:
    if world.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(world.device), "bf16" if config.precision.fp8 == "none" else "fp8")

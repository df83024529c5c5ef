"""Training: build, resume, then step, validate, save and log until the last step or a request to stop.

    megamug train CONFIG.yaml section.key=value
    torchrun --nproc-per-node 8 -m megamug train CONFIG.yaml parallel.tensor=2
"""

from __future__ import annotations

import logging
import time

import torch

from megamug.checkpoint import tokenizer_copy
from megamug.checkpoint.store import CheckpointStore
from megamug.command_line.console import counted
from megamug.configuration.reading import save_config
from megamug.configuration.sections import Config
from megamug.distributed import cpu_backend, setup
from megamug.distributed.stopping import StopRequest
from megamug.errors import UserError
from megamug.telemetry import environment, trackers
from megamug.telemetry.metrics import MetricsLogger, setup_logging
from megamug.telemetry.peaks import peak_flops
from megamug.training import adam
from megamug.training.resilience import BadStepGuard, Watchdog
from megamug.training.tensor_overlap import tensor_overlap

logger = logging.getLogger(__name__)

FINISHED, STOPPED = 0, 3


def train(config: Config) -> int:
    """Runs `config` (resolved, validated). Returns the exit code: 0 finished, 3 stopped on request and saved."""
    cpu_backend.apply()
    from megamug.checkpoint import initial
    from megamug.models.tasks import make_task

    task = make_task(config)
    task.check_data()  # this and the next, before any process group exists
    store = CheckpointStore(config.run_dir, config.checkpoint.keep)
    if not _check_resumable(task, store) and config.model.initial is not None:
        initial.check(config, task)
    world = setup.start(config.parallel, config.seed, task.plan.vocabulary_stages)
    log_path = setup_logging(config.run_dir, world.rank)
    try:
        with StopRequest() as stop, Watchdog(60 * config.parallel.timeout_minutes, log_path) as watchdog:
            with tensor_overlap(config), environment.life(config.run_dir, world) as life:
                trainer = Trainer(config, task, store, world, stop, watchdog)
                life["from_step"] = trainer.step
                try:
                    life["code"] = trainer.run()
                finally:
                    life["to_step"] = trainer.step
                return life["code"]
    except UserError:
        raise
    except Exception:
        logger.exception("the run ends with an error")
        raise
    finally:
        setup.stop()


class Trainer:
    """One rank of a run."""

    def __init__(self, config: Config, task, store: CheckpointStore, world, stop: StopRequest, watchdog: Watchdog):
        from megamug.checkpoint import initial, saver, state
        from megamug.generation.pictures import TrainingPictures
        from megamug.training.optim import Optimizer, wrap_chunks
        from megamug.training.step_graph import step_runner

        self.config, self.task, self.world, self.stop, self.watchdog = config, task, world, stop, watchdog
        if world.is_first:
            save_config(config)
            tokenizer_copy.keep(config)
        task.join(world)
        found = saver.find(store, world)
        fresh = found is None and config.model.initial is None
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
        saved = begun = self.step
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
                saves = done or stopped or _due(self.step, config.checkpoint.every)
                if validates or saves or self.world.device.type == "cpu":
                    self._tell()
                # A scheduler that asks to stop kills soon after: the checkpoint comes first.
                if validates:
                    with self.metrics.paused():
                        self._validate()
                if done or (not stopped and _due(self.step, pictures_every)):
                    with self.metrics.paused():
                        self._draw()
                if saves:
                    with self.metrics.paused():
                        self._save()
                    saved = self.step
            self.saver.wait()
        finally:
            self.loader.close()
            self.metrics.close()
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
        skipped = self.guard.is_bad(step, losses["loss"], norm)
        assert skipped != updated, (losses, norm, updated)
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
        if self.config.data.validation is None:
            return
        from megamug.training.pipeline import reduce_losses, run_batch

        started, gathered = time.perf_counter(), {}
        loader = self.task.loader(self.world, train=False, max_samples=self.config.data.validation_samples)
        torch.nn.ModuleList(self.chunks).eval()
        try:
            with torch.no_grad():
                for pairs in loader:
                    batches = [self.task.batch(micro) for micro in pairs.micro_batches]
                    totals = dict.fromkeys(self.task.plan.loss_weights, 1.0)
                    for name, values in run_batch(self.models, batches, totals, backward=False).items():
                        gathered.setdefault(name, []).extend(values)
                    self.watchdog.beat()
        finally:
            torch.nn.ModuleList(self.chunks).train()
            loader.close()
        (losses,) = self._read(reduce_losses(gathered, self.task.loss_names, self.world))
        seconds = time.perf_counter() - started
        self.metrics.validation(self.step, {**losses, "samples": loader.total_samples, "seconds": seconds})

    def _draw(self) -> None:
        """A picture of held-out pairs, where there are any; a drawing takes no part in training."""
        if self.config.data.validation is None:
            return
        picture = self.pictures.draw(self.chunks[0], self.world, self.step)
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
        })  # fmt: skip
        self.watchdog.beat()

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
        kernel = adam.NAMES[self.optimizer.kernel]
        logger.info("optimizer: %s (%s); torch's kernels for many tensors at once sum, measure and clip gradients",
                    kernel, self.optimizer.kernel_reason)  # fmt: skip
        flops = self.task.flops_per_sample / 1e9
        told = f" ({frozen / 1e6:.2f} M of them frozen)" if frozen else ""
        logger.info("this rank holds %.2f M parameters%s; %.2f GFLOP a training sample", count / 1e6, told, flops)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _peak(config: Config, world) -> float | None:
    if world.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(world.device), "bf16" if config.precision.fp8 == "none" else "fp8")


def _check_resumable(task, store: CheckpointStore) -> bool:
    """Whether there is a checkpoint to go on from, as far as the newest one's `state.json` says.

    Raises UserError where that is of other data, another tokenizer or arithmetic, or holds weights alone.

    (That the model is the same is checked with the configuration, see `validate.run_folder`.)
    """
    from megamug.checkpoint.saver import STATE, read_state

    newest = next((step for step in store.steps() if (store.path(step) / STATE).is_file()), None)
    if newest is None:
        return False
    try:
        contents = read_state(store.path(newest))
    except ValueError:
        return True  # damaged: the verification that follows names it and passes it over
    if contents.get("weights_only"):
        run = store.root.parent
        raise UserError(
            f"run_dir: {run} holds weights alone (converted or fused), which no training can go on from; set run_dir to"
            f" a new folder and model.initial={run}"
        )
    steps = task.config.train.steps
    if contents["step"] > steps:
        raise UserError(
            f"train.steps is {steps}, but {store.root.parent} holds a checkpoint of step {contents['step']}; set"
            f" train.steps to {contents['step']} or more to go on with it, or run_dir to a new folder"
        )
    task.check_resumable(contents)
    return True

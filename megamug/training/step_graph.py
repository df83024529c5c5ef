"""Forward and backward of a step's micro-batches as one CUDA graph (`parallel.cuda_graphs`), one launch for thousands.

A graph repeats the kernels of the step that it was recorded from, on the memory that they used. What the host decides
or computes anew in each step, a graph repeats as it was: so it may train on something else without a word. Therefore no
graph is used that was not proven. The step that is recorded is run without it as well, and so is the next one, which
has other samples and updated parameters; losses and the norm of every parameter's gradient have to agree. Where they
do not, or recording fails, a warning has the numbers and the run goes on without graphs.

Reductions over processes, the optimizer and validation stay outside. A step of other shapes (where a sample was
replaced by padding) is run without the graph.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from megamug.configuration.reading import towers
from megamug.configuration.sections import LONG, Config
from megamug.training import pipeline
from megamug.training.pipeline import Sums

logger = logging.getLogger(__name__)

def choose(config: Config, processes: int, spec: str) -> tuple[bool, str]:
    """Resolves `parallel.cuda_graphs` for layers of the kind `spec`: (whether, reason)."""
    parallel, steps = config.parallel, config.train.steps
    if parallel.cuda_graphs is not None:
        return parallel.cuda_graphs, f"parallel.cuda_graphs={str(parallel.cuda_graphs).lower()}"
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if processes > 1:
        return False, "several processes; parallel.cuda_graphs=true takes them where only data are parallel"
    if not towers(config) and spec == "te":
        return False, f"Transformer Engine's layers of model.kind={config.model.kind} cannot be replayed"
    if config.classifier.frozen or config.model.kind == "segmenter":
        return False, "running means of features are kept outside of a graph"
    if steps < LONG:
        return False, f"a run of {steps} steps is over sooner"
    return True, "one GPU"


WARM_UP = 2  # steps before the one that is recorded: layers are compiled in them, and libraries make their workspaces
CHECKS = 2  # steps that run both ways
# Relative differences that are no fault: sums in another order. Delayed scaling moves its scales with every pass.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-3, "delayed": 3e-2}
Recorder = Callable[[Callable[[], Sums]], tuple[Callable[[], None], Sums]]


class StepRunner:
    """Runs forward and backward of a step's micro-batches and reduces gradients, as `pipeline.run_batch` does."""

    def __init__(self, config: Config, models: list, world):
        self.models = models

    def run(self, batches: list, totals: dict[str, float], loader) -> Sums:
        return pipeline.run_batch(self.models, batches, totals, backward=True)


class GraphRunner(StepRunner):
    """The same by a CUDA graph, once it is recorded and proven."""

    def __init__(self, config: Config, models: list, world, record: Recorder | None = None):
        """`record` stands in for CUDA in tests: of a function, (what repeats it, what it returned)."""
        super().__init__(config, models, world)
        precision = config.precision
        self.tolerance = TOLERANCES["delayed" if precision.fp8 == "delayed" else precision.dtype]
        self.world = world
        self.memory = _SharedMemory() if record is None else None
        self.record = record or self.memory.record
        named = (pair for model in models for pair in model.module.named_parameters())
        self.parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.off = False
        self.warm, self.checks = 0, 0
        self.repeat: Callable[[], None] | None = None
        self.batches: list = []  # static: what the graph reads
        self.totals: dict[str, Tensor] = {}
        self.sums: Sums = {}

    def run(self, batches: list, totals: dict[str, float], loader) -> Sums:
        """Gradients are zero before; see `pipeline.run_batch`. `loader` holds still while a graph is recorded."""
        if self.off:
            return super().run(batches, totals, loader)
        if self.checks == CHECKS:
            fits = _signature(batches) == _signature(self.batches)
            sums = self._by_graph(batches, totals) if fits else self._plainly(batches, totals)
        else:
            sums = self._unproven(batches, totals, loader)
        pipeline.finalise_gradients(self.models)
        return sums

    def _unproven(self, batches: list, totals: dict[str, float], loader) -> Sums:
        fits = self.repeat is None or _signature(batches) == _signature(self.batches)
        if not self._everywhere(self.warm >= WARM_UP and fits):
            self.warm += 1
            return self._plainly(batches, totals)
        try:
            sums, reason = self._both_ways(batches, totals, loader)
        except torch.OutOfMemoryError:
            sums, reason = {}, "no memory is left for a step beside its graph"
        if self._everywhere(reason is None):
            self.checks += 1
            if self.checks == CHECKS:
                logger.info("CUDA graph: losses and gradients of %d steps agree with those without it", CHECKS)
            return sums
        reason = reason or "another process could not use its graph"
        logger.warning("parallel.cuda_graphs: %s; the run goes on without graphs", reason)
        self._give_up()
        self._zero()
        return self._plainly(batches, totals)

    def _both_ways(self, batches: list, totals: dict[str, float], loader) -> tuple[Sums, str | None]:
        """A step without the graph, then by it (made, where there is none yet), both from zero gradients. Returns the
        former's losses, and what is wrong with the latter."""
        sums = self._plainly(batches, totals)
        wanted = self._figures(sums)
        # The graph writes where these lie.
        sums = {name: [x.clone() if isinstance(x, Tensor) else x for x in values] for name, values in sums.items()}
        if self.repeat is None:
            with loader.paused() if loader else nullcontext():
                reason = self._record(batches, totals)
            if reason is not None:
                return sums, reason
        self._zero()
        found = self._figures(self._by_graph(batches, totals))
        return sums, _difference(wanted, found, list(self.parameters), self.tolerance)

    def _everywhere(self, here: bool) -> bool:
        """Whether it is so on all processes: they use a graph together or not at all."""
        if self.world.size == 1:
            return here
        agreed = torch.tensor(int(here), device=self.world.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return bool(agreed.item())

    def _plainly(self, batches: list, totals: dict[str, float]) -> Sums:
        with self.memory.used() if self.memory else nullcontext():
            return pipeline.run_batch(self.models, batches, totals, backward=True, reduce=False)

    def _by_graph(self, batches: list, totals: dict[str, float]) -> Sums:
        self._fill(batches, totals)
        self.repeat()
        return self.sums

    def _record(self, batches: list, totals: dict[str, float]) -> str | None:
        """Records a step on static copies of its input. Returns why that failed, or None."""
        self.batches = [_copy_of(batch) for batch in batches]
        self.totals = {name: torch.ones((), dtype=torch.float64, device=self.world.device) for name in totals}
        self._fill(batches, totals)
        try:
            self.repeat, self.sums = self.record(
                lambda: pipeline.run_batch(self.models, self.batches, self.totals, backward=True, reduce=False)
            )
        except (RuntimeError, ValueError) as error:  # CUDA's, and those of whatever layers cannot be recorded
            logger.debug("recording a CUDA graph failed", exc_info=True)
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return f"recording failed ({lines[0][:200]})"
        return None

    def _fill(self, batches: list, totals: dict[str, float]) -> None:
        for static, batch in zip(self.batches, batches, strict=True):
            for (_, target), (_, source) in zip(_tensors(static), _tensors(batch), strict=True):
                target.copy_(source)
        for name, total in totals.items():
            self.totals[name].fill_(total)

    def _figures(self, sums: Sums) -> dict[str, Tensor]:
        """What has to agree: each loss, and the norm of each parameter's gradient on this process."""
        losses = {name: torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in values]).sum().cpu()
                  for name, values in sums.items()}  # fmt: skip
        norms = torch.stack(torch._foreach_norm([p.main_grad for p in self.parameters.values()])).double().cpu()
        return {**losses, "gradients": norms}

    def _zero(self) -> None:
        for model in self.models:
            model.zero_grad_buffer()

    def _give_up(self) -> None:
        self.off, self.repeat, self.batches, self.sums, self.memory = True, None, [], {}, None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _difference(wanted: dict[str, Tensor], found: dict[str, Tensor], names: list[str], tolerance: float) -> str | None:
    """Where a graph's figures are not those of the step without it: a sentence with both numbers, or None."""
    for name in wanted:
        if name == "gradients":
            continue
        a, b = float(wanted[name]), float(found[name])
        if not abs(a - b) <= tolerance * abs(a):
            return f"the {name} loss of the step is {a:.6g}, and the graph of it gives {b:.6g}"
    a, b = wanted["gradients"], found["gradients"]
    total, other = float(a.norm()), float(b.norm())
    if not abs(total - other) <= tolerance * total:
        return f"the gradient norm of the step is {total:.6g}, and the graph of it gives {other:.6g}"
    apart = ((a - b).abs() / (a + 0.01 * total)).nan_to_num(nan=float("inf"))
    worst = int(apart.argmax())
    if apart[worst] > 2 * tolerance:
        return (
            f"the gradient norm of {names[worst]} is {float(a[worst]):.6g} in the step, and the graph of it gives"
            f" {float(b[worst]):.6g}"
        )
    return None


class _SharedMemory:
    """One pool of memory for a graph and for the same step run without it: as the one ends before the other begins,
    their intermediate results may lie in the same place, and proving a graph takes no more memory than using it.

    Memory that was freed on a stream is given out again on that stream alone, so both run on one."""

    def __init__(self):
        self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()

    @contextmanager
    def used(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream())
        # A pool belongs to the thread that asks for it: backward must not go to another.
        alone = torch.autograd.set_multithreading_enabled(False)
        with torch.cuda.stream(self.stream), alone, torch.cuda.use_mem_pool(self.pool):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, function: Callable[[], Sums]) -> tuple[Callable[[], None], Sums]:
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        torch.cuda.synchronize()
        # "thread_local": what other threads do (decoding) is not part of the graph, and no fault.
        captured = torch.cuda.graph(
            graph, pool=self.pool.id, stream=self.stream, capture_error_mode="thread_local"
        )  # fmt: skip
        with torch.autograd.set_multithreading_enabled(False), captured:
            sums = function()
        return graph.replay, sums


def _tensors(batch) -> list[tuple[str, Tensor]]:
    """Those of a batch's fields (MugBatch, TokenBatch)."""
    found = ((field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch))
    return [(name, value) for name, value in found if isinstance(value, Tensor)]


def _signature(batches: list) -> list:
    """What of a step's input a graph cannot take otherwise: shapes, types, and whatever is no tensor."""
    fields = [[(field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch)] for batch in batches]
    return [[(n, (x.shape, x.dtype) if isinstance(x, Tensor) else x) for n, x in batch] for batch in fields]


def _copy_of(batch):
    return dataclasses.replace(batch, **{name: value.clone() for name, value in _tensors(batch)})


def step_runner(config: Config, models: list, world) -> StepRunner:
    """Of this run; the log says which, and why."""
    graphs, reason = choose(config, world.size, getattr(models[0].module.plan, "spec", ""))
    logger.info("CUDA graph of a step: %s (%s)", "to be recorded and proven" if graphs else "none", reason)
    return (GraphRunner if graphs else StepRunner)(config, models, world)


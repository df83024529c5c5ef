"""`megamug plan`: the layouts of a configuration that fit so many GPUs, fastest first, and why the others do not.

Memory is `memory`'s, time `time`'s; what they leave out is said there. Nothing is built or allocated,
no data is read, and torch is not imported unless a tokenizer has to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

from megamug.configuration import validate, validate_precision
from megamug.configuration.counts import kept_values
from megamug.configuration.presets import FINE_TUNED, VOCABULARY
from megamug.configuration.reading import resolve
from megamug.configuration.sections import Config
from megamug.data.padding import padded_vocabulary
from megamug.errors import UserError
from megamug.planner.execution import GPUS, NODE, Gpu, graphs_of, layers_of
from megamug.planner.memory import GIB, Layout, Memory, memory
from megamug.planner.model import Model, model_of
from megamug.planner.plan import Choice, Plan, Rejected, described, given_up, memory_parts
from megamug.planner.time import peak, times_of
from megamug.telemetry.flops import TRAINING

LARGEST_MICRO_BATCH = 4096


def plan(
    config: Config, gpus: int, gpu: str, memory_gib: float | None = None, vocabulary: int | None = None,
    fixed: Collection[str] = (),
) -> Plan:
    """All layouts of `config` (read, not necessarily resolved) on `gpus` GPUs of a kind of `execution.GPUS`.

    Args:
        memory_gib: of one GPU, in place of that kind's.
        vocabulary: its size, in place of the tokenizer's.
        fixed: keys, such as `parallel.tensor`, whose value in `config` every layout keeps.

    Raises UserError: numbers that are not positive, an unknown kind of GPU, a configuration that no layout mends, and
    where nothing fits, with the layout that comes nearest.
    """
    if gpus < 1:
        raise UserError(f"--gpus is {gpus}; it must be at least 1")
    if gpu not in GPUS:
        raise UserError(f"--gpu is {gpu!r}, none of {', '.join(GPUS)}")
    if memory_gib is not None and not 0 < memory_gib < float("inf"):
        raise UserError(f"--memory is {memory_gib:g} GiB; it must be above 0")
    config = resolve(config)
    if config.model.kind in FINE_TUNED:
        raise UserError(f"megamug plan: layouts of model.kind={config.model.kind} are not planned; its parameters,"
                        " FLOPs and the memory of a layout that you name are told by megamug train CONFIG.yaml"
                        " --dry-run")
    validate.model(config)  # what no layout changes
    kind = GPUS[gpu] if memory_gib is None else replace(GPUS[gpu], memory=memory_gib)
    padded, source = _vocabulary(config, vocabulary)
    model = model_of(config, padded)
    choices: list[Choice] = []
    rejected: list[Rejected] = []
    for found in _search(config, gpus, kind, model, set(fixed)):
        (choices if isinstance(found, Choice) else rejected).append(found)
    choices.sort(key=lambda choice: (choice.times.total, choice.memory.total))
    if not choices:
        raise UserError(_nothing(gpus, kind, rejected))
    return Plan(config, gpus, kind, padded, source, model, choices, rejected)


def _vocabulary(config: Config, given: int | None) -> tuple[int, str]:
    """(padded size, where it is from)."""
    kind, path = config.model.kind, config.data.tokenizer
    if given is not None and given < 1:
        raise UserError(f"--vocabulary-size is {given}; it must be at least 1")
    if kind == "mug" and config.model.caption_loss_weight == 0:
        return 0, "no captions"
    if given is not None:
        size, source = given, "--vocabulary-size"
    elif path is not None and Path(path).exists():
        size, source = _read_vocabulary(kind, path), path
    else:
        size, source = VOCABULARY[kind], "assumed; give --vocabulary-size or data.tokenizer"
    return padded_vocabulary(size), source


def _read_vocabulary(kind: str, path: str) -> int:
    try:
        if kind == "mug":
            from megamug.data.pairs.text import Tokenizer

            return Tokenizer(path).vocab_size
        from megamug.data.documents.vocabulary import Vocabulary

        return Vocabulary.load(path).size
    except UserError as error:
        raise UserError(f"data.tokenizer: {error}") from None


# ---------------------------------------------------------------------------------------------- search


class _Space:
    """The values that are tried, and the configuration with them."""

    def __init__(self, config: Config, gpu: Gpu, fixed: set[str]):
        self.config, self.gpu, self.fixed = config, gpu, fixed

    def values(self, key: str, values: list) -> list:
        """Those of a key, or the one it is fixed to."""
        section, _, name = key.partition(".")
        return [getattr(getattr(self.config, section), name)] if key in self.fixed else values

    def fp8(self) -> list[str]:
        precision = self.config.precision
        able = precision.dtype == "bf16" and self.gpu.name != "A100"
        recipe = "delayed" if precision.fp8 == "none" else precision.fp8
        return self.values("precision.fp8", ["none", recipe] if able else ["none"])

    def micro_batches(self, share: int) -> list[int]:
        """Of a data-parallel rank that does `share` samples a step: powers of two, and the configured one."""
        powers = [2**n for n in range(LARGEST_MICRO_BATCH.bit_length())]
        sizes = self.values("data.micro_batch_size", sorted({*powers, self.config.data.micro_batch_size}))
        return [size for size in sizes if share % size == 0]

    def with_layout(self, layout: Layout) -> Config:
        parallel = replace(
            self.config.parallel, tensor=layout.tensor, pipeline=layout.pipeline, virtual=layout.virtual,
            data=layout.data, sequence=layout.sequence, recompute="full" if layout.recompute else "none",
            distributed_optimizer=layout.distributed_optimizer,
        )  # fmt: skip
        config = replace(
            self.config, parallel=parallel, data=replace(self.config.data, micro_batch_size=layout.micro_batch),
            precision=replace(self.config.precision, fp8=layout.fp8),
        )  # fmt: skip
        for key, value in given_up(config, layout).items():
            section, _, name = key.partition(".")
            if key not in self.fixed:
                setattr(getattr(config, section), name, value)
        return config


def _objection(check: Callable, *arguments) -> str | None:
    try:
        check(*arguments)
    except UserError as error:
        return str(error)
    return None


def _search(config: Config, gpus: int, gpu: Gpu, model: Model, fixed: set[str]) -> Iterator[Choice | Rejected]:
    space = _Space(config, gpu, fixed)
    for tensor in space.values("parallel.tensor", [1, 2, 4, 8]):
        layout = Layout(tensor=tensor, dtype=config.precision.dtype, kept=kept_values(config))
        said = {"tensor": tensor}
        if tensor > NODE or gpus % tensor:
            yield Rejected(said, f"{tensor} GPUs are more than a node's {NODE}" if tensor > NODE else
                           f"{gpus} GPUs cannot be shared out in groups of {tensor}")  # fmt: skip
            continue
        if reason := _objection(validate.tensor_parallel, space.with_layout(layout)):
            yield Rejected(said, reason)
            continue
        if tensor > 1:
            for sequence in space.values("parallel.sequence", [True]):
                layout = replace(layout, sequence=sequence)
            if reason := _objection(validate.sequence_parallel, space.with_layout(layout)):
                yield Rejected({**said, "sequence": True}, reason)
                if "parallel.sequence" in fixed:
                    continue
                layout = replace(layout, sequence=False)
        rest = gpus // tensor
        stages = [n for n in range(1, min(rest, len(model.blocks)) + 1) if rest % n == 0]
        for pipeline in space.values("parallel.pipeline", stages):
            yield from _pipelines(space, gpus, model, layout, pipeline)


def _pipelines(space: _Space, gpus: int, model: Model, layout: Layout, pipeline: int) -> Iterator[Choice | Rejected]:
    """All layouts of one tensor- and pipeline-parallel size."""
    said = {"tensor": layout.tensor, "pipeline": pipeline}
    if gpus % (layout.tensor * pipeline):
        yield Rejected(said, f"{gpus} GPUs cannot be shared out in groups of {layout.tensor} x {pipeline}")
        return
    data, whole = gpus // (layout.tensor * pipeline), space.config.data.global_batch_size
    if data not in space.values("parallel.data", [data]):
        yield Rejected(said, f"data({data}) is not the parallel.data({space.config.parallel.data}) that was asked for")
        return
    if pipeline > len(model.blocks):
        yield Rejected(said, f"{pipeline} stages are more than the model's {len(model.blocks)} blocks")
        return
    if whole % data:
        yield Rejected(said, f"data.global_batch_size({whole}) is not divisible by {data} data-parallel ranks")
        return
    virtual = [v for v in (1, 2, 4, 8) if v == 1 or 1 < pipeline and pipeline * v <= len(model.blocks)]
    shards = data > 1 and space.config.optimizer.name == "adamw"
    for chunks in space.values("parallel.virtual", virtual):
        for fp8 in space.fp8():
            layers = layers_of(space.config, layout.tensor, fp8)
            for shared in space.values("parallel.distributed_optimizer", [True, False] if shards else [False]):
                for recompute in space.values("parallel.recompute", ["none", "full"]):
                    again = recompute == "full"
                    yield from _micro_batches(space, gpus, model, replace(
                        layout, pipeline=pipeline, virtual=chunks, data=data, fp8=fp8, distributed_optimizer=shared,
                        recompute=again, layers=layers,
                        graphs=graphs_of(space.config, gpus, layout.tensor * pipeline, layers),
                    ))  # fmt: skip


def _micro_batches(space: _Space, gpus: int, model: Model, layout: Layout) -> Iterator[Choice | Rejected]:
    """From the smallest on, until one does not fit."""
    config, share = space.config, space.config.data.global_batch_size // layout.data
    sizes = space.micro_batches(share)
    if not sizes:
        yield Rejected(vars(layout), f"data.micro_batch_size({config.data.micro_batch_size}) does not divide a"
                                     f" data-parallel rank's {share} samples a step")  # fmt: skip
    for micro in sizes:
        layout = replace(layout, micro_batch=micro, micro_batches=share // micro)
        candidate = space.with_layout(layout)
        checks = ((validate.pipeline, candidate, gpus), (validate_precision.check, candidate, False))
        if reason := next(filter(None, (_objection(*check) for check in checks)), None):
            yield Rejected(vars(layout), reason)
            continue
        need = memory(model, layout)
        if need.total > space.gpu.memory * GIB:
            over = need.total / GIB - space.gpu.memory
            yield Rejected(vars(layout), f"needs {need.total / GIB:.1f} GiB, {over:.1f} too many", need)
            return
        yield _choice(config, model, layout, need, space.gpu)


def _choice(config: Config, model: Model, layout: Layout, need: Memory, gpu: Gpu) -> Choice:
    times = times_of(config, model, layout, gpu)
    rate = config.data.global_batch_size / times.total
    mfu = rate * TRAINING * model.forward_flops / (layout.gpus * peak(layout, gpu))
    return Choice(layout, need, times, rate, mfu)


def _nothing(gpus: int, gpu: Gpu, rejected: list[Rejected]) -> str:
    """The sentence where nothing fits."""
    nearest = min((r for r in rejected if r.memory), key=lambda r: r.memory.total, default=None)
    if nearest is None:
        return f"no layout on {gpus} GPUs is possible: {rejected[0].reason}"
    parts = ", ".join(f"{name} {number:.1f}" for name, number in memory_parts(nearest.memory).items())
    return (f"no layout fits {gpus} x {gpu.name} of {gpu.memory:g} GiB; the nearest ({described(nearest.layout)})"
            f" {nearest.reason} ({parts}); take more GPUs, or a smaller model or context")  # fmt: skip

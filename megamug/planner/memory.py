"""Memory of a layout, by parts, on the rank that needs most.

Weights, gradients, main parameters and moments are exact (`parameters.state_memory`). Activations are summed from what
each layer keeps for backward (`layers`), times the micro-batches in flight under Megatron's 1F1B or interleaved
schedule (Narayanan et al. 2021, arXiv 2104.04473, section 2.2). Not modelled: fragmentation of the
allocator beyond `RESERVED`, Transformer Engine's and NCCL's buffers beyond it, the batch itself, the padding of
Megatron's buffers, and the memory of CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from megamug.models.partition import cut
from megamug.planner.layers import SEQUENCE, TENSOR, Unit, shared
from megamug.planner.model import Model
from megamug.planner.parameters import BYTES, Count, state_memory

GIB = 1024**3
RESERVED = 2 * GIB  # CUDA context, cuBLAS and NCCL buffers: an allowance, not a measurement
LOGITS_CHUNK = 224 * 2**20  # `losses.linear_cross_entropy` on CUDA: the logits of a chunk of tokens
FP8_COPIES = 2  # bytes of an FP8 linear's weight: e4m3 and its transpose, kept over the micro-batches of a step


@dataclass(frozen=True)
class Layout:
    """One way to run a configuration."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    data: int = 1
    sequence: bool = False
    micro_batch: int = 1
    micro_batches: int = 1  # of a step and data-parallel rank
    recompute: bool = False
    distributed_optimizer: bool = False
    kept: int = 2  # fp32 values that the optimizer keeps of a parameter
    fp8: str = "none"
    dtype: str = "bf16"
    layers: str = "local"  # one of `execution.EXECUTIONS`
    graphs: bool = False  # `parallel.cuda_graphs`

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. `logits`: logits or their gradients, and the loss's; `workspace`: gradients on their way, and
    RESERVED."""

    weights: int
    gradients: int
    main_parameters: int
    moments: int
    activations: int
    logits: int
    fp8_copies: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` tells: without the allowance."""
        return self.total - RESERVED


@dataclass(frozen=True)
class _Stage:
    """Bytes of one sample on one rank (`constant`, `fp8_copies`, `gradient`: of no sample), and its parameters."""

    kept: float  # activations until backward
    logits: float
    constant: float
    again: float  # the largest layer's, while it is recomputed
    widest: float  # the largest tensor
    gradient: float  # the largest weight's gradient in the run's dtype, on its way to the fp32 one
    chunk: float  # a chunk's logits at most
    fp8_copies: int
    held: int
    trained: int
    tensors: int  # of the trained parameters


def memory(model: Model, layout: Layout) -> Memory:
    """Of the rank that needs most."""
    stages = _stages(model, layout)
    return max((_rank(stages, layout, rank) for rank in range(layout.pipeline)), key=lambda found: found.total)


def rank_parameters(model: Model, layout: Layout, rank: int) -> tuple[int, int]:
    """(all, trained) parameters of a process of pipeline rank `rank`."""
    own = _stages(model, layout)[rank :: layout.pipeline]
    return sum(stage.held for stage in own), sum(stage.trained for stage in own)


def most_trained(model: Model, layout: Layout) -> tuple[int, int]:
    """(trained parameters, tensors that they are) of the pipeline ranks that have most of each."""

    def make() -> tuple[int, int]:
        stages = _stages(model, layout)
        ranks = [stages[rank :: layout.pipeline] for rank in range(layout.pipeline)]
        return max(sum(s.trained for s in own) for own in ranks), max(sum(s.tensors for s in own) for own in ranks)

    return memo(model, ("trained", layout.pipeline, layout.virtual, layout.tensor), make)


def stages_of(model: Model, stages: int) -> list[range]:
    """The blocks of each stage, virtual ones counted."""
    return memo(model, ("cut", stages), lambda: cut([block.flops for block in model.blocks], stages))


def stage_bytes(model: Model, layout: Layout) -> list[float]:
    """Activations of one sample and micro-batch in each stage until its backward, logits apart."""
    return [stage.kept for stage in _stages(model, layout)]


def kept_bytes(unit: Unit, layout: Layout, logits: bool = False, constant: bool = False) -> float:
    """What backward keeps of a unit for one sample (`constant`: for no sample), recomputation apart."""
    arguments = layout.tensor, layout.sequence, BYTES[layout.dtype], layout.fp8 != "none"
    wanted = [k for k in unit.kept if (k.logits, k.constant) == (logits, constant)]
    return sum(k.bytes(*arguments) for k in wanted if not (k.not_te and layout.layers == "te"))


# ---------------------------------------------------------------------------------------------- stages

_MEMO: dict[int, tuple[Model, dict]] = {}  # by the model's identity: what depends on little of a layout


def memo(model: Model, key: tuple, make):
    if id(model) not in _MEMO:
        _MEMO.clear()
        _MEMO[id(model)] = (model, {})
    known = _MEMO[id(model)][1]
    if key not in known:
        known[key] = make()
    return known[key]


def _stages(model: Model, layout: Layout) -> list[_Stage]:
    count = layout.pipeline * layout.virtual
    key = (count, layout.tensor, layout.sequence, layout.recompute, layout.fp8 != "none", layout.dtype, layout.layers)
    return memo(model, key, lambda: [_stage(model, layout, run) for run in stages_of(model, count)])


def _stage(model: Model, layout: Layout, run: range) -> _Stage:
    units = [unit for index in run for unit in model.blocks[index].units]
    parts = {id(unit): _unit(model, layout, unit) for unit in units}  # most of them are one layer many times
    own = [parts[id(unit)] for unit in units]
    size, share = BYTES[layout.dtype], shared(SEQUENCE, layout.tensor, layout.sequence)
    # What arrived lies in one tensor, of which the first layers keep their inputs; what is sent is a copy.
    first = sum(unit.input for unit in model.blocks[run.start].units)
    arrived = max(0, model.boundary[run.start] - first)
    sent = model.boundary[run.stop] if run.stop < len(model.blocks) else 0
    held, trained = (sum((unit.count for unit in some), Count()) for some in (units, [u for u in units if u.trained]))
    if model.tied and {*model.tied[1:]} <= {*run}:
        held, trained = (Count(c.split - model.tied[0].split, c.whole) for c in (held, trained))
    return _Stage(
        kept=sum(part.kept for part in own) + (arrived + sent) * size / share,
        logits=sum(part.logits for part in own), constant=sum(part.constant for part in own),
        again=max(part.again for part in own), widest=max(part.widest for part in own),
        gradient=max(part.gradient for part in own), chunk=max(part.chunk for part in own),
        fp8_copies=sum(part.fp8_copies for part in own), held=held.on_rank(layout.tensor),
        trained=trained.on_rank(layout.tensor), tensors=sum(unit.tensors for unit in units if unit.trained),
    )  # fmt: skip


def _unit(model: Model, layout: Layout, unit: Unit) -> _Stage:
    def make() -> _Stage:
        tensor, size, fp8 = layout.tensor, BYTES[layout.dtype], layout.fp8 != "none"
        kept, again = kept_bytes(unit, layout), 0.0
        if layout.recompute and unit.layer:
            kept, again = unit.input * size / shared(SEQUENCE, tensor, layout.sequence), kept
        weights = [p.inputs * p.outputs // (tensor if p.split in ("columns", "rows") else 1) for p in unit.products]
        quantised = sum(w for w, p in zip(weights, unit.products, strict=True) if p.fp8)
        tokens = unit.products[0].rows if unit.chunked_logits else 0
        return _Stage(
            kept=kept, logits=kept_bytes(unit, layout, logits=True),
            constant=kept_bytes(unit, layout, logits=True, constant=True), again=again,
            widest=max((k.bytes(tensor, layout.sequence, size, fp8) for k in unit.kept if not k.constant), default=0.0),
            gradient=size * max(weights, default=0) * unit.trained,
            chunk=tokens * unit.chunked_logits * size / shared(TENSOR, tensor, layout.sequence),
            fp8_copies=FP8_COPIES * quantised * fp8, held=0, trained=0, tensors=0,
        )  # fmt: skip

    key = (id(unit), layout.tensor, layout.sequence, layout.recompute, layout.fp8, layout.dtype, layout.layers)
    return memo(model, key, make)


def _rank(stages: list[_Stage], layout: Layout, rank: int) -> Memory:
    own, micro = stages[rank :: layout.pipeline], layout.micro_batch
    state = state_memory(
        sum(stage.held for stage in own), sum(stage.trained for stage in own), layout.dtype, layout.data,
        layout.distributed_optimizer, layout.kept,
    )  # fmt: skip
    live = in_flight(layout.pipeline, layout.virtual, layout.micro_batches, rank)
    kept = max(sum(n * stage.kept for n, stage in zip(counts, own, strict=True)) for counts in live)
    last = own[-1]  # the last stage's backward follows its forward at once, so the logits of one micro-batch exist
    logits = micro * sum(s.logits for s in own) + last.constant + min(LOGITS_CHUNK, micro * last.chunk)
    scratch = 2 * micro * max(stage.widest for stage in own) + max(stage.gradient for stage in own)
    return Memory(
        state.weights, state.gradients, state.main_parameters, state.moments,
        activations=round(micro * (kept + max(stage.again for stage in own))), logits=round(logits),
        fp8_copies=sum(stage.fp8_copies for stage in own), workspace=round(scratch) + RESERVED,
    )  # fmt: skip


@cache
def in_flight(pipeline: int, virtual: int, micro_batches: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """How many micro-batches each chunk of `rank` has in memory, at every moment with most of them. 1F1B: p - rank;
    interleaved: 2 (p - rank - 1) + (v - 1) p forward passes before the first backward."""
    if virtual == 1:
        return ((min(micro_batches, pipeline - rank),),)
    total = micro_batches * virtual
    warm_up = min(total - 1, 2 * (pipeline - rank - 1) + (virtual - 1) * pipeline)
    live, moments = [0] * virtual, set()
    for step in range(warm_up):
        live[step // pipeline % virtual] += 1
    for step in range(min(total - warm_up, 2 * pipeline * virtual)):  # then it repeats
        live[(step + warm_up) // pipeline % virtual] += 1
        moments.add(tuple(live))
        live[virtual - 1 - step // pipeline % virtual] -= 1
    return tuple(sorted(moments))

"""Time of an optimizer step under a layout, by parts.

A step is m micro-batches on the slowest pipeline rank, the pipeline's bubble, what of the gradients' and parameters'
messages is not hidden, and the update. Forward, backward and update each take as long as the device computes or as
long as the host launches, whichever is longer:

    device = products + casts for FP8 + attention + elementwise work + sums of gradients
    host   = launches x seconds a launch

with the constants of `execution`. A product [M, K] x [K, N] has the rate that was measured for 8192^3, less at
small sizes: divided by (1 + h/M) (1 + h/N) (1 + h/K), h = HALF_SIZE.

Not modelled: the data loader, checkpoints, stragglers, a network that others use as well, overlapped tensor-parallel
messages, evaluation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megamug.configuration.sections import Config
from megamug.planner import execution as constants
from megamug.planner.execution import EXECUTIONS, FP8, NODE, Execution, Gpu
from megamug.planner.layers import SEQUENCE, Attention, Product, Unit, shared
from megamug.planner.memory import Layout, memo, most_trained, stages_of
from megamug.planner.model import Model
from megamug.planner.parameters import BYTES
from megamug.telemetry.peaks import peak_flops


@dataclass(frozen=True)
class Times:
    """Seconds of a step. `compute`: the device's work of all micro-batches; `waiting`: the device's for launches, in
    forward, backward and update. `exposed_*`: messages that nothing hides, of tensor, pipeline and data parallelism.
    `update`: the device's."""

    compute: float
    waiting: float
    exposed_tensor: float
    exposed_pipeline: float
    exposed_data: float
    bubble: float
    update: float

    @property
    def communication(self) -> float:
        return self.exposed_tensor + self.exposed_pipeline + self.exposed_data

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Work:
    """Seconds that a micro-batch takes of a unit or of a rank: the device's by kind, forward and backward, the host's,
    and tensor-parallel messages."""

    products: tuple[float, float] = (0.0, 0.0)
    casts: tuple[float, float] = (0.0, 0.0)
    attention: tuple[float, float] = (0.0, 0.0)
    elementwise: tuple[float, float] = (0.0, 0.0)
    host: tuple[float, float] = (0.0, 0.0)
    messages: float = 0.0

    def device(self, phase: int) -> float:
        return self.products[phase] + self.casts[phase] + self.attention[phase] + self.elementwise[phase]

    def takes(self, phase: int) -> float:
        return max(self.device(phase), self.host[phase])


def step_time(model: Model, layout: Layout, gpu: Gpu, overlap_gradients: bool, overlap_parameters: bool) -> Times:
    """Of one optimizer step; the overlaps are those of `parallel.overlap_grad_reduce` and `overlap_param_gather`."""
    stages = stages_of(model, layout.pipeline * layout.virtual)
    ranks = [_rank(model, layout, gpu, stages[rank :: layout.pipeline]) for rank in range(layout.pipeline)]
    slowest = max(ranks, key=lambda work: work.takes(0) + work.takes(1) + work.messages)
    forward, backward = slowest.takes(0), slowest.takes(1)
    handed = _handed(model, layout, gpu, stages)
    m, p = layout.micro_batches, layout.pipeline
    data = _exposed_data(layout, gpu, most_trained(model, layout)[0], backward if overlap_gradients else 0.0,
                         forward if overlap_parameters else 0.0)  # fmt: skip
    update, update_host = _update(model, layout, gpu)
    compute = slowest.device(0) + slowest.device(1)
    return Times(
        compute=m * compute, waiting=m * (forward + backward - compute) + max(0.0, update_host - update),
        exposed_tensor=m * slowest.messages, exposed_pipeline=m * handed, exposed_data=data,
        bubble=(p - 1) / layout.virtual * (forward + backward + slowest.messages + handed), update=update,
    )  # fmt: skip


def phases(model: Model, layout: Layout, gpu: Gpu) -> tuple[Work, float, float]:
    """For explanations: a micro-batch on a GPU that holds every layer, and the update's device and host seconds."""
    return _rank(model, layout, gpu, [range(len(model.blocks))]), *_update(model, layout, gpu)


def execution(layout: Layout) -> Execution:
    return EXECUTIONS[layout.layers]


def link(gpu: Gpu, ranks_apart: int) -> float:
    """Bytes a second between processes whose numbers differ by less than `ranks_apart`."""
    return (gpu.nvlink if ranks_apart <= NODE else gpu.network) * constants.LINK_SHARE


def peak(layout: Layout, gpu: Gpu) -> float:
    """Dense FLOP/s of the run's dtype by the data sheet: the denominator of MFU."""
    return gpu.fp32 if layout.dtype == "fp32" else peak_flops(gpu.name, "bf16")


# ---------------------------------------------------------------------------------------------- the device


def _rate(layout: Layout, gpu: Gpu) -> float:
    """FLOP/s of a large product."""
    if layout.dtype == "fp32":
        return gpu.fp32
    return gpu.products * (constants.SUSTAINED if layout.gpus > 1 else 1.0)


def _on_rank(product: Product, layout: Layout) -> tuple[float, float, float]:
    """(rows, columns, inner) of a linear's forward for a micro-batch on one rank."""
    rows, columns, inner = product.rows * layout.micro_batch, product.outputs, product.inputs
    if product.split == "columns":
        return rows, columns / layout.tensor, inner
    if product.split == "rows":
        return rows, columns, inner / layout.tensor
    return rows / shared(product.split, layout.tensor, layout.sequence), columns, inner


def _product_time(product: Product, layout: Layout, gpu: Gpu) -> float:
    """Seconds of a linear's forward for a micro-batch, casts apart; either product of backward takes as long."""
    half, rate = constants.HALF_SIZE, _rate(layout, gpu)
    if product.fp8 and layout.fp8 != "none":
        half, rate = constants.FP8_HALF_SIZE, rate * FP8[layout.fp8].rate
    rows, columns, inner = _on_rank(product, layout)
    return 2 * (rows + half) * (columns + half) * (inner + half) / rate


def _cast_time(product: Product, layout: Layout, gpu: Gpu) -> tuple[float, float]:
    """Seconds of casting to FP8: the input and the weight forward, the gradient backward."""
    if not product.fp8 or layout.fp8 == "none":
        return 0.0, 0.0
    rows, columns, inner = _on_rank(product, layout)
    seconds = FP8[layout.fp8].bytes / (gpu.copy * constants.CAST_SHARE)
    weight = columns * inner / layout.micro_batches  # once a step
    return seconds * (rows * inner + weight), seconds * rows * columns


def _attention_time(attention: Attention, layout: Layout, gpu: Gpu) -> tuple[float, float]:
    """Seconds of a micro-batch. Rows are padded to tiles, heads to HEAD."""
    tile = execution(layout).tile
    queries, keys = (-(-size // tile) * tile for size in (attention.queries, attention.keys))
    head = max(constants.HEAD, attention.width // attention.heads)
    flops = 4 * layout.micro_batch * queries * keys * head * attention.heads / layout.tensor
    seconds = flops * (1 + constants.ATTENTION_HALF_KEYS / keys) / _rate(layout, gpu) / (2 if attention.causal else 1)
    return (seconds / constants.ATTENTION_FORWARD,
            seconds * constants.ATTENTION_BACKWARD_FLOPS / constants.ATTENTION_BACKWARD)  # fmt: skip


def _elementwise_time(unit: Unit, layout: Layout, gpu: Gpu) -> tuple[float, float]:
    """Seconds of a micro-batch, sums of weight gradients included."""
    forward = backward = 0.0
    for share, once, back, kind in unit.moved:
        numbers = layout.micro_batch / shared(share, layout.tensor, layout.sequence)
        seconds = execution(layout).passes[kind] * numbers * BYTES[layout.dtype] / gpu.copy
        forward += once * seconds
        backward += back * seconds
    if unit.trained:
        moved = unit.count.on_rank(layout.tensor) * constants.ACCUMULATION_BYTES
        backward += moved / (gpu.copy * constants.UPDATE_SHARE) + unit.tensors * constants.KERNEL
    return forward, backward


def _update(model: Model, layout: Layout, gpu: Gpu) -> tuple[float, float]:
    """(device, host) seconds of norm, clipping and AdamW on the rank with most parameters."""
    trained, tensors = most_trained(model, layout)
    updated = trained / (layout.data if layout.distributed_optimizer else 1)
    device = updated * constants.UPDATE_BYTES / (gpu.copy * constants.UPDATE_SHARE)
    return device, tensors * execution(layout).parameter[1]


# ---------------------------------------------------------------------------------------------- the host


def _host_time(unit: Unit, layout: Layout) -> tuple[float, float]:
    """Seconds of launching a micro-batch's work."""
    if layout.graphs and unit.layer:
        return constants.GRAPH_LAUNCH, constants.GRAPH_LAUNCH
    kind, found = execution(layout), []
    for phase in (0, 1):
        launches = sum(
            kind.product[phase] + (FP8[layout.fp8].launches[phase] if product.fp8 and layout.fp8 != "none" else 0)
            for product in unit.products
        )
        launches += kind.attention[phase] * len(unit.attentions)
        found.append(launches * kind.launch)
    return found[0], found[1] + unit.tensors * unit.trained * kind.parameter[0]


# ---------------------------------------------------------------------------------------------- units and ranks


def _work(model: Model, unit: Unit, layout: Layout, gpu: Gpu) -> Work:
    """Of a unit for a micro-batch."""

    def make() -> Work:
        products, casts, attentions = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
        for product in unit.products:
            seconds = _product_time(product, layout, gpu)
            products[0] += seconds
            products[1] += seconds * (2 if product.trained else 1)
            casts = [a + b for a, b in zip(casts, _cast_time(product, layout, gpu), strict=True)]
        for attention in unit.attentions:
            attentions = [a + b for a, b in zip(attentions, _attention_time(attention, layout, gpu), strict=True)]
        # Forward, every linear's input is gathered and its output scattered (without sequence parallelism one
        # all-reduce, as long). Backward sends the same; half of it hides behind the weight gradients' products.
        tensor = layout.tensor
        sent = layout.micro_batch * unit.messages * BYTES[layout.dtype] * (tensor - 1) / tensor / link(gpu, tensor)
        parts = [products, casts, attentions, _elementwise_time(unit, layout, gpu), _host_time(unit, layout)]
        if layout.recompute and unit.layer:
            parts = [(forward, backward + forward) for forward, backward in parts]
            return Work(*parts, messages=2.5 * sent)
        return Work(*(tuple(part) for part in parts), messages=1.5 * sent)

    steps = layout.micro_batches if layout.fp8 != "none" else 0  # weights are cast once for all of them
    key = ("time", id(unit), gpu.name, layout.tensor, layout.sequence, layout.micro_batch, steps, layout.recompute,
           layout.fp8, layout.dtype, layout.layers, layout.graphs, layout.gpus > 1)  # fmt: skip
    return memo(model, key, make)


def _rank(model: Model, layout: Layout, gpu: Gpu, stages: list[range]) -> Work:
    """Of all units of these stages; most of them are one layer many times."""

    def make() -> list[tuple[Unit, int]]:
        units = [unit for stage in stages for index in stage for unit in model.blocks[index].units]
        by_identity, times = {id(unit): unit for unit in units}, Counter(map(id, units))
        return [(unit, times[key]) for key, unit in by_identity.items()]

    counted = memo(model, ("units", *stages), make)
    parts = [(_work(model, unit, layout, gpu), times) for unit, times in counted]
    pairs = {
        name: tuple(sum(times * getattr(part, name)[phase] for part, times in parts) for phase in (0, 1))
        for name in ("products", "casts", "attention", "elementwise", "host")
    }
    return Work(**pairs, messages=sum(times * part.messages for part, times in parts))


def _handed(model: Model, layout: Layout, gpu: Gpu, stages: list[range]) -> float:
    """Seconds of a micro-batch's messages between stages on one rank: each of its chunks hands on hidden states
    forward and their gradients backward. Neighbours of the pipeline are tensor x data ranks apart."""
    if layout.pipeline == 1:
        return 0.0
    numbers = max(model.boundary[stage.start] for stage in stages)
    numbers /= shared(SEQUENCE, layout.tensor, layout.sequence)
    seconds = layout.micro_batch * numbers * BYTES[layout.dtype] / link(gpu, layout.gpus)
    return 2 * layout.virtual * seconds


def _exposed_data(layout: Layout, gpu: Gpu, trained: int, backward: float, forward: float) -> float:
    """Seconds of reducing fp32 gradients and of gathering parameters that the last micro-batch's backward and the first
    one's forward (0 where that is not asked for) do not hide."""
    if layout.data == 1:
        return 0.0
    # A ring over several nodes leaves each by the adapters of all its members there.
    members = min(layout.data, max(1, NODE // layout.tensor))
    rate = link(gpu, layout.tensor * layout.data)
    if layout.tensor * layout.data > NODE:
        rate = min(gpu.nvlink * constants.LINK_SHARE, members * rate)
    once = (layout.data - 1) / layout.data / rate * trained
    if not layout.distributed_optimizer:
        return max(0.0, 2 * 4 * once - backward)
    return max(0.0, 4 * once - backward) + max(0.0, BYTES[layout.dtype] * once - forward)


def times_of(config: Config, model: Model, layout: Layout, gpu: Gpu) -> Times:
    """A step of `config` under `layout`."""
    parallel = config.parallel
    return step_time(model, layout, gpu, parallel.overlap_grad_reduce,
                     layout.distributed_optimizer and parallel.overlap_param_gather)  # fmt: skip

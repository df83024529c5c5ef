"""Time of an optimizer step under a layout, by parts.

A step is m micro-batches on the slowest pipeline rank, the pipeline's bubble, what of the gradients' and parameters'
messages is not hidden, and the update. A micro-batch is its matrix products at an efficiency that falls with small
sizes, attention, elementwise work at the memory's bandwidth, and the tensor- and pipeline-parallel messages.

    efficiency(M, N, K) = PRODUCT_EFFICIENCY * SUSTAINED / ((1 + h/M) (1 + h/N) (1 + h/K)),   h = HALF_SIZE

Not modelled: the data loader, checkpoints, kernel launches (they rule where a layer's products take less than some ten
microseconds: CUDA graphs), stragglers, a network that others use as well, context parallelism, overlapped
tensor-parallel messages.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamug.parameters import BYTES
from megamug.planner_layers import SEQUENCE, Product, Unit, shared
from megamug.planner_memory import Layout, memo, rank_parameters, stages_of
from megamug.planner_model import Model
from megamug.telemetry.peaks import peak_flops

NODE = 8  # GPUs that NVLink joins
FP32_PEAK = {"h100": 67e12, "h200": 67e12, "a100": 19.5e12}  # data sheets: vector units, which torch uses by default


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of eight. Bandwidths in bytes a second, of one GPU and direction."""

    name: str
    memory: float  # GiB that a process finds (torch.cuda.mem_get_info), not the data sheet's decimal figure
    memory_bandwidth: float  # data sheets (A100 2021, H100 2023, H200 2024)
    nvlink: float  # data sheets: 600 and 900 GB/s in both directions
    network: float  # one adapter a GPU: 200 Gb/s (DGX A100), 400 Gb/s (DGX H100)


GPUS = {
    "h100": Gpu("H100", 79.1, 3.35e12, 450e9, 50e9),
    "h200": Gpu("H200", 139.8, 4.8e12, 450e9, 50e9),
    "a100": Gpu("A100", 79.2, 2.04e12, 300e9, 25e9),
}

# 790 TFLOP/s of 989 measured on an H200 for an 8192^3 bf16 product alone; HALF_SIZE is a product's edge at which an
# eighth of the rate is left, a choice of the size of one tile.
PRODUCT_EFFICIENCY, HALF_SIZE = 0.84, 128
# Products in training against the same ones alone (power limit, gaps): fitted to the three published points of
# docs/layouts.md, the only number here that is.
SUSTAINED = 0.78
# A product with its casts against bf16, Transformer Engine on an H100.
FP8_SPEED = {"delayed": 1.69, "current": 1.57, "blockwise": 1.41}
# Share of the bf16 peak in attention forward and backward (FlashAttention-3, arXiv 2407.08608, figures 5 and 6: heads
# of 128, long rows), and the keys at which half of it is reached (a choice).
ATTENTION_FORWARD, ATTENTION_BACKWARD, ATTENTION_HALF_KEYS = 0.60, 0.50, 256
ATTENTION_BACKWARD_FLOPS = 2.5  # of forward: scores once more (Dao 2023, arXiv 2307.08691, section 3.2)
BANDWIDTH_SHARE = 0.85  # of a data sheet's bandwidth that large copies and collectives reach
# Bytes a weight moves per micro-batch: its bf16 gradient read, its fp32 sum read and written.
ACCUMULATION_BYTES = 10
UPDATE_BYTES = 34  # AdamW in fp32: gradient twice, main parameter and two moments read and written, weight written


@dataclass(frozen=True)
class Times:
    """Seconds of a step. `exposed_*`: messages that nothing hides, of tensor, pipeline and data parallelism."""

    compute: float
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


def step_time(model: Model, layout: Layout, gpu: Gpu, overlap_gradients: bool, overlap_parameters: bool) -> Times:
    """Of one optimizer step; the overlaps are those of `parallel.overlap_grad_reduce` and `overlap_param_gather`."""
    stages = stages_of(model, layout.pipeline * layout.virtual)
    ranks = [_rank(model, layout, gpu, stages[rank :: layout.pipeline]) for rank in range(layout.pipeline)]
    forward, backward, messages = max(ranks, key=sum)
    handed = _handed(model, layout, gpu, stages)
    m, p = layout.micro_batches, layout.pipeline
    micro = forward + backward + messages + handed
    held = [rank_parameters(model, layout, rank)[1] for rank in range(p)]
    data = _exposed_data(layout, gpu, max(held), backward if overlap_gradients else 0.0,
                         forward if overlap_parameters else 0.0)  # fmt: skip
    updated = max(held) / (layout.data if layout.distributed_optimizer else 1)
    return Times(
        compute=m * (forward + backward), exposed_tensor=m * messages, exposed_pipeline=m * handed, exposed_data=data,
        bubble=(p - 1) / layout.virtual * micro, update=updated * UPDATE_BYTES / _memory_rate(gpu),
    )  # fmt: skip


def _memory_rate(gpu: Gpu) -> float:
    return gpu.memory_bandwidth * BANDWIDTH_SHARE


def link(gpu: Gpu, ranks_apart: int) -> float:
    """Bytes a second between processes whose numbers differ by less than `ranks_apart`."""
    return (gpu.nvlink if ranks_apart <= NODE else gpu.network) * BANDWIDTH_SHARE


def efficiency(rows: float, columns: float, inner: float) -> float:
    """Share of the peak that a bf16 product [rows, inner] x [inner, columns] reaches in training."""
    sizes = (1 + HALF_SIZE / rows) * (1 + HALF_SIZE / columns) * (1 + HALF_SIZE / inner)
    return PRODUCT_EFFICIENCY * SUSTAINED / sizes


def peak(layout: Layout, gpu: Gpu) -> float:
    """Dense FLOP/s of the run's dtype: the denominator of MFU."""
    return FP32_PEAK[gpu.name.lower()] if layout.dtype == "fp32" else peak_flops(gpu.name, "bf16")


def _product_time(product: Product, layout: Layout, gpu: Gpu) -> float:
    """Seconds of a linear's forward for a micro-batch; either product of backward takes as long."""
    rows, columns, inner = product.rows * layout.micro_batch, product.outputs, product.inputs
    if product.split == "columns":
        columns /= layout.tensor
    elif product.split == "rows":
        inner /= layout.tensor
    else:
        rows /= shared(product.split, layout.tensor, layout.sequence)
    speed = FP8_SPEED[layout.fp8] if product.fp8 and layout.fp8 != "none" else 1.0
    return 2 * rows * columns * inner / (peak(layout, gpu) * efficiency(rows, columns, inner) * speed)


def _unit_times(model: Model, unit: Unit, layout: Layout, gpu: Gpu) -> tuple[float, float, float]:
    """Seconds of a unit for a micro-batch: forward, backward, tensor-parallel messages."""

    def make() -> tuple[float, float, float]:
        size, tensor, micro = BYTES[layout.dtype], layout.tensor, layout.micro_batch
        forward = backward = 0.0
        for product in unit.products:
            seconds = _product_time(product, layout, gpu)
            forward += seconds
            backward += seconds * (2 if product.trained else 1)
        for attention in unit.attentions:
            share = attention.keys / (attention.keys + ATTENTION_HALF_KEYS) * peak(layout, gpu) * tensor
            seconds = micro * attention.flops / (2 if attention.causal else 1) / share
            forward += seconds / ATTENTION_FORWARD
            backward += seconds * ATTENTION_BACKWARD_FLOPS / ATTENTION_BACKWARD
        for share, once, back in unit.moved:
            seconds = micro * size / shared(share, tensor, layout.sequence) / _memory_rate(gpu)
            forward += once * seconds
            backward += back * seconds
        if unit.trained:
            backward += unit.count.on_rank(tensor) * ACCUMULATION_BYTES / _memory_rate(gpu)
        # Forward, every linear's input is gathered and its output scattered (without sequence parallelism one
        # all-reduce, as long). Backward sends the same; half of it hides behind the weight gradients' products.
        sent = micro * unit.messages * size * (tensor - 1) / tensor / link(gpu, tensor)
        messages = 1.5 * sent
        if layout.recompute and unit.layer:
            backward, messages = backward + forward, messages + sent
        return forward, backward, messages

    key = ("time", id(unit), gpu.name, layout.tensor, layout.sequence, layout.micro_batch, layout.recompute,
           layout.fp8, layout.dtype)  # fmt: skip
    return memo(model, key, make)


def _rank(model: Model, layout: Layout, gpu: Gpu, stages: list[range]) -> tuple[float, float, float]:
    found = [0.0, 0.0, 0.0]
    for stage in stages:
        for index in stage:
            for unit in model.blocks[index].units:
                for place, seconds in enumerate(_unit_times(model, unit, layout, gpu)):
                    found[place] += seconds
    return tuple(found)


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
        rate = min(gpu.nvlink * BANDWIDTH_SHARE, members * rate)
    once = (layout.data - 1) / layout.data / rate * trained
    if not layout.distributed_optimizer:
        return max(0.0, 2 * 4 * once - backward)
    return max(0.0, 4 * once - backward) + max(0.0, BYTES[layout.dtype] * once - forward)

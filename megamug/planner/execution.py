"""What GPUs and our kinds of layers were measured to do: the constants of `time`, each with its source.

"Measured" is the table of docs/benchmarks/gpu.md; docs/layouts.md holds the error of every row. `python -m
tests.planner.measured --fit` fits those that a comment calls fitted to its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamug.configuration.sections import LONG, Config
from megamug.planner.layers import GELU, ROTARY, STREAM, SWIGLU

NODE = 8  # GPUs that NVLink joins


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of eight. Bandwidths in bytes a second, of one GPU and direction."""

    name: str
    memory: float  # GiB that a process finds (torch.cuda.mem_get_info), not the data sheet's decimal figure
    products: float  # FLOP/s of an 8192^3 product in bf16
    fp32: float  # FLOP/s of products in fp32: data sheets, vector units, which torch uses by default
    copy: float  # of memory, read + written by a large copy
    nvlink: float  # data sheets: 600 and 900 GB/s in both directions
    network: float  # one adapter a GPU: 200 Gb/s (DGX A100), 400 Gb/s (DGX H100)


# Products and copies of H100 and H200 are measured; the A100's are those shares of its data sheet (312 TFLOP/s, 2.04
# TB/s) that the H200 reached of its own (989 TFLOP/s, 4.8 TB/s).
GPUS = {
    "h100": Gpu("H100", 79.1, 798e12, 67e12, 3.00e12, 450e9, 50e9),
    "h200": Gpu("H200", 139.8, 780e12, 67e12, 4.25e12, 450e9, 50e9),
    "a100": Gpu("A100", 79.2, 246e12, 19.5e12, 1.81e12, 300e9, 25e9),
}
LINK_SHARE = 0.85  # of a link's data sheet that large messages reach: a choice

# An edge of this size halves a product's rate: fitted to the time that the profiles of ViT-L and of a language model
# of 2,048 give their products (45 and 180 ms; 47 and 175 with it).
HALF_SIZE = 96
# Products on many GPUs, beside messages and at the power limit for hours, against those of one GPU for seconds: fitted
# to the published points of docs/layouts.md.
SUSTAINED = 0.85


@dataclass(frozen=True)
class Fp8:
    """A recipe: the rate of a large FP8 product against bf16's, its casts apart; launches that a product's casts add,
    forward and backward; bytes that casting moves for each number: read for its largest value (not `delayed`), read
    again, written with its transpose."""

    rate: float
    launches: tuple[float, float]
    bytes: int


# Launches are fitted to ViT-H, the rate to the language model of 2,048 and the published points; `blockwise` has not
# been measured: as `current`, slower by what is published for Transformer Engine on H100 (1.41 against 1.57).
FP8 = {
    "delayed": Fp8(2.0, (0.2, 0.3), 4),
    "current": Fp8(2.0, (1.6, 3.2), 6),
    "blockwise": Fp8(1.8, (1.6, 3.2), 6),
}
FP8_HALF_SIZE = 350  # as HALF_SIZE: a product that is done sooner wants to be larger
CAST_SHARE = 0.78  # of the copy rate: casts, transposes and maxima took 15 ms of ViT-H's step (16 with it)

# Attention forward and backward at long rows and heads of 128, as a share of the 8192^3 product's rate
# (FlashAttention-3, arXiv 2407.08608, figures 5 and 6: 60% and 50% of the peak), and the keys at which half of it is
# reached. Heads below HEAD take as long as those.
ATTENTION_FORWARD, ATTENTION_BACKWARD, ATTENTION_HALF_KEYS, HEAD = 0.76, 0.63, 256, 64
ATTENTION_BACKWARD_FLOPS = 2.5  # of forward: scores once more (Dao 2023, arXiv 2307.08691, section 3.2)

# Bytes a trained weight moves: in each backward its bf16 gradient read, its fp32 sum read and written; in the update
# the gradients cleared (4), read for their norm (4), scaled (8), AdamW (28: gradient, main parameter, two moments), the
# weight written (6). FusedAdam took 2.8 ms for 0.33 G parameters: 78% of the copy rate. A kernel takes KERNEL at least:
# 396 sums took 2.2 ms, 396 norms 1.6.
ACCUMULATION_BYTES, UPDATE_BYTES, UPDATE_SHARE, KERNEL = 10, 50, 0.78, 3e-6


@dataclass(frozen=True)
class Execution:
    """How layers are run. Host time is launches x `launch`, Python included; (forward, backward)."""

    name: str
    launch: float  # seconds of host time a kernel launch
    product: tuple[float, float]  # launches of a linear, with its share of the norms, sums and activations around it
    attention: tuple[float, float]
    passes: dict[str, float]  # kind of elementwise work -> time at the copy rate, as a multiple of its `moved`
    tile: int = 128  # queries and keys that attention computes are multiples of it
    # Seconds of host time a parameter tensor: its gradient's hook in backward; its share of the update. ViT-L's 396
    # took 12 and 6 ms under the profiler.
    parameter: tuple[float, float] = (30e-6, 15e-6)


# Launches of layers as counted on a CPU (28 a layer of ViT-L, 10 of them forward).
EXECUTIONS = {
    "te": Execution("te", 160e-6, (2, 4), (2, 2), {STREAM: 4.3, GELU: 2.4, SWIGLU: 1.3, ROTARY: 1.6}),
    "local": Execution("local", 40e-6, (2, 4), (2, 2), {STREAM: 4.3, GELU: 2.4, SWIGLU: 5.6, ROTARY: 5.6}),
    "compiled": Execution("compiled", 15e-6, (2, 4), (2, 2), {STREAM: 2.2, GELU: 1.6, SWIGLU: 1.6, ROTARY: 1.6}, 16),
}
GRAPH_LAUNCH = 30e-6  # seconds of host time a layer, forward or backward, under `parallel.cuda_graphs`: a choice


def graphs_of(config: Config, gpus: int, split: int, layers: str) -> bool:
    """Whether a step is a CUDA graph on so many GPUs, over `split` of which a model is split (`step_graph.choose`)."""
    asked = config.parallel.cuda_graphs
    able = split == 1 and (layers != "te" or config.model.kind != "mug")
    return able and (gpus == 1 and config.train.steps >= LONG if asked is None else asked)


def layers_of(config: Config, tensor: int, fp8: str) -> str:
    """The execution of `precision.layers` under a layout on GPUs with Transformer Engine, as `models.specs.choose` has
    it: FP8 and tensor parallelism take Transformer Engine's layers; others are compiled on one tensor-parallel rank
    (see `models.compiled.choose`)."""
    layers = config.precision.layers
    if layers == "auto":
        layers = "te" if fp8 != "none" or tensor > 1 else "local"
    return "compiled" if layers == "local" and tensor == 1 and config.precision.compile != "never" else layers

"""What was measured of training steps, and what was published, beside what `megamug plan` says of the same.

    python -m tests.planner.measured            a line for each row: predicted, measured, and the parts
    python -m tests.planner.measured --fit      fits FREE to the rows, and prints the constants that it finds
    python -m tests.planner.measured --write    puts figures and constants into the tables of docs/layouts.md

A new figure is a new `Row`; `megamug benchmark` measures them (docs/benchmarks/gpu.md has the commands).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from megamug.configuration.reading import load_config, resolve
from megamug.configuration.sections import Config
from megamug.planner import execution as constants
from megamug.planner import memory as planner_memory
from megamug.planner.execution import GPUS, layers_of
from megamug.planner.memory import GIB, Layout, memory
from megamug.planner.model import Model, model_of
from megamug.planner.time import phases, step_time

# ---------------------------------------------------------------------------------------------- one GPU, measured


@dataclass(frozen=True, eq=False)
class Row:
    """A step on one GPU, one micro-batch: `overrides` of the benchmark's configuration, measured milliseconds and GiB
    (`torch.cuda.max_memory_allocated`). `then`: constants of the execution that held when it was measured."""

    name: str
    gpu: str
    overrides: list[str]
    milliseconds: float
    gib: float
    vocabulary: int = 0
    layers: str | None = None  # the execution, where that is not what the configuration chooses
    then: dict = field(default_factory=dict)

    @cached_property
    def config(self) -> Config:
        return resolve(load_config(None, ["precision.dtype=bf16", *self.overrides]))

    @cached_property
    def layout(self) -> Layout:
        config = self.config
        precision = config.precision
        return Layout(
            micro_batch=config.data.global_batch_size, fp8=precision.fp8, dtype=precision.dtype,
            layers=self.layers or layers_of(config, 1, precision.fp8), graphs=config.parallel.cuda_graphs,
            recompute=config.parallel.recompute == "full",
        )  # fmt: skip

    @cached_property
    def model(self) -> Model:
        return model_of(self.config, self.vocabulary)


def mug(preset: str, batch: int, *overrides: str) -> list[str]:
    """Of `megamug benchmark mug --preset PRESET --batch BATCH OVERRIDES`."""
    return [f"model.preset={preset}", "model.caption_loss_weight=0", f"data.global_batch_size={batch}", *overrides]


def language(kind: str, batch: int, *overrides: str) -> list[str]:
    """Of `megamug benchmark jam --layers 24 --width 2048 --heads 16 --ffn-width 5632 --tokens 2048 --batch BATCH`."""
    tower = dict(
        layers=24, width=2048, heads=16, query_groups=16, ffn_width=5632, norm="rmsnorm", activation="swiglu",
        bias=False, positions="rotary", tie_vocabulary=False,
    )  # fmt: skip
    preset, sections = {
        "decoder_lm": ("llama_7b", ["lm"]), "jam_cross": ("jam_demo", ["text_tower", "image_tower"]),
    }[kind]  # fmt: skip
    own = [f"{section}.{key}={json.dumps(value)}" for section in sections for key, value in tower.items()]
    return [f"model.kind={kind}", f"model.preset={preset}", f"data.global_batch_size={batch}", *own, *overrides]


GRAPH = "parallel.cuda_graphs=true"
TE = "precision.layers=te"
PLAIN = "precision.layers=local"
CAPTIONS = ["model.caption_loss_weight=0.1", "model.register_tokens=6", "model.decoder_register_tokens=3"]
# One kernel a parameter for sums, norms, scaling and copies; rotary positions and SwiGLU by several kernels.
BEFORE = {"parameter": (30e-6, 45e-6),
          "passes": {constants.STREAM: 4.3, constants.GELU: 2.4, constants.SWIGLU: 5.6, constants.ROTARY: 5.6}}
EVEN = ["model.register_tokens=7", "model.decoder_register_tokens=7"]

# 2026-11-27, one NVIDIA H200 (driver 580.159), Python 3.12.3, torch 2.11.0+cu130, megatron-core 0.19.2, Transformer
# Engine 2.11.0. The captions' vocabulary is that of the demo's tokenizer.
MEASURED = [
    Row("MAE ViT-L, 256 images, te", "h200", mug("vit_l16", 256, TE), 157.2, 21.7, then=BEFORE),
    Row("MAE ViT-L, 256 images, local", "h200", mug("vit_l16", 256, PLAIN), 118.9, 21.7, layers="local",
        then=BEFORE),
    Row("MUG ViT-L with captions, 256 pairs, te", "h200", mug("vit_l16", 256, TE, *CAPTIONS), 296.3, 29.9, 384,
        then=BEFORE),
    Row("MAE ViT-H, 128 images, te", "h200", mug("vit_h14", 128, TE, *EVEN), 222.2, 26.9, then=BEFORE),
    Row("MAE ViT-H, 128 images, FP8 current", "h200",
        mug("vit_h14", 128, "precision.fp8=current", *EVEN), 320.5, 25.3, then=BEFORE),
    Row("MAE ViT-H, 128 images, FP8 delayed", "h200",
        mug("vit_h14", 128, "precision.fp8=delayed", *EVEN), 234.9, 25.3, then=BEFORE),
    Row("DecoderLM 24 x 2048, 8 x 2048 tokens, te", "h200", language("decoder_lm", 8, TE), 334.2, 48.1, 32000,
        then=BEFORE),
    Row("DecoderLM 24 x 2048, 8 x 2048 tokens, FP8 current", "h200",
        language("decoder_lm", 8, "precision.fp8=current"), 308.4, 47.0, 32000, then=BEFORE),
    Row("JAM-Cross 2 x 24 x 2048, 4 x 2048 tokens, FP8 current", "h200",
        language("jam_cross", 4, "precision.fp8=current"), 727.2, 106.3, 32000, then=BEFORE),
    # The same day, with Transformer Engine 2.20.2: a step is a CUDA graph, gradients and parameters go many at once.
    Row("MAE ViT-L, 256 images, compiled, graph", "h200", mug("vit_l16", 256, GRAPH), 83.4, 21.8),
    Row("MUG ViT-L with captions, 256 pairs, compiled, graph", "h200", mug("vit_l16", 256, GRAPH, *CAPTIONS), 118.4,
        30.0, 384),
    Row("MAE ViT-H, 128 images, compiled, graph", "h200", mug("vit_h14", 128, GRAPH, *EVEN), 108.9, 27.1),
    Row("DecoderLM 24 x 2048, 8 x 2048 tokens, compiled, graph", "h200", language("decoder_lm", 8, GRAPH), 269.4, 51.0,
        32000),
    Row("DecoderLM 24 x 2048, 8 x 2048 tokens, FP8 current, graph", "h200",
        language("decoder_lm", 8, GRAPH, "precision.fp8=current"), 211.9, 47.0, 32000),
]  # fmt: skip


@contextmanager
def as_it_was(row: Row) -> Iterator[None]:
    """Inside, the execution has the constants that held when the row was measured."""
    name = row.layout.layers
    now = constants.EXECUTIONS[name]
    constants.EXECUTIONS[name] = replace(now, **row.then)
    planner_memory._MEMO.clear()  # what was computed of the model, with other constants
    try:
        yield
    finally:
        constants.EXECUTIONS[name] = now
        planner_memory._MEMO.clear()


def predicted(row: Row) -> tuple[float, float]:
    """(milliseconds, GiB) that the plan has for it."""
    model, layout = row.model, row.layout
    with as_it_was(row):
        seconds = step_time(model, layout, GPUS[row.gpu], overlap_gradients=False, overlap_parameters=False).total
    return seconds * 1e3, memory(model, layout).allocated / GIB


# ---------------------------------------------------------------------------------------------- clusters, published


@dataclass(frozen=True)
class Published:
    """Throughput of H100s, as TFLOP/s or tokens/s of a GPU. `square`: the share of attention's square that the
    publisher counts."""

    name: str
    rate: float
    tokens: int  # of a row
    model: Model
    layout: Layout
    square: float = 1.0

    def seconds(self) -> float:
        return step_time(self.model, self.layout, GPUS["h100"], overlap_gradients=True, overlap_parameters=True).total

    @property
    def rows(self) -> int:
        """Of a step and GPU."""
        return self.layout.micro_batch * self.layout.micro_batches * self.layout.data / self.layout.gpus

    def flops(self) -> float:
        """Of a row, as the publisher counts."""
        attention = sum(a.flops for block in self.model.blocks for unit in block.units for a in unit.attentions)
        return 3 * (self.model.forward_flops - (1 - self.square) * attention)

    def tflops(self) -> float:
        return self.flops() * self.rows / self.seconds() / 1e12

    def tokens_per_second(self) -> float:
        return self.tokens * self.rows / self.seconds()


def gpt(layers: int, width: int, heads: int, ffn_width: int, context: int, vocabulary: int, **tower) -> Model:
    config = Config()
    config.model.kind = "decoder_lm"
    sizes = dict(layers=layers, width=width, heads=heads, ffn_width=ffn_width, norm="layernorm", activation="gelu",
                 bias=True, positions="rotary", tie_vocabulary=True, qk_norm=False, max_positions=1)  # fmt: skip
    config.lm.__dict__.update(sizes | tower)
    config.data.context_length = context
    return model_of(resolve(config), vocabulary)


def llama(layers: int, width: int, heads: int, ffn_width: int, groups: int, context: int = 4096, words: int = 32000):
    return gpt(layers, width, heads, ffn_width, context, words, query_groups=groups, norm="rmsnorm",
               activation="swiglu", bias=False, tie_vocabulary=False)  # fmt: skip


def fused(**sizes) -> Layout:
    """Their layers have their elementwise work fused, as compiled ones have here."""
    return Layout(distributed_optimizer=True, layers="compiled", **sizes)


# Layers and widths of the first two are ours for the published sizes, and so are their micro-batches.
PUBLISHED = [
    Published("Megatron-LM 7.1B, TP 2, bf16", 466, 4096, gpt(32, 4096, 32, 16384, 4096, 131072),
              fused(tensor=2, sequence=True, data=24, micro_batch=2, micro_batches=4)),
    Published("Megatron-LM 16B, TP 4, bf16", 489, 4096, gpt(48, 5120, 40, 20480, 4096, 131072),
              fused(tensor=4, sequence=True, data=24, micro_batch=2, micro_batches=4)),
    # Its TFLOP/s count half of the attention square, as 14,451 tokens/s x 51.5 GFLOP a token show.
    Published("Megatron-Bridge Llama3-8B on 8 GPUs, FP8 current", 744, 8192,
              llama(32, 4096, 32, 14336, 8, 8192, 128256),
              fused(data=8, micro_batches=16, fp8="current"), 0.5),
]  # fmt: skip

# NeMo 24.12, FP8 on H100 (docs.nvidia.com/nemo-framework, performance summary): tokens/s a GPU. Looked at while
# the constants were chosen, so no clean hold-out.
NEMO = [
    Published("LLaMA2-7B", 16934, 4096, llama(32, 4096, 32, 11008, 32), fused(data=8, micro_batches=16, fp8="delayed")),
    Published("LLaMA2-13B", 8715, 4096, llama(40, 5120, 40, 13824, 40),
              fused(data=4, pipeline=4, virtual=10, micro_batches=32, fp8="delayed")),
    Published("LLaMA2-70B", 1728, 4096, llama(80, 8192, 64, 28672, 8),
              fused(tensor=4, sequence=True, data=4, pipeline=4, virtual=20, micro_batches=32, fp8="delayed")),
    Published("Nemotron-8B", 12507, 4096, gpt(32, 4096, 32, 16384, 4096, 256000, bias=False, tie_vocabulary=False),
              fused(tensor=2, sequence=True, data=32, micro_batch=4, micro_batches=2, fp8="delayed")),
    Published("GPT3-20B", 5851, 2048, gpt(44, 6144, 48, 24576, 2048, 51200),
              fused(tensor=2, sequence=True, data=32, micro_batch=2, micro_batches=4, fp8="delayed")),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- the program

DOCUMENT = Path(__file__).parents[2] / "docs/layouts.md"


def table() -> list[str]:
    """The rows of docs/layouts.md."""
    lines = []
    for row in MEASURED:
        seconds, gib = predicted(row)
        lines.append(
            f"| {row.name} | {GPUS[row.gpu].name} | {row.milliseconds:g} | {seconds:.0f} |"
            f" {seconds / row.milliseconds - 1:+.0%} | {row.gib:g} | {gib:.1f} | {gib / row.gib - 1:+.0%} |"
        )
    return lines


def published_table() -> list[str]:
    return [f"| {p.name} | {p.rate} | {p.tflops():.0f} | {p.tflops() / p.rate - 1:+.0%} |" for p in PUBLISHED]


def constants_table() -> list[str]:
    """But for the last column, which says where they are from."""
    return [
        f"| `{kind.name}` | {kind.launch * 1e6:g} | {' | '.join(f'{factor:g}' for factor in kind.passes.values())} |"
        for kind in constants.EXECUTIONS.values()
    ]


def write() -> None:
    """A row of a table is known by its first cells; new ones go behind the last of their table."""
    lines = DOCUMENT.read_text().splitlines()
    for rows, cells in ((table(), 3), (published_table(), 2), (constants_table(), 1)):
        last = None
        for row in rows:
            start = "|".join(row.split("|")[: cells + 1]) + "|"
            at = next((i for i, line in enumerate(lines) if line.startswith(start)), None)
            if at is not None:
                kept = lines[at].split("|")[row.count("|") :]
                lines[at], last = row + "|".join(kept), at
            else:
                last = (len(lines) if last is None else last) + 1
                lines.insert(last, row)
    DOCUMENT.write_text("\n".join(lines) + "\n")


# Constants that --fit may change, by name: how to read and how to set them.
def _field(execution: str, name: str):
    def put(value: float) -> None:
        constants.EXECUTIONS[execution] = replace(constants.EXECUTIONS[execution], **{name: value})

    return lambda: getattr(constants.EXECUTIONS[execution], name), put


def _passes(execution: str, kind: str):
    def put(value: float) -> None:
        known = constants.EXECUTIONS[execution]
        constants.EXECUTIONS[execution] = replace(known, passes={**known.passes, kind: value})

    return lambda: constants.EXECUTIONS[execution].passes[kind], put


def _fp8_launches(recipe: str):
    """Forward; backward follows in proportion."""
    known = constants.FP8[recipe].launches

    def put(value: float) -> None:
        both = value, known[1] * value / known[0]
        constants.FP8[recipe] = replace(constants.FP8[recipe], launches=both)

    return lambda: constants.FP8[recipe].launches[0], put


def _module(name: str):
    return lambda: getattr(constants, name), lambda value: setattr(constants, name, value)


FREE = {
    **{f"{name}.launch": _field(name, "launch") for name in constants.EXECUTIONS},
    **{f"{name}.passes.{kind}": _passes(name, kind) for name, known in constants.EXECUTIONS.items()
       for kind in known.passes},
    **{f"fp8.{recipe}.launches": _fp8_launches(recipe) for recipe in constants.FP8},
    **{name: _module(name) for name in ("HALF_SIZE", "FP8_HALF_SIZE", "SUSTAINED", "GRAPH_LAUNCH")},
}  # fmt: skip


def residuals() -> np.ndarray:
    """log(predicted / measured): seconds of the measured steps and of the published ones."""
    own = [np.log(predicted(row)[0] / row.milliseconds) for row in MEASURED]
    theirs = [np.log(p.rate / p.tflops()) for p in PUBLISHED] + [np.log(p.rate / p.tokens_per_second()) for p in NEMO]
    return np.array(own + [0.5 * error for error in theirs])  # of others' machines and layers: half the weight


def fit(names: list[str], hold: float) -> None:
    """Least squares in log ratio. `hold`: what it costs to leave the constants that are there, as so many rows."""
    start = np.array([FREE[name][0]() for name in names])

    def errors(logs: np.ndarray) -> np.ndarray:
        for name, value in zip(names, start * np.exp(logs), strict=True):
            FREE[name][1](float(value))
        return np.concatenate([residuals(), hold * logs])

    logs, damping = np.zeros(len(names)), 1e-3
    now = errors(logs)
    for _ in range(8):
        slope = np.stack([(errors(logs + 1e-3 * unit) - now) / 1e-3 for unit in np.eye(len(names))], axis=1)
        step = np.linalg.solve(slope.T @ slope + damping * np.eye(len(names)), -slope.T @ now)
        tried = errors(logs + step)
        if tried @ tried < now @ now:
            logs, now, damping = logs + step, tried, damping / 3
        else:
            damping *= 5
    errors(logs)
    for name, before, log in zip(names, start, logs, strict=True):
        print(f"{name:<28} {before:.4g} -> {before * np.exp(log):.4g}")


def show() -> None:
    for row in MEASURED:
        (seconds, gib), layout = predicted(row), row.layout
        with as_it_was(row):
            work, update, update_host = phases(row.model, layout, GPUS[row.gpu])
        print(f"{row.name:<56} {seconds:7.1f} of {row.milliseconds:6.1f} ms ({seconds / row.milliseconds - 1:+4.0%})"
              f" {gib:6.1f} of {row.gib:6.1f} GiB ({gib / row.gib - 1:+4.0%})")  # fmt: skip
        for phase, name in enumerate(("forward", "backward")):
            parts = ", ".join(f"{part} {1e3 * getattr(work, part)[phase]:.1f}"
                              for part in ("products", "casts", "attention", "elementwise"))  # fmt: skip
            print(f"    {name:<9} device {1e3 * work.device(phase):6.1f} = {parts}; host {1e3 * work.host[phase]:.1f}")
        print(f"    update    device {1e3 * update:6.1f}; host {1e3 * update_host:.1f}")
    for p in PUBLISHED:
        print(f"{p.name:<56} {p.tflops():6.0f} of {p.rate:6.0f} TFLOP/s ({p.tflops() / p.rate - 1:+4.0%})")
    for p in NEMO:
        rate = p.tokens_per_second()
        print(f"{p.name:<56} {rate:6.0f} of {p.rate:6.0f} tokens/s ({rate / p.rate - 1:+4.0%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", nargs="*", metavar="CONSTANT", help=f"of {', '.join(FREE)}; none: all of them")
    parser.add_argument("--hold", type=float, default=0.1, help="how much constants stay as they are (default 0.1)")
    parser.add_argument("--write", action="store_true", help=f"rows and constants into {DOCUMENT.name}")
    options = parser.parse_args()
    if options.fit is not None:
        fit(options.fit or list(FREE), options.hold)
    show()
    if options.write:
        write()


if __name__ == "__main__":
    main()

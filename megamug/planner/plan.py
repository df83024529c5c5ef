"""What a plan is: the layouts that fit, those that do not and why, and their words."""

from __future__ import annotations

from dataclasses import dataclass

from megamug.configuration.sections import Config
from megamug.planner.execution import Gpu
from megamug.planner.memory import GIB, Layout, Memory
from megamug.planner.model import Model
from megamug.planner.time import Times


@dataclass(frozen=True)
class Choice:
    """A layout that fits. `mfu`: model FLOPs, recomputation apart, over the dense peak of bf16 (fp32 in an fp32 run),
    FP8 or not."""

    layout: Layout
    memory: Memory
    times: Times
    samples_per_second: float
    mfu: float

    def overrides(self, config: Config) -> list[str]:
        """What makes a run of `config` use it, as `section.key=value`."""
        layout = self.layout
        gather = layout.distributed_optimizer and config.parallel.overlap_param_gather
        values = {
            "parallel.tensor": layout.tensor, "parallel.pipeline": layout.pipeline, "parallel.virtual": layout.virtual,
            "parallel.data": layout.data, "parallel.sequence": layout.sequence,
            "parallel.recompute": "full" if layout.recompute else "none",
            "parallel.distributed_optimizer": layout.distributed_optimizer, "parallel.overlap_param_gather": gather,
            "data.micro_batch_size": layout.micro_batch, "precision.fp8": layout.fp8, **given_up(config, layout),
        }  # fmt: skip
        return [f"{key}={str(value).lower()}" for key, value in values.items()]


def given_up(config: Config, layout: Layout) -> dict[str, object]:
    """Keys of `config` that `layout` cannot have, as they are without."""
    precision, parallel, off = config.precision, config.parallel, {}
    if layout.fp8 in ("none", "delayed"):
        kept = ("first_layers_bf16", "last_layers_bf16")
        off |= {f"precision.{key}": 0 for key in kept if getattr(precision, key)}
    if precision.fp8_parameters and (layout.fp8 == "none" or not layout.distributed_optimizer):
        off["precision.fp8_parameters"] = False
    if parallel.overlap_tensor and not layout.sequence:
        off["parallel.overlap_tensor"] = False
    if parallel.cuda_graphs and layout.tensor * layout.pipeline > 1:
        off["parallel.cuda_graphs"] = False
    return off


@dataclass(frozen=True)
class Rejected:
    """`layout` as far as it was decided when the reason was found; `memory` where that is the reason: larger
    micro-batches were not looked at."""

    layout: dict[str, object]
    reason: str
    memory: Memory | None = None


@dataclass(frozen=True)
class Plan:
    """`choices` from the fastest on."""

    config: Config
    gpus: int
    gpu: Gpu
    vocabulary: int  # padded
    vocabulary_source: str
    model: Model
    choices: list[Choice]
    rejected: list[Rejected]


def memory_parts(memory: Memory) -> dict[str, float]:
    """GiB by part; the optimizer's are main parameters and moments."""
    return {
        "weights": memory.weights / GIB, "gradients": memory.gradients / GIB,
        "optimizer": (memory.main_parameters + memory.moments) / GIB, "activations": memory.activations / GIB,
        "logits": memory.logits / GIB, "other": (memory.fp8_copies + memory.workspace) / GIB,
    }  # fmt: skip


def described(layout: dict[str, object]) -> str:
    """A layout, or what of it was decided, in words."""
    words = [f"{name} {layout[name]}" for name in ("tensor", "pipeline", "data") if name in layout]
    if layout.get("virtual", 1) != 1:
        words.append(f"virtual {layout['virtual']}")
    if "micro_batch" in layout:
        words.append(f"micro-batch {layout['micro_batch']}")
        words.append(f"recompute {'full' if layout['recompute'] else 'none'}")
    if layout.get("distributed_optimizer"):
        words.append("distributed optimizer")
    if layout.get("fp8", "none") != "none":
        words.append(f"fp8 {layout['fp8']}")
    return ", ".join(words)

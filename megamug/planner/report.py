"""What `megamug plan` prints and writes: a table of the layouts that fit, why the others do not, all of it as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

from megamug.planner.execution import NODE
from megamug.planner.memory import GIB, Layout, memory
from megamug.planner.parameters import Count
from megamug.planner.plan import Choice, Plan, Rejected, described, memory_parts
from megamug.planner.time import times_of
from megamug.telemetry.flops import TRAINING

COLUMNS = ("tp", "sp", "pp", "vp", "dp", "micro", "recompute", "optimizer", "fp8", "layers")
WORTH = 0.05  # of a step: what waits for launches for less, or wins less, is not spoken of


def text(plan: Plan, top: int) -> str:
    """The `top` fastest layouts as a table, how to use the first, and why the others do not fit."""
    first = [*_first(plan), *_launches(plan), *_fp8(plan)]
    return "\n".join([*_head(plan), "", *_table(plan, top), "", *first, *_others(plan)])


def as_json(plan: Plan) -> str:
    """Everything: sizes in bytes, times in seconds."""
    tree = {
        "gpus": plan.gpus,
        "gpu": vars(plan.gpu),
        "gpus_per_node": NODE,
        "model": {"kind": plan.config.model.kind, "preset": plan.config.model.preset, "parameters": parameters(plan),
                  "vocabulary": plan.vocabulary, "vocabulary_source": plan.vocabulary_source,
                  "training_flops_per_sample": TRAINING * plan.model.forward_flops},
        "global_batch_size": plan.config.data.global_batch_size,
        "layouts": [_as_tree(plan, choice) for choice in plan.choices],
        "rejected": [{"layout": rejected.layout, "reason": rejected.reason} for rejected in plan.rejected],
    }  # fmt: skip
    return json.dumps(tree, indent=1) + "\n"


def parameters(plan: Plan) -> int:
    """Of the whole model, a tied vocabulary once."""
    count = sum((unit.count for block in plan.model.blocks for unit in block.units), Count()).total
    return count - (plan.model.tied[0].total if plan.model.tied else 0)


def _as_tree(plan: Plan, choice: Choice) -> dict:
    memory, times = vars(choice.memory), vars(choice.times)
    return {
        "layout": vars(choice.layout), "overrides": choice.overrides(plan.config),
        "memory": {**memory, "total": choice.memory.total}, "step_seconds": {**times, "total": choice.times.total},
        "samples_per_second": choice.samples_per_second, "mfu": choice.mfu,
    }  # fmt: skip


def _unit(plan: Plan) -> str:
    return "pair" if plan.config.model.kind == "mug" else "row"


def _head(plan: Plan) -> list[str]:
    config, unit, full = plan.config, _unit(plan), [r for r in plan.rejected if r.memory]
    tokens = "" if unit == "pair" else f" of {config.data.context_length} tokens"
    vocabulary = f", vocabulary {plan.vocabulary} ({plan.vocabulary_source})" if plan.vocabulary else ""
    return [
        f"model    {config.model.preset}: {parameters(plan) / 1e9:.2f} G parameters{vocabulary}",
        f"GPUs     {plan.gpus} x {plan.gpu.name} of {plan.gpu.memory:g} GiB, {NODE} a node",
        f"batch    {config.data.global_batch_size} {unit}s{tokens},"
        f" {TRAINING * plan.model.forward_flops / 1e12:.2f} model TFLOP a {unit}",
        f"layouts  {len(plan.choices)} fit, {len(full)} exceed the memory (larger micro-batches were not tried),"
        f" {len(plan.rejected) - len(full)} are impossible",
    ]


def _layout_cells(layout: Layout) -> list[str]:
    return [
        str(layout.tensor), "yes" if layout.sequence else "no", str(layout.pipeline), str(layout.virtual),
        str(layout.data), str(layout.micro_batch), "full" if layout.recompute else "none",
        "shared" if layout.distributed_optimizer else "whole", layout.fp8,
        layout.layers + ", graphs" * layout.graphs,
    ]  # fmt: skip


def _table(plan: Plan, top: int) -> list[str]:
    unit = _unit(plan)
    rows = [["", *COLUMNS, "GiB", "weights", "gradients", "optimizer", "activations", "logits", "other", "step s",
             "compute", "waiting", "messages", "bubble", "update", f"{unit}s/s", "MFU"]]  # fmt: skip
    for number, choice in enumerate(plan.choices[:top], start=1):
        parts, times = memory_parts(choice.memory), choice.times
        seconds = (times.total, times.compute, times.waiting, times.communication, times.bubble, times.update)
        rows.append([
            str(number), *_layout_cells(choice.layout), f"{choice.memory.total / GIB:.1f}",
            *(f"{part:.1f}" for part in parts.values()), *(f"{x:.3f}" for x in seconds),
            f"{choice.samples_per_second:.4g}", f"{choice.mfu:.1%}",
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _first(plan: Plan) -> list[str]:
    return [
        "MFU is of the dense bf16 peak (fp32 in an fp32 run), FP8 or not. Predictions: docs/layouts.md says what they"
        " leave out.",
        f"the first: {' '.join(plan.choices[0].overrides(plan.config))}",
    ]


def _launches(plan: Plan) -> list[str]:
    """Where the first layout waits for the host: that it does, and what would help by how much."""
    choice = plan.choices[0]
    layout, total = choice.layout, choice.times.total
    if choice.times.waiting < WORTH * total:
        return []
    others = {}
    if layout.tensor == 1 and layout.fp8 == "none" and layout.layers != "compiled":
        others["compiled layers (precision.layers=auto)"] = {"layers": "compiled"}
    able = layout.layers != "te" or plan.config.model.kind != "mug"  # see `validate_precision.cuda_graphs`
    if able and not layout.graphs and layout.tensor * layout.pipeline == 1:
        others["parallel.cuda_graphs=true"] = {"graphs": True}
    if layout.micro_batches % 2 == 0:
        doubled = {"micro_batch": 2 * layout.micro_batch, "micro_batches": layout.micro_batches // 2}
        if memory(plan.model, replace(layout, **doubled)).total <= plan.gpu.memory * GIB:
            others[f"data.micro_batch_size={doubled['micro_batch']}"] = doubled
    told = {}
    for name, change in others.items():
        seconds = times_of(plan.config, plan.model, replace(layout, **change), plan.gpu).total
        if seconds < (1 - WORTH) * total:
            told[name] = seconds
    helps = "; ".join(f"{name} would make it {seconds:.3f} s" for name, seconds in told.items())
    return [
        f"its GPUs wait {choice.times.waiting:.3f} of {total:.3f} s for kernels to be launched: "
        + (helps or "a larger data.global_batch_size on fewer GPUs keeps them at work")
    ]


def _fp8(plan: Plan) -> list[str]:
    """What FP8 is worth, where layouts with it and without it fit."""
    best: dict[bool, Choice] = {}
    for choice in plan.choices:  # from the fastest on
        best.setdefault(choice.layout.fp8 != "none", choice)
    if len(best) < 2:
        return []
    eight, plain = best[True].times.total, best[False].times.total
    if eight < plain:
        return [f"FP8 ({best[True].layout.fp8}) pays at these widths: {eight:.3f} s a step against {plain:.3f} without"]
    return [f"FP8 does not pay at these widths: {eight:.3f} s a step against {plain:.3f} without"]


def _others(plan: Plan) -> list[str]:
    """For each tensor- and pipeline-parallel size of which nothing fits, what comes nearest or what forbids it."""
    fit = {(choice.layout.tensor, choice.layout.pipeline) for choice in plan.choices}
    groups: dict[tuple, list[Rejected]] = {}
    for rejected in plan.rejected:
        key = rejected.layout["tensor"], rejected.layout.get("pipeline")
        if key not in fit:
            groups.setdefault(key, []).append(rejected)
    lines = []
    for group in groups.values():
        full = [rejected for rejected in group if rejected.memory]
        nearest = min(full, key=lambda rejected: rejected.memory.total) if full else group[0]
        lines.append(f"  {described(nearest.layout)}: {nearest.reason}")
    return ["", "of these nothing fits or is possible; the nearest of each, and why not:", *lines] if lines else []

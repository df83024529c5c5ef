"""What `megamug train --dry-run` prints: layout, parameters, memory and FLOPs of a run that is not started.

No device and no process group is needed: a laptop tells what 512 GPUs would hold.
"""

from __future__ import annotations

from megamug import parameters, validate
from megamug.config import Config

GIB = 1024**3


def layout_text(config: Config, size: int) -> str:
    """The run in a few lines. `config` is resolved and valid on `size` processes."""
    return "\n".join([*_layout(config, size), *_mug(config), _precision(config), *_weight(config, size)])


def _layout(config: Config, size: int) -> list[str]:
    parallel, data = config.parallel, config.data
    ranks = validate.data_parallel(config, size)
    micro_batches = data.global_batch_size // (data.micro_batch_size * ranks)
    return [
        f"run        {config.run_dir}: {config.train.steps} steps of {data.global_batch_size} pairs",
        f"processes  {size} = tensor({parallel.tensor}) x pipeline({parallel.pipeline}) x data({ranks})"
        + (", sequence parallel" if parallel.sequence else "")
        + (", distributed optimizer" if parallel.distributed_optimizer else "")
        + (", recomputation" if parallel.recompute == "full" else ""),
        f"batch      {data.global_batch_size} = micro-batch({data.micro_batch_size}) x {micro_batches} micro-batches"
        f" x data({ranks})",
    ]


def _mug(config: Config) -> list[str]:
    model, data = config.model, config.data
    lines = [
        f"encoder    {model.layers} layers of {model.width}, {model.heads} heads;"
        f" {validate.visible_tokens(config)} tokens ({validate.visible_patches(config)} of"
        f" {validate.patch_count(config)} patches visible)",
    ]
    if model.image_loss_weight > 0:
        lines.append(f"image      {model.decoder_layers} layers of {model.decoder_width}, {model.decoder_heads} heads;"
                     f" {validate.decoder_tokens(config)} tokens; loss weight {model.image_loss_weight:g}")
    if model.caption_loss_weight > 0:
        lines.append(f"text       {model.text_unimodal_layers} + {model.text_multimodal_layers} layers of"
                     f" {model.text_width}, {model.text_heads} heads; {data.caption_length} tokens;"
                     f" loss weight {model.caption_loss_weight:g}")
    return lines


def _precision(config: Config) -> str:
    precision = config.precision
    return f"precision  {precision.dtype}, fp8 {precision.fp8}, layers {precision.layers}"


def _weight(config: Config, size: int) -> list[str]:
    """Parameters, FLOPs and memory, in all and for a process of each pipeline stage."""
    from megamug.models.mug_task import MugTask

    plan, parallel = MugTask(config).plan, config.parallel
    ranks = validate.data_parallel(config, size)
    training = 3 * plan.forward_flops
    step = training * config.data.global_batch_size
    total = parameters.mug_total(plan)
    lines = [
        f"parameters {total / 1e6:.2f} M",
        f"FLOPs      {training / 1e9:.2f} GFLOP a pair, forward and backward; {step / 1e12:.2f} TFLOP a step,"
        f" {step / size / 1e12:.3f} TFLOP of them a process",
        "memory     of a process, GiB; activations and FP8 copies of weights: not included",
    ]
    for rank in range(parallel.pipeline):
        stages = range(rank, len(plan.stages), parallel.pipeline)  # more than one with virtual stages
        count = sum((parameters.mug_stage(plan, stage) for stage in stages), parameters.Count())
        held = count.on_rank(parallel.tensor)
        memory = parameters.state_memory(held, held, config.precision.dtype, ranks, parallel.distributed_optimizer)
        share = sum(plan.blocks[i].flops for stage in stages for i in plan.stages[stage]) / plan.forward_flops
        lines.append(
            f"  stage {rank}  {memory.total / GIB:.3f} = weights({memory.weights / GIB:.3f}) +"
            f" gradients({memory.gradients / GIB:.3f}) + main parameters({memory.main_parameters / GIB:.3f}) +"
            f" moments({memory.moments / GIB:.3f}); {held / 1e6:.2f} M parameters, {share:.0%} of the FLOPs"
        )
    return lines

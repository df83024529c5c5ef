"""What `megamug train --dry-run` prints: layout, parameters, memory and FLOPs of a run that is not started.

No device and no process group is needed: a laptop tells what 512 GPUs would hold.
"""

from __future__ import annotations

from megamug.configuration import validate
from megamug.configuration.counts import as_mug, kept_values, segmenter_blocks
from megamug.configuration.presets import FINE_TUNED
from megamug.configuration.reading import towers
from megamug.configuration.sections import Config
from megamug.planner import parameters

GIB = 1024**3


def layout_text(config: Config, size: int) -> str:
    """The run in a few lines. `config` is resolved and valid on `size` processes."""
    model = _language(config) if towers(config) else _mug(config)
    return "\n".join([*_layout(config, size), *model, _precision(config), *_weight(config, size)])


def _unit(config: Config) -> str:
    """What batch sizes count."""
    return "image" if config.model.kind in FINE_TUNED else "row" if towers(config) else "pair"


def _layout(config: Config, size: int) -> list[str]:
    parallel, data = config.parallel, config.data
    ranks = validate.data_parallel(config, size)
    micro_batches = data.global_batch_size // (data.micro_batch_size * ranks)
    return [
        f"run        {config.run_dir}: {config.train.steps} steps of {data.global_batch_size} {_unit(config)}s",
        f"processes  {size} = tensor({parallel.tensor}) x pipeline({parallel.pipeline}) x data({ranks})"
        + (f", {parallel.virtual} chunks a stage" if parallel.virtual > 1 else "")
        + (", sequence parallel" if parallel.sequence else "")
        + (", distributed optimizer" if parallel.distributed_optimizer else "")
        + (", recomputation" if parallel.recompute == "full" else "")
        + (", overlapped tensor messages" if parallel.overlap_tensor else "")
        + (", CUDA graphs" if parallel.cuda_graphs else ""),
        f"batch      {data.global_batch_size} = micro-batch({data.micro_batch_size}) x {micro_batches} micro-batches"
        f" x data({ranks})",
    ]


def _mug(config: Config) -> list[str]:
    model, data = as_mug(config).model, config.data
    lines = [
        f"encoder    {model.layers} layers of {model.width}, {model.heads} heads;"
        f" {validate.visible_tokens(config)} tokens ({validate.visible_patches(config)} of"
        f" {validate.patch_count(config)} patches visible)",
    ]
    if model.image_loss_weight > 0:
        lines.append(f"image      {model.decoder_layers} layers of {model.decoder_width}, {model.decoder_heads} heads;"
                     f" {validate.decoder_tokens(config)} tokens; loss weight {model.image_loss_weight:g}")
    if model.caption_loss_weight > 0:
        hidden = f", {model.text_mask_ratio:.0%} of a caption's hidden" if model.text_objective == "masked" else ""
        lines.append(f"text       {model.text_unimodal_layers} + {model.text_multimodal_layers} layers of"
                     f" {model.text_width}, {model.text_heads} heads; {data.caption_length} tokens{hidden};"
                     f" loss weight {model.caption_loss_weight:g}")
    if config.model.kind == "segmenter":
        own = config.segmenter
        lines.append(f"head       {own.classes} classes of pixels, UperNet of {own.channels} channels on blocks"
                     f" {', '.join(map(str, segmenter_blocks(config)))}; positions of {own.position_image_size} pixels;"
                     f" auxiliary loss weight {own.auxiliary_weight:g}")  # fmt: skip
    if config.model.kind == "classifier":
        own = config.classifier
        reads = {"mean": "the mean of the patches", "class_token": "the class token",
                 "attention": "what one query reads of the patches"}[own.pool]  # fmt: skip
        lines.append(f"head       {own.classes} classes, of {reads}; label smoothing {own.label_smoothing:g}"
                     + ("; the encoder is frozen" if own.frozen else ""))  # fmt: skip
    return lines


def _language(config: Config) -> list[str]:
    lines = [f"rows       of {config.data.context_length} tokens"]
    for name, tower in towers(config).items():
        lines.append(f"{name:<11}{tower.layers} layers of {tower.width}, {tower.heads} heads; {tower.norm},"
                     f" {tower.activation}, {tower.positions} positions")
    if config.model.kind == "jam_cross":
        fusion = config.fusion
        lines.append(f"fusion     a cross block every {fusion.cross_every} layers, feed-forward"
                     f" {'yes' if fusion.cross_ffn else 'no'}, gate {'yes' if fusion.gate else 'no'};"
                     f" frozen towers: {fusion.freeze}")
    return lines


def _precision(config: Config) -> str:
    precision = config.precision
    kept = precision.first_layers_bf16, precision.last_layers_bf16
    return (f"precision  {precision.dtype}, fp8 {precision.fp8}, layers {precision.layers}"
            + (f"; first {kept[0]} and last {kept[1]} layers of a stack in bf16" if any(kept) else "")
            + ("; parameters kept and gathered in FP8" if precision.fp8_parameters else ""))  # fmt: skip


def _weight(config: Config, size: int) -> list[str]:
    """Parameters, FLOPs and memory, in all and for a process of each pipeline stage."""
    from megamug.models.tasks import make_task

    task, parallel = make_task(config), config.parallel
    plan, training = task.plan, task.flops_per_sample
    ranks = validate.data_parallel(config, size)
    step = training * config.data.global_batch_size
    total = parameters.total(plan)
    lines = [
        f"parameters {total / 1e6:.2f} M",
        f"FLOPs      {training / 1e9:.2f} GFLOP a {_unit(config)}, forward and backward;"
        f" {step / 1e12:.2f} TFLOP a step, {step / size / 1e12:.3f} TFLOP of them a process",
        "memory     of a process, GiB; activations and FP8 copies of weights: not included",
    ]
    for rank in range(parallel.pipeline):
        stages = range(rank, len(plan.stages), parallel.pipeline)  # more than one with virtual stages
        counts = [parameters.stage_counts(plan, stage) for stage in stages]
        held, trained = (sum(c.on_rank(parallel.tensor) for c in some) for some in zip(*counts, strict=True))
        memory = parameters.state_memory(held, trained, config.precision.dtype, ranks, parallel.distributed_optimizer,
                                         kept_values(config))  # fmt: skip
        share = sum(plan.blocks[i].flops for stage in stages for i in plan.stages[stage]) / plan.forward_flops
        lines.append(
            f"  stage {rank}  {memory.total / GIB:.3f} = weights({memory.weights / GIB:.3f}) +"
            f" gradients({memory.gradients / GIB:.3f}) + main parameters({memory.main_parameters / GIB:.3f}) +"
            f" moments({memory.moments / GIB:.3f}); {held / 1e6:.2f} M parameters, {share:.0%} of the FLOPs"
        )
    return lines

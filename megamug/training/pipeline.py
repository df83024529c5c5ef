"""Micro-batches of a step: one after another where one stage holds the model, through Megatron's schedules under a
pipeline. The one place that knows the schedules' (output, loss_func) contract.

A loss is `(sum, count)`. Sums are divided by the count of the whole *global* batch, which is known before the first
micro-batch runs; so gradients are simply added, over micro-batches, stages and data-parallel ranks, and nothing depends
on how the batch was split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megamug.models.stages import attach_loss

Sums = dict[str, list[Tensor]]
Totals = dict[str, float] | dict[str, Tensor]


def finalise_gradients(models: list, num_tokens=None, **groups) -> None:
    """Megatron's reductions (data parallel, sequence parallel) without its division by tokens, then tied weights."""
    finalize_model_grads(models, None, **groups)
    _sum_tied_weight(models)


def _sum_tied_weight(models: list) -> None:
    """Sums the gradients of a tied vocabulary weight over the stages that hold a copy of it.

    Megatron looks for the copies in the first and the last stage; here the cut by FLOPs may put them into any two, also
    into two chunks of one rank.
    """
    weights = [weight for weight in (bare(model).tied_weight() for model in models) if weight is not None]
    gradients = [weight.main_grad for weight in weights if weight.requires_grad]
    if not gradients:
        return
    total = gradients[0]
    for other in gradients[1:]:
        total.add_(other)
    group = parallel_state.get_embedding_group(check_initialized=False)
    if group is not None and group.size() > 1:
        dist.all_reduce(total, group=group)
    for other in gradients[1:]:
        other.copy_(total)


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """The chunk itself, without Megatron's DistributedDataParallel around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def run_batch(
    models: list[torch.nn.Module], batches: list, totals: Totals, backward: bool, reduce: bool = True
) -> Sums:
    """Runs the micro-batches of one step through this rank's chunks, forward and, if asked, backward.

    Args:
        models: this rank's chunks (one, or `parallel.virtual` of them), each wrapped in Megatron's
            DistributedDataParallel when training.
        batches: this data-parallel rank's micro-batches; with virtual stages a multiple of the pipeline's size.
        totals: by loss name, the count of the whole global batch; float64 scalars on the device in a step that is
            recorded and replayed.
        reduce: gradients are finalised, too; without a pipeline `finalise_gradients` may be called afterwards instead.

    Returns:
        By loss name, the (sum, count) pairs, flattened, of the losses that these chunks computed; `reduce_losses` joins
        them with the other ranks'.
    """
    first = bare(models[0])
    config, plan, interleaved = first.config, first.plan, len(models) > 1
    sums: Sums = {}

    def forward_step(data: Iterator, model) -> tuple[Tensor, object]:
        output, losses = model(next(data))
        scaled = None
        for name, (total, count) in losses.items():
            sums.setdefault(name, []).append(total.detach())
            sums.setdefault(f"{name}_count", []).append(count)
            term = total * _factor(plan.loss_weights[name], totals[name])
            scaled = term if scaled is None else scaled + term
        if output is not None and interleaved:
            output = _padded(output, rows, config.hidden_size)
        if output is not None and scaled is not None:
            output = attach_loss(output, scaled)
        # (loss, number of tokens, report): the loss is already what has to be differentiated, see the module's text.
        return (scaled if output is None else output), lambda loss: (loss, loss.new_ones((), dtype=torch.int), {})

    if plan.pipeline == 1:
        _one_after_another(models[0], batches, forward_step, backward)
        if backward and reduce:
            finalise_gradients(models)
        return sums
    assert reduce
    if interleaved:  # Megatron makes of seq_length and the configuration's sizes the shape [rows, 1, width]
        rows = _common_rows(plan, config.hidden_size)
        arguments = {
            "model": models,
            "data_iterator": [iter(batches) for _ in models],
            "seq_length": rows * (config.tensor_model_parallel_size if config.sequence_parallel else 1),
        }
    else:
        arguments = {"model": models[0], "data_iterator": iter(batches), "seq_length": 1}
        shapes = [[b.packed_shape] if b else [(1,)] for b in (first.incoming, first.outgoing)]
        arguments["adjust_tensor_shapes_fn"] = lambda receive, send: shapes
    assert config.calculate_per_token_loss
    get_forward_backward_func()(
        forward_step_func=forward_step,
        num_microbatches=len(batches),
        micro_batch_size=1,
        forward_only=not backward,
        **arguments,
    )
    return sums


def _factor(weight: float, total: float | Tensor) -> float | Tensor:
    """What a loss's sum is multiplied by: its weight over the number of its terms in the global batch."""
    if isinstance(total, Tensor):
        return (weight / total.clamp(min=1.0)).float()
    return weight / max(total, 1.0)


def _one_after_another(model: torch.nn.Module, batches: list, forward_step: Callable, backward: bool) -> None:
    """Micro-batches through a model that is one stage, as Megatron's schedule without a pipeline runs them: reductions
    that overlap with backward go with the last one, and FP8 weights are cast at the first one and kept."""
    bare(model).set_is_first_microbatch()
    data = iter(batches)
    for number in range(len(batches)):
        last = number == len(batches) - 1
        with nullcontext() if last or not backward else model.no_sync():
            loss, _ = forward_step(data, model)
            if backward and loss.requires_grad:  # of a model that is frozen whole it needs none
                loss.backward()
                model.collect()


def _common_rows(plan, width: int) -> int:
    """Rows of the one shape [rows, 1, width] that holds what any boundary sends: the interleaved schedule knows one."""
    boundaries = [plan.boundary(stage) for stage in range(1, len(plan.stages))]
    return max(-(-math.prod(boundary.packed_shape) // width) for boundary in boundaries)


def _padded(packed: Tensor, rows: int, width: int) -> Tensor:
    """[1, 1, numbers] -> [rows, 1, width]. `Boundary.unpack` reads from the front and leaves the padding."""
    return F.pad(packed.view(-1), (0, rows * width - packed.numel())).view(rows, 1, width)


def reduce_losses(sums: Sums, names: list[str], world) -> dict[str, Tensor]:
    """Global (sum, count) of each loss, the same on every rank: {"image": sum, "image_count": count, ...}, float64.

    Each loss stands on one stage and is the same on all tensor-parallel ranks.
    """
    keys = [key for name in names for key in (name, f"{name}_count")]
    values = [
        torch.stack([torch.as_tensor(v, dtype=torch.float64, device=world.device) for v in sums[key]]).sum()
        if key in sums
        else torch.zeros((), dtype=torch.float64, device=world.device)
        for key in keys
    ]
    packed = torch.stack(values)
    for group, size in ((world.pp_group, world.pp_size), (world.dp_group, world.dp_size)):
        if size > 1:
            dist.all_reduce(packed, group=group)
    return dict(zip(keys, packed, strict=True))

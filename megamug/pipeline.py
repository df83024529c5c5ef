"""Micro-batches through Megatron's schedules. The one place that knows their (output, loss_func) contract.

A loss is `(sum, count)`. Sums are divided by the count of the whole *global* batch, which is known before the first
micro-batch runs; so gradients are simply added, over micro-batches, stages and data-parallel ranks, and nothing depends
on how the batch was split.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megamug.models.stages import attach_loss

Sums = dict[str, list[Tensor]]


def finalise_gradients(model, num_tokens=None, **groups) -> None:
    """Megatron's reductions (data parallel, sequence parallel, tied vocabulary) without its division by tokens."""
    finalize_model_grads(model, None, **groups)


def run_batch(model: torch.nn.Module, batches: list, totals: dict[str, float], backward: bool) -> Sums:
    """Runs the micro-batches of one step through this rank's stage, forward and, if asked, backward.

    Args:
        model: the stage, wrapped in Megatron's DistributedDataParallel when training.
        batches: this data-parallel rank's micro-batches.
        totals: by loss name, the count of the whole global batch.

    Returns:
        By loss name, the (sum, count) pairs, flattened, of the losses that this stage computed; `reduce_losses` joins
        them with the other ranks'.
    """
    stage = model.module if isinstance(model, DistributedDataParallel) else model
    config, weights = stage.config, stage.plan.loss_weights
    sums: Sums = {}

    def forward_step(data: Iterator, model) -> tuple[Tensor, object]:
        output, losses = model(next(data))
        scaled = None
        for name, (total, count) in losses.items():
            sums.setdefault(name, []).append(total.detach())
            sums.setdefault(f"{name}_count", []).append(count)
            term = total * (weights[name] / max(totals[name], 1.0))
            scaled = term if scaled is None else scaled + term
        if output is not None and scaled is not None:
            output = attach_loss(output, scaled)
        # (loss, number of tokens, report): the loss is already what has to be differentiated, see the module's text.
        return (scaled if output is None else output), lambda loss: (loss, loss.new_ones((), dtype=torch.int), {})

    def shapes(receive, send):
        return ([b.packed_shape] if b else [(1,)] for b in (stage.incoming, stage.outgoing))

    pipelined = stage.plan.pipeline > 1
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=1,  # shapes of the boundaries are given below
        micro_batch_size=1,
        forward_only=not backward,
        adjust_tensor_shapes_fn=shapes if pipelined else None,
    )
    assert config.calculate_per_token_loss
    return sums


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

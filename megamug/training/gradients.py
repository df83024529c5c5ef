"""Gradients of many parameters at once: into Megatron's buffers, their norm, their clipping, and copies of parameters.

A model has hundreds of parameters, most of them small. One operator for each of them and each purpose makes thousands
of launches a step, for which a GPU waits longer than it computes. All here takes lists (torch's `_foreach` operators:
one kernel for dozens of tensors, whatever packages Megatron found to import).
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

PIECE = 256 * 2**20  # bytes of gradients that wait: few of them would not fill a GPU
WIDENED = 32 * 2**20  # bytes of gradients that are widened to fp32 before they are added: they stay in the L2 cache


class GradientBuffers(DistributedDataParallel):
    """Megatron's gradient buffers around a chunk. Gradients wait until there is a piece of them or `collect` is called.

    Megatron adds each parameter's gradient to its fp32 sum by itself, as soon as backward has made it. Where reductions
    overlap with backward that stays so: a bucket is sent when the last of its gradients is there. It stays so, too,
    under a pipeline, whose schedule does not say where one micro-batch's backward ends and the next begins.
    """

    def __init__(self, config, ddp_config, module: torch.nn.Module):
        super().__init__(config=config, ddp_config=ddp_config, module=module)
        self._waiting: dict[Tensor, None] = {}  # in order; by identity
        self._bytes = 0
        self._begun: set[Tensor] = set()  # parameters whose sums hold something
        for part in module.modules():
            # Of Transformer Engine's: products add a weight's gradient to its sum themselves, two passes less.
            if hasattr(part, "fuse_wgrad_accumulation"):
                part.fuse_wgrad_accumulation = True
        if ddp_config.overlap_grad_reduce or config.pipeline_model_parallel_size > 1:
            return
        # Megatron's hooks go with the autograd nodes that it keeps for them. (Without those nodes, every forward makes
        # its own, on the stream that it runs on: a CUDA graph may not wait for another stream.)
        self.grad_accs.clear()
        mine = weakref.ref(self)  # a hook is kept where no collector of cycles looks
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda done: mine()._wait(done))

    def _wait(self, parameter: Tensor) -> None:
        """Backward has made `parameter.grad`. A gradient that is in the buffer already (`grad_added_to_main_grad`, set
        by products that add to it) is a placeholder, unless it says that it is a zero to be added."""
        if parameter.grad_added_to_main_grad and not getattr(parameter, "zero_out_wgrad", False):
            parameter.grad = None
            return
        if parameter not in self._waiting:
            self._waiting[parameter] = None
            self._bytes += parameter.grad.nbytes
        if self._bytes >= PIECE:
            self.collect()

    def zero_grad_buffer(self) -> None:
        super().zero_grad_buffer()
        self._begun.clear()
        for parameter in self.params_with_grad:
            parameter.main_grad_begun = False

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the gradients that wait to their sums. At the end of each micro-batch's backward."""
        waiting, self._waiting, self._bytes = list(self._waiting), {}, 0
        # A sum that holds nothing yet takes the gradient as it is. (`main_grad_begun`: set by whoever adds to one.)
        begun = [p in self._begun or getattr(p, "main_grad_begun", False) for p in waiting]
        self._begun.update(waiting)
        first = [p for p, has in zip(waiting, begun, strict=True) if not has]
        later = [p for p, has in zip(waiting, begun, strict=True) if has]
        copy_([p.main_grad for p in first], [p.grad.view(p.main_grad.shape) for p in first])
        add_([p.main_grad for p in later], [p.grad.view(p.main_grad.shape) for p in later])
        for parameter in waiting:
            parameter.grad = None


def norm(optimizer) -> Tensor:
    """The 2-norm of the whole model's gradients, the same on every rank: a float32 scalar on the device.

    `optimizer` is Megatron's chain, whose parameters have their gradients (`prepare_grads`). Copies are counted once:
    of a tied weight (`shared`), and of parameters that every tensor-parallel rank holds whole.
    """
    squares = square_sum([
        parameter.grad
        for parameter in optimizer.get_parameters()
        if parameter.grad is not None
        and param_is_not_shared(parameter)
        and param_is_not_tensor_parallel_duplicate(parameter)
    ])  # fmt: skip
    group = optimizer.get_grad_stats_parallel_group()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(squares, group=group)
    return squares.sqrt()


def square_sum(tensors: list[Tensor]) -> Tensor:
    """The sum of all squares, a float32 scalar (0 for no tensors)."""
    tensors = [tensor for tensor in tensors if tensor.numel()]  # of a parameter that other ranks update there is none
    if not tensors:
        return torch.zeros((), device="cuda")  # Megatron's device, wherever that is
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def scale_(parameters: list[Tensor], factor: Tensor) -> None:
    """Multiplies the gradients of the parameters in place by a scalar."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def add_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Adds tensor by tensor, of any two types."""
    if all(target.dtype == source.dtype for target, source in zip(targets, sources, strict=True)):
        if targets:
            torch._foreach_add_(targets, sources)
        return
    first = 0
    while first < len(targets):  # adding tensors of two types would go one by one
        last, size = first + 1, sources[first].nbytes
        while last < len(targets) and size + sources[last].nbytes <= WIDENED:
            size += sources[last].nbytes
            last += 1
        wide = [torch.empty_like(target) for target in targets[first:last]]
        copy_(wide, sources[first:last])
        torch._foreach_add_(targets[first:last], wide)
        first = last


def copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies tensor by tensor, of any two types."""
    if targets:
        torch._foreach_copy_(targets, sources)

"""Output projection and cross-entropy in one, by chunks of tokens: the logits of all tokens never exist at once.

Axes: T tokens, C width, V columns of this rank's slice of the vocabulary (see `cross_entropy`).

For each chunk the logits are made, joined across ranks, turned into their own gradient in place and multiplied into the
gradients of the hidden states and of the weight, all in the forward pass; backward scales them. So the three matrix
products of the plain form are also the three of this one, and nothing is computed twice. The idea is that of Liger
(Hsu et al., arXiv 2410.10989, sec. 3.2); the split of the vocabulary and of the sequence is Megatron's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megamug.errors import UserError
from megamug.losses import ops
from megamug.losses.cross_entropy import Terms, check_tensors, count_tokens, forward_torch, gradient_torch, make_terms


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    max_bytes: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`vocab_parallel_cross_entropy(hidden @ weight.T, targets)` without the logits.

    Args:
        hidden: [..., C], the same on every rank of the group; with `sequence_parallel` [S / ranks, ..., C], this rank's
            part of the first axis.
        weight: [V, C], this rank's rows of the output weight, in the dtype of `hidden`.
        targets: [...] int64 (the whole sequence also with `sequence_parallel`), equal on every rank.
        max_bytes: bound on the logits of one chunk; None: `CHUNK_BYTES` of the device. The gradients of hidden states
            and weight (the latter accumulated in float32) come on top, as in the plain form.
        Other arguments and errors as in `vocab_parallel_cross_entropy`.

    Returns:
        `(sum, count)`, float32 scalars, equal on every rank. The gradient for `hidden` is summed over the group (or
        reduce-scattered with `sequence_parallel`), as Megatron's ColumnParallelLinear does. Where the weight has
        Megatron's `main_grad`, its gradient is added there, in float32. Backward scales what forward made, the
        gradient of the hidden states in place, so that a second backward through a retained graph raises.
    """
    name = "linear_cross_entropy"
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.dtype != hidden.dtype:
        raise UserError(
            f"{name}: weight must be {hidden.dtype} [columns, {hidden.shape[-1]}], "
            f"not {weight.dtype} {list(weight.shape)}"
        )
    if weight.device != hidden.device:
        raise UserError(f"{name}: weight is on {weight.device}, hidden on {hidden.device}; use one device")
    terms = make_terms(weight.shape[0], vocab_size, group, label_smoothing, z_loss, ignore_index)
    gather = sequence_parallel and group is not None and dist.get_world_size(group) > 1
    whole = hidden
    if gather:
        shape = (hidden.shape[0] * dist.get_world_size(group), *hidden.shape[1:])
        whole = hidden.new_empty(()).expand(shape)  # shape, dtype and device of the gathered hidden states
    check_tensors(name, whole, targets, weights, terms)
    row_bytes = weight.shape[0] * hidden.element_size()
    if max_bytes is None:
        max_bytes = max(CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"]), row_bytes)
    if max_bytes < row_bytes:
        raise UserError(f"{name}: max_bytes is {max_bytes} but the logits of one token take {row_bytes}; raise it")
    flat_weights = None if weights is None else weights.reshape(-1)
    total = _LinearCrossEntropy.apply(
        hidden,
        weight,
        targets.reshape(-1),
        flat_weights,
        terms,
        gather,
        _chunk(targets.numel(), max_bytes // row_bytes),
        ops.choose(impl, hidden, targets, weights),
        torch.is_grad_enabled(),
    )
    return total, count_tokens(targets.reshape(-1), flat_weights, ignore_index)


# The logits of a chunk. On a GPU every chunk but the first reads and writes the whole float32 gradient of the weight,
# and the product for the hidden states wants enough rows to fill the device; so there are few, large ones.
CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 224 * 2**20}
TILE = 128  # rows of the products' tiles
PRODUCT_BYTES = 8 * 2**20  # on a CPU: of the weight gradient's half-precision pieces


def _chunk(tokens: int, most: int) -> int:
    """Tokens of a chunk: as few chunks as `most` tokens allow, of one size, in whole tiles where there is room."""
    even = -(-tokens // max(1, -(-tokens // most)))
    tiles = -(-even // TILE) * TILE
    return max(1, tiles if tiles <= most else even)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, terms: Terms, gather, chunk, compiled, training) -> Tensor:
        states = _gather(hidden, terms) if gather else hidden
        states = states.reshape(-1, states.shape[-1])
        want_hidden, want_weight = (training and wanted for wanted in ctx.needs_input_grad[:2])
        grad_states = torch.empty_like(states) if want_hidden else None
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        grad_weight = torch.empty_like(weight, dtype=wide) if want_weight else None
        buffer = states.new_empty((min(chunk, states.shape[0]), weight.shape[0]))
        one = states.new_ones(buffer.shape[0], dtype=wide)
        forward = ops.cross_entropy_forward if compiled else forward_torch
        gradient = ops.cross_entropy_gradient_ if compiled else gradient_torch
        losses = []
        for start in range(0, states.shape[0], chunk):
            part = slice(start, start + chunk)
            part_weights = None if weights is None else weights[part]
            logits = torch.mm(states[part], weight.t(), out=buffer[: states[part].shape[0]])
            per_token, normalisers = forward(logits, targets[part], part_weights, terms)
            losses.append(per_token)
            if want_hidden or want_weight:
                incoming = one[: len(per_token)]
                logits = gradient(logits, targets[part], part_weights, normalisers, incoming, terms)
            if grad_states is not None:
                torch.mm(logits, weight, out=grad_states[part])
            if grad_weight is not None:
                _accumulate(grad_weight, logits, states[part], first=start == 0)
        if grad_weight is not None and not losses:
            grad_weight.zero_()
        total = torch.cat(losses).sum() if losses else states.new_zeros((), dtype=wide)
        ctx.save_for_backward(grad_states, grad_weight)
        ctx.weight, ctx.shape, ctx.gather, ctx.terms = weight, hidden.shape, gather, terms
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        grad_states, grad_weight = ctx.saved_tensors
        if grad_states is not None:
            grad_states.mul_(grad)
            if ctx.gather:
                grad_states = _reduce_scatter(grad_states, ctx.terms)
            elif ctx.terms.group is not None:
                dist.all_reduce(grad_states, group=ctx.terms.group)
            grad_states = grad_states.view(ctx.shape)
        if grad_weight is not None:
            grad_weight = _weight_gradient(ctx.weight, grad_weight, grad)
        return grad_states, grad_weight, None, None, None, None, None, None, None


def _accumulate(total: Tensor, gradient: Tensor, states: Tensor, first: bool) -> None:
    """total = (0 if first else total) + gradient.T @ states, added up in the dtype of `total`.

    Half precision: on CUDA the product itself adds to the float32 sum; elsewhere each chunk's product is rounded once.
    """
    beta = 0 if first else 1  # with 0 what `total` holds is not read
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), states, beta=beta)
    elif gradient.is_cuda and not torch.compiler.is_compiling():
        torch.addmm(total, gradient.t(), states, out_dtype=total.dtype, beta=beta, out=total)
    else:
        rows = max(1, PRODUCT_BYTES // (states.shape[1] * states.element_size()))
        for start in range(0, total.shape[0], rows):  # by pieces that are still in the cache when they are added
            part = slice(start, start + rows)
            product = gradient[:, part].t() @ states
            total[part].copy_(product) if first else total[part].add_(product)


def _weight_gradient(weight: Tensor, gradient: Tensor, grad: Tensor) -> Tensor:
    """The gradient to hand to autograd; Megatron's `main_grad` takes it directly where there is one.

    Autograd then gets zeros and `grad_added_to_main_grad` stays as it is: Megatron's hook adds `param.grad`, which has
    nothing of this use of the weight but may have another (an embedding tied to the output).
    """
    if getattr(weight, "main_grad", None) is not None:
        weight.main_grad.addcmul_(gradient, grad)
        weight.main_grad_begun = True
        return torch.zeros_like(weight)
    if gradient.is_cuda and weight.dtype != gradient.dtype:  # scaled and rounded in one pass
        return torch.mul(gradient, grad, out=torch.empty_like(weight))
    return gradient.mul_(grad).to(weight.dtype)


def _gather(hidden: Tensor, terms: Terms) -> Tensor:
    ranks = dist.get_world_size(terms.group)
    whole = hidden.new_empty((hidden.shape[0] * ranks, *hidden.shape[1:]))
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=terms.group)
    return whole


def _reduce_scatter(gradient: Tensor, terms: Terms) -> Tensor:
    ranks = dist.get_world_size(terms.group)
    part = gradient.new_empty((gradient.shape[0] // ranks, *gradient.shape[1:]))
    dist.reduce_scatter_tensor(part, gradient, group=terms.group)
    return part

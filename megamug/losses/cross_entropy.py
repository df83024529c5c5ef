"""Cross-entropy over a vocabulary that is split across tensor-parallel ranks.

Axes: R rows (tokens), V columns of this rank's slice, `vocab_size` columns that exist in the whole vocabulary. Rank r
of the group owns the global columns [r * V, (r + 1) * V); columns at and after `vocab_size` are padding.

Per token, with x the logits, t the target, lse = log sum exp x, e the label smoothing and z the z-loss coefficient:

    loss = (1 - e) (lse - x[t]) + e (lse - mean(x)) + z lse^2
    d loss / d x[j] = softmax(x)[j] (1 + 2 z lse) - (1 - e) [j = t] - e / vocab_size

The split follows Shoeybi et al., *Megatron-LM*, arXiv 1909.08053, sec. 3; label smoothing follows
`torch.nn.functional.cross_entropy`; the z-loss follows Chowdhery et al., *PaLM*, arXiv 2204.02311, sec. 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megamug.errors import UserError
from megamug.losses import ops

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Terms:
    """What a cross-entropy is made of, apart from its tensors: this rank's columns and the extra terms of the loss."""

    first_column: int  # global number of this rank's first column
    valid_columns: int  # how many of this rank's columns exist; the rest are padding
    vocab_size: int
    group: dist.ProcessGroup | None
    label_smoothing: float
    z_loss: float
    ignore_index: int


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    return_per_token: bool = False,
    inplace_backward: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of the tokens' losses and the sum of their weights.

    Args:
        logits: [..., V] float32, bfloat16 or float16: this rank's slice. All ranks have the same V.
        targets: [...] int64, numbers in the whole vocabulary, the same on every rank of the group.
        vocab_size: columns of the whole vocabulary that exist; default: V times the ranks, no padding.
        group: the ranks that share the vocabulary; None: this process holds all of it.
        label_smoothing, z_loss: e and z of the formula above.
        ignore_index: tokens with this target take no part: loss, gradient and count zero.
        weights: [...] float32, factor of each token; a token of weight 0 takes no part. Not differentiable.
        return_per_token: also return the weighted loss of each token, float32 [...].
        inplace_backward: let backward write the gradient over the logits, so that no second tensor of that size
            exists; logits must not be read after backward (autograd notices a use of its own and raises). Leaf tensors
            are never overwritten.
        impl: "auto", "compiled" or "torch".

    Returns:
        `(sum, count)` or `(sum, count, per_token)`, float32, equal on every rank of the group. Their gradient is, on
        each rank, the gradient for its own slice: what Megatron's tensor-parallel layers expect.

    Raises:
        UserError: wrong shape, dtype or device; a target outside the vocabulary. On CUDA targets are checked by the
            kernel, without waiting for it: the token's loss and gradient are NaN, and nothing is read out of bounds.
    """
    terms = make_terms(logits.shape[-1], vocab_size, group, label_smoothing, z_loss, ignore_index)
    check_tensors("vocab_parallel_cross_entropy", logits, targets, weights, terms)
    rows = logits.reshape(-1, logits.shape[-1])
    flat_targets = targets.reshape(-1)
    flat_weights = None if weights is None else weights.reshape(-1)
    if ops.choose(impl, logits, targets, weights):
        inplace = inplace_backward and not _is_leaf(logits)
        per_token = ops.cross_entropy(rows, flat_targets, flat_weights, terms, inplace)
    else:
        per_token = _TorchCrossEntropy.apply(rows, flat_targets, flat_weights, terms)
    total, count = per_token.sum(), count_tokens(flat_targets, flat_weights, ignore_index)
    return (total, count, per_token.view(targets.shape)) if return_per_token else (total, count)


def _is_leaf(tensor: Tensor) -> bool:
    """A leaf or a view of one: memory that belongs to the caller, not to the graph."""
    return tensor.is_leaf or (tensor._base is not None and tensor._base.is_leaf)


def count_tokens(targets: Tensor, weights: Tensor | None, ignore_index: int) -> Tensor:
    """Sum of the weights of the tokens that take part: a float32 scalar."""
    active = targets != ignore_index
    return (active.float() if weights is None else torch.where(active, weights, 0.0)).sum()


class _TorchCrossEntropy(torch.autograd.Function):
    """The loss of each token in plain torch: the specification of the kernels."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, weights: Tensor | None, terms: Terms) -> Tensor:
        per_token, normalisers = forward_torch(logits, targets, weights, terms)
        ctx.save_for_backward(logits, targets, weights, normalisers)
        ctx.terms = terms
        return per_token

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_per_token: Tensor):
        logits, targets, weights, normalisers = ctx.saved_tensors
        return gradient_torch(logits, targets, weights, normalisers, grad_per_token, ctx.terms), None, None, None


def forward_torch(logits: Tensor, targets: Tensor, weights: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor]:
    """[R, V], [R], [R] or None -> weighted loss of each token [R], and normalisers [2, R]: the maximum of each row and
    its sum of exponentials against that maximum, over the whole vocabulary."""
    x = _valid(logits, terms)
    row_maximum = x.amax(dim=-1) if terms.valid_columns else x.new_full(x.shape[:1], -torch.inf)
    _all_reduce(row_maximum, terms, dist.ReduceOp.MAX)

    owned, column = _owned(targets, terms)
    sum_of_exp = (x - row_maximum.unsqueeze(-1)).exp().sum(dim=-1)
    target_logit = x.new_zeros(x.shape[0])
    target_logit[owned] = x[owned, column]
    packed = torch.stack((sum_of_exp, target_logit, x.sum(dim=-1)))
    _all_reduce(packed, terms, dist.ReduceOp.SUM)
    sum_of_exp, target_logit, sum_of_logits = packed

    logsumexp = row_maximum + sum_of_exp.log()
    loss = (1 - terms.label_smoothing) * (logsumexp - target_logit)
    if terms.label_smoothing:
        loss = loss + terms.label_smoothing * (logsumexp - sum_of_logits / terms.vocab_size)
    if terms.z_loss:
        loss = loss + terms.z_loss * logsumexp.square()
    factor = _factor(targets, weights, terms)
    return torch.where(factor != 0, loss * factor, 0.0), torch.stack((row_maximum, sum_of_exp))


def gradient_torch(
    logits: Tensor, targets: Tensor, weights: Tensor | None, normalisers: Tensor, grad_per_token: Tensor, terms: Terms
) -> Tensor:
    """Gradient [R, V] for this rank's logits; padded columns and tokens that take no part get zero."""
    x = _valid(logits, terms)
    row_maximum, sum_of_exp = normalisers.unsqueeze(-1)
    gradient = (x - row_maximum).exp() / sum_of_exp
    if terms.z_loss:
        logsumexp = row_maximum + sum_of_exp.log()
        gradient = gradient * (1 + 2 * terms.z_loss * logsumexp)
    if terms.label_smoothing:
        gradient = gradient - terms.label_smoothing / terms.vocab_size
    owned, column = _owned(targets, terms)
    gradient[owned, column] -= 1 - terms.label_smoothing
    factor = _factor(targets, weights, terms).unsqueeze(-1)
    gradient = torch.where(factor != 0, gradient * factor * grad_per_token.unsqueeze(-1), 0.0)
    return torch.nn.functional.pad(gradient.to(logits.dtype), (0, logits.shape[-1] - terms.valid_columns))


def _valid(logits: Tensor, terms: Terms) -> Tensor:
    """The columns that exist, in the dtype of the arithmetic."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits[:, : terms.valid_columns].to(dtype)


def _owned(targets: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Rows whose target is one of this rank's columns, and that column."""
    column = targets - terms.first_column
    (rows,) = torch.nonzero((column >= 0) & (column < terms.valid_columns), as_tuple=True)
    return rows, column[rows]


def _factor(targets: Tensor, weights: Tensor | None, terms: Terms) -> Tensor:
    active = targets != terms.ignore_index
    return active.float() if weights is None else torch.where(active, weights, 0.0)


def _all_reduce(tensor: Tensor, terms: Terms, op) -> None:
    if terms.group is not None:
        dist.all_reduce(tensor, op=op, group=terms.group)


def make_terms(
    columns: int,
    vocab_size: int | None,
    group: dist.ProcessGroup | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
) -> Terms:
    """Where this rank's `columns` lie in the vocabulary, checked."""
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    vocab_size = columns * ranks if vocab_size is None else vocab_size
    if not 0 < vocab_size <= columns * ranks:
        raise UserError(
            f"cross-entropy: vocab_size is {vocab_size} but {ranks} rank(s) x {columns} columns hold "
            f"{columns * ranks}; it must be between 1 and that"
        )
    if not 0 <= label_smoothing <= 1:
        raise UserError(f"cross-entropy: label_smoothing must be between 0 and 1, not {label_smoothing}")
    if not z_loss >= 0:
        raise UserError(f"cross-entropy: z_loss must not be negative, not {z_loss}")
    first = rank * columns
    valid = min(max(vocab_size - first, 0), columns)
    return Terms(first, valid, vocab_size, group, float(label_smoothing), float(z_loss), ignore_index)


def check_tensors(name: str, logits: Tensor, targets: Tensor, weights: Tensor | None, terms: Terms) -> None:
    """UserError for tensors that do not belong together. `logits` may be hidden states: the last axis is free."""
    if logits.dtype not in _FLOATS:
        raise UserError(f"{name}: float32, bfloat16 or float16 is wanted, not {logits.dtype}")
    if targets.dtype != torch.int64:
        raise UserError(f"{name}: targets must be int64, not {targets.dtype}")
    if logits.shape[:-1] != targets.shape:
        raise UserError(f"{name}: targets must be {list(logits.shape[:-1])}, not {list(targets.shape)}")
    if targets.device != logits.device:
        raise UserError(f"{name}: targets are on {targets.device}, the rest on {logits.device}; use one device")
    if weights is not None:
        if weights.shape != targets.shape or weights.dtype != torch.float32 or weights.device != logits.device:
            raise UserError(
                f"{name}: weights must be float32 {list(targets.shape)} on {logits.device}, "
                f"not {weights.dtype} {list(weights.shape)} on {weights.device}"
            )
        if weights.requires_grad:
            raise UserError(f"{name}: weights are not differentiable; pass weights.detach()")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (targets != terms.ignore_index) & ((targets < 0) | (targets >= terms.vocab_size))
        if outside.any():
            raise UserError(
                f"{name}: target {int(targets[outside][0])} is outside the vocabulary [0, {terms.vocab_size}); "
                f"tokens without a target carry ignore_index ({terms.ignore_index})"
            )

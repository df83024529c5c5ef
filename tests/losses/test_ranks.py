"""The vocabulary split over 2 and 4 gloo ranks gives the one-rank loss and gradients, padding included."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megamug.errors import UserError
from megamug.losses import linear_cross_entropy, vocab_parallel_cross_entropy
from tests.losses.common import need, on_ranks

OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3}
# (columns of the whole vocabulary, columns that exist): no padding; the last rank partly or wholly padding
VOCABULARIES = [(40, 40), (40, 37), (40, 19)]


def problem(columns, vocab_size):
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 3, 16), torch.randn(columns, 16)
    targets = torch.randint(vocab_size, (8, 3))
    targets[0, 0] = -100
    return hidden, weight, targets, torch.rand(8, 3)


def split_loss(rank, ranks, impl):
    for columns, vocab_size in VOCABULARIES:
        hidden, weight, targets, weights = problem(columns, vocab_size)
        options = {**OPTIONS, "vocab_size": vocab_size, "weights": weights, "impl": impl}
        logits = (hidden @ weight.t()).requires_grad_()
        total, count, per_token = vocab_parallel_cross_entropy(logits, targets, return_per_token=True, **options)
        (gradient,) = torch.autograd.grad(total, logits)

        mine = logits.detach().chunk(ranks, dim=-1)[rank].clone().requires_grad_()
        group = dist.group.WORLD
        seen = vocab_parallel_cross_entropy(mine, targets, return_per_token=True, group=group, **options)
        torch.testing.assert_close(seen[0], total, rtol=1e-6, atol=0)
        torch.testing.assert_close(seen[1], count)
        torch.testing.assert_close(seen[2], per_token, rtol=1e-6, atol=1e-6)
        (part,) = torch.autograd.grad(seen[0], mine)
        torch.testing.assert_close(part, gradient.chunk(ranks, dim=-1)[rank], rtol=1e-6, atol=1e-7)

        everybody = [torch.empty_like(seen[2]) for _ in range(ranks)]
        dist.all_gather(everybody, seen[2].detach())
        assert all(torch.equal(other, everybody[0]) for other in everybody)  # to the bit


def split_linear(rank, ranks, impl):
    for columns, vocab_size in VOCABULARIES:
        hidden, weight, targets, weights = problem(columns, vocab_size)
        options = {**OPTIONS, "vocab_size": vocab_size, "weights": weights, "impl": impl}
        whole = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total, _ = linear_cross_entropy(*whole, targets, **options)
        wanted = torch.autograd.grad(total * 0.7, whole)
        slices = weight.chunk(ranks)
        for sequence_parallel in (False, True):
            mine = hidden.chunk(ranks)[rank] if sequence_parallel else hidden
            mine, part = mine.clone().requires_grad_(), slices[rank].clone().requires_grad_()
            seen, _ = linear_cross_entropy(
                mine, part, targets, group=dist.group.WORLD, sequence_parallel=sequence_parallel,
                max_bytes=columns // ranks * 4 * 5, **options,
            )
            torch.testing.assert_close(seen, total, rtol=1e-6, atol=0)
            grad_hidden, grad_weight = torch.autograd.grad(seen * 0.7, (mine, part))
            expected = wanted[0].chunk(ranks)[rank] if sequence_parallel else wanted[0]
            torch.testing.assert_close(grad_hidden, expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad_weight, wanted[1].chunk(ranks)[rank], rtol=1e-5, atol=1e-6)


def refusals(rank, ranks):
    logits, targets = torch.randn(2, 10), torch.tensor([3, 19])
    vocab_parallel_cross_entropy(logits, targets, group=dist.group.WORLD)
    with pytest.raises(UserError, match="target 19 is outside the vocabulary"):
        vocab_parallel_cross_entropy(logits, targets, group=dist.group.WORLD, vocab_size=19)
    with pytest.raises(UserError, match=r"2 rank\(s\) x 10 columns hold 20"):
        vocab_parallel_cross_entropy(logits, targets, group=dist.group.WORLD, vocab_size=21)


def everything(rank, ranks, impls):
    for impl in impls:
        split_loss(rank, ranks, impl)
        split_linear(rank, ranks, impl)
    if ranks == 2:
        refusals(rank, ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one(ranks):
    need("compiled")
    on_ranks(everything, ranks, ["torch", "compiled"])

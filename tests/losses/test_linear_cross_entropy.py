"""Linear + cross-entropy by chunks against the plain product and float64."""

from __future__ import annotations

import sys

import pytest
import torch

from megamug.errors import UserError
from megamug.losses import linear_cross_entropy
from tests.losses.common import IMPLEMENTATIONS, need, reference_cross_entropy


def sample(dtype=torch.float32, tokens=(5, 3), width=16, columns=37, vocab_size=33):
    torch.manual_seed(0)
    hidden = torch.randn(*tokens, width).to(dtype).requires_grad_()
    weight = (torch.randn(columns, width) * 0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, tokens)
    targets[0, 0] = -100
    return hidden, weight, targets, torch.rand(tokens)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("chunk", [1, 4, 15, 1000])
def test_equals_float64(impl, chunk):
    need(impl)
    hidden, weight, targets, weights = sample()
    total, count = linear_cross_entropy(
        hidden, weight, targets, vocab_size=33, label_smoothing=0.1, z_loss=1e-3, weights=weights,
        max_bytes=chunk * 37 * 4, impl=impl,
    )
    gradients = torch.autograd.grad(total * 0.7, (hidden, weight))
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    wanted = reference_cross_entropy(
        h @ w.t(), targets, vocab_size=33, smoothing=0.1, z_loss=1e-3, weights=weights
    ).sum()
    torch.testing.assert_close(total.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(count, weights[targets != -100].sum())
    for seen, expected in zip(gradients, torch.autograd.grad(wanted * 0.7, (h, w)), strict=True):
        torch.testing.assert_close(seen.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_weight_gradient_of_half_precision_adds_up_in_float32(impl, monkeypatch):
    """Many chunks: the sum must be as good as one rounding of a chunk's product, not one a chunk of the sum."""
    need(impl)
    module = sys.modules["megamug.losses.linear_cross_entropy"]  # the package gives the function under this name
    monkeypatch.setattr(module, "PRODUCT_BYTES", 10 * 16 * 2)  # several pieces of rows
    hidden, weight, targets, _ = sample(torch.bfloat16, tokens=(64, 4))
    total, _ = linear_cross_entropy(hidden, weight, targets, vocab_size=33, max_bytes=8 * 37 * 2, impl=impl)
    gradients = torch.autograd.grad(total, (hidden, weight))
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = (h @ w.t()).to(torch.bfloat16).double().requires_grad_()
    (grad_logits,) = torch.autograd.grad(reference_cross_entropy(logits, targets, vocab_size=33).sum(), logits)
    grad_logits = grad_logits.to(torch.bfloat16).double().view(-1, 37)
    expected = (grad_logits @ w).view_as(h), grad_logits.t() @ h.view(-1, 16)
    for seen, wanted in zip(gradients, expected, strict=True):
        assert seen.dtype == torch.bfloat16
        error = (seen.double() - wanted).norm() / wanted.norm()
        assert error < 2**-8, error


@pytest.mark.parametrize(
    "tokens, most, wanted",
    [(8192, 1792, 1664), (8192, 2048, 2048), (2049, 2048, 1152), (300, 1000, 384), (15, 4, 4), (15, 7, 5), (0, 10, 1)],
)
def test_chunks_are_few_and_even(tokens, most, wanted):
    """As few as fit; of whole tiles of 128 where that does not take more than fits."""
    chunk = sys.modules["megamug.losses.linear_cross_entropy"]._chunk(tokens, most)
    assert chunk == wanted and chunk <= most


def test_main_grad_takes_the_weight_gradient_in_float32():
    hidden, weight, targets, _ = sample(torch.bfloat16)
    total, _ = linear_cross_entropy(hidden, weight, targets, vocab_size=33)
    total.backward()
    plain = weight.grad
    weight.grad, weight.main_grad = None, torch.ones(37, 16)
    for _ in range(2):  # two micro-batches
        total, _ = linear_cross_entropy(hidden, weight, targets, vocab_size=33)
        (total + weight.float().sum()).backward()  # a second use of the weight, as a tied embedding makes
    torch.testing.assert_close(weight.main_grad - 1, 2 * plain.float(), rtol=1e-2, atol=1e-3)
    assert weight.main_grad.dtype == torch.float32
    assert torch.equal(weight.grad, torch.full_like(weight, 2.0))  # the other use alone


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_gradients(impl):
    need(impl)
    hidden, weight, targets, _ = sample()
    with torch.no_grad():
        quiet, _ = linear_cross_entropy(hidden, weight, targets, vocab_size=33, impl=impl)
    total, _ = linear_cross_entropy(hidden, weight.detach(), targets, vocab_size=33, impl=impl)
    torch.testing.assert_close(quiet, total)
    total.backward()
    assert weight.grad is None and hidden.grad is not None
    nothing, count = linear_cross_entropy(hidden[:0], weight, targets[:0], vocab_size=33, impl=impl)
    nothing.backward()
    assert nothing == 0 and count == 0 and not weight.grad.any()


def test_bad_input_is_a_sentence():
    hidden, weight, targets, _ = sample()

    def refused(match, *arguments, **options):
        with pytest.raises(UserError, match=match):
            linear_cross_entropy(*arguments, **options)

    refused("weight must be", hidden, weight[:, :-1], targets)
    refused("weight must be", hidden, weight.bfloat16(), targets)
    refused("outside the vocabulary", hidden, weight, targets + 30, vocab_size=33)
    refused("max_bytes is 100", hidden, weight, targets, max_bytes=100)
    refused(r"targets must be \[5, 3\]", hidden, weight, targets[:2])
    refused("one device", hidden, weight.to("meta"), targets)

"""Cross-entropy against torch's own in float64; bad input; tracing; what backward may overwrite."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megamug.errors import UserError
from megamug.losses import ops, vocab_parallel_cross_entropy
from tests.losses.common import IMPLEMENTATIONS, check_under_compile, need, reference_cross_entropy

SHAPES = [((5, 7), 33, 30), ((1,), 1, 1), ((3,), 2, 1), ((2, 3), 1000, 1000), ((4,), 5003, 4999), ((9,), 4097, 4097)]


def sample(shape, columns, vocab_size, dtype=torch.float32, scale=4.0):
    logits = (torch.randn(*shape, columns) * scale).to(dtype)
    targets = torch.randint(vocab_size, shape)
    targets.view(-1)[0] = -100 if targets.numel() > 1 else targets.view(-1)[0]
    return logits, targets, torch.rand(shape) * 2


def run(logits, targets, impl, seed_gradient=0.7, **options):
    """sum, count, per-token losses and the gradient of seed_gradient x sum."""
    x = logits.clone().requires_grad_()
    total, count, per_token = vocab_parallel_cross_entropy(x, targets, return_per_token=True, impl=impl, **options)
    (gradient,) = torch.autograd.grad(total * seed_gradient, x)
    return total.detach(), count, per_token.detach(), gradient


def reference(logits, targets, seed_gradient=0.7, **options):
    x = logits.double().requires_grad_()
    per_token = reference_cross_entropy(x, targets, **options)
    (gradient,) = torch.autograd.grad(per_token.sum() * seed_gradient, x)
    return per_token.detach(), gradient


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("smoothing, z_loss, weighted", [(0.0, 0.0, False), (0.1, 0.0, True), (0.0, 1e-3, True),
                                                         (0.3, 1e-2, False), (1.0, 0.0, False)])
def test_equals_float64(impl, smoothing, z_loss, weighted):
    need(impl)
    torch.manual_seed(0)
    for shape, columns, vocab_size in SHAPES:
        logits, targets, weights = sample(shape, columns, vocab_size)
        weights = weights if weighted else None
        total, count, per_token, gradient = run(
            logits, targets, impl, vocab_size=vocab_size, label_smoothing=smoothing, z_loss=z_loss, weights=weights
        )
        losses, wanted = reference(
            logits, targets, vocab_size=vocab_size, smoothing=smoothing, z_loss=z_loss, weights=weights
        )
        active = (targets != -100).float() * (1 if weights is None else weights)
        assert total.dtype == per_token.dtype == torch.float32
        torch.testing.assert_close(total.double(), losses.sum(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(per_token.double(), losses, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(count, active.sum())
        assert gradient[..., vocab_size:].count_nonzero() == 0
        assert gradient[targets == -100].count_nonzero() == 0


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_half_precision_is_the_float32_result_rounded(impl, dtype, rounding):
    need(impl)
    torch.manual_seed(1)
    for shape, columns, vocab_size in SHAPES:
        logits, targets, _ = sample(shape, columns, vocab_size, dtype)
        total, _, per_token, gradient = run(logits, targets, impl, vocab_size=vocab_size, label_smoothing=0.1)
        losses, wanted = reference(logits, targets, vocab_size=vocab_size, smoothing=0.1)
        torch.testing.assert_close(per_token.double(), losses, rtol=1e-6, atol=2e-6)
        assert gradient.dtype == dtype
        # the rounding, and a little where float32 falls on the other side of a tie
        torch.testing.assert_close(gradient.double(), wanted, rtol=rounding * 1.01, atol=6e-8)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_rows_are_what_torch_makes_of_them(impl, smoothing):
    """+-1e4, infinities and NaN, also where a whole block of columns holds nothing else."""
    need(impl)
    torch.manual_seed(2)
    inf, columns = math.inf, 5000
    x, t = torch.randn(13, columns) * 4, torch.randint(100, columns, (13,))
    x[0, 7], x[1, 7] = 1e4, -1e4
    x[2, t[2]], x[3, t[3]] = 1e4, -1e4
    x[4, :2500], x[5, 3], x[6] = -inf, inf, -inf
    x[7, :2600] = -inf
    x[7, 3] = math.nan  # alone among -inf in the first block
    x[8, t[8]] = -inf
    x[9] = 0
    x[10] = -inf
    x[10, t[10]] = 3.0
    x[11], t[11] = math.nan, -100  # an ignored row takes no part, whatever it holds
    x[12, -1] = math.nan
    _, _, per_token, gradient = run(x, t, impl, 1.0, label_smoothing=smoothing)
    losses, wanted = reference(x, t, 1.0, smoothing=smoothing)
    losses[11], wanted[11] = 0.0, 0.0
    torch.testing.assert_close(per_token.double(), losses, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_to_learn_from(impl):
    need(impl)
    logits = torch.randn(4, 10)
    for targets, weights in ((torch.full((4,), -100), None), (torch.tensor([1, 2, 3, 4]), torch.zeros(4))):
        total, count, per_token, gradient = run(logits, targets, impl, weights=weights)
        assert total == 0 and count == 0 and not per_token.any() and not gradient.any()
    total, count, _, gradient = run(torch.randn(0, 10), torch.empty(0, dtype=torch.int64), impl)
    assert total == 0 and count == 0 and gradient.shape == (0, 10)
    total, count, per_token, _ = run(logits, torch.tensor([7, 1, 7, 2]), impl, ignore_index=7)
    assert count == 2 and per_token[0] == per_token[2] == 0 < per_token[1]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_layouts_in_memory(impl):
    """Column slices, transposed logits, expanded targets: the same numbers as contiguous ones."""
    need(impl)
    torch.manual_seed(3)
    wide, targets = torch.randn(6, 40), torch.randint(30, (6,))
    for view in (wide[:, :30], wide[:, 3:33], wide[:, ::2], torch.randn(30, 6).t()):
        t = targets % view.shape[1]
        expected = run(view.contiguous(), t, impl)
        seen = run(view, t, impl)
        for a, b in zip(expected, seen, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    same = torch.tensor(5).expand(6)
    torch.testing.assert_close(run(wide, same, impl)[0], run(wide, same.contiguous(), impl)[0])


def test_backward_overwrites_what_the_graph_owns_and_nothing_else():
    need("compiled")
    torch.manual_seed(4)
    leaf, targets = torch.randn(6, 40, requires_grad=True), torch.randint(40, (6,))
    kept = leaf.detach().clone()
    for view in (leaf, leaf.view(3, 2, 40), leaf[:, :30]):  # memory of the leaf
        t = targets.clamp(max=29).view(view.shape[:-1])
        vocab_parallel_cross_entropy(view, t, impl="compiled")[0].backward()
        assert torch.equal(leaf, kept)

    made = leaf * 1
    total, _ = vocab_parallel_cross_entropy(made, targets, impl="compiled")
    (gradient,) = torch.autograd.grad(total, made, retain_graph=True)
    assert gradient.data_ptr() == made.data_ptr()
    with pytest.raises(RuntimeError, match="inplace"):  # a second time would read the gradient as logits
        total.backward()

    made = leaf * 1
    total, _ = vocab_parallel_cross_entropy(made, targets, impl="compiled", inplace_backward=False)
    total.backward()
    assert torch.equal(made, kept)

    probabilities = torch.softmax(leaf, dim=-1)  # its backward reads its own result
    total, _ = vocab_parallel_cross_entropy(probabilities, targets, impl="compiled")
    with pytest.raises(RuntimeError, match="inplace"):
        total.backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bad_input_is_a_sentence(impl):
    need(impl)
    logits, targets = torch.randn(4, 10), torch.tensor([0, 1, 2, 9])

    def refused(match, *arguments, **options):
        with pytest.raises(UserError, match=match):
            vocab_parallel_cross_entropy(*arguments, impl=impl, **options)

    refused("target 10 is outside the vocabulary", logits, torch.tensor([0, 1, 2, 10]))
    refused("target 9 is outside the vocabulary", logits, targets, vocab_size=9)
    refused("target -1 is outside", logits, torch.tensor([0, 1, 2, -1]))
    refused("targets must be int64", logits, targets.int())
    refused(r"targets must be \[4\]", logits, targets[:3])
    refused("float32, bfloat16 or float16", logits.long(), targets)
    refused("weights must be float32", logits, targets, weights=torch.ones(4, dtype=torch.float64))
    refused("weights must be float32", logits, targets, weights=torch.ones(5))
    refused("not differentiable", logits, targets, weights=torch.ones(4, requires_grad=True))
    refused("vocab_size is 11", logits, targets, vocab_size=11)
    refused("vocab_size is 0", logits, targets, vocab_size=0)
    refused("label_smoothing", logits, targets, label_smoothing=1.5)
    refused("z_loss", logits, targets, z_loss=-1.0)
    refused("one device", logits, targets.to("meta"))
    with pytest.raises(UserError, match="impl must be"):
        vocab_parallel_cross_entropy(logits, targets, impl="fast")
    if impl == "compiled":
        refused("use impl='torch'", logits.double(), targets)


def test_operators_refuse_what_the_public_function_would_not_send():
    """The kernel's own checks: no target leads out of bounds even if it is called directly."""
    need("compiled")
    op, x = torch.ops.megamug.cross_entropy_statistics, torch.randn(4, 10)
    for arguments in (
        (x, torch.tensor([0, 1, 2, 10]), 0, 10, 10, -100, False),
        (x, torch.tensor([0, 1, 2, -5]), 0, 10, 10, -100, False),
        (x, torch.tensor([0, 1, 2]), 0, 10, 10, -100, False),
        (x, torch.tensor([0, 1, 2, 3]), 0, 11, 11, -100, False),
        (x.t(), torch.zeros(10, dtype=torch.int64), 0, 4, 4, -100, False),
        (x.double(), torch.tensor([0, 1, 2, 3]), 0, 10, 10, -100, False),
    ):
        with pytest.raises(RuntimeError, match="megamug"):
            op(*arguments)


def operator_samples(dtype=torch.float32):
    torch.manual_seed(5)
    logits, targets, weights = sample((6,), 33, 30, dtype)
    statistics = ops.torch.ops.megamug.cross_entropy_statistics(logits, targets, 0, 30, 30, -100, True)
    _, normalisers = torch.ops.megamug.cross_entropy(
        logits, statistics[None], targets, None, 0, 30, 30, -100, 0.1, 1e-3, False
    )
    terms = (0, 30, 30, -100, 0.1, 1e-3)
    return {
        "cross_entropy_statistics": (logits, targets, 0, 30, 30, -100, True),
        "cross_entropy": (logits.clone().requires_grad_(), statistics[None], targets, weights, *terms, False),
        "cross_entropy_gradient": (logits, targets, weights, normalisers, torch.ones(6), *terms),
        "cross_entropy_gradient_": (logits, targets, None, normalisers, torch.ones(6), *terms),
    }


@pytest.mark.parametrize("name", ["cross_entropy_statistics", "cross_entropy", "cross_entropy_gradient",
                                  "cross_entropy_gradient_"])
def test_opcheck(name):
    need("compiled")
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(getattr(torch.ops.megamug, name).default, operator_samples(dtype)[name])


def test_gradcheck():
    torch.manual_seed(6)
    logits, targets, weights = sample((3, 2), 7, 5)
    options = {"vocab_size": 5, "label_smoothing": 0.1, "z_loss": 1e-2, "weights": weights}

    def loss(x, impl):
        return vocab_parallel_cross_entropy(x, targets, impl=impl, **options)[0]

    torch.autograd.gradcheck(lambda x: loss(x, "torch"), logits.double().requires_grad_())
    need("compiled")
    torch.autograd.gradcheck(lambda x: loss(x, "compiled"), logits.requires_grad_(), eps=1e-2, atol=5e-3, rtol=1e-2)


def test_under_compile():
    need("compiled")
    torch.manual_seed(7)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8)
    targets = torch.randint(50, (6,))

    def loss(h, impl="compiled"):
        return vocab_parallel_cross_entropy(F.linear(h, weight), targets, label_smoothing=0.1, impl=impl)[0]

    check_under_compile(loss, hidden)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_offsets_beyond_two_to_the_31_elements(impl):
    """Two rows 2^31 elements apart, as in logits of more than 2^31: the memory between them is never touched."""
    need(impl)
    torch.manual_seed(8)
    apart = torch.empty(2**31 + 1000, dtype=torch.bfloat16).as_strided((2, 1000), (2**31, 1))
    near, targets = torch.randn(2, 1000).bfloat16(), torch.tensor([3, 999])
    apart.copy_(near)
    x, y = apart.detach().requires_grad_(), near.requires_grad_()
    far, close = (vocab_parallel_cross_entropy(v, targets, impl=impl)[0] for v in (x, y))
    assert torch.equal(far, close)
    for a, b in zip(torch.autograd.grad(far, x), torch.autograd.grad(close, y), strict=True):
        assert torch.equal(a, b)
    if impl == "compiled":
        place = (0, 1000, 1000, -100)
        statistics = torch.ops.megamug.cross_entropy_statistics(apart, targets, *place, False)
        _, normalisers = torch.ops.megamug.cross_entropy(
            apart, statistics[None], targets, None, *place, 0.0, 0.0, False
        )
        arguments = (targets, None, normalisers, torch.ones(2), *place, 0.0, 0.0)
        expected = torch.ops.megamug.cross_entropy_gradient(apart, *arguments)
        torch.ops.megamug.cross_entropy_gradient_(apart, *arguments)
        assert torch.equal(apart, expected)

"""The CUDA kernels against the torch implementation on the same device and float64 on the CPU. Needs a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from megamug.losses import linear_cross_entropy, masked_patch_loss, ops, vocab_parallel_cross_entropy
from tests.losses.common import reference_cross_entropy, reference_masked_patch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not ops.libraries().cuda, reason=ops.libraries().reason),
]
# columns, columns that exist: vectors whole and ragged, rows that start off a 16-byte boundary, several unrolled rounds
COLUMNS = [(1, 1), (33, 30), (1000, 1000), (5003, 4999), (32768, 32768), (65537, 65000)]


def run(logits, targets, impl, **options):
    x = logits.clone().requires_grad_()
    result = vocab_parallel_cross_entropy(x * 1, targets, return_per_token=True, impl=impl, **options)
    (gradient,) = torch.autograd.grad(result[0] * 0.7, x)
    return result[0].detach(), result[2].detach(), gradient


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 1e-3)])
def test_cross_entropy(dtype, rounding, smoothing, z_loss):
    torch.manual_seed(0)
    for columns, vocab_size in COLUMNS:
        logits, targets = (torch.randn(37, columns) * 4).to(dtype), torch.randint(vocab_size, (37,))
        targets[1], weights = -100, torch.rand(37)
        options = {"vocab_size": vocab_size, "label_smoothing": smoothing, "z_loss": z_loss}
        total, per_token, gradient = run(logits.cuda(), targets.cuda(), "compiled", weights=weights.cuda(), **options)
        x = logits.double().requires_grad_()
        losses = reference_cross_entropy(
            x, targets, vocab_size=vocab_size, weights=weights, smoothing=smoothing, z_loss=z_loss
        )
        (wanted,) = torch.autograd.grad(losses.sum() * 0.7, x)
        torch.testing.assert_close(per_token.cpu().double(), losses.detach(), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(total.cpu().double(), losses.detach().sum(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=rounding * 1.01, atol=1e-7)


def test_extreme_rows():
    torch.manual_seed(1)
    inf, columns = math.inf, 20000
    x, t = torch.randn(8, columns) * 4, torch.randint(100, columns, (8,))
    x[0, 7], x[1, t[1]], x[2, t[2]] = 1e4, 1e4, -1e4
    x[3, :16384], x[4, 3], x[5] = -inf, inf, -inf
    x[6, :19000] = -inf
    x[6, 3] = math.nan
    x[7], t[7] = math.nan, -100
    seen, expected = (run(x.cuda(), t.cuda(), impl) for impl in ("compiled", "torch"))
    for a, b in zip(seen[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_bad_numbers_are_reported_without_reading_out_of_bounds():
    logits, targets = torch.randn(4, 100, device="cuda"), torch.tensor([1, 100, 2**40, -7], device="cuda")
    _, per_token, gradient = run(logits, targets, "compiled")
    assert per_token.isnan().tolist() == [False, True, True, True]
    assert gradient.isnan().all(dim=1).tolist() == [False, True, True, True]
    images, predictions = torch.randn(2, 3, 32, 32, device="cuda"), torch.randn(2, 4, 768, device="cuda")
    for bad in (4, -1, 2**40, 1):
        ids = torch.tensor([[0, 1, 2], [0, 1, bad]], device="cuda")
        total, _ = masked_patch_loss(images, predictions, ids, patch_size=16, impl="compiled")
        assert total.isnan()


@pytest.mark.parametrize("image_type", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_masked_patch(image_type, dtype, rounding):
    torch.manual_seed(2)
    for p, grid, masked in ((16, (2, 3), 4), (7, (1, 5), 3), (14, (2, 2), 3), (72, (1, 2), 1)):
        images = torch.randint(256, (2, 3, grid[0] * p, grid[1] * p), dtype=torch.uint8)
        options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
        if image_type != torch.uint8:
            images, options = (images / 100 - 1).to(image_type), {}
        patches = grid[0] * grid[1]
        ids = torch.stack([torch.randperm(patches)[:masked] for _ in range(2)])
        for rows in (patches, masked):
            for norm_pix in (True, False):
                predictions = torch.randn(2, rows, 3 * p * p).to(dtype)
                x = predictions.cuda().requires_grad_()
                total, _ = masked_patch_loss(
                    images.cuda(), x, ids.cuda(), patch_size=p, norm_pix=norm_pix, impl="compiled", **options
                )
                (gradient,) = torch.autograd.grad(total * 0.3, x)
                y = predictions.double().requires_grad_()
                wanted = reference_masked_patch(images, y, ids, p, norm_pix, **options)
                (wanted_gradient,) = torch.autograd.grad(wanted * 0.3, y)
                torch.testing.assert_close(total.detach().cpu().double(), wanted.detach(), rtol=2e-6, atol=1e-7)
                torch.testing.assert_close(gradient.cpu().double(), wanted_gradient, rtol=rounding * 1.01, atol=1e-7)


def test_linear_cross_entropy():
    torch.manual_seed(3)
    hidden = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(1000, 128, device="cuda") * 0.1).bfloat16().requires_grad_()
    targets = torch.randint(1000, (64,), device="cuda")
    results = []
    for impl in ("torch", "compiled"):
        total, _ = linear_cross_entropy(hidden, weight, targets, max_bytes=10 * 2000, impl=impl)
        results.append((total.detach(), *torch.autograd.grad(total, (hidden, weight))))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        assert (a.float() - b.float()).norm() / b.float().norm() < 2**-8


def test_more_than_two_to_the_31_logits():
    free, _ = torch.cuda.mem_get_info()
    rows, columns = 16400, 131072
    if free < 2 * rows * columns * 2 + 2**30:
        pytest.skip("needs 10 GB of free device memory")
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    targets = torch.full((rows,), columns - 1, device="cuda")
    logits[-1, -1] = 20.0
    x = logits.requires_grad_()
    total, count, per_token = vocab_parallel_cross_entropy(x * 1, targets, return_per_token=True, impl="compiled")
    expected = math.log(columns - 1 + math.exp(20.0)) - 20.0
    assert per_token[0].item() == pytest.approx(math.log(columns), rel=1e-6)
    assert per_token[-1].item() == pytest.approx(expected, rel=1e-3) and count == rows
    total.backward()
    assert x.grad[-2, -1].item() == pytest.approx(-1.0, rel=1e-2)
    assert x.grad[-1, 0].item() == pytest.approx(math.exp(-20.0) / (1 + columns * math.exp(-20.0)), rel=1e-2)


@pytest.mark.parametrize("name", ["cross_entropy_statistics", "cross_entropy", "cross_entropy_gradient"])
def test_opcheck(name):
    torch.manual_seed(4)
    logits, targets = torch.randn(6, 33, device="cuda"), torch.randint(30, (6,), device="cuda")
    library, place = torch.ops.megamug, (0, 30, 30, -100)
    statistics = library.cross_entropy_statistics(logits, targets, *place, True)[None]
    _, normalisers = library.cross_entropy(logits, statistics, targets, None, *place, 0.1, 0.0, False)
    arguments = {
        "cross_entropy_statistics": (logits, targets, *place, True),
        "cross_entropy": (logits.clone().requires_grad_(), statistics, targets, None, *place, 0.1, 0.0, False),
        "cross_entropy_gradient": (logits, targets, None, normalisers, torch.ones(6, device="cuda"), *place, 0.1, 0.0),
    }[name]
    torch.library.opcheck(getattr(library, name).default, arguments)

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_a_target_are_not_read(dtype):
    """Their logits may be anything; in a tensor whose rows begin off 16-byte boundaries, padding included."""
    torch.manual_seed(5)
    for columns in (100, 4099, 70001):
        logits, targets = (torch.randn(9, columns + 3, device="cuda") * 3).to(dtype), torch.randint(99, (9,)).cuda()
        targets[::2], logits[::2] = -100, math.nan
        for x in (logits[:, 3:], logits[:, : columns + 1]):
            y = x.detach().requires_grad_()
            total, count, per_token = vocab_parallel_cross_entropy(
                y, targets, vocab_size=columns, return_per_token=True, impl="compiled"
            )
            (gradient,) = torch.autograd.grad(total, y)
            wanted = reference_cross_entropy(x[1::2].cpu(), targets[1::2].cpu(), vocab_size=columns)
            torch.testing.assert_close(per_token[1::2].cpu().double(), wanted, rtol=2e-6, atol=2e-6)
            assert count == 4 and not per_token[::2].any() and not gradient[::2].any()
            assert gradient.isfinite().all() and not gradient[:, columns:].any()
            assert (gradient[1::2] < 0).sum() == 4  # the target of each


def test_bad_numbers_are_reported_without_reading_out_of_bounds():
    logits, targets = torch.randn(4, 100, device="cuda"), torch.tensor([1, 100, 2**40, -7], device="cuda")
    _, per_token, gradient = run(logits, targets, "compiled")
    assert per_token.isnan().tolist() == [False, True, True, True]
    assert gradient.isnan().all(dim=1).tolist() == [False, True, True, True]
    images, predictions = torch.randn(2, 3, 32, 32, device="cuda"), torch.randn(2, 4, 768, device="cuda")
    for bad in (4, -1, 2**40, 1):
        ids = torch.tensor([[0, 1, 2], [0, 1, bad]], device="cuda")
        for rows in (4, 3):  # predictions of all patches, of the masked ones
            x = predictions[:, :rows].clone().requires_grad_()
            total, _ = masked_patch_loss(images, x, ids, patch_size=16, impl="compiled")
            assert total.isnan()
            (gradient,) = torch.autograd.grad(total * 0.5, x)
            assert gradient[0, :3].isfinite().all() and gradient[1].isnan().any()


@pytest.mark.parametrize("image_type", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_masked_patch(image_type, dtype, rounding):
    """The gradient is rounded once, whatever comes in."""
    torch.manual_seed(2)
    for p, grid, masked in ((16, (2, 3), 4), (8, (3, 3), 5), (7, (1, 5), 3), (14, (2, 2), 3), (72, (1, 2), 1)):
        images = torch.randint(256, (2, 3, grid[0] * p, grid[1] * p), dtype=torch.uint8)
        options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
        if image_type != torch.uint8:
            images, options = (images / 100 - 1).to(image_type), {}
        patches = grid[0] * grid[1]
        ids = torch.stack([torch.randperm(patches)[:masked] for _ in range(2)])
        for rows in (patches, masked):
            for norm_pix in (True, False):
                predictions = torch.randn(2, rows, 3 * p * p).to(dtype)
                y = predictions.double().requires_grad_()
                wanted = reference_masked_patch(images, y, ids, p, norm_pix, **options)
                (wanted_gradient,) = torch.autograd.grad(wanted, y)
                for factor in (1.0, 0.3):
                    x = predictions.cuda().requires_grad_()
                    total, _ = masked_patch_loss(
                        images.cuda(), x, ids.cuda(), patch_size=p, norm_pix=norm_pix, impl="compiled", **options
                    )
                    (gradient,) = torch.autograd.grad(total * factor, x)
                    seen = gradient.cpu().double()
                    torch.testing.assert_close(total.detach().cpu().double(), wanted.detach(), rtol=2e-6, atol=1e-7)
                    torch.testing.assert_close(seen, wanted_gradient * factor, rtol=rounding * 1.01, atol=1e-7)


@pytest.mark.parametrize("dtype, precision", [(torch.float32, 2e-3), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
@pytest.mark.parametrize("main_grad", [False, True])
def test_linear_cross_entropy(dtype, precision, main_grad):
    """Many chunks against the product in one piece; fp32 products may be TF32."""
    torch.manual_seed(3)
    hidden = torch.randn(300, 128, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(1000, 128, device="cuda") * 0.1).to(dtype).requires_grad_()
    targets = torch.randint(1000, (300,), device="cuda")
    plain, _ = vocab_parallel_cross_entropy(hidden @ weight.t(), targets, impl="compiled")
    expected = torch.autograd.grad(plain * 0.7, (hidden, weight))
    for tokens in (1, 37, 128, 300):
        if main_grad:
            weight.main_grad = torch.ones(1000, 128, device="cuda")
        max_bytes = tokens * 1000 * dtype.itemsize
        total, _ = linear_cross_entropy(hidden, weight, targets, max_bytes=max_bytes, impl="compiled")
        seen = list(torch.autograd.grad(total * 0.7, (hidden, weight)))
        if main_grad:
            assert not seen[1].any()
            seen[1] = weight.main_grad - 1
        torch.testing.assert_close(total, plain, rtol=1e-4, atol=0)  # logits may be rounded differently
        for a, b in zip(seen, expected, strict=True):
            assert (a.float() - b.float()).norm() / b.float().norm() < precision


def test_losses_in_a_cuda_graph():
    """Forward and backward of all three, captured once and replayed on other data."""
    torch.manual_seed(6)
    images, predictions = torch.randn(4, 3, 32, 32, device="cuda"), torch.randn(4, 3, 768, device="cuda").bfloat16()
    ids = torch.stack([torch.randperm(4)[:3] for _ in range(4)]).cuda()
    hidden, weight = torch.randn(64, 32, device="cuda").bfloat16(), torch.randn(500, 32, device="cuda").bfloat16()
    logits, targets = torch.randn(64, 500, device="cuda").bfloat16(), torch.randint(500, (64,), device="cuda")
    scale = torch.full((), 0.3, device="cuda")
    inputs = [x.requires_grad_() for x in (predictions, hidden, weight, logits)]

    def step():
        total = masked_patch_loss(images, predictions, ids, patch_size=16, impl="compiled")[0]
        total = total + linear_cross_entropy(hidden, weight, targets, max_bytes=20 * 1000, impl="compiled")[0]
        total = total + vocab_parallel_cross_entropy(logits * 1, targets, impl="compiled")[0]
        return total.detach(), *torch.autograd.grad(total * scale, inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in (*inputs, images):
            x.copy_(torch.randn_like(x))
        ids.copy_(ids.flip(0))
        targets.copy_(torch.randint(500, (64,)))
        scale.fill_(1.0)
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-4)


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
    # lse - 20, of an lse that float32 has to multiples of 2^-19
    assert per_token[-1].item() == pytest.approx(expected, rel=0, abs=2**-19) and count == rows
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


def test_opcheck_masked_patch():
    images, x = torch.randn(2, 3, 16, 16, device="cuda"), torch.randn(2, 3, 192, device="cuda", requires_grad=True)
    ids, form = torch.tensor([[0, 1, 3], [3, 2, 0]], device="cuda"), (8, True, [], [])
    library = torch.ops.megamug
    torch.library.opcheck(library.masked_patch.default, (images, x, ids, *form, True))
    gradient, incoming = torch.empty_like(x), torch.full((), 0.5, device="cuda")
    arguments = (gradient.detach(), images, x.detach(), ids, *form, incoming)
    torch.library.opcheck(library.masked_patch_gradient_.default, arguments)

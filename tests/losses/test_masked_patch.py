"""The masked-patch loss against its definition in float64; bad input; tracing."""

from __future__ import annotations

import pytest
import torch

from megamug.errors import UserError
from megamug.losses import masked_patch_loss, patchify
from tests.losses.common import IMPLEMENTATIONS, check_under_compile, need, reference_masked_patch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sample(image_type, p, grid, masked, everything, dtype=torch.float32, batch=2):
    rows, columns = grid
    images = torch.randint(256, (batch, 3, rows * p, columns * p), dtype=torch.uint8)
    options = {"mean": MEAN, "std": STD}
    if image_type != torch.uint8:
        images, options = (images / 100 - 1).to(image_type), {}
    ids = torch.stack([torch.randperm(rows * columns)[:masked] for _ in range(batch)])
    predictions = torch.randn(batch, rows * columns if everything else masked, 3 * p * p).to(dtype)
    return images, predictions, ids, options


def run(images, predictions, ids, seed_gradient=1.0, **options):
    x = predictions.clone().requires_grad_()
    total, count = masked_patch_loss(images, x, ids, **options)
    (gradient,) = torch.autograd.grad(total * seed_gradient, x)
    return total.detach(), count, gradient


def reference(images, predictions, ids, p, norm_pix, mean=None, std=None):
    x = predictions.double().requires_grad_()
    total = reference_masked_patch(images, x, ids, p, norm_pix, mean, std)
    (gradient,) = torch.autograd.grad(total, x)
    return total.detach(), gradient


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("image_type", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p, grid, masked", [(16, (2, 3), 4), (8, (3, 2), 6), (7, (1, 5), 3), (14, (2, 2), 3),
                                             (1, (4, 4), 5), (20, (1, 2), 1)])
def test_equals_float64(impl, image_type, p, grid, masked):
    need(impl)
    torch.manual_seed(p)
    for everything in (True, False):
        for norm_pix in (True, False) if p > 1 else (False,):
            images, predictions, ids, options = sample(image_type, p, grid, masked, everything)
            total, count, gradient = run(
                images, predictions, ids, 0.3, patch_size=p, norm_pix=norm_pix, impl=impl, **options
            )
            wanted, wanted_gradient = reference(images, predictions, ids, p, norm_pix, **options)
            assert count == ids.numel() and total.dtype == torch.float32
            torch.testing.assert_close(total.double(), wanted, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(gradient.double(), wanted_gradient * 0.3, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_half_precision_is_the_float32_result_rounded(impl, dtype, rounding):
    """Once, whatever the incoming gradient is."""
    need(impl)
    torch.manual_seed(1)
    images, predictions, ids, _ = sample(dtype, 16, (2, 2), 3, True, dtype)
    wanted, wanted_gradient = reference(images, predictions, ids, 16, True)
    for factor in (1.0, 0.3):
        total, _, gradient = run(images, predictions, ids, factor, patch_size=16, impl=impl)
        assert gradient.dtype == dtype
        torch.testing.assert_close(total.double(), wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient.double(), wanted_gradient * factor, rtol=rounding * 1.01, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_patches_of_one_colour(impl):
    """Variance 0: the epsilon keeps the target at 0, so only the predictions are left."""
    need(impl)
    images = torch.full((1, 3, 32, 32), 117, dtype=torch.uint8)
    predictions, ids = torch.randn(1, 4, 768), torch.arange(4)[None]
    total, _ = masked_patch_loss(images, predictions, ids, patch_size=16, mean=(0.5,) * 3, std=(0.25,) * 3, impl=impl)
    torch.testing.assert_close(total, predictions.square().mean(-1).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_order_of_values_and_layouts_in_memory(impl):
    need(impl)
    torch.manual_seed(2)
    images, predictions, ids, _ = sample(torch.float32, 4, (2, 3), 6, True)
    exact, _ = masked_patch_loss(images, patchify(images, 4), ids, patch_size=4, norm_pix=False, impl=impl)
    assert exact == 0
    assert patchify(images, 4)[1, 4].tolist() == images[1, :, 4:8, 4:8].permute(1, 2, 0).reshape(-1).tolist()
    expected = run(images, predictions, ids, patch_size=4, impl=impl)
    strided = torch.randn(2, 6, 96)
    strided[..., ::2] = predictions
    seen = run(images.to(memory_format=torch.channels_last), strided[..., ::2], ids, patch_size=4, impl=impl)
    torch.testing.assert_close(seen[0], expected[0])
    torch.testing.assert_close(seen[2], expected[2])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_masked_patches(impl):
    need(impl)
    images, predictions, ids, _ = sample(torch.float32, 4, (2, 2), 0, True)
    total, count, gradient = run(images, predictions, ids, patch_size=4, impl=impl)
    assert total == 0 and count == 0 and not gradient.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bad_input_is_a_sentence(impl):
    need(impl)
    images, predictions, ids, options = sample(torch.uint8, 8, (2, 2), 3, True)
    good = {"images": images, "predictions": predictions, "masked_ids": ids, "patch_size": 8, **options}

    def refused(match, **changes):
        with pytest.raises(UserError, match=match):
            masked_patch_loss(**{**good, **changes}, impl=impl)

    refused("patches of 7", patch_size=7)
    refused("patches of 0", patch_size=0)
    refused("batch, 3, height", images=images[:, :2])
    refused("need mean and std", mean=None)
    refused("need mean and std", std=(0.0, 1.0, 1.0))
    refused("belong to uint8", images=images.float())
    refused("uint8 or floating", images=images.int())
    refused("predictions must be floating", predictions=predictions.int())
    refused("predictions must be", predictions=predictions[..., :-1])
    refused("predictions must be", predictions=predictions[:, :2])
    refused("masked_ids must be int64", masked_ids=ids.int())
    refused("masked_ids must be int64", masked_ids=ids[:1])
    refused("masked_ids hold 4", masked_ids=torch.tensor([[0, 1, 4], [0, 1, 2]]))
    refused("masked_ids hold -1", masked_ids=torch.tensor([[0, 1, -1], [0, 1, 2]]))
    refused("twice", masked_ids=torch.tensor([[0, 1, 0], [0, 1, 2]]))
    refused("one device", predictions=predictions.to("meta"))


def test_operator_refuses_bad_patch_numbers():
    need("compiled")
    images, predictions, _, _ = sample(torch.float32, 8, (2, 2), 3, True)
    for bad in (4, -1, 1):
        ids = torch.tensor([[0, 1, 2], [0, 1, bad]])
        with pytest.raises(RuntimeError, match="masked_ids"):
            torch.ops.megamug.masked_patch(images, predictions, ids, 8, True, [], [], True)


def test_second_backward_raises_rather_than_scaling_twice():
    need("compiled")
    images, predictions, ids, _ = sample(torch.float32, 8, (2, 2), 3, True)
    total, _ = masked_patch_loss(images, predictions.requires_grad_(), ids, patch_size=8, impl="compiled")
    (total * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        (total * 2).backward()


def test_opcheck():
    need("compiled")
    torch.manual_seed(3)
    for image_type, dtype in ((torch.uint8, torch.float32), (torch.bfloat16, torch.bfloat16)):
        images, predictions, ids, options = sample(image_type, 8, (2, 2), 3, True, dtype)
        mean_std = [list(v) for v in options.values()] or [[], []]
        arguments = (images, predictions.requires_grad_(), ids, 8, True, *mean_std, True)
        torch.library.opcheck(torch.ops.megamug.masked_patch.default, arguments)
        form = images, predictions.detach(), ids, 8, True, *mean_std, torch.tensor(0.5)
        gradient = torch.empty_like(predictions).detach()
        torch.library.opcheck(torch.ops.megamug.masked_patch_gradient_.default, (gradient, *form))


def test_gradcheck():
    torch.manual_seed(4)
    images, predictions, ids, options = sample(torch.uint8, 2, (2, 2), 3, True)

    def loss(x, impl):
        return masked_patch_loss(images, x, ids, patch_size=2, impl=impl, **options)[0]

    torch.autograd.gradcheck(lambda x: loss(x, "torch"), predictions.double().requires_grad_())
    need("compiled")
    torch.autograd.gradcheck(lambda x: loss(x, "compiled"), predictions.requires_grad_(), eps=1e-2, atol=1e-2)


def test_under_compile():
    need("compiled")
    torch.manual_seed(5)
    images, _, ids, options = sample(torch.uint8, 8, (2, 2), 3, True)
    hidden, weight = torch.randn(2, 4, 5, requires_grad=True), torch.randn(192, 5)

    def loss(h, impl="compiled"):
        return masked_patch_loss(images, h @ weight.t(), ids, patch_size=8, impl=impl, **options)[0] * 0.3

    check_under_compile(loss, hidden)

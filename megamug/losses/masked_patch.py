"""Masked-patch reconstruction loss (He et al., *Masked Autoencoders Are Scalable Vision Learners*, arXiv 2111.06377).

Axes: B images, 3 channels, H x W pixels, p patch size, N = (H/p)(W/p) patches in row-major grid order, M masked
patches, D = p*p*3 values of a patch in the order (row, column, channel).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megamug.errors import UserError
from megamug.losses import ops

VARIANCE_EPSILON = 1e-6
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def masked_patch_loss(
    images: Tensor,
    predictions: Tensor,
    masked_ids: Tensor,
    *,
    patch_size: int,
    norm_pix: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, int]:
    """Sum over the masked patches of the mean squared error of a patch, and their number.

    Args:
        images: [B, 3, H, W]. uint8 with `mean` and `std` (three numbers each, for values in [0, 1]: the target is
            `(image / 255 - mean) / std`), or a floating dtype, already normalised (`mean` and `std` None).
        predictions: [B, N, D], one row for every patch of the grid, or [B, M, D], masked patches only, in the order
            of `masked_ids`. If M = N the first reading holds.
        masked_ids: [B, M] int64, distinct patch numbers of each image, in [0, N).
        patch_size: p. H and W must be multiples of it.
        norm_pix: normalise each target patch by its own mean and unbiased variance: `(x - mean) / sqrt(var + 1e-6)`.
        impl: "auto", "compiled" or "torch".

    Returns:
        `(sum, count)`: a float32 scalar (float64 where the predictions are) and `B * M`, a python int. Arithmetic is
        float32 whatever the inputs are. The gradient flows to the predictions only; the images are data. The compiled
        form makes the gradient in the forward pass, right for an incoming gradient of 1; backward makes it anew, in
        place, for any other, so a second backward through a retained graph raises (on CUDA always).

    Raises:
        UserError: wrong shape, dtype or device; sizes that are not multiples of p; a patch number outside the grid or
            repeated. On CUDA the numbers are checked by the kernel, without waiting for it: the sum is then NaN and
            nothing is read or written out of bounds.
    """
    _check(images, predictions, masked_ids, patch_size, mean, std)
    compiled = ops.choose(impl, images, predictions, masked_ids)
    if masked_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_patch_numbers(masked_ids, _patch_count(images, patch_size))
    function = ops.masked_patch_sum if compiled else masked_patch_sum_torch
    total = function(images, predictions, masked_ids, patch_size, norm_pix, mean, std)
    return total, masked_ids.numel()


def masked_patch_sum_torch(
    images: Tensor,
    predictions: Tensor,
    masked_ids: Tensor,
    patch_size: int,
    norm_pix: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    """The sum in plain torch, differentiable by autograd: the specification of the kernel."""
    dtype = torch.float64 if predictions.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        pixels = images.to(dtype)
        if mean is not None and std is not None:
            shift, scale = (torch.tensor(v, dtype=dtype, device=images.device).view(3, 1, 1) for v in (mean, std))
            pixels = (pixels / 255 - shift) / scale
        target = _take(patchify(pixels, patch_size), masked_ids)
        if norm_pix:
            variance, average = torch.var_mean(target, dim=-1, keepdim=True, correction=1)
            target = (target - average) / (variance + VARIANCE_EPSILON).sqrt()
    if predictions.shape[1] == _patch_count(images, patch_size):
        predictions = _take(predictions, masked_ids)
    return (predictions.to(dtype) - target).square().mean(dim=-1).sum()


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, 3, H, W] -> [B, N, D]: patches in row-major grid order, each laid out (row, column, channel)."""
    batch, channels, height, width = images.shape
    p = patch_size
    grid = images.reshape(batch, channels, height // p, p, width // p, p)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * channels)


def _take(patches: Tensor, ids: Tensor) -> Tensor:
    """[B, N, D], [B, M] -> [B, M, D]."""
    return patches.gather(1, ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def _patch_count(images: Tensor, patch_size: int) -> int:
    return (images.shape[2] // patch_size) * (images.shape[3] // patch_size)


def _check(images, predictions, masked_ids, patch_size, mean, std) -> None:
    if images.dim() != 4 or images.shape[1] != 3:
        raise UserError(f"masked_patch_loss: images must be [batch, 3, height, width], not {list(images.shape)}")
    height, width = images.shape[2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise UserError(
            f"masked_patch_loss: {height} x {width} pixels cannot be cut into patches of {patch_size}; "
            "height and width must be multiples of the patch size"
        )
    if images.dtype == torch.uint8:
        if mean is None or std is None or len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
            raise UserError("masked_patch_loss: uint8 images need mean and std, three numbers each, std above 0")
    elif images.dtype not in _FLOATS:
        raise UserError(f"masked_patch_loss: images must be uint8 or floating point, not {images.dtype}")
    elif mean is not None or std is not None:
        raise UserError("masked_patch_loss: mean and std belong to uint8 images; these are floating point")
    if predictions.dtype not in _FLOATS:
        raise UserError(f"masked_patch_loss: predictions must be floating point, not {predictions.dtype}")
    if masked_ids.dtype != torch.int64 or masked_ids.dim() != 2 or masked_ids.shape[0] != images.shape[0]:
        raise UserError(
            f"masked_patch_loss: masked_ids must be int64 [{images.shape[0]}, masked patches], "
            f"not {masked_ids.dtype} {list(masked_ids.shape)}"
        )
    patches, masked, values = _patch_count(images, patch_size), masked_ids.shape[1], patch_size * patch_size * 3
    shape = tuple(predictions.shape)
    if shape not in ((images.shape[0], patches, values), (images.shape[0], masked, values)):
        raise UserError(
            f"masked_patch_loss: predictions must be [{images.shape[0]}, {patches} (all patches) or {masked} (masked), "
            f"{values}], not {list(shape)}"
        )
    if not images.device == predictions.device == masked_ids.device:
        raise UserError(
            f"masked_patch_loss: images ({images.device}), predictions ({predictions.device}) and masked_ids "
            f"({masked_ids.device}) must be on one device"
        )


def _check_patch_numbers(masked_ids: Tensor, patches: int) -> None:
    if masked_ids.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(masked_ids))
    if low < 0 or high >= patches:
        wrong = low if low < 0 else high
        raise UserError(f"masked_patch_loss: masked_ids hold {wrong}; the grid has patches 0 to {patches - 1}")
    seen = torch.zeros(masked_ids.shape[0], patches, dtype=torch.bool).scatter_(1, masked_ids, True)
    if int(seen.sum()) != masked_ids.numel():
        raise UserError("masked_patch_loss: masked_ids name a patch twice in one image")

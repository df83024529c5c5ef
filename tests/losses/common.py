"""Independent references in float64 and the spawning of gloo ranks, shared by the tests of the losses."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from megamug.losses import ops

IMPLEMENTATIONS = ["torch", "compiled"]


def need(impl: str) -> None:
    if impl == "compiled" and not ops.libraries().cpu:
        pytest.skip(ops.libraries().reason)


def reference_cross_entropy(logits, targets, *, vocab_size=None, weights=None, smoothing=0.0, z_loss=0.0, ignore=-100):
    """Weighted loss of each token in float64, by torch's own cross-entropy; differentiable."""
    x = logits.double()[..., :vocab_size].reshape(targets.numel(), -1)
    t = targets.reshape(-1)
    loss = F.cross_entropy(x, t, reduction="none", label_smoothing=smoothing, ignore_index=ignore)
    if z_loss:
        loss = loss + z_loss * torch.where(t != ignore, x.logsumexp(dim=-1) ** 2, 0.0)
    if weights is not None:
        loss = loss * weights.reshape(-1).double()
    return loss.view(targets.shape)


def reference_masked_patch(images, predictions, ids, p: int, norm_pix: bool, mean=None, std=None) -> Tensor:
    """The definition, patch by patch and value by value order, in float64."""
    x = images.double()
    if mean is not None:
        x = torch.stack([(x[:, c] / 255 - mean[c]) / std[c] for c in range(3)], dim=1)
    across, total = images.shape[3] // p, torch.zeros((), dtype=torch.float64)
    everything = predictions.shape[1] == (images.shape[2] // p) * across
    for b, row in enumerate(ids.tolist()):
        for m, n in enumerate(row):
            top, left = n // across * p, n % across * p
            target = x[b, :, top : top + p, left : left + p].movedim(0, -1).reshape(-1)
            if norm_pix:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            total = total + (predictions[b, n if everything else m].double() - target).square().mean()
    return total


def check_under_compile(loss: Callable, x: Tensor) -> None:
    """`loss(x)`, compiled kernels in one graph of torch.compile, against `loss(x, "torch")`: values and gradients."""
    expected = loss(x, "torch")
    (expected_gradient,) = torch.autograd.grad(expected, x)
    seen = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    (gradient,) = torch.autograd.grad(seen, x)
    torch.testing.assert_close(seen, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def on_ranks(function: Callable, ranks: int, *arguments) -> None:
    """Run `function(rank, ranks, *arguments)` on gloo ranks; a failing rank fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(ranks, os.path.join(folder, "store"), function, arguments), nprocs=ranks)


def _rank(rank: int, ranks: int, store: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        function(rank, ranks, *arguments)
    finally:
        dist.destroy_process_group()

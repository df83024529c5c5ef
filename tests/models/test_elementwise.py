"""Rotary positions and SwiGLU against their plain forms and numerical derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from megamug.models.elementwise import Rotate, SwiGLU, _SwiGLU


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def plain(x, angles):
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def test_rotation_is_that_of_the_halves():
    x = inputs(5, 2, 3, 8).requires_grad_()
    for shape in ((5, 1, 1, 4), (5, 2, 1, 4)):
        half = inputs(*shape) * 3
        angles = torch.cat([half, half], dim=-1)
        assert torch.allclose(Rotate.apply(x, angles), plain(x, angles), rtol=1e-12)
        assert gradcheck(Rotate.apply, (x, angles))
    strided = inputs(5, 2, 3, 16).requires_grad_()[..., 4:12]  # as it comes out of a fused projection
    assert torch.allclose(Rotate.apply(strided, angles), plain(strided, angles), rtol=1e-12)


def test_rotation_in_bfloat16_is_near_the_exact_one():
    x, half = inputs(64, 2, 3, 16), inputs(64, 1, 1, 8) * 100
    angles = torch.cat([half, half], dim=-1).float()
    found = Rotate.apply(x.bfloat16(), angles)
    assert found.dtype == torch.bfloat16
    assert (found.double() - plain(x, angles.double())).abs().max() < 0.04


def test_swiglu_is_silu_of_the_gate_times_up():
    x = inputs(4, 3, 10).requires_grad_()
    gate, up = x.chunk(2, dim=-1)
    config = type("Config", (), {"gated_linear_unit": True, "activation_func": F.silu})
    assert torch.allclose(SwiGLU(config)(x), F.silu(gate) * up, rtol=1e-12)
    assert gradcheck(_SwiGLU.apply, (x,))

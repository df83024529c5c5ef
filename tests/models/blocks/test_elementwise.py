"""Rotary positions and SwiGLU against their plain forms and numerical derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from megamug.models.blocks.elementwise import SwiGLU, rotate, rotation_table


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def plain(x, angles):
    first, second = x.chunk(2, dim=-1)
    angles = torch.cat([angles, angles], dim=-1)[:, None, None]
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def test_rotation_is_that_of_the_halves():
    x, angles = inputs(5, 2, 3, 8).requires_grad_(), inputs(5, 4) * 3
    table = rotation_table(angles, torch.float64)
    assert table.shape == (5, 1, 1, 8)
    assert torch.allclose(rotate(x, table), plain(x, angles), rtol=1e-12)
    assert gradcheck(rotate, (x, table))
    strided = inputs(5, 2, 3, 16).requires_grad_()[..., 4:12]  # as it comes out of a fused projection
    assert torch.allclose(rotate(strided, table), plain(strided, angles), rtol=1e-12)
    with torch.no_grad():
        assert torch.equal(rotate(x, table), rotate(x.detach(), table)) and not rotate(x, table).requires_grad


def test_rotation_in_bfloat16_is_near_the_exact_one():
    x, angles = inputs(64, 2, 3, 16), inputs(64, 8).float() * 100
    found = rotate(x.bfloat16(), rotation_table(angles, torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert (found.double() - plain(x, angles.double())).abs().max() < 0.04


def test_swiglu_is_silu_of_the_gate_times_up():
    x = inputs(4, 3, 10).requires_grad_()
    gate, up = x.chunk(2, dim=-1)
    config = type("Config", (), {"gated_linear_unit": True, "activation_func": F.silu})
    swiglu = SwiGLU(config)
    assert torch.allclose(swiglu(x), F.silu(gate) * up, rtol=1e-12)
    assert gradcheck(swiglu, (x,))
    with torch.no_grad():
        assert torch.equal(swiglu(x), swiglu(x.detach())) and not swiglu(x).requires_grad

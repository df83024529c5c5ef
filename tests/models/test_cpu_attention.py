"""Attention from batched products against the formula in float64, forward and gradients, causal and not."""

from __future__ import annotations

import pytest
import torch

from megamug.models.cpu_attention import BmmAttention, pays


def formula(query, key, value, causal):
    """softmax(q k^T / sqrt(d)) v, written out; [s, b, n, d] -> [s, b, n * d]."""
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) / query.shape[-1] ** 0.5
    if causal:
        s, t = scores.shape[-2:]
        scores = scores.masked_fill(torch.arange(t) > torch.arange(s).unsqueeze(1), float("-inf"))
    return torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), value).flatten(2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [7, 12])
def test_forward_and_gradients_equal_the_formula(causal, keys):
    if causal and keys != 7:
        pytest.skip("causal attention has as many keys as queries")
    torch.manual_seed(0)
    mixed = torch.randn(7, 2, 3, 24, dtype=torch.float64, requires_grad=True)  # strided parts, as in a layer
    query = mixed[..., :8]
    other = torch.randn(keys, 2, 3, 16, dtype=torch.float64, requires_grad=True)
    key, value = (mixed[..., 8:16], mixed[..., 16:]) if keys == 7 else (other[..., :8], other[..., 8:])
    inputs = (mixed,) if keys == 7 else (mixed, other)
    weight = torch.randn(7, 2, 24, dtype=torch.float64)
    found, expected = BmmAttention.apply(query, key, value, causal), formula(query, key, value, causal)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_bfloat16_is_as_near_to_float64_as_torch_s_own_attention():
    torch.manual_seed(1)
    parts = [torch.randn(33, 4, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    exact = formula(*(p.double() for p in parts), False)
    ours = BmmAttention.apply(*parts, False)
    permuted = (p.permute(1, 2, 0, 3) for p in parts)
    torchs = torch.nn.functional.scaled_dot_product_attention(*permuted).permute(2, 0, 1, 3).flatten(2)
    error, yardstick = (ours - exact).abs().max(), (torchs - exact).abs().max()
    assert error <= 2 * yardstick + 1e-3, (error, yardstick)


def test_it_is_used_for_bfloat16_with_gradients_alone():
    short, long = torch.zeros(5, 1, 1, 8), torch.zeros(600, 1, 1, 8)
    half = short.bfloat16().requires_grad_()
    assert pays(half, half)
    assert not pays(short.clone().requires_grad_(), short)
    assert not pays(short.bfloat16(), short)
    assert not pays(half, long.bfloat16())

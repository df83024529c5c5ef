import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megamug.models.blocks import cpu_linear


@pytest.fixture(autouse=True)
def available():
    if not cpu_linear.AVAILABLE:
        pytest.skip("this torch has no oneDNN")


def with_gradients(linear, x, weight, bias, seed):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, *([] if bias is None else [bias]))]
    y = linear(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape, out", [((7, 3, 48), 80), ((64, 17), 5), ((2, 1, 33), 9), ((300, 1, 96), 1)])
@pytest.mark.parametrize("biased", [True, False])
def test_results_and_gradients_are_those_of_float64(shape, out, biased, dtype, tolerance):
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(shape, generator=g).to(dtype), torch.randn(out, shape[-1], generator=g).to(dtype)
    bias = torch.randn(out, generator=g).to(dtype) if biased else None
    found = with_gradients(cpu_linear.linear, x, weight, bias, 5)
    exact = with_gradients(F.linear, x.double(), weight.double(), None if bias is None else bias.double(), 5)
    for one, other in zip(found, exact, strict=True):
        assert one.shape == other.shape and one.dtype == dtype
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


def test_strided_inputs_and_gradients_are_read_where_they_lie():
    x = torch.randn(20, 40, generator=torch.Generator().manual_seed(2)).t()  # [40, 20], not contiguous
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(3), requires_grad=True)
    y = cpu_linear.linear(x, weight, None)
    assert torch.allclose(y, x @ weight.t(), atol=1e-5)
    y.backward(torch.ones(1, 1).expand(40, 6))
    assert torch.allclose(weight.grad, x.sum(0).expand(6, -1), atol=1e-4)


def test_only_what_needs_a_gradient_gets_one_and_the_same_call_the_same_bits():
    x, weight = torch.randn(32, 8), torch.randn(4, 8, requires_grad=True)
    first, second = (cpu_linear.linear(x, weight, None) for _ in range(2))
    assert torch.equal(first, second)
    first.sum().backward()
    assert x.grad is None and weight.grad is not None


def test_flops_are_counted():
    x, weight = torch.randn(2, 16, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        cpu_linear.linear(x, weight, torch.zeros(4)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 32 * 8 * 4

"""The CUDA kernels of attention against the formula in float64, next to torch's own attention. Needs a GPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megamug.losses import ops
from megamug.models.attention import gpu as gpu_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not ops.libraries().cuda, reason=ops.libraries().reason),
]
# tokens, sequences, heads, width, causal
SHAPES = [
    *((s, 3, 2, 64, False) for s in (1, 16, 17, 49, 50, 64, 65, 72, 128, 129, 197, 256)),
    *((s, 3, 2, 32, False) for s in (1, 50, 128, 129, 197, 208, 256, 257, 272, 288)),
    *((s, 3, 2, d, False) for s in (1, 17, 50, 65, 72, 128) for d in (80, 96, 128)),
    *((s, 3, 2, d, True) for s in (1, 17, 64, 128) for d in (32, 64, 80, 96, 128)),
]


def inputs(s, b, n, d, dtype):
    return torch.randn(s, b, n, 3, d, device="cuda").to(dtype), torch.randn(s, b, n * d, device="cuda").to(dtype)


def formula(mixed, causal):
    return attention(*mixed.unbind(3), causal)


def attention(query, key, value, causal=False):
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)


def torch_attention(mixed, causal):
    query, key, value = (x.permute(1, 2, 0, 3) for x in mixed.unbind(3))
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).permute(2, 0, 1, 3).flatten(2)


def with_gradient(function, mixed, gradient, causal):
    x = mixed.detach().requires_grad_()
    context = function(x, causal)
    return context.detach(), *torch.autograd.grad(context, x, gradient)


def relative(found, wanted, floor=0.0):
    return ((found.double() - wanted).norm() / max(wanted.norm().item(), floor)).item()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape, dtype, tolerance):
    torch.manual_seed(0)
    *sizes, causal = shape
    mixed, gradient = inputs(*sizes, dtype)
    assert gpu_attention.pays(mixed, causal)
    context, result = with_gradient(gpu_attention.packed_attention, mixed, gradient, causal)
    wanted, wanted_result = with_gradient(formula, mixed.double(), gradient.double(), causal)
    assert relative(context, wanted) <= tolerance
    for part in range(3):  # a single token has no gradient of query and key but what rounding leaves
        error = relative(result[..., part, :], wanted_result[..., part, :], gradient.norm().item())
        assert error <= tolerance, ("query", "key", "value")[part]


@pytest.mark.parametrize("s, t, d", [(64, 50, 64), (64, 65, 80), (200, 17, 32), (5, 256, 64), (1, 1, 128)])
def test_across(s, t, d):
    torch.manual_seed(7)
    query, mixed = torch.randn(s, 3, 2, d, device="cuda"), torch.randn(t, 3, 2, 2, d, device="cuda")
    gradient = torch.randn(s, 3, 2 * d, device="cuda").bfloat16()
    leaves = [x.bfloat16().requires_grad_() for x in (query, mixed)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    assert gpu_attention.pays_across(*leaves)
    found, wanted = gpu_attention.cross_attention(*leaves), attention(doubles[0], *doubles[1].unbind(3))
    assert relative(found, wanted) <= 4e-3
    results = torch.autograd.grad(found, leaves, gradient)
    for a, b in zip(results, torch.autograd.grad(wanted, doubles, gradient.double()), strict=True):
        assert relative(a, b, gradient.norm().item()) <= 4e-3


def test_no_worse_than_torch():
    torch.manual_seed(1)
    for sizes in ((50, 8, 16, 64), (197, 8, 16, 32), (65, 8, 16, 80), (257, 8, 16, 32)):
        mixed, gradient = inputs(*sizes, torch.bfloat16)
        wanted = with_gradient(formula, mixed.double(), gradient.double(), False)
        ours = with_gradient(gpu_attention.packed_attention, mixed, gradient, False)
        theirs = with_gradient(torch_attention, mixed, gradient, False)
        for a, b, exact in zip(ours, theirs, wanted, strict=True):
            assert relative(a, exact) <= 1.2 * relative(b, exact)


def test_the_same_bits_again_and_among_other_sequences():
    torch.manual_seed(2)
    mixed, gradient = inputs(197, 64, 16, 32, torch.bfloat16)
    first = with_gradient(gpu_attention.packed_attention, mixed, gradient, False)
    for a, b in zip(first, with_gradient(gpu_attention.packed_attention, mixed, gradient, False), strict=True):
        assert torch.equal(a, b)
    part = with_gradient(gpu_attention.packed_attention, mixed[:, 5:7].contiguous(), gradient[:, 5:7], False)
    for a, b in zip(first, part, strict=True):
        assert torch.equal(a[:, 5:7], b)


def test_extreme_scores():
    torch.manual_seed(3)
    mixed, gradient = inputs(50, 2, 2, 64, torch.bfloat16)
    found = with_gradient(gpu_attention.packed_attention, mixed * 100, gradient, False)
    wanted = with_gradient(formula, (mixed * 100).double(), gradient.double(), False)
    assert relative(found[0], wanted[0]) <= 4e-3 and found[1].isfinite().all()
    mixed[3, 1, 1, 0, 5] = math.nan  # a query: its own context, and the gradients of what it read
    context, result = with_gradient(gpu_attention.packed_attention, mixed, gradient, False)
    assert context[3, 1, 64:].isnan().all() and context.isnan().sum() == 64
    assert not result[:, 0].isnan().any() and result[:, 1, 1].isnan().any()


def test_gradients_of_any_layout():
    torch.manual_seed(4)
    mixed, gradient = inputs(50, 2, 2, 64, torch.bfloat16)
    wide = torch.randn(50, 2, 131, device="cuda").bfloat16()
    for other in (
        gradient.transpose(0, 1).contiguous().transpose(0, 1),
        wide[..., 3:],
        gradient[:1].expand(50, 2, 128),
    ):
        a = with_gradient(gpu_attention.packed_attention, mixed, other, False)
        b = with_gradient(gpu_attention.packed_attention, mixed, other.contiguous(), False)
        assert torch.equal(a[1], b[1])
    x = mixed.requires_grad_()
    gpu_attention.packed_attention(x).sum().backward()
    assert x.grad.isfinite().all()


def test_opcheck():
    torch.manual_seed(5)
    mixed, gradient = inputs(9, 2, 2, 32, torch.bfloat16)
    library = torch.ops.megamug
    torch.library.opcheck(library.packed_attention_forward.default, (mixed.requires_grad_(), False, 0.3))
    context, logsumexp = library.packed_attention_forward(mixed.detach(), True, 0.3)
    arguments = (gradient, mixed.detach(), context, logsumexp, True, 0.3)
    torch.library.opcheck(library.packed_attention_backward.default, arguments)


@pytest.mark.parametrize("compiled", [False, True])
def test_in_a_cuda_graph(compiled):
    torch.manual_seed(6)
    mixed, gradient = inputs(50, 4, 2, 64, torch.bfloat16)
    x = mixed.clone().requires_grad_()

    def step(x):
        return gpu_attention.packed_attention(x * 2)

    function = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(function(x), x, gradient)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        context = function(x)
        (result,) = torch.autograd.grad(context, x, gradient)
    with torch.no_grad():
        x.copy_(mixed.flip(0))
    graph.replay()
    wanted = with_gradient(lambda x, causal: step(x), mixed.flip(0), gradient, False)
    assert torch.equal(context, wanted[0])
    torch.testing.assert_close(result, wanted[1])


def test_tensors_that_do_not_fit_are_refused():
    forward = torch.ops.megamug.packed_attention_forward
    mixed = torch.zeros(4, 1, 1, 3, 64, device="cuda", dtype=torch.bfloat16)
    for bad, message in (
        (mixed.float(), "bfloat16 or float16"),
        (mixed[..., :2, :], "must be"),
        (mixed[..., :48], "wide, not 48"),
        (mixed[:0], "1 to 256"),
        (mixed.expand(4, 1, 1, 3, 64).repeat(65, 1, 1, 1, 1), "1 to 256 tokens"),
        (mixed.transpose(3, 4).contiguous().transpose(3, 4), "16 bytes"),
        (torch.zeros(4 * 192 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(4, 1, 1, 3, 64), "16 bytes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(bad, False, 0.1)

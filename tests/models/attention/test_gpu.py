"""Attention of packed projections: the CUDA kernels emulated on a CPU, the formula in torch, operators and choice."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megamug.losses import ops
from megamug.models.attention import gpu as gpu_attention

ROOT = Path(__file__).resolve().parents[3]
need = pytest.mark.skipif(not ops.libraries().cpu, reason=ops.libraries().reason)


def formula(query, key, value, causal=False):
    """[s, b, n, d], [t, b, n, d] twice -> context [s, b, n * d] and logsumexp [b, n, s]."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2), scores.logsumexp(-1)


def exact(mixed, gradient, causal):
    """Context, logsumexp and the gradient of `mixed`, in float64."""
    x = mixed.detach().double().requires_grad_()
    context, logsumexp = formula(*x.unbind(3), causal)
    return context.detach(), logsumexp.detach(), torch.autograd.grad(context, x, gradient.double())[0]


def exact_across(query, mixed, gradient):
    """Context, logsumexp and the gradients of queries and of keys and values of their own, in float64."""
    x, y = (t.detach().double().requires_grad_() for t in (query, mixed))
    context, logsumexp = formula(x, *y.unbind(3))
    return context.detach(), logsumexp.detach(), *torch.autograd.grad(context, (x, y), gradient.double())


def inputs(s, b, n, d, dtype=torch.bfloat16):
    return torch.randn(s, b, n, 3, d).to(dtype), torch.randn(s, b, n * d).to(dtype)


# ---- the kernels, thread by thread on a CPU ----

# tokens, sequences, heads, width, causal; then, as csrc/cuda/attention.cu may choose: warps of forward, tiles of keys
# that a warp owns in backward, tiles of queries in a block of score gradients
SHAPES = {
    "one token": (1, 1, 1, 64, False, 1, 1, 1),
    "a tile and one": (17, 2, 2, 32, False, 2, 1, 2),
    "ViT-L encoder": (50, 1, 2, 64, False, 4, 1, 4),
    "ViT-L decoder": (197, 1, 1, 32, False, 7, 2, 7),
    "ViT-H encoder": (65, 1, 2, 80, False, 5, 1, 5),
    "ViT-H decoder": (257, 1, 1, 32, False, 6, 3, 3),
    "whole tiles": (64, 1, 2, 96, False, 4, 1, 4),
    "the longest, wide": (128, 1, 1, 128, True, 8, 1, 3),
    "captions": (63, 1, 2, 64, True, 4, 1, 4),
    "causal, two tiles a warp": (144, 1, 1, 64, True, 5, 2, 5),
    "causal, three tiles a warp": (273, 1, 1, 32, True, 6, 3, 3),
    "fewer warps, smaller blocks": (90, 1, 1, 32, False, 3, 2, 2),
}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulator") / "attention.so"
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
    subprocess.run([*command, ROOT / "tests/emulation/attention.cpp", "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    return loaded


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def emulated(emulator, query, mixed, gradient, causal, warps, owned, block_tiles, descending):
    """Context, logsumexp, the gradients of query and mixed: one tensor if they are, which has three parts then."""
    (s, b, n), (keys, *_, parts, d) = query.shape[:3], mixed.shape
    context, logsumexp = torch.full((s, b, n * d), math.nan).bfloat16(), torch.full((b, n, s), math.nan)
    result = torch.full_like(mixed, math.nan)
    of_query = result if query is mixed else torch.full_like(query, math.nan)
    read, written = (pointer(query), pointer(mixed)), (pointer(context), pointer(logsumexp))
    sizes = s, keys, b, n, d, parts, ctypes.c_float(d**-0.5), causal
    assert emulator.emulate_forward(*read, *written, *sizes, warps, descending)
    gradients = pointer(of_query), pointer(result)
    arguments = pointer(gradient), *read, *written, *gradients, *sizes, owned, block_tiles
    assert emulator.emulate_backward(*arguments, descending)
    return context, logsumexp, of_query, result


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_emulated_kernels_equal_the_formula(emulator, shape):
    """Whichever warp comes first; every number is written, none is read before it is there, no bank is met twice."""
    torch.manual_seed(0)
    *sizes, causal, warps, owned, block_tiles = shape
    mixed, gradient = inputs(*sizes)
    context, logsumexp, result = exact(mixed, gradient, causal)
    found = [emulated(emulator, mixed, mixed, gradient, causal, warps, owned, block_tiles, x) for x in (False, True)]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert (found[0][0].double() - context).norm() <= 4e-3 * context.norm()  # measured: up to 2.3e-3
    torch.testing.assert_close(found[0][1].double(), logsumexp, rtol=1e-6, atol=2e-6)
    for part in range(3):  # a single token has no gradient of query and key but what rounding leaves
        error = (found[0][3][..., part, :].double() - result[..., part, :]).norm()
        assert error <= 4e-3 * max(result[..., part, :].norm(), gradient.norm()), ("query", "key", "value")[part]
    assert emulator.take_conflicts() == 0


# queries, keys, width; warps of forward, tiles of keys of a warp of backward, tiles of queries in a block
@pytest.mark.parametrize("shape", [(64, 50, 64, 4, 1, 4), (70, 17, 32, 5, 1, 2), (5, 140, 32, 1, 2, 1)], ids=str)
def test_emulated_kernels_read_another_sequence(emulator, shape):
    torch.manual_seed(1)
    s, t, d, *choices = shape
    query, mixed, gradient = torch.randn(s, 2, 1, d), torch.randn(t, 2, 1, 2, d), torch.randn(s, 2, d)
    query, mixed, gradient = (x.bfloat16() for x in (query, mixed, gradient))
    wanted = exact_across(query, mixed, gradient)
    for a, b in zip(emulated(emulator, query, mixed, gradient, False, *choices, False), wanted, strict=True):
        assert (a.double() - b).norm() <= 4e-3 * b.norm()


def test_emulated_kernels_with_very_negative_scores(emulator):
    """exp(-logsumexp) of tokens that do not exist is infinite then; it must not reach the others."""
    mixed, gradient = torch.ones(20, 1, 1, 3, 32).bfloat16(), torch.ones(20, 1, 32).bfloat16()
    mixed[..., 0, :] = -40
    context, _, _, result = emulated(emulator, mixed, mixed, gradient, False, 2, 1, 2, False)
    assert context.eq(1).all() and result[..., :2, :].eq(0).all() and (result[..., 2, :] - 1).abs().max() < 0.01


# ---- the formula and the operators ----


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_the_formula_in_torch(causal, dtype, tolerance):
    torch.manual_seed(1)
    mixed, gradient = inputs(17, 2, 3, 32, dtype)
    context, logsumexp = gpu_attention.forward_torch(mixed, causal, 32**-0.5)
    result = gpu_attention.backward_torch(gradient, mixed, context, logsumexp, causal, 32**-0.5)
    assert context.dtype == result.dtype == dtype and result.shape == mixed.shape
    for a, b in zip((context, logsumexp, result), exact(mixed, gradient, causal), strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@need
@pytest.mark.parametrize("causal", [False, True])
def test_opcheck(causal):
    torch.manual_seed(2)
    mixed, gradient = inputs(9, 2, 2, 32)
    library = torch.ops.megamug
    torch.library.opcheck(library.packed_attention_forward.default, (mixed.requires_grad_(), causal, 0.3))
    context, logsumexp = library.packed_attention_forward(mixed.detach(), causal, 0.3)
    arguments = (gradient, mixed.detach(), context, logsumexp, causal, 0.3)
    torch.library.opcheck(library.packed_attention_backward.default, arguments)


@need
def test_opcheck_across():
    torch.manual_seed(2)
    query, mixed, gradient = torch.randn(9, 2, 2, 32), torch.randn(5, 2, 2, 2, 32), torch.randn(9, 2, 64)
    library = torch.ops.megamug
    leaves = query.clone().requires_grad_(), mixed.clone().requires_grad_()
    torch.library.opcheck(library.cross_attention_forward.default, (*leaves, 0.3))
    context, logsumexp = library.cross_attention_forward(query, mixed, 0.3)
    arguments = (gradient, query, mixed, context, logsumexp, 0.3)
    torch.library.opcheck(library.cross_attention_backward.default, arguments)


@need
def test_floating_point_operations_are_counted():
    mixed = torch.randn(20, 2, 3, 3, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.ops.megamug.packed_attention_forward(mixed, False, 0.2)[0].sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * 20 * 20 * 2 * 3 * 32
    query, mixed = (x.detach().requires_grad_() for x in (mixed[:7, ..., 0, :], mixed[..., 1:, :]))
    with FlopCounterMode(display=False) as counter:
        torch.ops.megamug.cross_attention_forward(query, mixed, 0.2)[0].sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * 7 * 20 * 2 * 3 * 32


def on_gpu(*sizes, dtype=torch.bfloat16):
    """What looks like a packed projection on a GPU, without one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):  # past what stands in for `torch.empty` on a machine without a GPU
        return torch.ops.aten.empty.memory_format(sizes, dtype=dtype, device=torch.device("cuda:0"))


@pytest.fixture
def pretend(monkeypatch):
    """Libraries with the CUDA kernels, and a GPU of this compute capability."""

    def set_up(capability=(9, 0), cuda=True):
        monkeypatch.setattr(ops, "_LIBRARIES", ops.Libraries(True, cuda, "pretended"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return set_up


def test_what_the_kernels_take(pretend):
    pretend()
    taken = [(50, 256, 16, 3, 64), (197, 256, 16, 3, 32), (257, 128, 16, 3, 32), (65, 128, 16, 3, 80), (1, 1, 1, 3, 96)]
    for sizes in taken:
        assert gpu_attention.pays(on_gpu(*sizes), False), sizes
    assert gpu_attention.pays(on_gpu(50, 2, 3, 3, 64, dtype=torch.float16), False)
    assert gpu_attention.pays(on_gpu(128, 2, 3, 3, 64), True)
    others = [(289, 2, 3, 3, 32), (257, 2, 3, 3, 64), (129, 2, 3, 3, 80), (50, 2, 3, 3, 48), (0, 2, 3, 3, 64)]
    for sizes in others:
        assert not gpu_attention.pays(on_gpu(*sizes), False), sizes
    assert not gpu_attention.pays(on_gpu(129, 2, 3, 3, 64), True)
    assert not gpu_attention.pays(on_gpu(50, 2, 3, 3, 64, dtype=torch.float32), False)
    assert not gpu_attention.pays(on_gpu(50, 2, 3, 3, 64).transpose(1, 2), False)
    assert not gpu_attention.pays(torch.empty(50, 2, 3, 3, 64, dtype=torch.bfloat16), False)
    assert gpu_attention.pays_across(on_gpu(64, 2, 3, 64), on_gpu(50, 2, 3, 2, 64))
    assert not gpu_attention.pays_across(on_gpu(64, 2, 3, 64), on_gpu(257, 2, 3, 2, 64))


@pytest.mark.parametrize("capability, fits", [((8, 0), True), ((8, 6), False), ((10, 0), True), ((12, 0), False)])
def test_gpus_with_little_shared_memory_are_left_to_torch(pretend, capability, fits):
    pretend(capability)
    assert gpu_attention.pays(on_gpu(50, 2, 3, 3, 64), False) is fits


def test_the_choice_can_be_traced(pretend):
    pretend()

    def choose(x):
        return x + gpu_attention._has_room(0) + gpu_attention.pays(x, True)

    assert torch.compile(choose, backend="eager", fullgraph=True)(torch.zeros(3)).eq(1).all()


def test_without_the_cuda_library(pretend):
    pretend(cuda=False)
    assert not gpu_attention.pays(on_gpu(50, 2, 3, 3, 64), False)


@pytest.mark.parametrize("way", ["operator", "CPU kernels", "torch"])
def test_every_way_gives_the_same(way, monkeypatch):
    if way != "torch" and not ops.libraries().cpu:
        pytest.skip(ops.libraries().reason)
    if way == "torch":
        monkeypatch.setattr(ops, "_LIBRARIES", ops.Libraries(False, False, "not built"))
    for name in ("pays", "pays_across"):
        monkeypatch.setattr(gpu_attention, name, lambda *_: way == "operator")
    torch.manual_seed(3)
    mixed, gradient = inputs(20, 2, 3, 32, torch.float32)
    for causal in (False, True):
        context, _, result = exact(mixed, gradient, causal)
        x = mixed.detach().requires_grad_()
        found = gpu_attention.packed_attention(x, causal)
        torch.testing.assert_close(found.double(), context, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(found, x, gradient)[0].double(), result, rtol=1e-5, atol=1e-5)
    query, others = mixed[..., 0, :].contiguous(), mixed[:7, ..., 1:, :].contiguous()
    context, _, *results = exact_across(query, others, gradient)
    leaves = query.requires_grad_(), others.requires_grad_()
    found = gpu_attention.cross_attention(*leaves)
    torch.testing.assert_close(found.double(), context, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(found, leaves, gradient), results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@need
def test_compiled_in_one_graph(monkeypatch):
    """The operator between two products, forward and backward, without a break."""
    monkeypatch.setattr(gpu_attention, "pays", lambda mixed, causal: True)
    torch.manual_seed(4)
    weight, out, x = torch.randn(3 * 64, 64), torch.randn(64, 64), torch.randn(12, 2, 64)

    def layer(x, weight, out):
        return gpu_attention.packed_attention((x @ weight.t()).view(12, 2, 2, 3, 32)) @ out

    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, out)]
        y = function(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)

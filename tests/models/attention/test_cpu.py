"""The compiled attention against the formula in float64, forward and gradients; the layer with it and without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megamug.losses import ops
from megamug.models.attention import cpu as cpu_attention
from tests.distributed.launch import python_path

ROOT = Path(__file__).resolve().parents[3]
need = pytest.mark.skipif(not ops.libraries().cpu, reason=ops.libraries().reason)
DTYPES = [torch.float32, torch.bfloat16]

# queries, keys, batch, heads, heads of keys, width, causal
SHAPES = {
    "tiny": (7, 7, 2, 3, 3, 8, True),
    "one query": (1, 33, 2, 4, 2, 64, False),
    "one key": (3, 1, 1, 2, 2, 16, False),
    "width 1": (129, 129, 1, 1, 1, 1, True),
    "odd width": (65, 130, 1, 2, 2, 31, False),
    "width 32": (197, 197, 1, 2, 2, 32, False),
    "width 64": (50, 50, 2, 2, 2, 64, True),
    "width 80, grouped": (197, 197, 1, 2, 1, 80, True),
    "width 128, grouped": (260, 260, 1, 4, 2, 128, True),
    "width 256": (33, 70, 1, 2, 2, 256, False),
    "fewer keys, causal": (200, 40, 1, 2, 2, 24, True),
    "more keys, causal": (40, 200, 1, 2, 2, 24, True),
    "several blocks of keys": (70, 401, 1, 2, 1, 48, False),
}


def formula(query, key, value, causal, segments=None):
    """softmax(q k^T / sqrt(d)) v, written out; [s, b, n, d], [t, b, m, d] -> [s, b, n * d]."""
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) / query.shape[-1] ** 0.5
    s, t = scores.shape[-2:]
    hidden = torch.zeros(1, 1, s, t, dtype=torch.bool)
    if causal:
        hidden = hidden | (torch.arange(t) > torch.arange(s).unsqueeze(1))
    if segments is not None:
        hidden = hidden | (segments.unsqueeze(1) != segments.unsqueeze(2)).unsqueeze(1)
    return torch.einsum("bnst,tbnd->sbnd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value).flatten(2)


def strided_inputs(shape, dtype):
    """Query, key and value as parts of wider tensors, as layers make them, and a weight for the result."""
    s, t, b, n, m, d, _ = shape
    query = torch.randn(s, b, n, d + 5).to(dtype)[..., 3 : 3 + d]
    key, value = torch.randn(t, b, m, 2 * d).to(dtype).split(d, dim=-1)
    return (query, key, value), torch.randn(s, b, n * d).to(dtype)


def with_gradients(function, inputs, weight):
    leaves = [x.detach().requires_grad_() for x in inputs]  # keeps the strides
    result = function(*leaves)
    return result.detach(), *torch.autograd.grad((result * weight).sum(), leaves)


def check(inputs, weight, causal, segments=None):
    found = with_gradients(lambda *x: cpu_attention.attention(*x, causal, segments), inputs, weight)
    exact = with_gradients(lambda *x: formula(*x, causal, segments), [x.double() for x in inputs], weight.double())
    # Of the largest number of each result. Measured: up to 1.5e-6 and 7.2e-3; torch's own attention 8.8e-7 and 1.0e-2.
    tolerance = 3e-6 if inputs[0].dtype == torch.float32 else 1.5e-2
    for name, a, b in zip(("context", "query", "key", "value"), found, exact, strict=True):
        assert a.dtype == inputs[0].dtype and a.shape == b.shape
        error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1)  # one key: no gradient for queries
        assert error <= tolerance, (name, error)


@need
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_gradients_equal_the_formula(shape, dtype):
    torch.manual_seed(0)
    check(*strided_inputs(shape, dtype), causal=shape[-1])


@need
@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_do_not_read_each_other(dtype):
    torch.manual_seed(1)
    segments = (torch.rand(2, 401) < 0.02).cumsum(1).int()
    segments[1, 100:] = 7  # a number may come again later only after another one: a document is a run
    check(*strided_inputs((401, 401, 2, 2, 1, 48, True), dtype), causal=True, segments=segments)


@need
def test_large_scores_do_not_overflow():
    torch.manual_seed(2)
    (query, key, value), weight = strided_inputs((70, 300, 1, 1, 1, 16, False), torch.float32)
    context, *gradients = with_gradients(
        lambda *x: cpu_attention.attention(*x, False), (100 * query, 100 * key, value), weight
    )
    exact = formula(100 * query.double(), 100 * key.double(), value.double(), False)
    torch.testing.assert_close(context.double(), exact, rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() for g in gradients)


@need
def test_what_is_not_a_number_stays_none():
    query, key, value = (torch.randn(20, 1, 2, 8) for _ in range(3))
    query[3, 0, 1, 2] = float("nan")
    context = cpu_attention.attention(query, key, value, False).view(20, 2, 8)
    assert context[3, 1].isnan().all() and context.isnan().sum() == 8


@need
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype):
    torch.manual_seed(3)
    inputs, weight = strided_inputs((150, 150, 3, 4, 2, 40, True), dtype)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(lambda *x: cpu_attention.attention(*x, True), inputs, weight))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@need
@pytest.mark.parametrize("kernels", ["generic", "avx2", "avx512"])
def test_narrower_instruction_sets(kernels):
    """The comparisons once more, in a process that is told to use an older instruction set."""
    order = ["generic", "avx2", "avx512", "avx512_bf16"]
    mine = next(name for name in reversed(order) if f"kernels {name}" in ops.libraries().reason)
    if order.index(mine) < order.index(kernels):
        pytest.skip(f"this processor has no {kernels}")
    environment = {**os.environ, "MEGAMUG_CPU_KERNELS": kernels, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "formula or documents or asked"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


@need
def test_the_instruction_set_asked_for_is_used():
    asked = os.environ.get("MEGAMUG_CPU_KERNELS")
    assert asked is None or f"kernels {asked};" in ops.libraries().reason.replace(",", ";") + ";"


@need
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    torch.manual_seed(4)
    (query, key, value), weight = strided_inputs((9, 9, 2, 4, 2, 8, True), dtype)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    segments = torch.zeros(2, 9, dtype=torch.int32)
    torch.library.opcheck(torch.ops.megamug.attention_forward.default, (*leaves, True, 0.3, segments))
    context, logsumexp = torch.ops.megamug.attention_forward(query, key, value, True, 0.3, None)
    arguments = (weight.view(9, 2, 4, 8), query, key, value, context, logsumexp, True, 0.3, None)
    torch.library.opcheck(torch.ops.megamug.attention_backward.default, arguments)


@need
def test_tensors_that_do_not_fit_are_refused():
    query, key = torch.zeros(4, 2, 3, 8), torch.zeros(4, 2, 2, 8)
    for arguments, message in (
        ((query, key, key, False), "multiple of those of the key"),
        ((query, query, query[:3], False), "as many values as keys"),
        ((query, query[:0], query[:0], False), "one at least"),
        ((query, query.bfloat16(), query, False), "dtype"),
        ((query.half(),) * 3 + (False,), "float32 or bfloat16"),
        ((query.transpose(0, 3),) * 3 + (False,), "last axis"),
        ((query, query, query, False, torch.zeros(2, 4, dtype=torch.int32)), "causal"),
        ((query, query, query, True, torch.zeros(2, 4)), "segments must be"),
        ((torch.zeros(1, 1, 1, 257),) * 3 + (False,), "1 to 256"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cpu_attention.attention(*arguments)


def layer(causal, dropout=0.0):
    # here, and not above: the tests of narrower instruction sets start faster without Megatron
    from megatron.core.transformer.enums import AttnMaskType

    from megamug.models.blocks.layers import LocalAttention

    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    return LocalAttention(SimpleNamespace(attention_dropout=dropout), 1, mask, "self")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("built", [True, False])
def test_the_layer_with_the_kernels_and_without(causal, dtype, built, monkeypatch):
    """Grouped queries; without the library torch's attention stands in."""
    if built and not ops.libraries().cpu:
        pytest.skip(ops.libraries().reason)
    if not built:
        monkeypatch.setattr(ops, "_LIBRARIES", ops.Libraries(False, False, "not built"))
    torch.manual_seed(5)
    inputs, weight = strided_inputs((20, 20, 2, 4, 2, 16, causal), dtype)
    assert cpu_attention.pays(inputs[0]) is built
    found = with_gradients(layer(causal), inputs, weight)
    exact = with_gradients(lambda *x: formula(*x, causal), [x.double() for x in inputs], weight.double())
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).abs().max() <= (1e-5 if dtype == torch.float32 else 3e-2) * b.abs().max()


@pytest.mark.parametrize("built", [True, False])
def test_the_layer_keeps_documents_apart(built, monkeypatch):
    """By their numbers, through the kernels or torch, and by a mask of Megatron's form."""
    from megamug.models.blocks.layers import document_mask

    if built and not ops.libraries().cpu:
        pytest.skip(ops.libraries().reason)
    if not built:
        monkeypatch.setattr(ops, "_LIBRARIES", ops.Libraries(False, False, "not built"))
    torch.manual_seed(6)
    inputs, weight = strided_inputs((40, 40, 2, 4, 2, 16, True), torch.float32)
    documents = torch.tensor([[0] * 40, [0] * 7 + [1] * 20 + [2] * 13], dtype=torch.int32)
    expected = with_gradients(lambda *x: formula(*x, True, documents), inputs, weight)
    for mask in (documents, document_mask(documents)):
        for a, b in zip(with_gradients(lambda *x, m=mask: layer(True)(*x, m), inputs, weight), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@need
def test_where_the_kernels_are_used():
    long, short = torch.zeros(20, 1, 2, 8), torch.zeros(3, 1, 2, 8)
    assert cpu_attention.pays(long) and cpu_attention.pays(long.bfloat16()) and cpu_attention.pays(short.bfloat16())
    for other in (short, long.half(), long.double(), torch.zeros(20, 1, 1, 257), long.to("meta")):
        assert not cpu_attention.pays(other)


@need
def test_dropout_and_masks_are_torch_s(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu_attention, "attention", lambda *_: calls.append(1))
    x = torch.randn(20, 1, 2, 8)
    hidden = torch.ones(20, 20, dtype=torch.bool).triu(1)[None, None]
    expected = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3),) * 3, is_causal=True)
    torch.testing.assert_close(layer(False)(x, x, x, hidden), expected.permute(2, 0, 1, 3).flatten(2))
    layer(True, dropout=0.5)(x, x, x)
    assert not calls
    layer(True, dropout=0.5).eval()(x, x, x)
    assert calls

"""Documents of a row that do not read each other, by where they begin: against a mask of all pairs of tokens.

The kernels need a GPU (tests/gpu/models/test_documents.py); here each document is attended by itself in their
place, and all around them is the models' own.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megamug.configuration.reading import resolve
from megamug.configuration.sections import Config
from megamug.data.documents.loader import TokenBatch
from megamug.models.attention import documents
from megamug.models.blocks.elementwise import rotate, rotation_table
from megamug.models.blocks.layers import LocalAttention, document_mask
from tests.models.jam.test_cross import GPT, LLAMA, jam_config

ROWS, TOKENS, VOCABULARY = 3, 37, 200  # no other size is 37
# Lengths of the documents of each row: one, several, some of one token.
LENGTHS = {
    "unequal": [[37], [1, 20, 1, 15], [30, 7]],
    "of one token": [[1] * 37, [1, 36], [36, 1]],
    "whole rows": [[37], [37], [37]],
}


def numbered(lengths: list[list[int]]) -> torch.Tensor:
    """int32 [b, s], as `TokenBatch.segments`."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in lengths]).int()


def by_document(query, key, value, begins, longest, dropout):
    """`documents.within` without its kernels: each document by itself."""
    assert dropout == 0 and key.shape == value.shape and len(query) == len(key) == int(begins[-1])
    edges, parts = begins.tolist(), []
    for first, last in zip(edges, edges[1:], strict=False):
        if last > first:
            assert last - first <= longest
            q, k, v = (x[first:last].transpose(0, 1) for x in (query, key, value))
            k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
            parts.append(F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def by_starts(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(documents, "by_number", lambda device: False)
    monkeypatch.setattr(documents, "within", by_document)


def by_mask(monkeypatch):
    """With a mask of all pairs."""
    monkeypatch.setattr(documents, "for_attention", lambda segments, most=None: document_mask(segments))


# ---------------------------------------------------------------------------------------------- where documents begin


def test_starts_are_those_of_a_loop():
    g = torch.Generator().manual_seed(0)
    for case in range(60):
        b, s = (int(torch.randint(1, high, (), generator=g)) for high in (5, 30))
        segments = (torch.rand(b, s, generator=g) < (0.1, 0.5, 1.0, 0.0)[case % 4]).cumsum(1).int()
        if case % 3 == 0:
            segments = segments % 2  # a run of a number that was there before is another document
        expected = []
        for row in range(b):
            for place in range(s):
                if place == 0 or segments[row, place] != segments[row, place - 1]:
                    expected.append(row * s + place)
        for empty in (0, 1, 7):
            found = documents.starts(segments, len(expected) + empty)
            assert found.dtype == torch.int32 and found.tolist() == expected + [b * s] * (empty + 1)


def test_more_documents_than_said_are_an_error():
    with pytest.raises((IndexError, RuntimeError), match="index"):
        documents.starts(numbered(LENGTHS["unequal"]), 6)  # there are 7


def test_shapes_do_not_tell_what_documents_there_are(by_starts):
    shapes = {documents.for_attention(numbered(lengths), 128).shape for lengths in LENGTHS.values()}
    assert shapes == {(129,)}
    assert len(documents.for_attention(numbered(LENGTHS["unequal"]))) == 7 + 1  # counted where it is not said
    assert documents.for_attention(None, 3) is None


def test_cpus_take_numbers():
    segments = numbered(LENGTHS["unequal"])
    assert documents.for_attention(segments, 64) is segments and not documents.are_starts(segments)
    assert documents.are_starts(documents.starts(segments, 64)) and not documents.are_starts(None)


# ---------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_local_attention_is_that_of_a_mask(by_starts, lengths, heads):
    from megatron.core.transformer.enums import AttnMaskType

    attention = LocalAttention(SimpleNamespace(attention_dropout=0.0), 1, AttnMaskType.causal, "self")
    torch.manual_seed(0)
    # Parts of a wider tensor, as layers make them.
    mixed = torch.randn(TOKENS, ROWS, sum(heads) + heads[1], 8, requires_grad=True)
    query, key, value = mixed.split([heads[0], heads[1], heads[1]], dim=2)
    segments, weight = numbered(LENGTHS[lengths]), torch.randn(TOKENS, ROWS, heads[0] * 8)
    results = []
    for mask in (documents.for_attention(segments, 128), document_mask(segments)):
        context = attention(query, key, value, mask)
        assert context.is_contiguous()
        results.append((context, *torch.autograd.grad((context * weight).sum(), mixed, retain_graph=True)))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, heads, width", [
    (torch.bfloat16, (4, 2), 64), (torch.float16, (4, 4), 256), (torch.float32, (4, 2), 64),
    (torch.bfloat16, (2, 1), 20), (torch.float32, (2, 2), 12), (torch.bfloat16, (2, 1), 264),
])  # fmt: skip
def test_the_kernels_take_what_they_are_given(dtype, heads, width):
    """Their shapes, forward and backward, as torch knows them without a device."""
    query, key, value = (
        torch.empty(ROWS * TOKENS, n, width, dtype=dtype, device="meta", requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    )
    begins = torch.empty(65, dtype=torch.int32, device="meta")
    context = documents.within(query, key, value, begins, TOKENS, 0.0)
    assert context.shape == query.shape and context.dtype == dtype
    context.backward(torch.empty_like(context))
    for x in (query, key, value):
        assert x.grad.shape == x.shape and x.grad.dtype == dtype


def test_heads_are_turned_into_rows():
    torch.manual_seed(0)
    x, weight = torch.randn(TOKENS, ROWS, 4, 8, requires_grad=True), torch.randn(TOKENS, ROWS, 4, 8)
    table = rotation_table(torch.randn(TOKENS, 4), torch.float32)
    results = []
    for by_rows in (False, True):
        turned = rotate(x, table, by_rows)
        assert turned.is_contiguous() is not by_rows and turned.transpose(0, 1).is_contiguous() is by_rows
        assert documents.row_by_row(turned).data_ptr() == turned.data_ptr() or not by_rows  # no copy
        results.append((turned, *torch.autograd.grad((turned * weight).sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------------------------------------- the models


LEARNED = {}
ROTARY = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rotary", "tie_vocabulary": False, "bias": True}
FAMILIES = {
    "learned": LEARNED,
    "grouped, head norms": ROTARY | {"query_groups": 2, "qk_norm": True},
    "a norm for each head": ROTARY | {"query_groups": 2, "qk_norm": True, "qk_norm_per_head": True,
                                      "res_post_norm": True},
    "grid": ROTARY | {"positions": "rotary_grid", "grid": 6},
}  # fmt: skip


def decoder(options: dict, recompute: str):
    from megamug.models.init import initialise
    from megamug.models.language.decoder_lm import DecoderLM
    from megamug.models.language.plan import LmPlan

    config = Config()
    config.model.kind, config.model.preset = "decoder_lm", "lm_tiny"
    config.lm.__dict__.update({"max_positions": TOKENS, "layers": 2, "width": 64, "ffn_width": 96, **options})
    config.data.__dict__.update(context_length=TOKENS, micro_batch_size=ROWS)
    config.parallel.recompute = recompute
    model = DecoderLM(LmPlan(resolve(config), VOCABULARY))
    initialise(model.sharded_state_dict(), seed=3)
    return model


def jam(recompute: str):
    from megamug.models.init import initialise
    from megamug.models.jam.cross import JamCross
    from megamug.models.jam.plan import JamPlan

    towers = (LLAMA, GPT | {"max_positions": TOKENS})
    config = jam_config(*towers, data={"context_length": TOKENS, "micro_batch_size": ROWS},
                        parallel={"recompute": recompute})  # fmt: skip
    model = JamCross(JamPlan(config, VOCABULARY))
    initialise(model.sharded_state_dict(), 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gate"):
                parameter.fill_(0.5)
    return model


def batch(lengths: list[list[int]], seed: int = 0) -> TokenBatch:
    g = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=g) for _ in range(2))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return TokenBatch(tokens, labels, numbered(lengths), positions, most_documents=128)


def trained(model, rows: TokenBatch) -> list[torch.Tensor]:
    """The loss, then the gradients."""
    model.zero_grad()
    loss = model(rows)[1]["lm"][0]
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def check(model, monkeypatch, precision: float = 1e-6) -> None:
    """Loss and gradients, to `precision` of their norms."""
    for lengths in LENGTHS.values():
        found = trained(model, batch(lengths))
        with monkeypatch.context() as patch:
            by_mask(patch)
            expected = trained(model, batch(lengths))
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).norm() <= precision * theirs.norm() + 1e-9


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_lm_trains_as_with_a_mask(world, by_starts, monkeypatch, family, recompute):
    check(decoder(FAMILIES[family], recompute), monkeypatch)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_jam_cross_trains_as_with_a_mask(world, by_starts, monkeypatch, recompute):
    """Queries of one tower, keys of the other: the same tokens, so the same documents.

    A gate's gradient is one number, a sum of terms of both signs over all tokens and units: more of it is rounding.
    """
    check(jam(recompute), monkeypatch, precision=2e-5)  # a gate's gradient is a sum over all tokens that nearly cancels


def test_evaluation_gives_the_loss_of_training(world, by_starts):
    for model in (decoder(FAMILIES["grouped, head norms"], "none"), decoder(LEARNED, "none"), jam("none")):
        rows = batch(LENGTHS["unequal"])
        expected = model(rows)[1]["lm"][0]
        with torch.no_grad():
            assert torch.allclose(model.eval()(rows)[1]["lm"][0], expected, rtol=1e-6)


class Pairs(TorchDispatchMode):
    """Counts tensors with a number for every pair of tokens of a row."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        self.found += sum(isinstance(x, torch.Tensor) and list(x.shape).count(TOKENS) > 1 for x in made)
        return result


def test_nothing_has_the_size_of_all_pairs(world, by_starts, monkeypatch):
    rows = batch(LENGTHS["unequal"][1:] + [[20, 17]])  # no document fills a row
    for model in (decoder(FAMILIES["grouped, head norms"], "none"), jam("none")):
        with Pairs() as pairs:
            trained(model, rows)
        assert pairs.found == 0
        with monkeypatch.context() as patch, Pairs() as pairs:
            by_mask(patch)
            trained(model, rows)
        assert pairs.found > 0

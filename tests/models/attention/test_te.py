"""What Transformer Engine's attention is given for documents that do not read each other; its kernels need a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megamug.models.attention import documents
from megamug.models.blocks.layers import document_mask
from tests.models.attention.test_documents import LENGTHS, ROWS, TOKENS, by_document, numbered

if importlib.util.find_spec("transformer_engine") is None:
    pytest.skip("Transformer Engine is not installed (extra `te`)", allow_module_level=True)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype, width, fused", [
    (torch.bfloat16, 64, True), (torch.bfloat16, 160, False), (torch.float32, 64, False),
])  # fmt: skip
def test_documents_go_to_the_fused_kernels_where_there_are_some(monkeypatch, lengths, dtype, width, fused):
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megamug.models.attention.te import DocumentAttention

    called = []

    def kernels(self, query, key, value, mask, attn_mask_type, packed_seq_params=None, **more):
        packed = packed_seq_params
        if packed is None:
            called.append("plain")
            return query.flatten(2)
        called.append("fused")
        assert mask is None and not more and packed.qkv_format == "thd" and attn_mask_type == AttnMaskType.causal
        assert packed.cu_seqlens_q is packed.cu_seqlens_kv and packed.cu_seqlens_q.dtype == torch.int32
        assert packed.cu_seqlens_q_padded is None and packed.max_seqlen_q == packed.max_seqlen_kv == TOKENS
        return by_document(query, key, value, packed.cu_seqlens_q, packed.max_seqlen_q, 0).flatten(1)

    monkeypatch.setattr(TEDotProductAttention, "forward", kernels)
    monkeypatch.setattr(documents, "within", by_document)
    attention = object.__new__(DocumentAttention)  # building one asks for a GPU
    attention.__dict__.update(training=True, attention_dropout=0.0)
    torch.manual_seed(0)
    query, key, value = (torch.randn(TOKENS, ROWS, n, width).to(dtype) for n in (4, 2, 2))
    segments = numbered(LENGTHS[lengths])
    found = attention.forward(
        query, key, value, documents.starts(segments, 128), attn_mask_type=AttnMaskType.causal, attention_bias=None,
        packed_seq_params=None,
    )  # fmt: skip
    heads = [x.permute(1, 2, 0, 3).float() for x in (query, *(y.repeat_interleave(2, 2) for y in (key, value)))]
    seen = document_mask(segments).logical_not()
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen)
    torch.testing.assert_close(found.float(), expected.permute(2, 0, 1, 3).flatten(2), rtol=2e-2, atol=2e-2)
    assert found.shape == (TOKENS, ROWS, 4 * width) and called == ["fused"] * fused
    attention.forward(query, key, value, None, AttnMaskType.causal, packed_seq_params=None)
    assert called[-1] == "plain"

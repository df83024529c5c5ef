"""Transformer Engine's attention, also inside documents that do not read each other (see `documents.py`)."""

from __future__ import annotations

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megamug.models.attention import documents

WIDEST = 128  # numbers of a head up to which Transformer Engine has a fused backward for documents on every GPU


class DocumentAttention(TEDotProductAttention):
    """Megatron's, which takes what `documents.starts` gives in the place of a mask as well."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        **more,
    ) -> Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n * d]."""
        if not documents.are_starts(attention_mask):
            return super().forward(query, key, value, attention_mask, attn_mask_type, **more)
        assert attn_mask_type == AttnMaskType.causal, attn_mask_type
        longest, rows = query.shape[:2]
        query, key, value = (documents.row_by_row(x) for x in (query, key, value))
        if query.dtype == torch.float32 or query.shape[-1] > WIDEST or query.shape[-1] % 8:
            # Transformer Engine would write out the scores of every document at the length of a row.
            dropout = self.attention_dropout if self.training else 0.0
            context = documents.within(query, key, value, attention_mask, longest, dropout)
        else:
            packed = PackedSeqParams(
                qkv_format="thd", cu_seqlens_q=attention_mask, cu_seqlens_kv=attention_mask, max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )  # fmt: skip
            context = super().forward(query, key, value, None, attn_mask_type, packed_seq_params=packed)
        return documents.token_by_token(context, rows)

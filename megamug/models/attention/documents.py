"""Attention inside documents that share a row and do not read each other.

On a CPU the kernels of `csrc/` take the number of each token's document. On a GPU kernels for sequences of many lengths
take where documents begin (`starts`): all rows stand one behind the other, and a token sees what lies before it in its
own document. Nothing of the size of queries x keys exists, and no work is done for pairs of tokens that are hidden.
Shapes follow from sizes known on the host alone, and nothing is read from the device, so a CUDA graph can hold it.

Axes: s tokens of a row, b rows, t = b s tokens, n heads, g heads of keys, d head width, N documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FLASH_WIDEST = 256  # numbers of a head that torch's FlashAttention takes
CAUSAL = 1  # of torch's `_efficient_attention_forward`: a query sees keys up to its own place, counted from the first


def by_number(device: torch.device) -> bool:
    """Whether attention on `device` takes the documents' numbers, not where they begin."""
    return device.type == "cpu"


def for_attention(segments: Tensor | None, most: int | None = None) -> Tensor | None:
    """What layers take in place of an attention mask, for documents int32 [b, s], each a run of one number along a row.

    On a CPU that tensor itself; on a GPU `starts`. `most`: no fewer than the documents of all rows together, padding
    counted; None asks the device, which waits for all that it has still to do.
    """
    if segments is None or by_number(segments.device):
        return segments
    return starts(segments, int(_firsts(segments).sum()) if most is None else most)


def starts(segments: Tensor, most: int) -> Tensor:
    """Documents [b, s] -> int32 [most + 1]: the place in the t tokens, row after row, at which each begins, and t.

    Where there are fewer than `most` documents, empty ones at the end make up for it. An index error (of the device: a
    failed assertion) where there are more.
    """
    document = _firsts(segments).view(-1).cumsum(0) - 1
    tokens = torch.arange(len(document), dtype=torch.int32, device=segments.device)
    begins = torch.full((most,), len(document), dtype=torch.int32, device=segments.device)
    return F.pad(begins.scatter_reduce_(0, document, tokens, "amin"), (0, 1), value=len(document))


def _firsts(segments: Tensor) -> Tensor:
    """bool [b, s]: the first token of each document; a row begins with one."""
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)


def are_starts(mask: Tensor | None) -> bool:
    """Whether an attention mask is what `starts` gives: masks and documents' numbers have more axes."""
    return mask is not None and mask.dim() == 1


def row_by_row(x: Tensor) -> Tensor:
    """[s, b, ...] -> [t, ...], the tokens of a row side by side; a copy unless they are so in memory already."""
    return x.transpose(0, 1).reshape(-1, *x.shape[2:])


def token_by_token(x: Tensor, rows: int) -> Tensor:
    """Heads [t, n, d] or [t, n * d], as `row_by_row` orders them, -> [s, b, n * d]."""
    return x.reshape(rows, len(x) // rows, -1).transpose(0, 1).contiguous()


def attention(query: Tensor, key: Tensor, value: Tensor, begins: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k / sqrt(d)) v up to each query's place in its document: query [s, b, n, d], key and value
    [s, b, g, d], `begins` as `starts` gives them -> [s, b, n * d]. Differentiable; n / g queries share a key."""
    longest, rows = query.shape[:2]
    context = within(*(row_by_row(x) for x in (query, key, value)), begins, longest, dropout)
    return token_by_token(context, rows)


def within(query: Tensor, key: Tensor, value: Tensor, begins: Tensor, longest: int, dropout: float) -> Tensor:
    """`attention` on tokens row by row: [t, n, d] and twice [t, g, d] -> [t, n, d]; no document is above `longest`.

    By FlashAttention in bfloat16 and float16; by torch's memory-efficient kernels in float32 and for wide heads, a key
    copied for each of its queries. Heads are filled up with zeros to the multiple of 8 that both want.
    """
    width = query.shape[-1]
    if width % 8:
        query, key, value = (F.pad(x, (0, -width % 8)) for x in (query, key, value))
        query = query * (query.shape[-1] / width) ** 0.5  # the kernels divide by the root of the width that they see
    if query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= FLASH_WIDEST:
        context = torch.ops.aten._flash_attention_forward(
            query, key, value, begins, begins, longest, longest, dropout, True, False
        )[0]
    else:
        if query.shape[1] != key.shape[1]:
            shared = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
        context = torch.ops.aten._efficient_attention_forward(
            query[None], key[None], value[None], None, begins, begins, longest, longest, dropout, CAUSAL, True
        )[0][0]
    return context[..., :width] if width % 8 else context

"""The causal masked objective, CM3 (Aghajanyan et al. 2022), as metaseq draws it.

A document gets k ~ Poisson(mean) masked spans. k = 0 leaves it as it is, k = 1 takes one candidate, k > 1 draws k * k
candidates and keeps, in the order of drawing, those that do not overlap, k at most. The output is the document with
each span replaced by a sentinel, then for each span `<sentinel i> span <eoss>`, then the document's `<eos>`:

    <bos> a b c d <break> x y z <eos>   ->   <bos> a <s0> d <break> x <s1> <s0> b c <eoss> <s1> y z <eoss> <eos>

A candidate is two tokens drawn uniformly, the first among all tokens that may be masked, the second among those of the
same segment, and what lies between: so a span never crosses `<break>` nor the border of a prompt and its response, and
may lie inside an image's codes or cover them all. `<bos>`, `<break>` and `<eos>` are never masked. k spans make a
document longer by exactly `GROWTH * k` tokens.

Everything is a pure function of (seed, epoch, number of the document). As in metaseq, the loss covers all tokens of the
output, the sentinels in place too.

Axes: b documents, n tokens of a document, k spans.
"""

from __future__ import annotations

import math

import numpy as np

from megamug.data.documents.vocabulary import Vocabulary
from megamug.data.random import uniform

GROWTH = 3  # the sentinel in place of a span, and the sentinel and <eoss> around it at the end


def most_spans(mean: float) -> int:
    """The count that a Poisson draw of 32 bits does not exceed but once in 10^9 draws; higher draws become this one."""
    return len(_cumulative(mean))


def _cumulative(mean: float) -> np.ndarray:
    """P(k <= 0), P(k <= 1), ... of the Poisson distribution, up to where less than 1e-9 is left."""
    probabilities, total = [], 0.0
    while total < 1 - 1e-9:
        k = len(probabilities)
        probabilities.append(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)))
        total += probabilities[-1]
    return np.cumsum(probabilities)


def draw_counts(seed: int, epochs: np.ndarray, documents: np.ndarray, mean: float) -> np.ndarray:
    """How many spans each document is to lose: Poisson by inversion -> int64 [b]. `mean` 0: none."""
    if mean == 0:
        return np.zeros(len(documents), np.int64)
    u = uniform(seed, "cm3/count", epochs, documents, 1)[:, 0]
    return np.searchsorted(_cumulative(mean), u, side="right").astype(np.int64)


def draw_spans(seed: int, epoch: int, document: int, count: int, segments: np.ndarray) -> np.ndarray:
    """Spans of one document, ascending and disjoint -> int64 [k, 2] of (start, end), k <= count.

    `segments`: int64 [m, 2], start and end of each stretch that a span may lie in (`maskable`). Fewer than `count`
    spans where candidates overlap, or where nothing may be masked.
    """
    lengths = segments[:, 1] - segments[:, 0]
    total = int(lengths.sum())
    if count == 0 or total == 0:
        return np.empty((0, 2), np.int64)
    candidates = count * count
    u = uniform(seed, "cm3/spans", epoch, np.array([document]), 2 * candidates).reshape(candidates, 2)
    ends = np.cumsum(lengths)
    first = (u[:, 0] * total).astype(np.int64)
    segment = np.searchsorted(ends, first, side="right")
    first += segments[segment, 0] - (ends - lengths)[segment]
    second = segments[segment, 0] + (u[:, 1] * lengths[segment]).astype(np.int64)
    kept: list[tuple[int, int]] = []
    for start, last in zip(np.minimum(first, second).tolist(), np.maximum(first, second).tolist(), strict=True):
        if all(last < s or start >= e for s, e in kept):
            kept.append((start, last + 1))
            if len(kept) == count:
                break
    return np.array(sorted(kept), np.int64)


def maskable(tokens: np.ndarray, borders: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Stretches of a document [n] that spans may lie in, int64 [m, 2].

    `borders`: ascending starts of the segments, and n. A stretch is a segment without `<bos>`, `<break>` and `<eos>`,
    which stand only at a segment's start and end.
    """
    starts, ends = borders[:-1].copy(), borders[1:].copy()
    starts += tokens[starts] == vocabulary.bos_id
    # a segment of <bos> or <eos> alone (a long document is cut anywhere) leaves nothing
    last = tokens[ends - 1]
    ends -= (last == vocabulary.break_id) | (last == vocabulary.eos_id)
    stretches = np.stack([starts, ends], axis=1).astype(np.int64)
    return stretches[starts < ends]


def mask_spans(tokens: np.ndarray, spans: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Move `spans` [k, 2] of a document [n] to its end -> (tokens, origins), both int64 [n + GROWTH * k].

    `origins[t]`: the position in the document that output token t comes from; of a sentinel and `<eoss>`, that of the
    span's first token. What is known of a token (its role) is carried along by it.
    """
    assert len(spans) <= len(vocabulary.sentinels)
    body = len(tokens) - int(tokens[-1] == vocabulary.eos_id)
    kept: list[np.ndarray] = []
    moved: list[np.ndarray] = []
    at = 0
    sentinels = vocabulary.sentinels.start
    positions = np.arange(len(tokens), dtype=np.int64)
    marks: list[tuple[int, int]] = []  # (place in the output, id)
    place = tail = 0
    tail_starts = body - int((spans[:, 1] - spans[:, 0]).sum()) + len(spans)
    for i, (start, end) in enumerate(spans.tolist()):
        kept += [positions[at:start], positions[start : start + 1]]
        moved += [positions[start : start + 1], positions[start:end], positions[start : start + 1]]
        place += start - at
        marks.append((place, sentinels + i))
        marks.append((tail_starts + tail, sentinels + i))
        tail += end - start + 2
        marks.append((tail_starts + tail - 1, vocabulary.eoss_id))
        place += 1
        at = end
    origins = np.concatenate([*kept, positions[at:body], *moved, positions[body:]])
    masked = tokens[origins].astype(np.int64)
    for where, token in marks:
        masked[where] = token
    return masked, origins


def restore(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The document that `mask_spans` made `tokens` of: each span back in the place of its sentinel.

    Raises `ValueError` where the tokens are no masked document: a sentinel without its span, a span without `<eoss>`.
    """
    tokens = np.asarray(tokens, np.int64)
    sentinels = vocabulary.sentinels
    marks = np.flatnonzero((tokens >= sentinels.start) & (tokens < sentinels.stop))
    if len(marks) == 0:
        return tokens
    k = len(marks) // 2
    expected = np.tile(np.arange(sentinels.start, sentinels.start + k), 2)
    if len(marks) % 2 or (tokens[marks] != expected).any():
        raise ValueError("sentinels do not come in their order, once in place and once before their span")
    ends = np.flatnonzero(tokens == vocabulary.eoss_id)
    tail = marks[k:]
    if len(ends) != k or (ends <= tail).any() or (ends[:-1] + 1 != tail[1:]).any():
        raise ValueError("a masked span does not end in <eoss>")
    parts, at = [], 0
    for mark, start, end in zip(marks[:k].tolist(), tail.tolist(), ends.tolist(), strict=True):
        parts += [tokens[at:mark], tokens[start + 1 : end]]
        at = mark + 1
    return np.concatenate([*parts, tokens[at : tail[0]], tokens[ends[-1] + 1 :]])

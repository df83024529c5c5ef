"""The causal masked objective."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamug.data.documents.cm3 import GROWTH, draw_counts, draw_spans, mask_spans, maskable, most_spans, restore
from megamug.data.documents.tokenizer import assemble
from megamug.data.documents.vocabulary import Vocabulary, VocabularySpec

SENTINELS = 40
VOCABULARY = Vocabulary(VocabularySpec(50, "", 16, (2, 2), 8, "", SENTINELS), None, Path("."))
TEXT = st.lists(st.integers(4, 49), min_size=1, max_size=12).map(lambda ids: (np.array(ids), False))
IMAGE = st.integers(0, 15).map(lambda i: (VOCABULARY.image_ids((np.arange(4) + i) % 16), True))


@st.composite
def documents(draw):
    """(tokens, borders of the segments) of a document, whole or cut at its ends as a long one's pieces are."""
    segments = draw(st.lists(TEXT | IMAGE, min_size=1, max_size=5))
    ids, images = zip(*segments, strict=True)
    made, _ = assemble(list(ids), list(images), [False] * len(ids), VOCABULARY)
    tokens = np.concatenate(made)
    borders = np.concatenate([[0], np.cumsum([len(m) for m in made])])
    first, last = draw(st.sampled_from([(0, 0), (1, 0), (0, 1), (2, 1)]))
    if len(tokens) - first - last < 2:
        return tokens, borders
    stop = len(tokens) - last
    inside = borders[(borders > first) & (borders < stop)] - first
    return tokens[first:stop], np.concatenate([[0], inside, [stop - first]])


@settings(deadline=None, max_examples=300)
@given(documents(), st.integers(0, 6), st.integers(0, 2**40), st.integers(0, 3))
def test_spans_are_disjoint_inside_segments_and_come_back(document, count, number, epoch):
    tokens, borders = document
    spans = draw_spans(7, epoch, number, count, maskable(tokens, borders, VOCABULARY))
    assert len(spans) <= count
    previous = 0
    for start, end in spans:
        assert previous <= start < end  # ascending, disjoint, not empty
        previous = end
        assert np.searchsorted(borders, start, side="right") == np.searchsorted(borders, end - 1, side="right")
        assert not np.isin(tokens[start:end], [VOCABULARY.break_id, VOCABULARY.bos_id, VOCABULARY.eos_id]).any()
    masked, origins = mask_spans(tokens, spans, VOCABULARY)
    assert len(masked) == len(origins) == len(tokens) + GROWTH * len(spans)
    assert (restore(masked, VOCABULARY) == tokens).all()
    plain = masked < VOCABULARY.eoss_id
    assert (masked[plain] == tokens[origins[plain]]).all() and np.unique(origins).tolist() == list(range(len(tokens)))
    assert np.bincount(origins[plain], minlength=len(tokens)).max() == 1  # no token twice
    if tokens[-1] == VOCABULARY.eos_id:
        assert masked[-1] == VOCABULARY.eos_id
    again = draw_spans(7, epoch, number, count, maskable(tokens, borders, VOCABULARY))
    assert (again == spans).all()


def test_an_example_is_as_the_facts_say():
    text = [10, 11, 12, 13]
    tokens = np.array([1, *text, VOCABULARY.break_id, 20, 21, 22, 2])
    s0, s1 = VOCABULARY.sentinels[:2]
    masked, origins = mask_spans(tokens, np.array([[2, 4], [7, 9]]), VOCABULARY)
    assert masked.tolist() == [
        1, 10, s0, 13, VOCABULARY.break_id, 20, s1, s0, 11, 12, VOCABULARY.eoss_id, s1, 21, 22, VOCABULARY.eoss_id, 2,
    ]  # fmt: skip
    assert origins.tolist() == [0, 1, 2, 4, 5, 6, 7, 2, 2, 3, 2, 7, 7, 8, 7, 9]


@pytest.mark.parametrize("mean", [0.3, 1.0, 4.0])
def test_counts_are_poisson(mean):
    counts = draw_counts(3, np.zeros(40000, np.int64), np.arange(40000), mean)
    k = np.arange(12)
    factorial = np.cumprod(np.maximum(k, 1))
    expected = np.exp(-mean) * mean**k / factorial
    found = np.bincount(counts, minlength=12)[:12] / 40000
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / 40000)
    assert counts.max() <= most_spans(mean) and abs(counts.mean() - mean) < 5 * np.sqrt(mean / 40000)


def test_no_spans_where_none_are_asked_for():
    assert (draw_counts(3, np.zeros(9, np.int64), np.arange(9), 0.0) == 0).all()


def test_one_document_draws_the_same_beside_any_others():
    numbers = np.array([5, 9, 1 << 33])
    together = draw_counts(3, np.array([0, 1, 2]), numbers, 1.0)
    alone = [draw_counts(3, np.array([e]), numbers[i : i + 1], 1.0)[0] for i, e in enumerate((0, 1, 2))]
    assert together.tolist() == alone
    draws = [draw_counts(seed, np.array([e]), np.array([d]), 4.0)[0] for seed, e, d in np.ndindex(3, 3, 9)]
    assert len(set(draws)) > 3


def test_spans_reach_every_token_and_a_whole_image():
    tokens = np.array([1, 10, 11, VOCABULARY.break_id, *VOCABULARY.image_ids(np.arange(4)), 2])
    stretches = maskable(tokens, np.array([0, 4, 9]), VOCABULARY)
    assert stretches.tolist() == [[1, 3], [4, 8]]
    seen = {tuple(draw_spans(1, 0, i, 1, stretches)[0].tolist()) for i in range(600)}
    texts, images = {(1, 2), (2, 3), (1, 3)}, {(s, e) for s in range(4, 8) for e in range(s + 1, 9)}
    assert seen == texts | images


def test_several_spans_are_had():
    stretches = np.array([[1, 101]])
    sizes = [len(draw_spans(1, 0, i, 3, stretches)) for i in range(200)]
    assert min(sizes) >= 1 and max(sizes) == 3 and np.mean(sizes) > 2  # nine candidates for three


@pytest.mark.parametrize(
    "tokens",
    [
        [1, 10, VOCABULARY.sentinels[0], 2],
        [1, VOCABULARY.sentinels[0], VOCABULARY.sentinels[0], 10, 2],
        [1, VOCABULARY.sentinels[1], VOCABULARY.sentinels[1], 10, VOCABULARY.eoss_id, 2],
        [1, VOCABULARY.sentinels[0], VOCABULARY.sentinels[0], 10, VOCABULARY.eoss_id, VOCABULARY.eoss_id, 2],
    ],
)
def test_what_is_no_masked_document_is_not_restored(tokens):
    with pytest.raises(ValueError, match="span"):
        restore(np.array(tokens), VOCABULARY)

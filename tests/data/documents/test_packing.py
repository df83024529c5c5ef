"""Documents in rows."""


import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamug.data.documents.cm3 import restore
from megamug.data.documents.indexed import DocumentSet
from megamug.data.documents.packing import RowMaker, best_fit, pack, reserve
from megamug.errors import UserError
from tests.data.language import image, some_documents, tiny_vocabulary, write_set


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tiny_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def documents(vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents") / "set"
    return DocumentSet(write_set(folder, vocabulary, some_documents(vocabulary, 200)), vocabulary)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80))
def test_best_fit_overfills_no_row_and_wastes_little(lengths):
    lengths = np.array(lengths)
    rows = best_fit(lengths, 50)
    filled = np.bincount(rows, weights=lengths)
    assert filled.max() <= 50 and filled.min() > 0
    assert len(filled) <= 11 / 9 * -(-lengths.sum() // 50) + 1 + (lengths > 25).sum()
    assert (filled + filled.min() > 50).sum() >= len(filled) - 1  # the emptiest row fits into no other
    _, first = np.unique(rows, return_index=True)
    assert (np.diff(first) > 0).all()  # numbered by the first piece


def pieces_of(rows, i):
    """(tokens, loss) of the pieces of row i."""
    numbers = rows.segments[i]
    found = [(rows.tokens[i, numbers == n], rows.loss[i, numbers == n]) for n in range(numbers.max() + 1)]
    return [(tokens, loss) for tokens, loss in found if tokens[0] != 0]  # without the padding


@pytest.mark.parametrize("spans", [0.0, 1.0, 3.0])
def test_every_document_is_whole_in_one_row(documents, vocabulary, spans):
    maker = RowMaker(documents, vocabulary, context_length=90, cm3_spans=spans, loss_on="all", seed=3)
    rows = maker.make(np.arange(len(maker)), np.zeros(len(maker), np.int64))
    found, masked = [], 0
    for i in range(len(maker)):
        for tokens, loss in pieces_of(rows, i):
            plain = restore(tokens, vocabulary)
            masked += len(plain) != len(tokens)
            found.append(plain.tolist())
            assert not loss[0] and loss[1:].all()
    wanted = [documents.document(n)[0].tolist() for n in range(len(documents))]
    assert sorted(found) == sorted(wanted)
    assert (masked > 60) if spans else masked == 0
    assert not rows.loss[rows.tokens == vocabulary.pad_id].any()


def test_hidden_text_is_masks_that_carry_no_loss_and_codes_that_do(documents, vocabulary):
    options = dict(context_length=90, cm3_spans=1.0, loss_on="all", seed=3)
    maker, plain = (RowMaker(documents, vocabulary, **options, hidden_text=share) for share in (0.5, 0.0))
    assert maker.fingerprint() != plain.fingerprint()
    wanted = [documents.document(n)[0] for n in range(len(documents))]
    with_images = [tokens for tokens in wanted if vocabulary.is_image(tokens).any()]
    hidden = 0
    rows = maker.make(np.arange(len(maker)), np.full(len(maker), 2))
    for i in range(len(maker)):
        for tokens, loss in pieces_of(rows, i):
            masked = tokens == vocabulary.mask_id
            if masked.any():
                hidden += 1
                assert not loss[masked].any() and loss[1:][~masked[1:]].all()
                assert any(np.array_equal(vocabulary.without_text(x), tokens) for x in with_images)
    assert 0.3 * len(with_images) < hidden < 0.7 * len(with_images)


def test_positions_restart_and_segments_count(documents, vocabulary):
    maker = RowMaker(documents, vocabulary, context_length=90, cm3_spans=1.0, loss_on="all", seed=3)
    rows = maker.make(np.arange(len(maker)), np.ones(len(maker), np.int64))
    starts = np.diff(rows.segments, axis=1, prepend=-1) != 0
    assert ((rows.positions == 0) == starts).all()
    assert (np.diff(rows.positions, axis=1)[~starts[:, 1:]] == 1).all()
    assert set(rows.tokens[starts]) == {vocabulary.bos_id, vocabulary.pad_id}


def test_rows_do_not_depend_on_their_neighbours(documents, vocabulary):
    maker = RowMaker(documents, vocabulary, context_length=90, cm3_spans=1.0, loss_on="all", seed=3)
    numbers = np.arange(len(maker))
    together = maker.make(numbers, numbers % 3)
    for i in (0, 5, len(maker) - 1):
        alone = maker.make(numbers[i : i + 1], numbers[i : i + 1] % 3)
        assert (alone.tokens[0] == together.tokens[i]).all() and (alone.loss[0] == together.loss[i]).all()
    other = maker.make(numbers, numbers % 3 + 1)
    assert (other.tokens != together.tokens).any(axis=1).mean() > 0.7


def test_spans_are_left_out_seldom(documents, vocabulary):
    """The rule of the free tokens: rows with a document each draw a span too many in less than 2 of 100."""
    from megamug.data.documents.cm3 import draw_counts

    counts = draw_counts(3, np.zeros(20000, np.int64), np.arange(20000), 1.0)
    assert (counts * 3 > reserve(1.0)).mean() < 0.02
    assert reserve(0.0) == 0


def test_long_documents_are_cut_between_segments(vocabulary, tmp_path):
    text = np.arange(20) + 260
    whole = [(text, False, False), (image(vocabulary), True, False)] * 5
    endless = [(np.arange(100) % 30 + 260, False, False), (image(vocabulary), True, False)]
    folder = write_set(tmp_path / "set", vocabulary, [whole, endless, [(text, False, False)]])
    documents = DocumentSet(folder, vocabulary)
    packing = pack(documents, 60, 0.0)
    assert packing.lengths.max() <= 61 and packing.lengths.min() >= 2
    pieces = [documents.tokens[s : s + n] for s, n in zip(packing.starts, packing.lengths, strict=True)]
    for number in range(3):
        mine = [pieces[i] for i in np.flatnonzero(packing.documents == number)]
        assert (np.concatenate(mine) == documents.document(number)[0]).all()
    for piece in pieces:  # no image is cut
        runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], vocabulary.is_image(piece), [0]]))))[::2]
        assert set(runs.tolist()) <= {16}
    first = [pieces[i] for i in np.flatnonzero(packing.documents == 0)]
    assert all(piece[-1] in (vocabulary.break_id, vocabulary.eos_id) for piece in first)
    assert sorted(packing.row_pieces.tolist()) == list(range(len(pieces)))


def test_a_row_too_short_for_an_image_is_told(documents, vocabulary):
    with pytest.raises(UserError, match=r"context_length=15 is too short for an image.*18 tokens.*row holds 16"):
        pack(documents, 15, 0.0)
    with pytest.raises(UserError, match="no room beside the 9 tokens"):
        pack(documents, 9, 1.0)


def test_a_row_is_filled_to_its_last_token(vocabulary, tmp_path):
    """Documents of 11 and 12 tokens with their marks: rows of 11 hold the first whole, and cut the other."""
    text = np.arange(10) + 260
    documents = DocumentSet(write_set(tmp_path / "set", vocabulary, [[(text[:9], False, False)],
                                                                     [(text, False, False)]]), vocabulary)  # fmt: skip
    assert np.diff(documents.starts).tolist() == [11, 12]
    packing = pack(documents, 10, 0.0)
    assert packing.lengths.tolist() == [11, 10, 2] and packing.documents.tolist() == [0, 1, 1] and len(packing) == 3
    packing = pack(documents, 10 + reserve(1.0), 1.0)  # as long beside what spans need
    assert packing.lengths.tolist() == [11, 10, 2]
    assert pack(documents, 12, 0.0).lengths.tolist() == [11, 12] == pack(documents, 11, 0.0).lengths.tolist()
    packing = pack(documents, 22, 0.0)
    assert len(packing) == 1 and np.diff(packing.row_starts).tolist() == [2]  # 23 tokens: both
    assert len(pack(documents, 21, 0.0)) == 2
    assert pack(documents, 10, 1.0).lengths.max() == 2  # two tokens are the least that a piece can be


@pytest.mark.parametrize("spans", [0.0, 2.0])
def test_what_carries_loss(vocabulary, tmp_path, spans):
    prompt, response = np.arange(5) + 260, np.arange(7) + 270
    asked, picture = (prompt, False, False), image(vocabulary)
    dialogue = [asked, (response, False, True), (picture, True, True), asked]
    plain = [asked, (picture, True, False)]
    documents = DocumentSet(write_set(tmp_path / "set", vocabulary, [dialogue, plain]), vocabulary)

    def rows(loss_on):
        options = {"context_length": 100, "cm3_spans": spans, "seed": 5}
        maker = RowMaker(documents, vocabulary, loss_on=loss_on, **options)
        assert len(maker) == 1
        return maker.make(np.array([0]), np.array([0]))

    everything = rows("all")
    dialogue_, plain_ = pieces_of(rows("response"), 0)
    assert not plain_[1][0] and plain_[1][1:].all()  # no roles: all of it
    tokens, loss = dialogue_
    is_prompt = np.isin(tokens, prompt) | (tokens == vocabulary.bos_id) | (tokens == vocabulary.eos_id)
    is_response = np.isin(tokens, response) | vocabulary.is_image(tokens) | (tokens == vocabulary.break_id)
    assert (is_prompt | is_response).sum() == len(restore(tokens, vocabulary)) and not loss[is_prompt].any()
    assert loss[is_response].all()
    marks = ~(is_prompt | is_response)
    assert marks.any() == (spans > 0)
    images, text = rows("image"), rows("text")
    assert (images.loss == (everything.loss & vocabulary.is_image(everything.tokens))).all() and images.loss.sum() == 32
    assert (text.loss ^ images.loss == everything.loss).all()

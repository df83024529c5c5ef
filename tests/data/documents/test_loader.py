"""Batches of tokens."""

import json
import os

import numpy as np
import pytest
import torch

from megamug.data.documents.indexed import DocumentSet, open_documents
from megamug.data.documents.loader import IGNORE, TokenLoader
from megamug.errors import UserError
from tests.data.language import image, some_documents, tiny_vocabulary, write_set


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tiny_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def folders(vocabulary, tmp_path_factory):
    root = tmp_path_factory.mktemp("documents")
    return [write_set(root / name, vocabulary, some_documents(vocabulary, n, n)) for name, n in (("a", 90), ("b", 40))]


def make(documents, vocabulary, **options):
    options = {"context_length": 80, "global_batch_size": 8, "micro_batch_size": 2, "seed": 5} | options
    return TokenLoader(documents, vocabulary, **options)


def joined(batch, name):
    return torch.cat([getattr(micro, name) for micro in batch.micro_batches])


def test_shapes_and_labels(folders, vocabulary):
    batch = make(open_documents(str(folders[0]), vocabulary), vocabulary, separate_documents=True).next()
    assert len(batch.micro_batches) == 4 and batch.samples == 8 and batch.failures == 0 and batch.wait_seconds > 0
    micro = batch.micro_batches[0]
    kinds = {"tokens": torch.int64, "labels": torch.int64, "segments": torch.int32, "positions": torch.int64}
    for name, dtype in kinds.items():
        assert getattr(micro, name).shape == (2, 80) and getattr(micro, name).dtype == dtype
    tokens, labels, segments = (joined(batch, name) for name in ("tokens", "labels", "segments"))
    followed = labels[:, :-1] != IGNORE
    assert (labels[:, :-1][followed] == tokens[:, 1:][followed]).all()
    assert (segments[:, 1:] == segments[:, :-1])[followed].all()  # nothing is predicted across documents
    unpredicted = tokens[:, 1:][~followed]
    assert set(unpredicted.tolist()) <= {vocabulary.bos_id, vocabulary.pad_id}
    together = make(open_documents(str(folders[0]), vocabulary), vocabulary).next()
    assert together.micro_batches[0].segments is None and together.micro_batches[0].positions is None
    assert (joined(together, "tokens") == tokens).all()


def test_batches_say_how_many_documents_they_have_at_most(folders, vocabulary):
    documents = open_documents(str(folders[0]), vocabulary)
    near = make(documents, vocabulary, separate_documents=True)
    same = make(documents, vocabulary, separate_documents=True, same_shapes=True)
    said, counts = set(), set()
    for _ in range(6):
        batches = near.next().micro_batches, same.next().micro_batches
        for one, other in zip(*batches, strict=True):
            count = 2 + int((one.segments[:, 1:] != one.segments[:, :-1]).sum())
            assert count <= one.most_documents <= max(16, 2 * count - 1) and one.most_documents.bit_count() == 1
            assert count <= other.most_documents
            counts.add(count)
            said.add(other.most_documents)
    assert len(said) == 1 and len(counts) > 1
    packing = near.makers[0].packing
    assert said == {2 * (int(np.diff(packing.row_starts).max()) + 1)}
    assert make(documents, vocabulary, same_shapes=True).next().micro_batches[0].most_documents is None


@pytest.mark.parametrize("dp_size", [2, 4])
def test_the_batch_is_the_same_for_any_number_of_ranks(folders, vocabulary, dp_size):
    sets = [{"path": str(folders[0]), "weight": 3}, {"path": str(folders[1]), "weight": 1}]
    documents = open_documents(sets, vocabulary)
    one = make(documents, vocabulary)
    many = [make(documents, vocabulary, dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
    for _ in range(12):  # into the second epoch
        batch, parts = one.next(), [loader.next() for loader in many]
        for name in ("tokens", "labels"):
            assert (torch.cat([joined(part, name) for part in parts]) == joined(batch, name)).all()
        assert {part.samples for part in parts} == {batch.samples}


def test_resuming_gives_the_very_next_rows(folders, vocabulary):
    documents = open_documents(str(folders[0]), vocabulary)
    loader = make(documents, vocabulary)
    for _ in range(3):
        loader.next()
    state = json.loads(json.dumps(loader.state()))
    expected = [joined(loader.next(), "labels") for _ in range(9)]
    resumed = make(documents, vocabulary, state=state)
    assert all((joined(resumed.next(), "labels") == e).all() for e in expected)
    other_layout = make(documents, vocabulary, state=state, dp_size=2, dp_rank=1, micro_batch_size=4)
    assert (joined(other_layout.next(), "labels") == expected[0][4:]).all()


@pytest.mark.parametrize("change", [{"context_length": 90}, {"cm3_spans": 2.0}, {"seed": 6}])
def test_a_cursor_of_other_rows_is_refused(folders, vocabulary, change):
    documents = open_documents(str(folders[0]), vocabulary)
    state = make(documents, vocabulary).state()
    with pytest.raises(UserError):
        make(documents, vocabulary, state=state, **change)
    with pytest.raises(UserError, match="made with other data"):
        make(open_documents(str(folders[1]), vocabulary), vocabulary, state=state)
    make(documents, vocabulary, state=state, loss_on="text", separate_documents=True)


def test_a_validation_pass_has_each_row_once(folders, vocabulary):
    documents = open_documents(str(folders[1]), vocabulary)
    loaders = [
        make(documents, vocabulary, train=False, cm3_spans=0.0, dp_rank=r, dp_size=2) for r in range(2)
    ]  # fmt: skip
    predicted = 0
    for parts in zip(*loaders, strict=True):
        for part in parts:
            predicted += int((joined(part, "labels") != IGNORE).sum())
    total = int(documents[0].header.tokens)
    assert predicted == total - len(documents[0])  # all but each document's <bos>
    with pytest.raises(StopIteration):
        loaders[0].next()
    short = make(documents, vocabulary, train=False, max_samples=3)
    batch = short.next()
    assert short.total_samples == 3 == batch.samples
    assert [(row != IGNORE).any().item() for row in joined(batch, "labels")] == [True] * 3 + [False] * 5


def test_sets_are_blended_by_weight(folders, vocabulary, tmp_path):
    texts = write_set(tmp_path / "t", vocabulary, [[(np.full(60, 270), False, False)]] * 9)
    images = write_set(tmp_path / "i", vocabulary, [[(image(vocabulary), True, False)]] * 60)
    weighted = [{"path": str(texts), "weight": 0.5}, {"path": str(images), "weight": 0.5}]
    loader = make(open_documents(weighted, vocabulary), vocabulary, cm3_spans=0.0)
    rows = torch.cat([joined(loader.next(), "tokens") for _ in range(5)])
    assert (rows == 270).any(dim=1).sum() == 20


def test_another_vocabulary_is_told_with_what_to_run(folders, vocabulary, tmp_path):
    other = tiny_vocabulary(tmp_path, sentinels=9)
    with pytest.raises(UserError) as told:
        open_documents(str(folders[0]), other)
    wanted = [vocabulary.fingerprint()[:12], other.fingerprint()[:12], "megamug data documents", str(folders[0])]
    assert all(part in str(told.value) for part in wanted)


def test_damaged_folders_are_told(vocabulary, tmp_path):
    def broken(name, damage, message):
        folder = write_set(tmp_path / name, vocabulary, some_documents(vocabulary, 5))
        damage(folder)
        with pytest.raises(UserError, match=message):
            make(open_documents(str(folder), vocabulary), vocabulary).next()

    broken("a", lambda f: (f / "documents.json").unlink(), "no tokenised documents in there")
    broken("b", lambda f: (f / "documents.idx").unlink(), "documents.idx is missing")
    broken("c", lambda f: (f / "documents.bin").write_bytes(b"12"), "has 2 bytes and the index")
    broken("d", lambda f: (f / "documents.idx").write_bytes(b"MMI"), "not a whole index")
    broken("e", lambda f: (f / "documents.json").write_text("{}"), "broken")

    def edited(**changes):
        def change(folder):
            path = folder / "documents.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change

    broken("i", edited(tokens=7), "broken .it does not agree with its checksum")
    broken("j", edited(version=99), "version 99, this program reads 2")
    broken("k", edited(version=1, bytes=-5), "broken .*bytes: .*found -5")
    broken("l", lambda f: (f / "documents.json").write_text("[]"), "no JSON object")

    def flip(name, place):
        def change(folder):
            data = bytearray((folder / name).read_bytes())
            data[place] ^= 1
            (folder / name).write_bytes(data)

        return change

    broken("m", flip("documents.idx", -1), "does not agree with its checksum")  # the mode of a segment

    def beyond(folder):
        size = (folder / "documents.bin").stat().st_size // 2
        (folder / "documents.bin").write_bytes(np.full(size, vocabulary.size, np.uint16).tobytes())

    broken("f", beyond, f"token {vocabulary.size} is beyond the {vocabulary.size} ids")
    wrong = [[(vocabulary.image_ids(np.arange(15)), True, False)]]
    with pytest.raises(UserError, match="document 0: an image of 15 codes.*has 16"):
        DocumentSet(write_set(tmp_path / "g", vocabulary, wrong), vocabulary)
    with pytest.raises(UserError, match="it is one of all, response"):
        good = write_set(tmp_path / "h", vocabulary, some_documents(vocabulary, 5))
        make(open_documents(str(good), vocabulary), vocabulary, loss_on="images")


def test_a_flipped_bit_in_the_tokens_is_found_on_request(vocabulary, tmp_path):
    folder = write_set(tmp_path / "a", vocabulary, some_documents(vocabulary, 20))
    assert len(DocumentSet(folder, vocabulary, verify=True)) == 20
    data = bytearray((folder / "documents.bin").read_bytes())
    data[40] ^= 1
    (folder / "documents.bin").write_bytes(data)
    DocumentSet(folder, vocabulary)  # too much to read each time
    with pytest.raises(UserError, match="the tokens are not those that were written"):
        open_documents(str(folder), vocabulary, verify=True)


def test_documents_of_the_first_version_are_read(vocabulary, tmp_path):
    folder = write_set(tmp_path / "a", vocabulary, some_documents(vocabulary, 20))
    path = folder / "documents.json"
    values = json.loads(path.read_text())
    del values["checksum"], values["index_sha256"]
    path.write_text(json.dumps(values | {"version": 1}))
    assert len(DocumentSet(folder, vocabulary, verify=True)) == 20


def test_tokens_that_are_cut_off_in_use_are_a_sentence_and_no_signal(vocabulary, tmp_path):
    """A memory map of them ended the process with SIGBUS, which no test of this process would survive."""
    folder = write_set(tmp_path / "a", vocabulary, some_documents(vocabulary, 300))
    loader = make(open_documents(str(folder), vocabulary), vocabulary)
    loader.next()
    for kind in ("idx", "bin"):
        os.truncate(folder / f"documents.{kind}", 0)
    with pytest.raises(OSError, match=r"documents\.bin ends .* bytes before the end of tokens .* cut off while"):
        loader.next()


def test_folders_by_braces_and_lists(folders, vocabulary):
    root = folders[0].parent
    assert [s.name for s in open_documents(f"{root}/{{a,b}}", vocabulary)] == [str(folder) for folder in folders]
    assert len(open_documents(f"{folders[0]}::{folders[1]}", vocabulary)) == 2
    with pytest.raises(UserError, match="2 folders under one weight; give each folder its own"):
        open_documents([{"path": f"{root}/{{a,b}}", "weight": 1}], vocabulary)
    assert [s.name for s in open_documents(f"{root}/[ab]", vocabulary)] == [str(folder) for folder in folders]
    with pytest.raises(UserError, match="no folder matches"):
        open_documents(f"{root}/x*", vocabulary)

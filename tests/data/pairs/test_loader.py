import json
import os
import queue
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from megamug.data.pairs.loader import PairLoader, TooManyFailures, _put
from megamug.data.shards.indexing import index_paths
from megamug.data.shards.reading import Shard
from megamug.data.shards.sources import resolve_sources
from megamug.errors import UserError


@pytest.fixture
def make(shard_folder, tokenizer):
    loaders = []

    def make(value=shard_folder, **options):
        settings = dict(
            tokenizer=tokenizer, image_size=32, caption_length=24, global_batch_size=8, micro_batch_size=2, seed=1,
            threads=1,
        )  # fmt: skip
        sources = options.pop("sources", None) or resolve_sources(str(value))
        loaders.append(PairLoader(sources, **(settings | options)))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def flat(batches):
    """All pairs of some global batches: images, tokens, epochs, indices."""
    micro = [m for batch in batches for m in batch.micro_batches]
    return (
        torch.cat([m.images for m in micro]), torch.cat([m.tokens for m in micro]),
        np.concatenate([m.epochs for m in micro]), np.concatenate([m.indices for m in micro]),
    )  # fmt: skip


def same(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def test_batches(make, tokenizer):
    loader = make()
    batch = loader.next()
    assert len(batch.micro_batches) == 4 and batch.samples == 8 and batch.wait_seconds > 0
    micro = batch.micro_batches[0]
    assert micro.images.shape == (2, 3, 32, 32) and micro.images.dtype == torch.uint8
    assert micro.tokens.shape == (2, 25) and micro.tokens.dtype == torch.int64
    assert micro.indices.dtype == micro.epochs.dtype == np.int64 and micro.valid.all()
    assert micro.captions() == [f"picture number {i}" for i in micro.indices]
    assert micro.keys() == [f"a-{int(i >= 13)}.tar: {i:04d}" for i in micro.indices]
    assert [tokenizer.decode(row) for row in micro.tokens] == micro.captions()


def test_every_sample_once_an_epoch(make):
    loader = make(need_images=False)
    micro = [m for _ in range(5) for m in loader.next().micro_batches]
    seen = sorted((e, i) for m in micro for e, i in zip(m.epochs, m.indices, strict=True))
    assert seen == [(epoch, index) for epoch in range(2) for index in range(20)]
    assert micro[0].images is None


def test_layout_changes_nothing(make):
    loader = make()
    want = flat([loader.next() for _ in range(3)])
    for dp_size, micro_batch_size in [(2, 2), (4, 1), (1, 8)]:
        ranks = [make(dp_rank=r, dp_size=dp_size, micro_batch_size=micro_batch_size) for r in range(dp_size)]
        batches = [rank.next() for _ in range(3) for rank in ranks]
        assert same(flat(batches), want)
        assert {batch.samples for batch in batches[-dp_size:]} == {24}


def test_threads_and_chunks_change_nothing(make, monkeypatch):
    loader = make()
    want = flat([loader.next() for _ in range(3)])
    threads = make(threads=3)
    assert same(flat([threads.next() for _ in range(3)]), want)
    monkeypatch.setattr("megamug.data.pairs.loader.MAX_DECODE_BATCH", 3)  # a batch of 8 is decoded in three parts
    parts = make()
    assert same(flat([parts.next() for _ in range(3)]), want)


def test_resume_continues_with_the_next_sample(make):
    straight = make()
    want = flat([straight.next() for _ in range(7)][4:])
    loader = make()
    for _ in range(4):
        loader.next()
    state = json.loads(json.dumps(loader.state()))  # prefetched batches are not consumed ones
    assert state["samples"] == 32
    resumed = make(state=state)
    assert resumed.state() == state
    assert same(flat([resumed.next() for _ in range(3)]), want)
    two = [make(state=state, dp_rank=r, dp_size=2) for r in range(2)]
    assert same(flat([rank.next() for _ in range(3) for rank in two]), want)


def test_another_data_set_or_seed_is_refused(make, shard_folder):
    state = make().state()
    with pytest.raises(UserError, match="made with other data"):
        make(shard_folder / "a-0.tar", state=state)
    with pytest.raises(UserError, match="seed"):
        make(seed=2, state=state)


def test_augmentation_can_be_switched(make):
    def images(**options):
        loader = make(**options)
        return flat([loader.next()])[0]

    assert not torch.equal(images(), images(flip=False))
    plain = images(crop_scale=(1.0, 1.0), flip=False)
    assert torch.equal(plain, images(crop_scale=(1.0, 1.0), flip=False))
    assert not torch.equal(plain, images(crop_scale=(0.2, 1.0), flip=False))


@pytest.mark.parametrize(("samples", "dp_size"), [(None, 1), (11, 1), (11, 2), (9, 4), (16, 2)])
def test_validation_has_each_sample_once(make, samples, dp_size):
    wanted = samples or 20
    ranks = [make(train=False, max_samples=samples, dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
    passes = [list(rank) for rank in ranks]
    assert {len(batches) for batches in passes} == {-(-wanted // 8)}
    micro = [m for batches in passes for batch in batches for m in batch.micro_batches]
    indices = np.concatenate([m.indices[m.valid] for m in micro])
    assert len(indices) == len(set(indices.tolist())) == wanted == ranks[0].total_samples
    assert all(m.images.shape == (2, 3, 32, 32) for m in micro)
    with pytest.raises(StopIteration):
        ranks[0].next()
    again = make(train=False, max_samples=samples, dp_rank=0, dp_size=dp_size)
    assert same(flat(passes[0]), flat(list(again)))


@pytest.fixture
def damaged(helpers, tmp_path):
    """An indexed shard of 12 whose sample 4 was overwritten behind the index's back."""
    path = helpers.write_tar(tmp_path / "x.tar", helpers.good_members(12))
    index_paths([path], processes=1)
    stat, record = path.stat(), Shard(path).samples[4]
    with open(path, "r+b") as file:
        file.seek(int(record["image_offset"]))
        file.write(b"\0" * int(record["image_size"]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return path


def test_a_sample_that_fails_is_replaced_by_the_next(make, damaged, tokenizer, caplog):
    whole = make(damaged, micro_batch_size=4, global_batch_size=4)
    batches = [whole.next() for _ in range(3)]
    indices = flat(batches)[3]
    assert sorted(indices.tolist()) == [0, 1, 2, 3, 5, 5, 6, 7, 8, 9, 10, 11]
    assert batches[-1].failures == 1 and "sample 4 does not decode" in caplog.text
    captions = [c for batch in batches for m in batch.micro_batches for c in m.captions()]
    assert captions == [f"picture number {i}" for i in indices]
    assert [tokenizer.decode(row) for row in flat(batches)[1]] == captions  # its caption was replaced with it
    split = [make(damaged, dp_rank=r, dp_size=4, micro_batch_size=1, global_batch_size=4) for r in range(4)]
    assert same(flat([rank.next() for _ in range(3) for rank in split]), flat(batches))


def test_a_failure_in_a_later_chunk_is_replaced_alike(make, damaged, monkeypatch):
    want = make(damaged, micro_batch_size=4, global_batch_size=4)
    want = flat([want.next() for _ in range(3)])
    monkeypatch.setattr("megamug.data.pairs.loader.MAX_DECODE_BATCH", 3)
    parts = make(damaged, micro_batch_size=4, global_batch_size=4)
    assert same(flat([parts.next() for _ in range(3)]), want)


def test_a_sample_that_is_another_than_was_indexed_is_replaced(make, helpers, tmp_path, caplog):
    """It decodes, so only its hash tells; the time of the shard is as it was."""
    path = helpers.write_tar(tmp_path / "x.tar", helpers.good_members(12))
    index_paths([path], processes=1)
    stat, shard = path.stat(), Shard(path)
    first = shard.record(4)
    with open(path, "r+b") as file:
        file.seek(int(first["caption_offset"]))
        file.write(shard.caption(5).encode()[: int(first["caption_size"])])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    plain = make(path, micro_batch_size=4, global_batch_size=4)
    assert [plain.next() for _ in range(3)][-1].failures == 0
    sources = resolve_sources(str(path), verify=True)
    checked = make(path, micro_batch_size=4, global_batch_size=4, sources=sources)
    assert [checked.next() for _ in range(3)][-1].failures == 1
    assert "sample 4 is not what was indexed" in caplog.text


def test_transparent_pictures_have_the_background_asked_for(make, helpers, tmp_path):
    from PIL import Image

    data = helpers.encoded(Image.new("RGBA", (40, 30), (0, 0, 0, 0)), "PNG")
    members = [member for i in range(8) for member in ((f"{i}.png", data), (f"{i}.txt", b"c"))]
    path = helpers.write_tar(tmp_path / "x.tar", members)
    index_paths([path], processes=1)
    assert (make(path).next().micro_batches[0].images == 255).all()
    images = make(path, background=[1, 2, 3]).next().micro_batches[0].images
    assert images.unique(dim=2).unique(dim=3).flatten().tolist()[:3] == [1, 2, 3]


def test_too_many_failures_end_the_run(make, damaged):
    loader = make(damaged, max_failure_rate=0.0)
    with pytest.raises(TooManyFailures, match=r"max_failure_rate.*sample 4 of .*x\.tar"):
        for _ in range(3):
            loader.next()
    with pytest.raises(TooManyFailures):  # and again, not a hang
        loader.next()


def test_a_shard_that_shrinks_is_no_crash(make, helpers, tmp_path, caplog):
    path = helpers.write_tar(tmp_path / "x.tar", helpers.good_members(12))
    index_paths([path], processes=1)
    loader = make(path, prefetch=1)
    os.truncate(path, 0)
    with pytest.raises(TooManyFailures):
        for _ in range(20):
            loader.next()
    assert "bytes at" in caplog.text


def test_no_tokenizer_is_told(make):
    with pytest.raises(UserError, match=r"data\.tokenizer is not set"):
        make(tokenizer=None)
    assert make(tokenizer=None, need_captions=False).next().micro_batches[0].tokens is None


def test_close_ends_the_thread(make):
    loader = make()
    loader.next()
    loader.close()
    assert not loader._thread.is_alive()


def test_who_is_asked_to_stop_while_the_queue_is_full_puts_nothing():
    full, stop = queue.Queue(maxsize=1), threading.Event()
    assert _put(full, stop, "first") is True
    threading.Timer(0.3, stop.set).start()
    assert _put(full, stop, "second") is False
    assert full.get_nowait() == "first" and full.empty()


def test_while_it_is_paused_no_batch_is_made(make, monkeypatch):
    """After that it goes on where it was."""
    made, original = [], PairLoader._make_batch
    monkeypatch.setattr(PairLoader, "_make_batch", lambda self, *a: (made.append(None), original(self, *a))[1])
    loader = make(prefetch=1)
    first = loader.next()
    with loader.paused():
        count = len(made)
        time.sleep(0.2)
        assert len(made) == count
    rest = [loader.next() for _ in range(3)]
    assert [first.samples, *(batch.samples for batch in rest)] == [8, 16, 24, 32]


def test_real_photographs(make):
    named = os.environ.get("MEGAMUG_PHOTOS")
    folder = Path(named) if named else Path(__file__).parents[4] / "shared" / "data" / "photos"
    if not folder.is_dir():
        pytest.skip("no photographs: set MEGAMUG_PHOTOS to a folder of photograph shards")
    assert sum(r.samples for r in index_paths([folder], processes=1)) == 200
    loader = make(folder, image_size=64, global_batch_size=32, micro_batch_size=16)
    images, _, _, _ = flat([loader.next(), loader.next()])
    assert 60 < images.float().mean() < 180 and images.float().std() > 40


@pytest.mark.parametrize("lines", ["join", "first", "random"])
def test_a_caption_file_of_several_lines(lines, helpers, tokenizer, tmp_path):
    members = []
    for n in range(6):
        members += [(f"{n}.jpg", helpers.encoded(helpers.picture(n))), (f"{n}.txt", b"picture\nnumber\n7")]
    helpers.write_tar(tmp_path / "s.tar", members)
    index_paths([tmp_path / "s.tar"], processes=1)
    loader = PairLoader(
        resolve_sources(str(tmp_path)), tokenizer=tokenizer, image_size=16, caption_length=12, caption_lines=lines,
        global_batch_size=6, micro_batch_size=6, seed=1, need_images=False,
    )  # fmt: skip
    with closing(loader):
        epochs = [loader.next().micro_batches[0] for _ in range(4)]
        told = [micro.captions() for micro in epochs]
        assert [[tokenizer.decode(row) for row in micro.tokens] for micro in epochs] == told
    numbers = [micro.indices.tolist() for micro in epochs]
    by_sample = [dict(zip(*pair, strict=True)) for pair in zip(numbers, told, strict=True)]
    if lines == "random":
        assert {caption for captions in told for caption in captions} == {"picture", "number", "7"}
        assert len({tuple(sorted(epoch.items())) for epoch in by_sample}) == 4  # another in each epoch
    else:
        assert {c for captions in told for c in captions} == {{"join": "picture number 7", "first": "picture"}[lines]}

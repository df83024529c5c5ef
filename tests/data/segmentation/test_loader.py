"""Images with maps through the loader: maps lie over their images, whoever reads them; lost ones are replaced."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megamug.data.segmentation.loader import MapLoader
from megamug.data.shards.sources import resolve_sources
from megamug.errors import UserError
from tests.data.conftest import good_members, write_tar
from tests.training.segmentation.made import COLOURS, make_shards

SIZE = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("maps"), {"train": 17}, reduce_zero=True)


def loaded(path, **more):
    arguments = dict(
        tokenizer=None, need_captions=False, image_size=SIZE, caption_length=0, global_batch_size=8, micro_batch_size=4,
        seed=3, threads=1, scale=(0.5, 2.0), most_of_one_class=0.75, distortion=False, mean=(0.5, 0.25, 0.0),
        reduce_zero_label=True,
    )  # fmt: skip
    return MapLoader(resolve_sources(str(path)), **arguments | more)


def batches(path, count: int, **more):
    loader = loaded(path, **more)
    try:
        return [micro for _ in range(count) for micro in loader.next().micro_batches]
    finally:
        loader.close()


@pytest.mark.parametrize("train", [True, False])
def test_a_map_lies_over_its_image(folder, train):
    flips, padded = set(), 0
    for micro in batches(folder / "train", 2, train=train):
        assert micro.images.shape == (4, 3, SIZE, SIZE) and micro.maps.shape == (4, SIZE, SIZE)
        assert micro.images.dtype == micro.maps.dtype == torch.uint8
        for image, classes in zip(micro.images.numpy(), micro.maps.numpy(), strict=True):
            known = classes != 255
            assert set(np.unique(classes[known])) <= {0, 1, 2, 3}
            nearest = abs(image.transpose(1, 2, 0)[:, :, None].astype(int) - COLOURS).sum(-1).argmin(-1)
            assert (nearest == classes)[known].mean() > 0.93  # but edges, which are resized in two ways
            outside = (image == np.array([128, 64, 0])[:, None, None]).all(0)
            padded += outside.sum()
            assert not (outside & known).any()
            flips.add(bool(known[:, 0].any()))
    assert (padded > 0) == train


def test_the_same_whoever_reads_and_wherever_it_begins(folder):
    def content(some):
        return [(m.images.tolist(), m.maps.tolist(), m.indices.tolist()) for m in some]

    whole = content(batches(folder / "train", 3, distortion=True))
    ranks = [content(batches(folder / "train", 3, dp_rank=rank, dp_size=2, distortion=True)) for rank in (0, 1)]
    assert whole == [micro for pair in zip(*ranks, strict=True) for micro in pair]
    loader = loaded(folder / "train", distortion=True)
    loader.next()
    state = loader.state()
    loader.close()
    assert content(batches(folder / "train", 2, state=state, distortion=True)) == whole[2:]
    plain = content(batches(folder / "train", 1))
    assert [m[1:] for m in plain] == [m[1:] for m in whole[:2]] and plain != whole[:2]


def test_padding_of_a_validation_has_no_class(folder):
    last = batches(folder / "train", 3, train=False)[-2:]
    assert [m.valid.tolist() for m in last] == [[True, False, False, False], [False] * 4]
    assert (last[0].maps[0] != 255).any() and (last[0].maps[1:] == 255).all() and (last[1].maps == 255).all()


def test_a_map_that_cannot_be_read_any_more_is_replaced(folder, monkeypatch, caplog):
    from megamug.data.shards.reading import Shard

    read, failed = Shard.map, []

    def broken(self, record):
        if not failed:
            failed.append(1)
            raise ValueError("the map does not decode: for a test")
        return read(self, record)

    monkeypatch.setattr(Shard, "map", broken)
    (first, *_) = batches(folder / "train", 1)
    assert "the map does not decode: for a test; the next sample takes its place" in caplog.text
    monkeypatch.setattr(Shard, "map", read)
    (whole, *_) = batches(folder / "train", 1)
    assert first.indices[0] == (whole.indices[0] + 1) % 17 and (first.indices[1:] == whole.indices[1:]).all()


def test_images_without_a_map_are_refused(tmp_path):
    from megamug.data.shards.indexing import index_paths

    path = write_tar(tmp_path / "0.tar", good_members(3))
    index_paths([path], processes=1)
    with pytest.raises(UserError, match=r"3 of 3 samples without a usable map \(0000.jpg: no map"):
        loaded(path)

"""Labels and images without captions in the loader; captioned data in the order that they always had."""

import hashlib
import io
import json
import os
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from megamug.data.pairs.loader import PairLoader
from megamug.data.shards.annotations import Limits
from megamug.data.shards.indexing import index_paths
from megamug.data.shards.sources import resolve_sources
from megamug.errors import UserError

SIZES = dict(image_size=16, caption_length=12, seed=1, threads=1)


def loader(sources, **options):
    return closing(PairLoader(sources, **({**SIZES, "tokenizer": None, "need_captions": False} | options)))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two shards of 9 and 6 images without captions; the key says the class: its number modulo 4."""
    from tests.data.conftest import encoded, picture, write_tar

    folder = tmp_path_factory.mktemp("labelled")
    for name, numbers in (("0", range(9)), ("1", range(9, 15))):
        members = []
        for n in numbers:
            members += [(f"{n:02d}.jpg", encoded(picture(n))), (f"{n:02d}.cls", b"%d" % (n % 4))]
        write_tar(folder / f"{name}.tar", members)
    index_paths([folder], processes=1)
    return folder


@pytest.mark.parametrize("train", [True, False])
def test_every_sample_has_its_own_label(labelled, train):
    with loader(resolve_sources(str(labelled)), global_batch_size=8, micro_batch_size=4, train=train,
                need_labels=True) as batches:  # fmt: skip
        seen = []
        for _ in range(2):
            for micro in batches.next().micro_batches:
                assert micro.labels.dtype == torch.int64 and micro.labels.shape == (4,)
                keys = [int(key.split(": ")[1]) for key in micro.keys()]
                assert micro.labels.tolist() == [key % 4 for key in keys]
                assert micro.captions() == [""] * 4 and micro.tokens is None
                seen += [key for key, counts in zip(keys, micro.valid, strict=True) if counts]
    assert len(seen) == 16 - (not train) and set(seen) == set(range(15))


def test_labels_are_none_unless_asked_for(labelled):
    with loader(resolve_sources(str(labelled)), global_batch_size=4, micro_batch_size=4) as batches:
        assert batches.next().micro_batches[0].labels is None


def test_a_replaced_sample_brings_its_own_label(helpers, tmp_path):
    members = []
    for n in range(4):
        members += [(f"{n}.jpg", helpers.encoded(helpers.picture(n))), (f"{n}.cls", b"%d" % n)]
    path = helpers.write_tar(tmp_path / "x.tar", members)
    index_paths([path], processes=1)
    sources = resolve_sources(str(path))
    place, stat = int(sources[0].shards[0].record(2)["image_offset"]), path.stat()
    with open(path, "r+b") as file:  # the third image no longer decodes
        file.seek(place)
        file.write(bytes(200))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with loader(sources, global_batch_size=4, micro_batch_size=4, train=False, need_labels=True,
                max_failure_rate=1.0) as batches:  # fmt: skip
        micro = batches.next().micro_batches[0]
        assert sorted(micro.labels.tolist()) == [0, 1, 3, 3]
        assert [int(key[-1]) for key in micro.keys()] == micro.labels.tolist()


def test_labels_that_are_not_there_are_refused(labelled, shard_folder, tokenizer):
    with pytest.raises(UserError, match=r"20 of 20 samples without a usable label \(0000.jpg: no label"):
        loader(resolve_sources(str(shard_folder)), global_batch_size=4, micro_batch_size=4, need_labels=True)
    with pytest.raises(UserError, match="20 samples without"):
        loader(resolve_sources([str(labelled), str(shard_folder)]), global_batch_size=4, micro_batch_size=4,
               need_labels=True)  # fmt: skip
    with pytest.raises(UserError, match="15 of 15 samples have no caption"):
        loader(resolve_sources(str(labelled)), global_batch_size=4, micro_batch_size=4, need_captions=True,
               tokenizer=tokenizer)  # fmt: skip


def test_images_without_a_caption_are_left_out_where_captions_are_read(helpers, tokenizer, tmp_path):
    members = helpers.good_members(3)
    members[3:3] = [("x.jpg", helpers.encoded(helpers.picture(7)))]
    path = helpers.write_tar(tmp_path / "x.tar", members)
    index_paths([path], limits=Limits(images_alone=True), processes=1)
    kinds = {True: {"0000", "0001", "0002"}, False: {"0000", "0001", "0002", "x"}}
    for captions, wanted in kinds.items():
        with loader(resolve_sources(str(path), captions=captions), global_batch_size=1, micro_batch_size=1, train=False,
                    need_captions=captions, tokenizer=tokenizer) as batches:  # fmt: skip
            keys = [batch.micro_batches[0].keys()[0].split(": ")[1] for batch in batches]
        assert len(keys) == len(wanted) and set(keys) == wanted


# What the loader gave for these shards before indexes knew labels (index version 2).
ORDER = [11, 6, 17, 16, 7, 4, 3, 8, 13, 5, 12, 14, 0, 10, 19, 15, 2, 1, 18, 9, 7, 15, 10, 1, 16, 8, 17, 11, 19, 13]
DRAWS = [0.2777453, 0.21863702, 0.62646688]


def test_captioned_data_keep_their_order_and_draws(shard_folder):
    sources = resolve_sources(str(shard_folder))
    with loader(sources, global_batch_size=10, micro_batch_size=10) as batches:
        micro = [batches.next().micro_batches[0] for _ in range(3)]
    assert np.concatenate([m.indices for m in micro]).tolist() == ORDER
    assert [key for m in micro for key in m.keys()] == [f"a-{int(i >= 13)}.tar: {i:04d}" for i in ORDER]
    assert np.allclose(micro[0]._lines[1][:3], DRAWS, atol=1e-8)
    digest = hashlib.sha256()
    for shard, count in zip(sorted(shard_folder.glob("*.tar")), (13, 7), strict=True):
        digest.update(f"{shard.name} {hashlib.sha256(shard.read_bytes()).hexdigest()} {count}\n".encode())
    for captions in (False, True):  # checkpoints know their data by it
        assert resolve_sources(str(shard_folder), captions=captions)[0].fingerprint() == digest.hexdigest()


def test_real_labels(tmp_path):
    """Emoji with captions and nine classes: not part of the project, MEGAMUG_EMOJI names their folder."""
    named = os.environ.get("MEGAMUG_EMOJI")
    folder = Path(named) if named else Path(__file__).parents[4] / "shared" / "data" / "emoji"
    shard = folder / "heldout-noto.tar"
    if not shard.is_file():
        pytest.skip(f"no emoji: {shard} is not there; set MEGAMUG_EMOJI to the folder of heldout-noto.tar")
    (tmp_path / "0.tar").write_bytes(shard.read_bytes())
    index_paths([tmp_path], processes=1)
    with tarfile.open(fileobj=io.BytesIO(shard.read_bytes())) as members:
        truth = {m.name[:-5]: json.load(members.extractfile(m))["label"] for m in members if m.name.endswith(".json")}
    (source,) = resolve_sources(str(tmp_path), captions=True)
    assert source.classes == 9 and len(source) == len(truth)
    found = {}
    with loader([source], global_batch_size=32, micro_batch_size=32, train=False, need_labels=True) as batches:
        for batch in batches:
            for micro in batch.micro_batches:
                keys = [key.split(": ")[1] for key in micro.keys()]
                found |= dict(zip(keys, micro.labels.tolist(), strict=True))
    assert found == truth

"""What is seen of the sets: nested parts of a seed, captions that are nobody's own."""

from __future__ import annotations

import numpy as np
import pytest

from megamug.data.pairs.selection import selected
from megamug.data.shards.sources import resolve_sources
from megamug.errors import UserError
from tests.data.pairs.test_loader import make  # noqa: F401


@pytest.fixture
def sources(shard_folder):
    return resolve_sources(str(shard_folder))  # 20 samples in two shards, picture and caption of one number


def seen(source):
    """(number of the picture, number in the caption) of each sample."""
    pictures = [int(shard.key(i)) for shard, i in map(source.locate, range(len(source)))]
    captions = [shard.caption_aside(i) for shard, i in map(source.locate_caption, range(len(source)))]
    return pictures, [int(caption.removeprefix("picture number ")) for caption in captions]


def test_a_smaller_part_lies_within_a_larger_one(sources):
    parts = {}
    for fraction, count in {0.04: 1, 0.25: 5, 0.5: 10, 0.51: 11, 1.0: 20}.items():
        (source,) = selected(sources, 3, fraction)
        pictures, captions = seen(source)
        assert len(source) == count and pictures == captions == sorted(set(pictures))
        parts[fraction] = set(pictures)
    values = list(parts.values())
    assert all(small < large for small, large in zip(values, values[1:], strict=False))
    assert {seen(selected(sources, seed, 0.25)[0])[0][0] for seed in range(20)} != {0}  # another seed, another part
    assert seen(selected(sources, 3, 0.25)[0]) == seen(selected(sources, 3, 0.25)[0])


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1])
def test_shuffled_captions_are_a_permutation_without_a_fixed_point(sources, fraction):
    drawn = set()
    for seed in range(8):
        pictures, captions = seen(selected(sources, seed, fraction, "shuffled")[0])
        assert sorted(captions) == sorted(pictures) and not any(np.equal(pictures, captions))
        drawn.add(tuple(captions))
    assert len(drawn) > 1 and len(sources[0]) == 20 and seen(sources[0])[0] == seen(sources[0])[1]


def test_what_is_seen_is_part_of_what_a_set_is(sources):
    kinds = [(1, 1.0, "own"), (1, 0.5, "own"), (2, 0.5, "own"), (1, 1.0, "shuffled"), (2, 1.0, "shuffled")]
    found = [selected(sources, *kind)[0].fingerprint() for kind in kinds]
    assert len(set(found)) == 5 and found[0] == sources[0].fingerprint()


def test_one_sample_has_no_other_caption(sources):
    with pytest.raises(UserError, match=r"has 1 sample at data.fraction=0.05; there is no other"):
        selected(sources, 1, 0.05, "shuffled")


def test_the_loader_reads_what_is_seen(make, sources, tokenizer):  # noqa: F811
    """Pictures, crops and order stay what they are; captions are those of other pictures, and told as such."""
    plain, mixed = make(), make(sources=selected(sources, 5, 1.0, "shuffled"))
    _, given = seen(selected(sources, 5, 1.0, "shuffled")[0])
    for _ in range(3):
        ours, theirs = plain.next(), mixed.next()
        for a, b in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            assert a.images.equal(b.images) and (a.indices == b.indices).all() and a.keys() == b.keys()
            assert b.captions() == [f"picture number {given[i]}" for i in b.indices]
            assert [tokenizer.decode(row) for row in b.tokens] == b.captions()
    with pytest.raises(UserError, match="made with other data"):
        make(sources=selected(sources, 5, 1.0, "shuffled"), state=plain.state())
    part = make(sources=selected(sources, 5, 0.5), need_images=False)
    allowed = {f"picture number {i}" for i in seen(selected(sources, 5, 0.5)[0])[0]}
    told = [caption for _ in range(5) for micro in part.next().micro_batches for caption in micro.captions()]
    assert set(told) == allowed and all(told.count(caption) == 4 for caption in allowed)  # 40 samples: four epochs

"""Micro-batches of a classifier: what is mixed adds up, the same whoever makes it; held-out images stay whole."""

from __future__ import annotations

import types

import pytest
import torch

from megamug.configuration.reading import resolve
from megamug.configuration.sections import Config
from megamug.models.tasks import make_task
from tests.training.classified import SIZES, make_shards

DRAWN = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("task"), {"train": 17, "heldout": 5})


def batches(folder, train: bool, rank: int = 0, ranks: int = 1, **classifier):
    """(as the loader gives them, as the model takes them) of the first step."""
    config = Config()
    config.model.__dict__.update(SIZES, kind="classifier")
    config.classifier.__dict__.update(classes=3, **classifier)
    config.data.__dict__.update(train=str(folder / "train"), validation=str(folder / "heldout"), image_size=32,
                                global_batch_size=8, micro_batch_size=4, threads=1)  # fmt: skip
    task = make_task(resolve(config))
    world = types.SimpleNamespace(dp_rank=rank, dp_size=ranks, device=torch.device("cpu"), is_first=False)
    loader = task.loader(world, train)
    try:
        found = loader.next().micro_batches
        return found, [task.batch(micro) for micro in found]
    finally:
        loader.close()


def test_targets_sum_to_one_and_are_the_shares_of_the_pixels(folder):
    pairs, mixed = batches(folder, train=True, **DRAWN)
    for micro, batch in zip(pairs, mixed, strict=True):
        assert batch.labels.shape == (4, 3)
        torch.testing.assert_close(batch.labels.sum(1), torch.ones(4))
        for i in range(4):
            own, other = (micro.images[row].float() for row in (i, 3 - i))
            # The one share that explains the mean of mixed pixels, whether of a box or of all of them.
            share = batch.labels[i, micro.labels[i]]
            if micro.labels[i] == micro.labels[3 - i]:
                assert share == pytest.approx(1)
                continue
            differs = (own - other).abs() > 1
            shares = ((batch.images[i] - other) / (own - other))[differs]
            assert float(shares.min()) > -1e-3 and float(shares.max()) < 1 + 1e-3
            assert float(shares.mean()) == pytest.approx(float(share), abs=0.1)


def test_the_same_whoever_makes_it(folder):
    _, whole = batches(folder, train=True, **DRAWN)
    parts = [batches(folder, True, rank, 2, **DRAWN)[1] for rank in (0, 1)]
    for one, (other,) in zip(whole, parts, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.scales, other.scales) and one.scales.shape == (2, 2, 4, 1)


def test_held_out_images_stay_whole(folder):
    pairs, held_out = batches(folder, train=False, **DRAWN)
    for micro, batch in zip(pairs, held_out, strict=True):
        assert torch.equal(batch.images, micro.images) and torch.equal(batch.labels, micro.labels)
        assert batch.scales is None
    assert held_out[1].rows.tolist() == [0] and not pairs[1].train
    _, plain = batches(folder, train=True)
    assert plain[0].images.dtype == torch.uint8 and plain[0].scales is None

"""Micro-batches of a classifier: what is mixed adds up, the same whoever makes it; held-out images stay whole."""

from __future__ import annotations

import importlib.util
import types

import pytest
import torch

from megamug.configuration.reading import resolve
from megamug.configuration.sections import Config
from megamug.data.pairs.mixing import erased_boxes, erasing_noise
from megamug.models.tasks import make_task
from tests.training.classified import SIZES, make_shards

DRAWN = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.3}
ALL = DRAWN | {"random_erasing": 0.5}
if importlib.util.find_spec("timm"):
    ALL["rand_augment"] = "rand-m9-mstd0.5-inc1"


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
    _, whole = batches(folder, train=True, **ALL)
    parts = [batches(folder, True, rank, 2, **ALL)[1] for rank in (0, 1)]
    for one, (other,) in zip(whole, parts, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.scales, other.scales) and one.scales.shape == (2, 2, 4, 1)


def test_boxes_are_erased_before_images_are_mixed(folder):
    """Noise about the mean colour in a box, all else as it was; the same boxes whoever erases them."""
    pairs, erased = batches(folder, train=True, random_erasing=1.0)
    boxes = 0
    for micro, batch in zip(pairs, erased, strict=True):
        places = erased_boxes(1234, micro.epochs, micro.indices, 32, 1.0)
        for row, (top, left, height, width) in enumerate(places):
            inside = torch.zeros(32, 32, dtype=torch.bool)
            inside[top : top + height, left : left + width] = True
            assert torch.equal(batch.images[row][:, ~inside], micro.images[row].float()[:, ~inside])
            noise = torch.from_numpy(erasing_noise(1234, micro.epochs[row], micro.indices[row], height, width))
            mean, std = (torch.tensor(x).view(3, 1, 1) for x in (Config().data.mean, Config().data.std))
            normalised = (batch.images[row][:, top : top + height, left : left + width] / 255 - mean) / std
            torch.testing.assert_close(normalised, noise, rtol=1e-4, atol=1e-4)
            boxes += height > 0
    assert boxes >= 6
    _, mixed = batches(folder, train=True, random_erasing=1.0, mixup=0.8)
    for plain, batch in zip(erased, mixed, strict=True):
        differs = (plain.images - plain.images.flip(0)).abs() > 1
        shares = (batch.images - plain.images.flip(0)) / (plain.images - plain.images.flip(0))
        for row in range(4):
            assert float(shares[row][differs[row]].std()) < 1e-2


def test_held_out_images_stay_whole(folder):
    pairs, held_out = batches(folder, train=False, **ALL)
    for micro, batch in zip(pairs, held_out, strict=True):
        assert torch.equal(batch.images, micro.images) and torch.equal(batch.labels, micro.labels)
        assert batch.scales is None
    assert held_out[1].rows.tolist() == [0] and not pairs[1].train
    sharp, _ = batches(folder, train=False)
    assert torch.equal(pairs[0].images, sharp[0].images)
    _, plain = batches(folder, train=True)
    assert plain[0].images.dtype == torch.uint8 and plain[0].scales is None

"""RandAugment is timm's own to the bit, whatever other threads draw, and leaves their generators alone."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megamug.data.pairs import rand_augment
from megamug.data.pairs.rand_augment import RandAugment, generators
from megamug.data.random import random_words
from megamug.errors import UserError

POLICY, MEAN, SIZE = "rand-m9-mstd0.5-inc1", (0.485, 0.456, 0.406), 32
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


def images(count: int = 40) -> torch.Tensor:
    pixels = torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return pixels.repeat_interleave(8, 2).repeat_interleave(8, 3)


@needs_timm
@pytest.mark.parametrize("threads", [1, 4])
def test_equals_timm_seeded_alike_and_draws_nothing_of_the_process(threads):
    from PIL import Image

    path = Path(importlib.util.find_spec("timm").submodule_search_locations[0], "data", "auto_augment.py")
    spec = importlib.util.spec_from_file_location("auto_augment_as_it_is", path)
    timm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(timm)
    plain = timm.rand_augment_transform(POLICY, {
        "translate_const": 14, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC,
    })  # fmt: skip
    pixels, epochs, indices = images(), np.arange(40) % 3, 1000 + np.arange(40)
    random.seed(5), np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    own = RandAugment(POLICY, 7, SIZE, MEAN, threads)
    found = own(pixels, epochs, indices)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    words = random_words(7, "rand augment", epochs, indices, 4)
    for row in range(40):
        one, other = generators(words[row])
        random.setstate(one.getstate()), np.random.set_state(other.get_state())
        expected = np.asarray(plain(Image.fromarray(pixels[row].permute(1, 2, 0).numpy())))
        assert np.array_equal(found[row].permute(1, 2, 0).numpy(), expected), row
    assert found.dtype == torch.uint8 and 5 < sum(not torch.equal(a, b) for a, b in zip(found, pixels, strict=True))
    # A function of the sample alone, not of its neighbours.
    assert torch.equal(own(pixels[3:5], epochs[3:5], indices[3:5]), found[3:5])
    assert not torch.equal(own(pixels, epochs + 1, indices), found)


@pytest.mark.parametrize("policy", ["", "rand-m", "rand-m9-x3", "augmix-m5", "rand-m9-mstd", "rand-w0"])
def test_what_is_no_policy_is_told(policy):
    with pytest.raises(UserError, match=r"is no policy of RandAugment; .*MAE's is rand-m9-mstd0\.5-inc1"):
        rand_augment.check(policy)


def test_without_timm_the_line_that_brings_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="computed by timm, which is not installed; run: pip install timm"):
        rand_augment.check(POLICY)


def test_another_timm_is_refused(monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "auto_augment.py").write_text("import random\n")
    found = importlib.machinery.ModuleSpec("timm", None)
    found.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError, match="is not what megamug knows of timm"):
        rand_augment.check(POLICY)

import numpy as np
import pytest

from megamug.data.random import philox4x32, random_masks, uniform

# Known answers of the Random123 distribution (kat_vectors, philox4x32 10): counter, key, output
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_philox_known_answers(counter, key, output):
    assert philox4x32(np.array(words(counter), np.uint64), tuple(words(key))).tolist() == words(output)


def test_philox_vectorised_equals_one_by_one():
    counters = np.array([words(counter) for counter, _, _ in KNOWN], np.uint64)
    before = counters.copy()
    together = philox4x32(counters, (1, 2))
    assert np.array_equal(together, np.stack([philox4x32(c, (1, 2)) for c in counters]))
    assert np.array_equal(counters, before)


def test_uniform_is_a_pure_function_of_each_sample():
    indices, epochs = np.array([5, 2**40 + 5, 7, 5]), np.array([0, 0, 3, 1])
    together = uniform(1, "crop", epochs, indices, 7)
    for row in range(4):
        assert np.array_equal(together[row], uniform(1, "crop", epochs[row], indices[row : row + 1], 7)[0])
    assert len({row.tobytes() for row in together}) == 4  # 64-bit indices and epochs are told apart
    assert not np.array_equal(together, uniform(2, "crop", epochs, indices, 7))
    assert not np.array_equal(together, uniform(1, "flip", epochs, indices, 7))


def test_uniform_is_uniform():
    values = uniform(3, "x", 0, np.arange(20000), 5)
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, bins=50, range=(0, 1))[0]
    expected = values.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 95  # chi-squared with 49 degrees: above in 1 of 10,000
    assert abs(np.corrcoef(values.T) - np.eye(5)).max() < 0.04


def test_random_masks():
    indices = np.arange(2000)
    visible, masked = random_masks(1, np.zeros(2000, int), indices, 64, 16)
    assert visible.shape == (2000, 16) and masked.shape == (2000, 48) and visible.dtype == masked.dtype == np.int64
    assert (np.diff(visible) > 0).all() and (np.diff(masked) > 0).all()
    assert np.array_equal(np.sort(np.concatenate([visible, masked], 1), 1), np.tile(np.arange(64), (2000, 1)))
    share = np.bincount(visible.ravel(), minlength=64) / 2000
    assert abs(share - 0.25).max() < 0.05
    again, _ = random_masks(1, np.zeros(3, int), indices[[70, 3, 1999]], 64, 16)
    assert np.array_equal(again, visible[[70, 3, 1999]])
    other, _ = random_masks(1, np.ones(3, int), indices[[70, 3, 1999]], 64, 16)
    assert not np.array_equal(other, again)

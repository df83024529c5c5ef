import resource
import tracemalloc

import numpy as np
import pytest

from megamug.data.order import BLOCK, WINDOW_BLOCKS, Cursor, GlobalOrder, _scaled_floor, feistel_permutation
from megamug.errors import UserError

WINDOW = BLOCK * WINDOW_BLOCKS


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_feistel_is_a_permutation(size):
    for key in [(1, 2), (0, 0), (2**32 - 1, 77)]:
        assert np.array_equal(np.sort(feistel_permutation(np.arange(size), size, key)), np.arange(size))


@pytest.mark.parametrize("size", [3, 64, 100, 4097])
@pytest.mark.parametrize("key", [(1, 2), (2**32 - 1, 77)])
def test_feistel_is_that_of_whole_numbers(size, key):
    """One value at a time, in numbers that cannot overflow: by other rounds a run would go on with other samples."""
    def mixed(x):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = (x ^ x >> shift) * factor % 2**64
        return x

    high = -(-max(len(f"{size - 1:b}"), 2) // 2)  # the wider half
    low = max(len(f"{size - 1:b}"), 2) - high

    def permuted(value):
        left, right = divmod(value, 2**low)
        words = key[0] * 2**32 + key[1], key[1] * 2**32 + key[0]
        for pair in range(4):
            left ^= mixed(right ^ words[0] ^ 2 * pair * 0x9E3779B97F4A7C15 % 2**64) % 2**high
            right ^= mixed(left ^ words[1] ^ (2 * pair + 1) * 0x9E3779B97F4A7C15 % 2**64) % 2**low
        value = left * 2**low + right
        return value if value < size else permuted(value)

    assert feistel_permutation(np.arange(size), size, key).tolist() == [permuted(value) for value in range(size)]


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 300, WINDOW, WINDOW + 1, 3 * WINDOW + 130])
def test_each_epoch_has_every_sample_once(size):
    order = GlobalOrder([size], seed=3)
    seen = []
    for epoch in range(2):
        sources, epochs, indices = order.slice(epoch * size, size)
        assert (sources == 0).all() and (epochs == epoch).all()
        assert np.array_equal(np.sort(indices), np.arange(size))
        seen.append(indices)
    if size >= 127:
        assert not np.array_equal(seen[0], seen[1])
        assert (seen[0] == np.arange(size)).mean() < 0.1


def test_a_slice_does_not_depend_on_where_it_is_cut():
    order = GlobalOrder([500, 3000, 77], weights=[0.5, 0.3, 0.2], seed=1)
    whole = order.slice(0, 5000)
    fresh = GlobalOrder([500, 3000, 77], weights=[0.5, 0.3, 0.2], seed=1)
    start = 4321  # out of the order of the other calls, on purpose
    for part in [(start, 679), (0, 1), (1, 999), (1000, 3321)]:
        for array, piece in zip(whole, fresh.slice(*part), strict=True):
            assert np.array_equal(array[part[0] : part[0] + part[1]], piece)


def test_blend_is_exact():
    weights = [0.7, 0.2, 0.1]
    order = GlobalOrder([1000, 100, 5000], weights=weights, seed=1)
    sources, epochs, indices = order.slice(0, 20000)
    for source, weight in enumerate(weights):
        taken = np.cumsum(sources == source)
        assert abs(taken - weight * np.arange(1, 20001)).max() <= 2
        size = order.sizes[source]
        mine = sources == source
        for epoch in range(int(mine.sum()) // size):
            assert np.array_equal(np.sort(indices[mine & (epochs == epoch)]), np.arange(size))
    for position in (0, 1, 2, 777, 19999):
        assert order._counts(position) == [int((sources[:position] == s).sum()) for s in range(3)]


def test_without_weights_the_sets_end_their_epochs_together():
    order = GlobalOrder([7, 1000, 130], seed=1)
    sources, epochs, indices = order.slice(0, len(order))
    unique = order.unique(sources, indices)
    assert (epochs == 0).all() and np.array_equal(np.sort(unique), np.arange(1137))
    assert order.first_pass() == 1137


def test_first_pass_ends_before_a_sample_comes_twice():
    order = GlobalOrder([100, 1000], weights=[0.5, 0.5], seed=1)
    length = order.first_pass()
    assert (order.slice(0, length)[1] == 0).all()
    assert (order.slice(0, length + 2)[1] > 0).any()


def test_ranks_of_any_number_see_the_one_order():
    """DP 2 -> 1 -> 4 in mid-epoch: the ledger is a start of the global order, nothing twice, nothing missing."""
    order = GlobalOrder([1000, 333, 200], weights=[3, 2, 1], seed=7)
    cursor, ledger, batch = Cursor(order.fingerprint, 7, 0), [], 24
    for dp_size, steps in [(2, 13), (1, 5), (4, 17)]:
        order = GlobalOrder([1000, 333, 200], weights=[3, 2, 1], seed=7)  # a new process
        order.check(Cursor.from_dict(cursor.to_dict()))
        for _ in range(steps):
            part = batch // dp_size
            for rank in range(dp_size):
                ledger.append(np.stack(order.slice(cursor.samples + rank * part, part)))
            cursor = order.cursor(cursor.samples + batch)
    ledger = np.concatenate(ledger, axis=1)
    assert np.array_equal(ledger, np.stack(order.slice(0, 24 * 35)))
    assert len({tuple(column) for column in ledger.T.tolist()}) == 24 * 35


def test_a_billion_samples_in_constant_memory():
    tracemalloc.start()
    order = GlobalOrder([10**9, 3 * 10**8, 5 * 10**9], weights=[0.5, 0.2, 0.3], seed=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for start in [0, 123_456_789_012, 10**9 - 100, 7 * 10**11]:
        sources, epochs, indices = order.slice(start, 256)
        assert all(0 <= i < order.sizes[s] for s, i in zip(sources, indices, strict=True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KB
    whole = GlobalOrder([6 * 10**9, 10**9], seed=1)  # a denominator beyond 31 bits
    sources, _, indices = whole.slice(6_999_999_000, 1000)
    assert whole._counts(7 * 10**9) == [6 * 10**9, 10**9]
    assert abs((sources == 0).sum() - 857) <= 1


@pytest.mark.parametrize("denominator", [1_000_000, 2**31 - 1, 2**31, 7 * 10**9])
def test_scaled_floor_is_exact_where_products_overflow(denominator):
    values = np.array([0, 1, denominator - 1, denominator, 10**13 + 7, 10**15], np.int64)
    for numerator in (1, denominator // 3, denominator - 1):
        want = [int(value) * numerator // denominator for value in values]
        assert _scaled_floor(values, numerator, denominator).tolist() == want


def test_windows_stay_local_and_blocks_spread():
    order = GlobalOrder([10**6], seed=1)
    _, _, indices = order.slice(0, WINDOW)
    assert len(np.unique(indices // BLOCK)) <= WINDOW_BLOCKS + 1
    assert np.ptp(indices) > 300_000


def test_another_order_is_refused():
    order = GlobalOrder([10, 20], seed=1, fingerprints=["a", "b"])
    order.check(order.cursor(5))
    for other in [
        GlobalOrder([10, 20], seed=1, fingerprints=["a", "c"]),
        GlobalOrder([10, 21], seed=1, fingerprints=["a", "b"]),
        GlobalOrder([10, 20], weights=[1, 1], seed=1, fingerprints=["a", "b"]),
    ]:
        with pytest.raises(UserError, match="made with other data"):
            order.check(other.cursor(5))
    with pytest.raises(UserError, match="set seed=2"):
        order.check(GlobalOrder([10, 20], seed=2, fingerprints=["a", "b"]).cursor(5))

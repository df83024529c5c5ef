"""Means, standard errors and differences, against numpy and numbers drawn at random."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megamug.transfer.study.statistics import difference, spread


def test_mean_and_standard_error_are_numpys():
    for count in (2, 3, 10):
        values = np.random.default_rng(count).normal(0.5, 0.1, count)
        mean, error = spread(values.tolist())
        assert mean == pytest.approx(np.mean(values), rel=1e-12)
        assert error == pytest.approx(np.std(values, ddof=1) / np.sqrt(count), rel=1e-12)
    assert spread([0.3]) == (0.3, math.inf)


def test_a_difference_is_told_only_where_it_is_more_than_chance():
    one, other = [0.5, 0.52, 0.51], [0.4, 0.41, 0.39]
    found = difference(one, other)
    assert found.value == pytest.approx(0.11) and found.error == pytest.approx(np.hypot(0.01, 0.01) / 3**0.5)
    assert found.told and found.words() == "better" and difference(other, one).words() == "worse"
    assert not difference([0.5, 0.6, 0.4], [0.45, 0.55, 0.5]).told
    assert difference([0.5, 0.6, 0.4], [0.5, 0.6, 0.4]).words() == "no difference"
    assert "one seed does not tell" in difference([0.5], [0.4]).words() and not difference([0.5], [0.4]).told
    assert "one seed" in difference([0.5, 0.6], [0.4]).words()


def test_so_many_seeds_would_tell():
    """Sets of other sizes: with `seeds` of the same scatter the difference is two standard errors, with fewer less."""
    one, other = [0.5, 0.6, 0.43, 0.55], [0.45, 0.55, 0.5]
    found = difference(one, other)
    spread_of_both = np.var(one, ddof=1) + np.var(other, ddof=1)
    assert 2 * np.sqrt(spread_of_both / found.seeds) <= abs(found.value)
    assert 2 * np.sqrt(spread_of_both / (found.seeds - 1)) > abs(found.value)
    assert f"about {found.seeds} seeds" in found.words() and found.seeds > 4

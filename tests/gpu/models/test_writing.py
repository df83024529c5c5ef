"""Runs of random weights that a CPU made, read on the GPU: what is written is what the CPU writes, token by token, and
the same without a key-value cache; perplexities are the CPU's."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import writing
from tests.gpu.writing import MODELS

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def runs(cpu_runs):
    """(folder, what the CPU wrote and measured)."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    folder, expected = cpu_runs
    return folder, expected.result(timeout=300)


@pytest.mark.parametrize("name", MODELS)
def test_documents_are_the_cpus_with_and_without_a_cache(name, runs):
    folder, expected = runs
    found = writing.documents(folder, name)
    assert len({tuple(row[-10:]) for row in found["greedy"]}) == 4, "rows that do not differ test nothing"
    assert found == writing.documents(folder, name, cache=False)
    assert found == expected[name]["documents"]


@pytest.mark.parametrize("name", MODELS)
def test_perplexities_are_the_cpus(name, runs, tmp_path):
    folder, expected = runs
    found = writing.perplexity(folder, name, tmp_path)
    assert len(found) > 2 and found == pytest.approx(expected[name]["perplexity"], rel=1e-5)


def test_captions_and_pixels_are_the_cpus_with_and_without_a_cache(runs):
    folder, expected = runs
    found, plain = writing.captions(folder), writing.captions(folder, cache=False)
    for label in ("greedy", "nucleus"):
        assert found[label] == plain[label] == expected["mug"][label]
    pixels, wanted = (torch.tensor(one["pixels"]) for one in (found, expected["mug"]))
    torch.testing.assert_close(pixels, wanted, rtol=1e-4, atol=1e-5)

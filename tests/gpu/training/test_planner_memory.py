"""The planner's memory of a layout against what training steps take: a MUG and a DecoderLM of moderate size."""

from __future__ import annotations

import pytest

from tests.gpu import planned

pytestmark = pytest.mark.gpu
CASES = [f"{model}-{kind}" for model in ("vit-b16", "lm-8x1024") for kind in ("te", "local", "recompute")]


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_within_a_tenth_of_what_is_planned(name, request):
    if "local" not in name:
        request.getfixturevalue("transformer_engine")
    config, vocabulary, build, options = planned.cases()[name]
    peak = planned.taken(build, options)
    assert planned.planned(config, vocabulary) / 2**30 == pytest.approx(peak / 2**30, rel=0.1)

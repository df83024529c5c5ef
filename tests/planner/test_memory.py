"""What the parts of a rank's memory are summed of, by hand; `test_search.py` compares with what autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megamug.planner import memory
from megamug.planner.layers import TENSOR, Kept, Product, Unit
from megamug.planner.memory import Layout
from megamug.planner.parameters import Count

GIB, MIB = 1024**3, 1024**2
FIRST = memory._Stage(
    kept=100.0, logits=0.0, constant=0.0, again=7.0, widest=30.0, gradient=11.0, chunk=0.0, fp8_copies=20, held=50,
    trained=40, tensors=3,
)  # fmt: skip
LAST = replace(FIRST, kept=60.0, logits=500.0, constant=3.0, again=9.0, widest=20.0, gradient=13.0, chunk=70.0)


@pytest.fixture
def stages(monkeypatch):
    made = [FIRST, LAST]
    monkeypatch.setattr(memory, "_stages", lambda model, layout: made)
    return made


def test_a_rank_is_the_sum_of_its_parts(stages):
    """1F1B: the first of two ranks has two micro-batches in flight, the last one; 5 samples in each."""
    layout = Layout(pipeline=2, micro_batch=5, micro_batches=8)
    first, last = (memory._rank(stages, layout, rank) for rank in range(2))
    assert (first.activations, last.activations) == (5 * (2 * 100 + 7), 5 * (60 + 9))
    assert (first.logits, last.logits) == (0, 5 * 500 + 3 + 5 * 70)
    assert first.workspace == 2 * 5 * 30 + 11 + 2 * GIB and last.workspace == 2 * 5 * 20 + 13 + 2 * GIB
    assert first.fp8_copies == 20
    assert (first.weights, first.gradients, first.main_parameters, first.moments) == (100, 160, 160, 320)
    assert first.total == 100 + 160 + 160 + 320 + 1035 + 20 + 311 + 2 * GIB
    assert first.allocated == first.total - 2 * GIB
    assert memory.memory(None, layout) == last, "logits weigh most"
    stages[1] = replace(LAST, logits=0.0)
    assert memory.memory(None, layout) == first


def test_virtual_stages_of_a_rank_are_summed(stages):
    """One rank of both chunks has the logits of one micro-batch, the widest tensor and gradient of either."""
    both = memory._rank(stages, Layout(virtual=2, micro_batch=5, micro_batches=2), 0)
    assert both.fp8_copies == 40 and both.weights == 200 and both.logits == 5 * 500 + 3 + 5 * 70
    assert both.workspace == 2 * 5 * 30 + 13 + 2 * GIB
    assert both.activations == 5 * (max(n * 100 + m * 60 for n, m in memory.in_flight(1, 2, 2, 0)) + 9)


def test_logits_in_chunks_take_224_mib_at_most(stages):
    stages[1] = replace(LAST, logits=0.0, constant=0.0, chunk=100.0 * MIB)
    told = [memory._rank(stages, Layout(pipeline=2, micro_batch=n), 1).logits for n in (1, 2, 3, 9)]
    assert told == [100 * MIB, 200 * MIB, 224 * MIB, 224 * MIB]


@pytest.mark.parametrize("fp8", ["none", "current"])
def test_a_unit_by_hand(fp8):
    """Two linears of a layer for two tensor-parallel ranks: one of split columns in FP8, one whole and not."""
    unit = Unit(
        Count(), 2, products=(Product(10, 8, 6, "columns"), Product(10, 5, 4, "whole", fp8=False)), layer=True,
        kept=(Kept(80, "whole"), Kept(60, TENSOR, "fp8")), input=80, chunked_logits=12,
    )  # fmt: skip
    layout = Layout(tensor=2, fp8=fp8)
    told, again = (memory._unit(object(), replace(layout, recompute=again), unit) for again in (False, True))
    kept = 80 * 2 + 60 * (2 if fp8 == "none" else 1) / 2
    assert (told.kept, told.again) == (kept, 0) and (again.kept, again.again) == (80 * 2, kept)
    assert told.widest == 160 and told.gradient == 2 * max(8 * 6 / 2, 5 * 4)
    assert told.chunk == 10 * 12 * 2 / 2
    assert told.fp8_copies == (0 if fp8 == "none" else 2 * 8 * 6 / 2), "e4m3 and its transpose"

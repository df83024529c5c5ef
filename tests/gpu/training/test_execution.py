"""Compiled layers and steps as CUDA graphs train as the plain ones do, on a GPU; and a graph that does not is not used.

Six steps of tiny models: two that warm up, two that run both ways, two by the graph alone.
"""

from __future__ import annotations

import logging

import pytest

from megamug.training import step_graph
from tests.gpu import parity
from tests.gpu.models.test_parity import BF16, SAME_PRODUCTS, close

pytestmark = pytest.mark.gpu
PLAIN = [case for case in parity.CASES if "documents" not in case]  # those count their documents on the device
AGREE = "losses and gradients of 2 steps agree with those without it"


@pytest.mark.parametrize("case", ["mug-with-captions", "lm-cm3leon", "lm-chameleon", "jam-equal-towers"])
def test_compiled_layers_are_the_plain_ones(case, caplog):
    with caplog.at_level(logging.INFO, "megamug"):
        found = parity.train(case, "fp32-local-compiled")
    assert "compiled in" in caplog.text and "uncompiled" not in caplog.text
    close(found, parity.curve(case, "fp32-local"), 1e-5, 1e-5)
    close(parity.train(case, "bf16-local-compiled"), parity.curve(case, "bf16-local"), *BF16)


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("kind", ["local", "te", "local-compiled"])
def test_graphs_train_as_without(case, kind, caplog, request):
    if kind == "te":
        request.getfixturevalue("transformer_engine")
        if case.startswith("mug"):
            pytest.skip("Transformer Engine's layers of a MUG are not recorded (validate_precision.cuda_graphs)")
    plain = parity.train(case, f"bf16-{kind}")
    with caplog.at_level(logging.INFO, "megamug"):
        found = parity.train(case, f"bf16-{kind}-graph")
    assert AGREE in caplog.text
    close(found, plain, *SAME_PRODUCTS)


def test_a_wrong_graph_is_not_used(caplog, monkeypatch):
    """The first gradient is doubled behind every replay."""
    record = step_graph._SharedMemory.record

    def spoiled(self, function):
        repeat, sums = record(self, function)

        def wrong() -> None:
            repeat()
            runners[0].models[0].module.encoder.cls_token.main_grad.mul_(2)

        return wrong, sums

    runners, made = [], step_graph.GraphRunner.__init__
    monkeypatch.setattr(step_graph.GraphRunner, "__init__", lambda self, *a: runners.append(self) or made(self, *a))
    monkeypatch.setattr(step_graph._SharedMemory, "record", spoiled)
    found = parity.train("mug-with-captions", "bf16-local-graph")
    assert "and the graph of it gives" in caplog.text and "the run goes on without graphs" in caplog.text
    close(found, parity.train("mug-with-captions", "bf16-local"), *SAME_PRODUCTS)

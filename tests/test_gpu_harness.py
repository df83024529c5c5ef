"""What the tests of GPUs are made of, run on a CPU: both sides of a comparison are CPUs then and agree to the bit."""

from __future__ import annotations

import importlib

import pytest
import torch

from megamug.benchmarks import mug
from megamug.configuration import validate_precision
from megamug.models.tasks import model_of
from megamug.planner import parameters
from megamug.planner.memory import Layout, memory
from tests.gpu import cpu, parity, planned, writing
from tests.gpu.parity import CASES, CUT, STEPS, VARIANTS


@pytest.fixture(scope="module")
def without_gpu():
    """One process, of one thread, as this one is meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with cpu.processes(1) as pool:
        yield pool
    torch.set_num_threads(before)


def test_the_other_process_sees_no_gpu(without_gpu, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with cpu.processes(1) as another:
        assert another.submit(cpu.visible_gpus).result(timeout=100) == 0


@pytest.mark.parametrize("case", ["mug-with-captions", "lm-llama-separate-documents"])
def test_curves_and_checkpoints_are_the_same_in_both_processes(case, without_gpu, tmp_path):
    future = without_gpu.submit(parity.train, case, "fp32-local")
    written = without_gpu.submit(parity.train, case, "fp32-local", steps=CUT, save=str(tmp_path / "there"))
    found = parity.train(case, "fp32-local")
    assert found == future.result(timeout=200) and len(found) == STEPS
    assert written.result(timeout=200) == found[:CUT]
    assert parity.train(case, "fp32-local", first=CUT, load=str(tmp_path / "there")) == found[CUT:]
    assert parity.worst(found, found) == (0.0, 0.0)


def test_differences_are_seen():
    curve = [[2.0, 1.0], [4.0, 2.0], [1.0, 8.0]]
    other = [[2.0, 3.0], [4.4, 2.0], [1.0, 8.8]]
    assert parity.worst(other, curve) == pytest.approx((0.1, 2.0))
    assert parity.worst(other, curve, first=1) == pytest.approx((0.1, 0.1))
    assert parity.worst([[float("nan"), 1.0], *curve[1:]], curve)[0] == float("inf")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_one_that_training_takes(case, variant):
    """FP8 products of weight gradients want rows in multiples of 16."""
    if variant == "bf16-te-graph" and case.startswith("mug"):
        pytest.skip("refused, and no test trains it")
    options = parity.options(case, variant)
    config = importlib.import_module(options["case"]).tiny(options)
    assert (config.precision.fp8 == "none") == (not variant.startswith("fp8-"))
    validate_precision.check(config, here=False)


def test_what_is_written_is_the_same_in_both_processes(without_gpu, tmp_path):
    expected = without_gpu.submit(writing.make_runs_and_write, tmp_path).result(timeout=300)
    assert writing.on_this_device(tmp_path, tmp_path / "here") == expected
    assert len(expected["mug"]["greedy"]) == 4 and len(set(expected["mug"]["pixels"])) > 100
    for name in writing.MODELS:
        assert len({tuple(row[-10:]) for row in expected[name]["documents"]["greedy"]}) == 4
        assert len(expected[name]["perplexity"]) > 2


def test_planned_bytes():
    """bf16 weights (2 bytes a parameter) with fp32 gradients, main parameters and two moments (16)."""
    cases = planned.cases()
    config, vocabulary, *_ = cases["lm-8x1024-te"]
    layer = 4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024
    count = 2 * vocabulary * 1024 + 8 * layer + 1024
    assert count == parameters.total(model_of("decoder_lm")[0](config, vocabulary))
    whole = planned.planned(config, vocabulary)
    assert 18 * count < whole < 18 * count + 4 * 2**30
    parts = memory(planned.model_of(config, vocabulary), Layout(micro_batch=8, layers="te"))
    assert whole == sum(vars(parts).values()) - planned.RESERVED
    assert planned.planned(*cases["lm-8x1024-recompute"][:2]) < whole
    assert planned.planned(*cases["vit-b16-te"][:2]) > planned.planned(*cases["vit-b16-recompute"][:2])


def test_taken_bytes(monkeypatch):
    """Of the step that the planner is held to, with numbers that stand in for the allocator's."""
    called = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: called.append("reset"))
    options = planned.mug_options("model.layers=1", "model.decoder_layers=1", preset="vit_ti16", batch=1)
    assert planned.taken(mug.build_megamug, options, steps=2) == 250 and called == ["reset"]

"""Layers by torch.compile against the plain ones, on a CPU: losses, gradients, one compilation for a stack, and the
proof before they are used. tests/gpu/test_compiled.py has the same on a GPU."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

from megamug.configuration.sections import Config
from megamug.models.attention import gpu as gpu_attention
from megamug.models.blocks import compiled, functional
from megamug.training.pipeline import run_batch
from tests.distributed.cases import jam_case, lm_case, mug_case

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def step(world, case, options: dict, compile: str) -> tuple[dict, dict]:
    """Losses and gradients of a step's micro-batches."""
    from megamug.training.optim import wrap_chunks

    config = case.tiny(options | {"precision": {"compile": compile}})
    task = case.make_task(config)
    task.join(world)
    chunks = task.build(world)
    models = wrap_chunks(chunks, config)
    batches, totals = case.micro_batches(1, task.plan, config, world)
    models[0].zero_grad_buffer()
    sums = run_batch(models, batches, totals, backward=True)
    gradients = {name: p.main_grad.clone() for name, p in chunks[0].named_parameters()}
    return {name: float(sum(values)) for name, values in sums.items()}, gradients


AGAIN = {"parallel": {"recompute": "full"}}
LLAMA = {"family": "llama", "lm": {"layers": 2}}


@pytest.fixture(autouse=True)
def kernels_stay(monkeypatch):
    """What a failed proof gives up is given back."""
    monkeypatch.setattr(gpu_attention, "_used", True)


# Layers with and without cross-attention, rotary positions, gates, norms of heads. Inductor takes 20 s for each kind of
# layer on a CPU, so it makes one; the others are traced and taken apart as for it, and then run by torch.
@pytest.mark.parametrize("case, options, kinds, backend", [
    (mug_case, AGAIN, 4, "aot_eager"), (jam_case, {"pair": "equal"}, 2, "aot_eager"), (lm_case, LLAMA, 1, "inductor"),
], ids=["mug-recompute", "jam", "lm"])  # fmt: skip
def test_compiled_layers_give_the_same(world, caplog, monkeypatch, case, options, kinds, backend):
    monkeypatch.setattr(compiled.Compiled, "backend", backend)
    plain = step(world, case, options, "never")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with caplog.at_level(logging.INFO):
        found = step(world, case, options, "always")
    assert plain[0] == pytest.approx(found[0], rel=1e-6)
    for name, gradient in plain[1].items():
        assert (gradient - found[1][name]).norm() <= 1e-5 * gradient.norm() + 1e-8, name
    lines = [record.message for record in caplog.records if "compiled in" in record.message]
    # Layers of a kind share their compilation, and nothing breaks it into pieces.
    assert len(lines) == kinds and torch._dynamo.utils.counters["stats"]["unique_graphs"] == kinds
    assert not torch._dynamo.utils.counters["graph_break"]


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), 2.0))


def scaled(module, x):
    return x * module.weight * (1.01 if torch.compiler.is_compiling() else 1.0)


def broken(module, x):
    if torch.compiler.is_compiling():
        raise NotImplementedError("what no compiler takes")
    return x * module.weight


@pytest.mark.parametrize("function, said", [
    (scaled, "compiled and plain differ by 1.0e-02 of the"), (broken, "torch.compile failed, so it runs uncompiled"),
])  # fmt: skip
def test_what_is_not_proven_is_not_used(caplog, monkeypatch, function, said):
    """A compiler that computes something else, and one that fails."""
    monkeypatch.setattr(compiled.Compiled, "backend", "aot_eager")
    layer, x = Scale(), torch.randn(3, 4)
    taken = compiled.Compiled(function)
    assert torch.equal(taken(layer, x), x * 2) and torch.equal(taken(layer, x), x * 2)
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert said in line and "runs uncompiled" in line


def test_another_kind_of_layer_is_proven_by_itself(caplog, monkeypatch):
    monkeypatch.setattr(compiled.Compiled, "backend", "aot_eager")
    wide = Scale()
    wide.weight = torch.nn.Parameter(torch.ones(5))
    taken = compiled.Compiled(scaled)
    taken(Scale(), torch.randn(3, 4)), taken(wide, torch.randn(3, 5)), taken(wide, torch.randn(3, 5))
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 2


def test_validation_and_writing_run_plain_layers(world, monkeypatch):
    config = mug_case.tiny({"precision": {"compile": "always"}})
    task = mug_case.make_task(config)
    task.join(world)
    (chunk,) = task.build(world)
    calls, short = [], functional.transformer_layer
    monkeypatch.setattr(functional, "transformer_layer", lambda *a: calls.append(0) or short(*a))
    batches, totals = mug_case.micro_batches(0, task.plan, config, world)
    with torch.no_grad():
        run_batch([chunk.eval()], batches[:1], totals, backward=False)
    assert len(calls) == 2 + 3 + 3


@pytest.mark.parametrize("keys, cuda, wanted, said", [
    ({}, False, False, "no CUDA device"),
    ({"compile": "always"}, False, True, "precision.compile=always"),
    ({"compile": "never"}, True, False, "precision.compile=never"),
    ({"steps": 20}, True, False, "a run of 20 steps"),
    ({"tensor": 2}, True, False, "split over tensor-parallel ranks"),
    ({}, True, True, "on a GPU"),
])  # fmt: skip
def test_the_choice_has_a_reason(monkeypatch, keys, cuda, wanted, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: object())
    config = Config()
    config.precision.compile = keys.get("compile", "auto")
    config.train.steps, config.parallel.tensor = keys.get("steps", 1000), keys.get("tensor", 1)
    found, reason = compiled.choose(config, "local")
    assert found == wanted and said in reason

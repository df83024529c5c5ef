"""A step as a graph is used only where it does what the step does. A stand-in for CUDA repeats the step on a CPU,
rightly or wrongly; tests/gpu/test_step_graph.py has the real thing."""

from __future__ import annotations

import logging

import pytest
import torch

from megamug.training import step_graph
from megamug.training.optim import Optimizer, wrap_chunks
from megamug.training.pipeline import reduce_losses
from tests.distributed.cases.mug_case import make_task, micro_batches, tiny

STEPS = 7


class Repeats:
    """Records by running; repeats by running again into the same results. `spoil(models)` follows each repetition."""

    def __init__(self, models: list, spoil=None):
        self.models, self.spoil, self.repeated = models, spoil, 0

    def __call__(self, function):
        sums = function()

        def repeat() -> None:
            self.repeated += 1
            for name, values in function().items():
                for mine, new in zip(sums[name], values, strict=True):
                    if isinstance(mine, torch.Tensor):
                        mine.copy_(new)
            if self.spoil is not None:
                self.spoil(self.models, sums)

        return repeat, sums


def trained(world, spoil=None, record=None, cut: int | None = None) -> tuple[list, Repeats | None]:
    """(losses and norm of each step, the stand-in); without `spoil` and `record`, and with cut = -1, plainly."""
    config = tiny({"data": {"micro_batch_size": 4}})
    task = make_task(config)
    task.join(world)
    chunks = task.build(world)
    models = wrap_chunks(chunks, config)
    optimizer = Optimizer(config, models)
    stand_in = record(models) if record else Repeats(models, spoil)
    runner = step_graph.StepRunner(config, models, world)
    if cut != -1:
        runner = step_graph.GraphRunner(config, models, world, stand_in)
    found = []
    for step in range(STEPS):
        batches, totals = micro_batches(step, task.plan, config, world)
        if step == cut:  # a row that is padding
            batches[0].rows = torch.tensor([0, 1, 3])
        optimizer.zero_grad()
        sums = reduce_losses(runner.run(batches, totals, loader=None), task.loss_names, world)
        norm, _ = optimizer.prepare(step + 1)
        optimizer.apply(norm)
        found.append([*(float(x) for x in sums.values()), float(norm)])
    return found, stand_in


@pytest.fixture(scope="module")
def plain(world):
    return trained(world, cut=-1)[0]


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_a_right_graph_trains_as_without(world, plain, caplog):
    with caplog.at_level(logging.INFO):
        found, graph = trained(world)
    assert found == plain and not warnings(caplog)
    # Two steps of warming up, the one that is recorded and the next are run without it as well.
    assert graph.repeated == STEPS - step_graph.WARM_UP
    assert "losses and gradients of 2 steps agree with those without it" in caplog.text


def doubled(models, sums) -> None:
    models[0].module.encoder.cls_token.main_grad.mul_(2)


def turned(models, sums) -> None:
    """The whole norm stays: one parameter has what another should have."""
    layers = models[0].module.encoder.stack.layers
    one, two = (layer.self_attention.linear_proj.weight.main_grad for layer in layers)
    kept = one.clone()
    one.copy_(two)
    two.copy_(kept)


def lost(models, sums) -> None:
    for parameter in models[0].parameters():
        parameter.main_grad.fill_(float("nan"))


def loss(models, sums) -> None:
    sums["image"][0].mul_(1.01)


@pytest.mark.parametrize("spoil, said", [
    (doubled, "the gradient norm of the step is"), (turned, "linear_proj.weight is"),
    (lost, "and the graph of it gives nan"), (loss, "the image loss of the step is"),
])  # fmt: skip
def test_a_wrong_graph_is_not_used(world, plain, caplog, spoil, said):
    found, graph = trained(world, spoil)
    assert found == plain and graph.repeated == 1
    (line,) = warnings(caplog)
    assert said in line and line.endswith("the run goes on without graphs")


def test_a_graph_that_keeps_what_it_read_is_not_used(world, plain, caplog):
    """It agrees on the step that it was recorded from, and not on the next one."""
    state = {}

    def stale(models, sums) -> None:
        gradients = [p.main_grad for p in models[0].parameters()]
        if not state:
            state["gradients"] = [g.clone() for g in gradients]
        torch._foreach_copy_(gradients, state["gradients"])

    found, graph = trained(world, stale)
    assert found == plain and graph.repeated == 2
    assert "and the graph of it gives" in warnings(caplog)[0]


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing\nmore"),
                                   torch.OutOfMemoryError("CUDA out of memory")])  # fmt: skip
def test_a_step_that_cannot_be_recorded_runs_as_it_is(world, plain, caplog, error):
    def record(models):
        def fails(function):
            function()
            raise error

        return fails

    found, _ = trained(world, record=record)
    assert found == plain
    (line,) = warnings(caplog)
    assert line.startswith(f"parallel.cuda_graphs: recording failed ({str(error).splitlines()[0]}")


def test_a_step_of_other_shapes_runs_without_the_graph(world, caplog):
    found, graph = trained(world, cut=5)
    assert graph.repeated == STEPS - step_graph.WARM_UP - 1 and not warnings(caplog)
    assert all(torch.isfinite(torch.tensor(row)).all() for row in found)


def test_totals_are_those_of_the_step(world, plain):
    """Captions have other lengths in each step, and their number divides the loss: so `plain` tells them apart."""
    assert len({row[3] for row in plain}) > 3

"""The program under several processes, with real data: a run that moves from layout to layout follows one curve, and
the samples it consumes are the one global order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamug import cli
from megamug.configuration.reading import to_yaml
from megamug.data.pairs.loader import order_of
from megamug.data.shards.sources import resolve_sources
from tests.distributed.launch import ROOT, launch
from tests.evaluate.tiny_run import make_data, tiny_config
from tests.training.runs import checkpoints, consumed, metrics

STEPS, BATCH = 10, 12
# (processes, layout, step to stop after, rank that is told to): 5 steps an epoch, so the third leg begins in mid-epoch.
LEGS = [
    (2, ["parallel.tensor=2"], 2, 1),
    (2, ["parallel.pipeline=2", "parallel.virtual=2"], 4, 0),
    (2, ["parallel.distributed_optimizer=true", "checkpoint.asynchronous=true", "checkpoint.every=1"], 7, 1),
    (1, [], None, 0),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def recipe(data) -> Path:
    config = tiny_config(data, data / "run")
    config.data.__dict__.update(global_batch_size=BATCH, micro_batch_size=3, prefetch=1)
    config.optimizer.__dict__.update(learning_rate=2e-3, warmup_steps=3)
    config.train.__dict__.update(steps=STEPS, validate_every=5)
    config.log.__dict__.update(every=1, tensorboard=False)
    (data / "recipe.yaml").write_text(to_yaml(config))
    return data / "recipe.yaml"


def train(recipe: Path, run: Path, processes: int, *overrides: str, **hooks) -> list[tuple[int, str]]:
    worker = str(ROOT / "tests" / "training" / "runs.py")
    return launch([worker, json.dumps(hooks), "train", str(recipe), f"run_dir={run}", *overrides], processes)


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    """The same run in one process from beginning to end."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main(["train", str(recipe), f"run_dir={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def moved(recipe, tmp_path_factory) -> tuple[Path, list[Path]]:
    """(run folder, folder of consumed samples of each leg) of the run that moves."""
    folder = tmp_path_factory.mktemp("moved")
    run, ledgers = folder / "run", []
    for number, (processes, layout, stop_step, stop_rank) in enumerate(LEGS):
        ledgers.append(folder / f"ids-{number}")
        hooks = {"ids": str(ledgers[-1]), "stop_step": stop_step, "stop_rank": stop_rank}
        results = train(recipe, run, processes, *layout, **hooks)
        # One rank was told; all stop, after the same step, with a code by which a scheduler starts the command again.
        for rank, (code, output) in enumerate(results):
            assert code == (3 if stop_step else 0), f"leg {number}, rank {rank} exits {code}:\n{output[-4000:]}"
            told = "SIGTERM: stopping after this step" in output
            assert told == (stop_step is not None and rank == stop_rank)
        assert checkpoints(run)[-1] == (stop_step or STEPS)
        steps = [list(consumed(ledgers[-1], rank)) for rank in range(processes)]
        assert all(mine == steps[0] for mine in steps) and steps[0][-1] == (stop_step or STEPS)
    return run, ledgers


def test_a_run_that_moves_follows_the_curve_of_one_process(moved, alone):
    (steps, validations), (expected, expected_validations) = metrics(moved[0]), metrics(alone)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1)) == [record["step"] for record in expected]
    for record, other in zip(steps, expected, strict=True):
        for name in ("loss", "image_loss", "caption_loss", "grad_norm", "learning_rate"):
            assert record[name] == pytest.approx(other[name], rel=1e-5), (record["step"], name)
        assert record["samples_seen"] == other["samples_seen"] == BATCH * record["step"]
    assert [record["step"] for record in validations] == [5, STEPS]
    for record, other in zip(validations, expected_validations, strict=True):
        for name in ("image_loss", "caption_loss"):
            assert record["validation"][name] == pytest.approx(other["validation"][name], rel=1e-5)
        assert record["validation"]["samples"] == other["validation"]["samples"] == 13
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_every_sample_once_in_the_one_order(moved, data):
    """The ledger over all legs: ranks of a data-parallel leg share each batch, those of the others all read it."""
    found, (_, ledgers) = [], moved
    for ledger, (processes, layout, *_) in zip(ledgers, LEGS, strict=True):
        ranks = [consumed(ledger, rank) for rank in range(processes)]
        shared = any("distributed_optimizer" in option for option in layout)
        for step in ranks[0]:
            if shared:
                assert [len(rank[step]) for rank in ranks] == [BATCH // processes] * processes
                found += [pair for rank in ranks for pair in rank[step]]
            else:
                assert all(rank[step] == ranks[0][step] for rank in ranks)
                found += ranks[0][step]
    order = order_of(resolve_sources(str(data / "data" / "train")), seed=1234)
    _, epochs, indices = order.slice(0, STEPS * BATCH)
    assert found == list(zip(epochs.tolist(), indices.tolist(), strict=True))
    assert len(set(found)) == STEPS * BATCH == 2 * len(order)

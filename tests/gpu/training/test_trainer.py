"""Training on a GPU from shards to checkpoints: a run that was stopped ends where an undisturbed one does, to the bit.

Eight steps of a tiny MUG with captions, DALI `mixed` decoding, validation, checkpoints in the background.
"""

from __future__ import annotations

import pytest

from megamug import cli
from megamug.configuration.reading import to_yaml
from tests.evaluate.tiny_run import HELD_OUT, make_data, tiny_config
from tests.training.runs import checkpoints, consumed, fingerprint, hooked, metrics

pytestmark = pytest.mark.gpu
STEPS, STOP = 8, 3
LAYERS = {
    "local-fp32": ["precision.layers=local", "precision.dtype=fp32"],
    "te-bf16": ["precision.layers=te", "precision.dtype=bf16"],
    "te-fp8": ["precision.layers=te", "precision.dtype=bf16", "precision.fp8=current"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    folder = make_data(tmp_path_factory.mktemp("data"))
    config = tiny_config(folder, folder / "run", register_tokens=3, decoder_register_tokens=7)
    config.data.__dict__.update(global_batch_size=12, micro_batch_size=4)
    config.optimizer.__dict__.update(learning_rate=2e-3, warmup_steps=3)
    config.train.__dict__.update(steps=STEPS, validate_every=4)
    config.checkpoint.__dict__.update(every=2, keep=0, asynchronous=True)
    config.log.__dict__.update(every=2, tensorboard=False)
    (folder / "recipe.yaml").write_text(to_yaml(config))
    return folder / "recipe.yaml"


def train(recipe, run, *overrides: str, **hooks) -> int:
    with hooked(**hooks):
        return cli.main(["train", str(recipe), f"run_dir={run}", *overrides])


@pytest.mark.parametrize("layers", LAYERS)
def test_a_stopped_run_ends_as_an_undisturbed_one(recipe, layers, tmp_path, request, monkeypatch):
    if layers.startswith("te"):
        request.getfixturevalue("transformer_engine")
        monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # else sums of attention's backward differ
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train(recipe, straight, *LAYERS[layers], ids=tmp_path / "ids") == 0
    assert checkpoints(straight) == [2, 4, 6, 8]
    assert train(recipe, stopped, *LAYERS[layers], ids=tmp_path / "other", stop_step=STOP) == 3
    assert checkpoints(stopped)[-1] == STOP
    assert train(recipe, stopped, *LAYERS[layers], ids=tmp_path / "other") == 0
    assert consumed(tmp_path / "other") == consumed(tmp_path / "ids")
    ends = [fingerprint(run / "checkpoints" / f"step-{STEPS:08d}") for run in (straight, stopped)]
    assert ends[0] == ends[1]
    (steps, validations), (expected, expected_validations) = metrics(stopped), metrics(straight)
    assert steps == expected and [record["step"] for record in steps] == list(range(1, STEPS + 1))
    found = [[(r["step"], r["validation"]["loss"]) for r in some] for some in (validations, expected_validations)]
    assert found[0] == found[1] and [step for step, _ in found[0]] == [4, STEPS]
    assert all(r["validation"]["samples"] == HELD_OUT for r in validations)
    assert steps[-1]["loss"] < steps[0]["loss"]
    log = (straight / "log" / "rank-0.log").read_text()
    assert " over NCCL" in log and f"layers: {layers.split('-')[0]} " in log

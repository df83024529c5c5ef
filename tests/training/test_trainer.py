"""A run that was stopped, killed, damaged or given bad numbers ends where an undisturbed one does, to the bit.

Twelve steps of a tiny MUG on demo scenes: five steps an epoch, four micro-batches a step, seven steps of warm-up.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megamug import cli
from megamug.configuration.reading import load_config, to_yaml
from tests.distributed.launch import ROOT, environment
from tests.evaluate.tiny_run import HELD_OUT, make_data, tiny_config
from tests.training.runs import checkpoints, consumed, fingerprint, hooked, metrics

STEPS = 12
RECORD = {
    "step", "loss", "image_loss", "caption_loss", "grad_norm", "learning_rate", "samples_seen", "samples_per_second",
    "data_wait", "tflops_per_device", "mfu", "memory",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes started by these tests: sums of other parts would be rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A configuration file; its run_dir is given with the command."""
    folder = make_data(tmp_path_factory.mktemp("data"))
    config = tiny_config(folder, folder / "run")
    config.data.__dict__.update(global_batch_size=12, micro_batch_size=3, prefetch=1)
    config.optimizer.__dict__.update(learning_rate=2e-3, warmup_steps=7)
    config.train.__dict__.update(steps=STEPS, validate_every=6)
    config.log.__dict__.update(every=5, tensorboard=False)
    (folder / "recipe.yaml").write_text(to_yaml(config))
    return folder / "recipe.yaml"


def train(recipe: Path, run: Path, *overrides: str, **hooks) -> int:
    with hooked(**hooks):
        return cli.main(["train", str(recipe), f"run_dir={run}", *overrides])


def command(recipe: Path, run: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "megamug", "train", str(recipe), f"run_dir={run}", *overrides]


def run_program(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory) -> Path:
    """The undisturbed run, with a checkpoint of every step in `run` and what it consumed in `ids`."""
    folder = tmp_path_factory.mktemp("straight")
    assert train(recipe, folder / "run", "checkpoint.every=1", "checkpoint.keep=0", ids=folder / "ids") == 0
    assert checkpoints(folder / "run") == list(range(1, STEPS + 1))
    return folder


def killed_after(step: int, straight: Path, run: Path) -> Path:
    """A run folder as the undisturbed run would have left it, had it been killed some steps after the checkpoint of
    `step`: it has logged more than it has saved."""
    later = [f"step-{number:08d}" for number in range(step + 1, STEPS + 1)]
    shutil.copytree(straight / "run", run, ignore=shutil.ignore_patterns(*later))
    (run / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
    return run


def assert_same_end(run: Path, straight: Path, first: int = 1) -> None:
    """The run ended as the undisturbed one: parameters, optimizer state, cursor, and every record from `first` on."""
    expected = fingerprint(straight / "run" / "checkpoints" / f"step-{STEPS:08d}")
    assert fingerprint(run / "checkpoints" / f"step-{STEPS:08d}") == expected
    (steps, validations), (expected_steps, expected_validations) = metrics(run), metrics(straight / "run")
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))  # each once
    assert steps[first - 1 :] == expected_steps[first - 1 :]
    timeless = [[{**r["validation"], "seconds": 0, "step": r["step"]} for r in v]
                for v in (validations, expected_validations)]  # fmt: skip
    assert timeless[0] == timeless[1] and len(timeless[0]) == 2


def log_of(run: Path) -> str:
    return (run / "log" / "rank-0.log").read_text()


def test_the_undisturbed_run(straight, recipe):
    """What the others are compared with is a run worth comparing with."""
    lines = [json.loads(line) for line in (straight / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "validation" not in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(set(line) >= RECORD and not line["skipped"] for line in steps)
    assert [line["samples_seen"] for line in steps] == [12 * step for step in range(1, STEPS + 1)]
    assert len({line["loss"] for line in steps}) == STEPS
    rates = [line["learning_rate"] for line in steps]
    assert rates[:7] == pytest.approx([2e-3 * step / 7 for step in range(1, 8)])
    assert rates[6:] == sorted(rates[6:], reverse=True)
    ids = consumed(straight / "ids")
    epochs = [sum((ids[step] for step in range(first, first + 5)), []) for first in (1, 6)]
    assert [sorted(epoch) for epoch in epochs] == [[(e, i) for i in range(60)] for e in (0, 1)]  # every sample once
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    hashes = [fingerprint(straight / "run" / "checkpoints" / f"step-{step:08d}") for step in (11, 12)]
    assert hashes[0].keys() == hashes[1].keys()
    assert sum(hashes[0][name] != hashes[1][name] for name in hashes[0]) > 100


@pytest.mark.parametrize("step", [3, 5, 8], ids=["in an epoch, in warm-up", "between epochs", "after warm-up"])
def test_a_killed_run_goes_on_to_the_bit(recipe, straight, tmp_path, step):
    run = killed_after(step, straight, tmp_path / "run")
    assert train(recipe, run, ids=tmp_path / "ids") == 0
    assert_same_end(run, straight)
    expected = consumed(straight / "ids")
    assert consumed(tmp_path / "ids") == {s: expected[s] for s in range(step + 1, STEPS + 1)}
    abandoned = [json.loads(line) for line in (run / "metrics.abandoned.jsonl").read_text().splitlines()]
    assert [r["step"] for r in abandoned if "validation" not in r] == list(range(step + 1, STEPS + 1))


def test_sigterm_saves_once_and_a_new_process_goes_on_to_the_bit(recipe, straight, tmp_path, capfd):
    """Stopped after step 4 (in an epoch, in warm-up), with more signals before and after the checkpoint is written."""
    run = tmp_path / "run"
    assert train(recipe, run, stop_step=4, again=True, ids=tmp_path / "ids") == 3
    assert "SIGTERM: already stopping" in capfd.readouterr().err
    assert checkpoints(run) == [4] and (run / "checkpoints" / "latest").read_text() == "step-00000004\n"
    assert "stopped on request after step 4; start the same command again" in log_of(run)
    assert list(consumed(tmp_path / "ids")) == [1, 2, 3, 4]
    again = run_program(command(recipe, run))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming after step 4" in again.stdout
    assert_same_end(run, straight)


def test_a_signal_to_all_processes_of_the_job(recipe, tmp_path):
    """As SLURM and a terminal send it: to the program and to whatever it has started. And once more while it saves."""
    run = tmp_path / "run"
    endless = command(recipe, run, "train.steps=1000000", "train.validate_every=0", "checkpoint.every=2", "log.every=1")
    with open(tmp_path / "out", "w+") as out:
        job = subprocess.Popen(endless, env=environment(), cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        try:
            give_up = time.monotonic() + 100
            while not (run / "checkpoints" / "step-00000004").exists():
                assert job.poll() is None and time.monotonic() < give_up, (tmp_path / "out").read_text()
                time.sleep(0.05)
            os.killpg(job.pid, signal.SIGTERM)
            time.sleep(0.1)
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGTERM)
            assert job.wait(timeout=100) == 3, (tmp_path / "out").read_text()
            with pytest.raises(ProcessLookupError):
                os.killpg(job.pid, 0)  # it has left nothing running
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    newest = max(checkpoints(run))
    assert metrics(run)[0][-1]["step"] == newest
    assert f"stopped on request after step {newest}" in log_of(run)


def test_a_step_with_an_infinite_gradient_changes_nothing(recipe, tmp_path, monkeypatch):
    from megamug.training import pipeline

    whole, calls, seen = pipeline.run_batch, [], []

    def poisoned(models, batches, totals, backward):
        if backward:
            seen.append([p.detach().clone() for p in models[0].parameters()])
        sums = whole(models, batches, totals, backward)
        if backward:
            calls.append(None)
            if len(calls) == 2:
                next(models[0].parameters()).main_grad.view(-1)[0] = float("inf")
        return sums

    monkeypatch.setattr(pipeline, "run_batch", poisoned)
    run, short = tmp_path / "run", ["train.steps=4", "optimizer.warmup_steps=1"]
    assert train(recipe, run, *short, "checkpoint.every=1", "checkpoint.keep=0") == 0
    before, after, later = seen[1:]  # as step 2, 3 and 4 begin
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(after, later, strict=True) if a.dim() > 1)
    assert checkpoints(run) == [1, 3, 4]  # while steps are skipped nothing is saved
    steps, _ = metrics(run)
    assert [step["skipped"] for step in steps] == [False, True, False, False]
    assert steps[1]["grad_norm"] is None and steps[3]["loss"] < float("inf")
    states = [json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text()) for step in (1, 3, 4)]
    assert [state["updates"] for state in states] == [1, 2, 3]
    assert [state["cursor"]["samples"] for state in states] == [12, 36, 48]  # its samples are not tried again
    layout = {"tensor": 1, "pipeline": 1, "virtual": 1, "data": 1, "sequence": False, "distributed_optimizer": False}
    assert states[0]["layout"] == layout
    assert "step 2 skipped: loss" in log_of(run)


def test_a_run_that_explodes_ends_with_a_message_and_code_1(recipe, tmp_path):
    explode = ["optimizer.learning_rate=1e30", "optimizer.clip_grad=0", "optimizer.warmup_steps=0", "train.steps=50"]
    result = run_program(command(recipe, tmp_path / "run", *explode))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "not finite in 10 steps in a row" in result.stderr and "Lower optimizer.learning_rate" in result.stderr
    steps, _ = metrics(tmp_path / "run")
    assert sum(step["skipped"] for step in steps) == 9 and len(steps) < 20  # the tenth ends the run
    assert not (tmp_path / "run" / "checkpoints").exists()  # nothing broken was saved


def test_validation_is_what_evaluate_measures(straight):
    from megamug.evaluate import run_task

    logged = metrics(straight / "run")[1][-1]["validation"]
    assert logged["samples"] == HELD_OUT
    figures = run_task(straight / "run", "reconstruction", samples=HELD_OUT, output=straight / "figures")
    assert figures["image_loss"] == pytest.approx(logged["image_loss"], rel=1e-5)


def test_asynchronous_checkpoints_hold_the_same_and_training_goes_on(recipe, straight, tmp_path, monkeypatch):
    """Each write takes at least as long as a step here, so a checkpoint of what came later would differ."""
    from megamug.checkpoint import state
    from megamug.training.trainer import Trainer

    whole, whole_step, events = state.TensorWrite.write, Trainer._train_step, []

    def slow(self):
        time.sleep(0.3)
        whole(self)
        events.append("written")

    def step(self):
        events.append(f"step {self.step}")
        return whole_step(self)

    monkeypatch.setattr(state.TensorWrite, "write", slow)
    monkeypatch.setattr(Trainer, "_train_step", step)
    run = tmp_path / "run"
    options = ["checkpoint.every=4", "checkpoint.keep=2", "checkpoint.asynchronous=true"]
    assert train(recipe, run, *options) == 0
    assert events.index("step 5") < events.index("written") and events.count("written") == 3
    assert checkpoints(run) == [8, 12]  # complete, and no more than checkpoint.keep
    assert_same_end(run, straight)
    eight = [fingerprint(folder / "checkpoints" / "step-00000008") for folder in (run, straight / "run")]
    assert eight[0] == eight[1]

    stopped = tmp_path / "stopped"
    assert train(recipe, stopped, *options, stop_step=5) == 3  # while the checkpoint of step 4 is being written
    assert checkpoints(stopped) == [4, 5]
    five = [fingerprint(folder / "checkpoints" / "step-00000005") for folder in (stopped, straight / "run")]
    assert five[0] == five[1]


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_last_one(
    recipe, straight, tmp_path, monkeypatch, asynchronous
):
    from megamug.checkpoint import state

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.TensorWrite, "write", full)
    run = killed_after(4, straight, tmp_path / "run")
    assert train(recipe, run, "checkpoint.every=2", f"checkpoint.asynchronous={asynchronous}") == 1
    said = "the run ends: the checkpoint of step 6 could not be written: rank 0: No space left on device"
    assert said in log_of(run) and "the run ends with an error" in log_of(run)
    assert (run / "checkpoints" / "latest").read_text() == "step-00000004\n"
    monkeypatch.undo()
    assert train(recipe, run) == 0
    assert "resuming after step 4" in log_of(run)
    assert_same_end(run, straight)


def flip_a_byte(checkpoint: Path) -> None:
    largest = max((checkpoint / "model").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


@pytest.mark.parametrize(("damaged", "said"), [
    ([7], "resuming after step 6 from {run}/checkpoints/step-00000006 (newest complete checkpoint; passed over as "
          "damaged: step-00000007)"),
    ([], "resuming after step 7 from {run}/checkpoints/step-00000007 (newest complete checkpoint; `latest` names "
         "none)"),
    ([1, 2, 3, 4, 5, 6, 7], "no complete checkpoint in {run}/checkpoints (7 damaged)"),
], ids=["newest damaged", "empty pointer", "all damaged"])  # fmt: skip
def test_damaged_checkpoints(recipe, straight, tmp_path, damaged, said):
    """The one before is resumed, or training starts again from the beginning; it is said; the end is the same."""
    run = killed_after(7, straight, tmp_path / "run")
    for step in damaged:
        flip_a_byte(run / "checkpoints" / f"step-{step:08d}")
    if not damaged:
        (run / "checkpoints" / "latest").write_text("")
    (run / "log" / "rank-0.log").unlink()
    assert train(recipe, run) == 0
    assert said.format(run=run) in log_of(run)
    assert_same_end(run, straight)


def test_a_finished_run_started_again(recipe, straight, tmp_path, capsys):
    """It says what to do; with fewer steps than it has done it ended with "finished: step 8 of 6" and exit code 0. And
    its folder, moved, holds all that its evaluation needs, and tells of both of its lives."""
    run = tmp_path / "run"
    shutil.copytree(straight / "run", run)
    assert train(recipe, run) == 0
    assert f"this run was finished before: set train.steps above {STEPS} to go on" in log_of(run)
    told = json.loads((run / "environment.json").read_text())["lives"]
    assert [(life["from_step"], life["to_step"], life["outcome"]) for life in told] == [
        (0, STEPS, "finished"), (STEPS, STEPS, "finished")]  # fmt: skip
    capsys.readouterr()
    assert train(recipe, run, f"train.steps={STEPS - 1}") == 2
    assert f"train.steps is {STEPS - 1}, but {run} holds a checkpoint of step {STEPS}" in capsys.readouterr().err
    original = Path(load_config(run / "config.yaml").data.tokenizer)
    assert original.is_absolute() and (run / "tokenizer.model").read_bytes() == original.read_bytes()

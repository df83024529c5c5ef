"""What a run folder remembers of its configuration, and where a run goes back to."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from megamug.checkpoint.store import STATE, CheckpointStore
from megamug.configuration.reading import load_config, resolve
from megamug.errors import UserError
from megamug.training import resuming


def configured(run: Path, *overrides: str):
    return resolve(load_config(None, [f"run_dir={run}", *overrides]))


def test_every_configuration_that_was_replaced_is_kept(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for rate in ("1e-3", "2e-3", "3e-3", "3e-3"):  # twice after the same step; the last changes nothing
        resuming.keep_history(configured(tmp_path, f"optimizer.learning_rate={rate}"), 6)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["config-step-00000006-2.yaml", "config-step-00000006.yaml", "config.yaml"]
    rates = [load_config(tmp_path / name).optimizer.learning_rate for name in reversed(kept)]
    assert rates == [3e-3, 1e-3, 2e-3]
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and "optimizer.learning_rate 0.001 -> 0.002" in told[0]


def test_a_configuration_that_cannot_be_read_is_kept_and_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "config.yaml").write_text("train: {steps: [\n")
    resuming.keep_history(configured(tmp_path), 0)
    assert (tmp_path / "config-step-00000000.yaml").read_text() == "train: {steps: [\n"
    assert load_config(tmp_path / "config.yaml").train.steps == 1000
    assert "it could not be read" in caplog.text


class Task:
    """Of a run whose data are what `refuse` says."""

    def __init__(self, refuse: bool = False):
        self.refuse = refuse

    def check_resumable(self, contents: dict) -> None:
        if self.refuse:
            raise UserError("data: the checkpoint was made with other data")


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    """Checkpoints of steps 3, 6 and 9."""
    store = CheckpointStore(tmp_path, keep=0)
    for step in (3, 6, 9):
        folder = store.begin(step)
        (folder / STATE).write_text(json.dumps({"step": step}))
        (folder / "model" / "a").write_text("a")
        store.commit(step)
    return store


def choose(store: CheckpointStore, *overrides: str, **task):
    config = configured(store.root.parent, *overrides)
    return resuming.choose(config, Task(**task), store, first=True)


def test_a_refused_start_sets_nothing_aside(store):
    """Exit code 2 means that nothing was begun: the newest checkpoint is still the newest."""
    with pytest.raises(UserError, match="made with other data"):
        choose(store, "checkpoint.go_back_to=3", refuse=True)
    with pytest.raises(UserError, match="train.steps is 2"):
        choose(store, "checkpoint.go_back_to=3", "train.steps=2", "optimizer.warmup_steps=0")
    assert choose(store).step == 9 and store.steps() == [9, 6, 3]


def test_going_back_beyond_the_last_step_of_a_shorter_run(store):
    assert choose(store, "checkpoint.go_back_to=3", "train.steps=5").step == 3
    assert store.steps() == [3] and choose(store, "checkpoint.go_back_to=3").step == 3

"""The run that everything goes wrong with: twelve steps of a tiny MUG, five steps an epoch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamug.configuration.reading import to_yaml
from tests.distributed.launch import ROOT, environment, launch_forked
from tests.evaluate.tiny_run import make_data, tiny_config
from tests.training.runs import fingerprint

STEPS = 12
WORKER = str(ROOT / "tests" / "reliability" / "faulty.py")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    folder = make_data(tmp_path_factory.mktemp("data"))
    config = tiny_config(folder, folder / "run")
    config.data.__dict__.update(global_batch_size=12, micro_batch_size=3, prefetch=1)
    config.optimizer.__dict__.update(learning_rate=2e-3, warmup_steps=3)
    config.train.__dict__.update(steps=STEPS)
    config.checkpoint.__dict__.update(every=3, keep=2)
    config.log.__dict__.update(every=1, tensorboard=False)
    (folder / "recipe.yaml").write_text(to_yaml(config))
    return folder / "recipe.yaml"


class Runs:
    """Starts runs of the recipe."""

    def __init__(self, recipe: Path):
        self.recipe = recipe

    def words(self, run: Path, *overrides: str, faults: list[dict] = ()) -> list[str]:
        return [WORKER, json.dumps(list(faults)), "train", str(self.recipe), f"run_dir={run}", *overrides]

    def ranks(self, run: Path, processes: int, *overrides: str, faults: list[dict] = (), timeout: float = 120.0):
        """[(exit code, output)] of each rank."""
        return launch_forked(self.words(run, *overrides, faults=faults), processes, timeout)

    def torchrun(self, run: Path, processes: int, *overrides: str, faults: list[dict] = (), restarts: int = 2):
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                 "--max-restarts", str(restarts), *self.words(run, *overrides, faults=faults)]  # fmt: skip
        return subprocess.run([sys.executable, *words], env=environment(), cwd=ROOT, capture_output=True, text=True,
                              timeout=240)  # fmt: skip


@pytest.fixture(scope="session")
def runs(recipe) -> Runs:
    return Runs(recipe)


@pytest.fixture(scope="session")
def undisturbed(runs, tmp_path_factory) -> dict[str, str]:
    """Hashes of the last checkpoint of two data-parallel processes that nothing happens to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert [code for code, _ in runs.ranks(run, 2)] == [0, 0]
    return fingerprint(run / "checkpoints" / f"step-{STEPS:08d}")

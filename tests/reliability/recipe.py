"""The run that everything goes wrong with: twelve steps of a tiny MUG, five steps an epoch, saved every three."""

from __future__ import annotations

from pathlib import Path

from megamug.configuration.reading import to_yaml
from tests.evaluate.tiny_run import make_data, tiny_config

STEPS = 12


def make_recipe(folder: Path) -> Path:
    """`folder/recipe.yaml`, with its data beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    make_data(folder)
    config = tiny_config(folder, folder / "run")
    config.data.__dict__.update(global_batch_size=12, micro_batch_size=3, prefetch=1)
    config.optimizer.__dict__.update(learning_rate=2e-3, warmup_steps=3)
    config.train.__dict__.update(steps=STEPS)
    config.checkpoint.__dict__.update(every=3, keep=2)
    config.log.__dict__.update(every=1, tensorboard=False)
    (folder / "recipe.yaml").write_text(to_yaml(config))
    return folder / "recipe.yaml"

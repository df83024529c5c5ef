"""A run folder as training leaves it, made in a second: demo pairs, a tokenizer, and a MUG of random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from megamug.checkpoint.saver import Saver
from megamug.checkpoint.store import CheckpointStore
from megamug.configuration.reading import save_config
from megamug.configuration.sections import Config
from megamug.data.demo.scenes import DemoParameters, make_demo_data
from megamug.data.pairs.text import iterate_captions, train_tokenizer
from megamug.data.shards.indexing import index_paths
from megamug.data.shards.sources import resolve_sources
from megamug.distributed import setup

HELD_OUT, MICRO_BATCH, STEP = 13, 4, 7


def make_data(folder: Path) -> Path:
    """`folder/data/{train,heldout}` indexed, and `folder/tokenizer.model`."""
    shards = make_demo_data(folder / "data", DemoParameters(train=60, heldout=HELD_OUT, size=40), processes=1)
    index_paths(shards, processes=1)
    train_tokenizer(iterate_captions(resolve_sources(str(folder / "data" / "train"))), folder / "tokenizer.model", 330)
    return folder


def tiny_config(data: Path, run_dir: Path, **model) -> Config:
    config = Config(run_dir=str(run_dir))
    config.model.__dict__.update(
        preset="demo", patch_size=8, layers=2, width=32, heads=4, ffn_width=64, decoder_layers=1, decoder_width=32,
        decoder_heads=4, text_unimodal_layers=1, text_multimodal_layers=2, text_width=32, text_heads=4,
        norm_pix_loss=False, **model,
    )
    config.data.__dict__.update(
        train=str(data / "data" / "train"), validation=str(data / "data" / "heldout"),
        tokenizer=str(data / "tokenizer.model"), image_size=32, caption_length=24, global_batch_size=8,
        micro_batch_size=MICRO_BATCH, threads=1, validation_samples=100,
    )
    return config


def make_run(config: Config, scale: float = 5.0) -> dict[str, torch.Tensor]:
    """Saves a checkpoint of random weights through the pieces that training uses; returns the weights.

    Matrices and tokens are initialised as ever and then made `scale` times as large, so that what the model says
    depends on what it is shown.
    """
    from megamug.models.mug.task import MugTask

    save_config(config)
    task = MugTask(config)
    world = setup.start(config.parallel, config.seed, task.plan.vocabulary_stages)
    try:
        task.join(world)
        (model,) = task.build(world)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter *= scale
        saver = Saver(CheckpointStore(config.run_dir, keep=0), world, asynchronous=False)
        saver.save(STEP, [model], None, {"step": STEP, "identity": task.identity()})
        saver.wait()
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    finally:
        setup.stop()

"""Language models for tests of writing: a vocabulary, documents, and run folders of random weights as training leaves
them."""

from __future__ import annotations

from pathlib import Path

import torch

from megamug.checkpoint.saver import Saver
from megamug.checkpoint.store import CheckpointStore
from megamug.configuration.reading import resolve, save_config
from megamug.configuration.sections import Config
from megamug.data.documents.vocabulary import Vocabulary
from megamug.distributed import setup
from tests.data.language import some_documents, tiny_vocabulary, write_set

STEP, CONTEXT = 3, 64
LEARNED = dict(layers=2, width=32, heads=4, query_groups=4, ffn_width=64, max_positions=96, init_std=0.3)
ROTARY = {
    **LEARNED, "width": 48, "layers": 3, "query_groups": 2, "norm": "rmsnorm", "positions": "rotary",
    "activation": "swiglu",
}
MODELS = {
    "learned": {"model": {"kind": "decoder_lm", "preset": "lm_tiny"}, "lm": LEARNED},
    "rotary": {"model": {"kind": "decoder_lm", "preset": "lm_tiny"}, "lm": ROTARY},
    "jam": {"model": {"kind": "jam_cross", "preset": "jam_demo"}, "text_tower": LEARNED, "image_tower": ROTARY},
}


def make_data(folder: Path) -> Vocabulary:
    """`folder/vocabulary` and `folder/documents`."""
    vocabulary = tiny_vocabulary(folder)
    write_set(folder / "documents", vocabulary, some_documents(vocabulary, 20))
    return vocabulary


def config_of(name: str, folder: Path) -> Config:
    config = Config(run_dir=str(folder / name))
    for section, values in MODELS[name].items():
        getattr(config, section).__dict__.update(values)
    config.data.__dict__.update(
        train=str(folder / "documents"), validation=str(folder / "documents"), tokenizer=str(folder / "vocabulary"),
        context_length=CONTEXT, global_batch_size=2, micro_batch_size=2, validation_samples=100,
    )
    return config


def make_run(name: str, folder: Path) -> Path:
    """A checkpoint of random weights, with open gates, so that what is written depends on all that was read."""
    from megamug.models.tasks import make_task

    config = config_of(name, folder)
    save_config(config)
    task = make_task(resolve(config))
    world = setup.start(config.parallel, config.seed, task.plan.vocabulary_stages)
    try:
        task.join(world)
        (model,) = task.build(world)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(".gate"):
                    parameter.fill_(0.7)
        saver = Saver(CheckpointStore(config.run_dir, keep=0), world, asynchronous=False)
        saver.save(STEP, [model], None, {"step": STEP, "identity": task.identity()})
        saver.wait()
    finally:
        setup.stop()
    return Path(config.run_dir)

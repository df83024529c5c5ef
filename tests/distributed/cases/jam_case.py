"""A tiny JamCross for `layout_worker`: its configuration, its task, its batches. Option `pair`: equal | unlike."""

from __future__ import annotations

import functools

import torch

from megamug.configuration.reading import resolve
from megamug.configuration.sections import Config
from megamug.data.documents.loader import IGNORE
from tests.distributed.cases import lm_case
from tests.distributed.cases.lm_case import TOKENS, VOCABULARY
from tests.models.jam.test_cross import CM3LEON, GPT, LLAMA

PAIRS = {"equal": (CM3LEON, CM3LEON), "unlike": (LLAMA, GPT)}
# A gate's gradient is one number, the sum over all tokens and units of terms of both signs. With these seeds it is
# above 0.005 for each gate; where it is nearly zero, its last digits are those of the order of the additions.
SEEDS = {"equal": 8, "unlike": 9}


def tiny(options: dict) -> Config:
    """Towers of equal sizes, or of widths 128 and 192, depths 4 and 6, RMSNorm and LayerNorm, rotary and learned
    positions; the unlike ones with separate documents and z-loss as well."""
    config = Config()
    config.model.kind = "jam_cross"
    unlike, config.seed = options["pair"] == "unlike", SEEDS[options["pair"]]
    for section, tower in zip((config.text_tower, config.image_tower), PAIRS[options["pair"]], strict=True):
        section.__dict__.update(tower)
    config.model.z_loss_weight = 1e-2 if unlike else 0.0
    config.data.__dict__.update(
        context_length=TOKENS, global_batch_size=8, micro_batch_size=2, separate_documents=unlike, tokenizer="none"
    )
    config.optimizer.__dict__.update(learning_rate=1e-3, warmup_steps=3)
    config.train.steps = 10
    for section, values in options.items():
        if isinstance(values, dict):
            getattr(config, section).__dict__.update(values)
    return resolve(config)


def make_task(config: Config):
    """The task of `config`, without a vocabulary's files; gates are open, so that every parameter has a gradient."""
    from megamug.models.jam.task import JamTask

    class OpenGates(JamTask):
        def build(self, world, initialised: bool = True) -> list[torch.nn.Module]:
            chunks = super().build(world, initialised)
            with torch.no_grad():
                for entry in (entry for chunk in chunks for entry in chunk.sharded_state_dict().values()):
                    if entry.key.endswith(".gate"):
                        entry.data.fill_(0.3 if ".text." in entry.key else -0.4)
            return chunks

    return lm_case.make_task(config, OpenGates)


def row(index: int) -> tuple[torch.Tensor, ...]:
    """Tokens, labels, document numbers and places in the document of row `index`: a pure function of it."""
    g = torch.Generator().manual_seed(1000 + index)
    tokens = torch.randint(0, VOCABULARY, (TOKENS,), generator=g)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=g)
    labels[torch.rand(TOKENS, generator=g) < 0.3] = IGNORE
    first = int(torch.randint(1, TOKENS, (), generator=g))
    segments = (torch.arange(TOKENS) >= first).int()
    return tokens, labels, segments, torch.cat([torch.arange(first), torch.arange(TOKENS - first)])


micro_batches = functools.partial(lm_case.micro_batches, row=row)

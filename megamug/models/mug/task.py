"""What the trainer knows of MUG: its chunks, its batches, what its losses are divided by, its FLOPs."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from megamug.command_line.console import counted
from megamug.configuration.sections import Config
from megamug.data.dali import load_dali
from megamug.data.order import GlobalOrder
from megamug.data.pairs.loader import GlobalBatch, PairBatch, PairLoader, order_of
from megamug.data.pairs.selection import selected
from megamug.data.pairs.text import Tokenizer
from megamug.data.random import random_masks, random_words
from megamug.data.shards.sources import Source, resolve_sources
from megamug.data.text.marks import TRAINED_HERE
from megamug.errors import printable
from megamug.models.mug.model import Mug, MugBatch
from megamug.models.mug.plan import MugPlan
from megamug.models.mug.text_masks import caption_terms, hidden_tokens
from megamug.models.task import Task

log = logging.getLogger(__name__)


class MugTask(Task):
    """Of image-caption pairs."""

    plan_type, model = MugPlan, Mug

    def __init__(self, config: Config):
        super().__init__(config)
        self.tokenizer = Tokenizer(config.data.tokenizer) if config.model.caption_loss_weight > 0 else None
        self.told: set[str] = set()
        self.vocabulary = self.tokenizer.vocab_size if self.tokenizer else 0
        marks = self.tokenizer.framing if self.tokenizer else TRAINED_HERE
        self.plan = MugPlan(config, self.vocabulary, self.spec, marks)
        self.loss_names = [n for n, used in (("image", self.plan.paints), ("caption", self.plan.writes)) if used]

    # ------------------------------------------------------------------------------------------ data

    def loader(
        self, world, train: bool, state: dict | None = None, max_samples: int | None = None,
        captions: bool | None = None,
    ) -> PairLoader:  # fmt: skip
        """Every rank of a data-parallel replica reads the same pairs: a replaced sample is replaced on all of them.

        `captions`: whether samples must have one, and come with its tokens; None: where the model writes.
        """
        return self.pairs(world, train, state, max_samples, self.plan.writes if captions is None else captions)

    def pairs(self, world, train: bool, state: dict | None, max_samples: int | None, captions: bool,
              loader: type[PairLoader] = PairLoader, **more) -> PairLoader:  # fmt: skip
        """A loader of a kind; `more`: further arguments of it."""
        data = self.config.data
        sources = self.sources(train, captions)
        if world.is_first:
            self._tell(sources)
        return loader(
            sources,
            tokenizer=self.tokenizer,
            image_size=data.image_size,
            caption_length=data.caption_length,
            caption_lines=data.caption_lines,
            need_captions=captions,
            crop_scale=data.crop_scale,
            flip=data.flip,
            background=data.background,
            threads=data.threads,
            prefetch=data.prefetch,
            max_failure_rate=data.max_failure_rate,
            state=state,
            max_samples=max_samples,
            **more,
            **self.reading(world, train),
        )

    def sources(self, train: bool, captions: bool) -> list[Source]:
        """The sets that are trained on, as far as the run sees them, or the held-out ones."""
        data = self.config.data
        sources = resolve_sources(data.train if train else data.validation, data.verify, captions)
        return selected(sources, self.config.seed, data.fraction, data.captions) if train else sources

    def _tell(self, sources: list[Source]) -> None:
        """Once of each set, what is left out of it."""
        for source in sources:
            missing = source.without_caption()
            if source.captioned and missing and source.name not in self.told:
                self.told.add(source.name)
                log.warning("%s: %s without a caption left out", printable(source.name), counted(missing, "sample"))

    def check_data(self) -> None:
        """The shards are checked with the configuration; this is what decodes their images."""
        load_dali()

    def order(self) -> GlobalOrder:
        return order_of(self.sources(train=True, captions=self.plan.writes), self.config.seed)

    def identity(self) -> dict:
        tokenizer = None if self.tokenizer is None else self.tokenizer.sha256[:16]
        return {"data.tokenizer": tokenizer, "precision.dtype": self.config.precision.dtype}

    def batch(self, pairs: PairBatch) -> MugBatch:
        """Masks are a pure function of (seed, epoch, sample), made here and not stored."""
        plan = self.plan
        visible, masked = random_masks(self.config.seed, pairs.epochs, pairs.indices, plan.patches, plan.visible)
        device = pairs.images.device
        rows = None if pairs.valid.all() else torch.from_numpy(pairs.valid.nonzero()[0]).to(device)
        tokens = pairs.tokens
        if rows is not None and tokens is not None:
            tokens = torch.where(torch.from_numpy(pairs.valid).to(device).unsqueeze(1), tokens, self.plan.marks.pad)
        text_mask = None
        if plan.masked_text and tokens is not None:
            words = random_words(self.config.seed, "text mask", pairs.epochs, pairs.indices, plan.caption_length)
            text_mask = hidden_tokens(tokens, torch.from_numpy(words.astype("int64")), plan.marks, plan.text_mask_ratio)
        return MugBatch(
            torch.from_numpy(visible).to(device), torch.from_numpy(masked).to(device), pairs.images, tokens, rows,
            text_mask,
        )

    def totals(self, pairs: GlobalBatch, batches: list[MugBatch], world) -> dict[str, float]:
        """By loss name, the number of terms in the whole global batch. One small all-reduce over the replicas."""
        patches = sum(int(p.valid.sum()) for p in pairs.micro_batches) * self.plan.masked
        tokens = sum(caption_terms(b, self.plan.marks.pad) for b in batches) if self.plan.writes else 0
        counts = torch.tensor([patches, tokens], dtype=torch.float64, device=world.device)
        if world.dp_size > 1:
            dist.all_reduce(counts, group=world.dp_group)
        return dict(zip(("image", "caption"), counts.tolist(), strict=True))

    unit = ("images", 1)  # what throughput counts, and how many a sample has

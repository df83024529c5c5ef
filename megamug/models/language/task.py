"""What the trainer knows of a language model: its chunks, its token batches, what its losses are divided by."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.distributed as dist

from megamug.configuration.sections import Config
from megamug.data.documents.indexed import DocumentSet, open_documents
from megamug.data.documents.loader import IGNORE, TokenBatch, TokenLoader, order_of_rows, row_makers
from megamug.data.documents.vocabulary import Vocabulary
from megamug.data.order import GlobalOrder
from megamug.data.pairs.loader import GlobalBatch
from megamug.models.language.decoder_lm import DecoderLM
from megamug.models.language.plan import LmPlan
from megamug.models.task import Task


class LmTask(Task):
    """Of a language model; JAM-Cross has the same with another plan and model."""

    plan_type, model = LmPlan, DecoderLM

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocabulary = Vocabulary.load(config.data.tokenizer)
        self.plan = self.plan_type(config, self.vocabulary.size, self.spec)
        self.loss_names = list(self.plan.loss_weights)

    # ------------------------------------------------------------------------------------------ data

    def documents(self, train: bool) -> list[DocumentSet]:
        """The opened sets. Raises UserError: one is missing, damaged, or of another vocabulary."""
        data = self.config.data
        return open_documents(data.train if train else data.validation, self.vocabulary, data.verify)

    def loader(self, world, train: bool, state: dict | None = None, max_samples: int | None = None) -> TokenLoader:
        """Rows of tokens; every rank of a data-parallel replica reads the same ones."""
        return TokenLoader(
            self.documents(train),
            self.vocabulary,
            separate_documents=self.config.data.separate_documents,
            same_shapes=self.config.parallel.cuda_graphs or self.compiled,
            state=state,
            max_samples=max_samples,
            **self._rows(),
            **self.reading(world, train),
        )

    def _rows(self) -> dict[str, object]:
        """How documents become rows."""
        data = self.config.data
        return {
            "context_length": data.context_length, "cm3_spans": data.cm3_spans, "hidden_text": data.hidden_text,
            "loss_on": data.loss_on,
        }  # fmt: skip

    def check_data(self) -> None:
        self.order()
        if self.config.data.validation is not None:
            self.documents(train=False)

    def order(self) -> GlobalOrder:
        return self._order

    @cached_property
    def _order(self) -> GlobalOrder:
        seed = self.config.seed
        makers = row_makers(self.documents(train=True), self.vocabulary, seed=seed, **self._rows())
        return order_of_rows(makers, seed)

    def identity(self) -> dict:
        config = self.config
        return {
            "data.tokenizer": self.vocabulary.fingerprint(),
            "data.context_length": config.data.context_length,
            "fusion.freeze": config.fusion.freeze,  # frozen parameters have no optimizer state
            "precision.dtype": config.precision.dtype,
        }

    def batch(self, rows: TokenBatch) -> TokenBatch:
        """A micro-batch of the loader is what the models take."""
        return rows

    def totals(self, rows: GlobalBatch, batches: list[TokenBatch], world) -> dict[str, float]:
        """By loss name, the number of terms in the whole global batch. One small all-reduce over the replicas."""
        count = sum((batch.labels != IGNORE).sum() for batch in batches).to(torch.float64)
        if world.dp_size > 1:
            dist.all_reduce(count, group=world.dp_group)
        return dict.fromkeys(self.loss_names, count.item())

    # ------------------------------------------------------------------------------------------ figures

    @property
    def unit(self) -> tuple[str, int]:
        """What throughput counts, and how many a sample has."""
        return "tokens", self.config.data.context_length

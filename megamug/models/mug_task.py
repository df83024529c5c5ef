"""What the trainer knows of MUG: its stage, its batches, what its losses are divided by, its FLOPs."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megamug.config import Config
from megamug.data.loader import GlobalBatch, PairBatch, PairLoader
from megamug.data.random import random_masks
from megamug.data.sources import resolve_sources
from megamug.data.text import Tokenizer
from megamug.models import specs
from megamug.models.init import initialise
from megamug.models.mug import PAD, Mug, MugBatch
from megamug.models.mug_plan import MugPlan


class MugTask:
    """Built on every rank; holds no parameters."""

    def __init__(self, config: Config):
        """`config` is resolved and validated. Needs no process group."""
        self.config = config
        self.tokenizer = Tokenizer(config.data.tokenizer) if config.model.caption_loss_weight > 0 else None
        self.vocabulary = self.tokenizer.vocab_size if self.tokenizer else 0
        self.spec, self.spec_reason = specs.choose(config.precision.layers)
        self.plan = MugPlan(config, self.vocabulary, self.spec)
        self.loss_names = [n for n, used in (("image", self.plan.paints), ("caption", self.plan.writes)) if used]

    def join(self, world) -> None:
        """Learns this process's place in the tensor-parallel group."""
        group = world.tp_group if world.tp_size > 1 else None
        self.plan.place_tensor(world.tp_rank, group)

    def build(self, world) -> Mug:
        """This rank's pipeline stage, initialised: the same numbers in every layout."""
        stage = Mug(self.plan, world.pp_rank)
        stage.to(world.device)
        initialise(stage.sharded_state_dict(), self.config.seed)
        return stage

    # ------------------------------------------------------------------------------------------ data

    def loader(self, world, train: bool, state: dict | None = None, max_samples: int | None = None) -> PairLoader:
        """Every rank of a data-parallel replica reads the same pairs: a replaced sample is replaced on all of them."""
        data = self.config.data
        return PairLoader(
            resolve_sources(data.train if train else data.validation),
            tokenizer=self.tokenizer,
            image_size=data.image_size,
            caption_length=data.caption_length,
            global_batch_size=data.global_batch_size,
            micro_batch_size=data.micro_batch_size,
            seed=self.config.seed,
            dp_rank=world.dp_rank,
            dp_size=world.dp_size,
            train=train,
            need_captions=self.plan.writes,
            crop_scale=data.crop_scale,
            flip=data.flip,
            device=world.device,
            threads=data.threads,
            prefetch=data.prefetch,
            max_failure_rate=data.max_failure_rate,
            state=state,
            max_samples=max_samples,
        )

    def batch(self, pairs: PairBatch) -> MugBatch:
        """Masks are a pure function of (seed, epoch, sample), made here and not stored."""
        plan = self.plan
        visible, masked = random_masks(self.config.seed, pairs.epochs, pairs.indices, plan.patches, plan.visible)
        device = pairs.images.device
        rows = None if pairs.valid.all() else torch.from_numpy(pairs.valid.nonzero()[0]).to(device)
        tokens = pairs.tokens
        if rows is not None and tokens is not None:
            tokens = torch.where(torch.from_numpy(pairs.valid).to(device).unsqueeze(1), tokens, PAD)
        return MugBatch(
            torch.from_numpy(visible).to(device), torch.from_numpy(masked).to(device), pairs.images, tokens, rows
        )

    def totals(self, pairs: GlobalBatch, batches: list[MugBatch], world) -> dict[str, float]:
        """By loss name, the number of terms in the whole global batch. One small all-reduce over the replicas."""
        patches = sum(int(p.valid.sum()) for p in pairs.micro_batches) * self.plan.masked
        tokens = sum(int((b.tokens[:, 1:] != PAD).sum()) for b in batches) if self.plan.writes else 0
        counts = torch.tensor([patches, tokens], dtype=torch.float64, device=world.device)
        if world.dp_size > 1:
            dist.all_reduce(counts, group=world.dp_group)
        return dict(zip(("image", "caption"), counts.tolist(), strict=True))

    # ------------------------------------------------------------------------------------------ figures

    @property
    def flops_per_sample(self) -> float:
        """Model FLOPs of one training pair: forward, and twice that for backward (recomputation is not counted)."""
        return 3 * self.plan.forward_flops

    def losses_reason(self) -> str:
        """Which implementation of the losses runs, and why."""
        from megamug.losses import ops

        return ops.status()[1]

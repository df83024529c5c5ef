"""A classifier's sizes: those of the encoder of a MUG that sees every patch, and of the head behind it."""

from __future__ import annotations

from functools import cached_property

from megamug.configuration.sections import Config
from megamug.models.mug.finetuning import FineTuningPlan
from megamug.models.stages import Block, Boundary, Part
from megamug.telemetry.flops import linear_flops

# Of the linear's weights: MAE's fine-tuning starts from (nearly) equal logits; its linear probe.
HEAD_STD, PROBE_STD = 2e-5, 0.01


class ClassifierPlan(FineTuningPlan):
    """Derived sizes of a classifier under a layout. `config.classifier.classes` is known."""

    def __init__(self, config: Config, vocabulary: int, spec: str = "local"):
        super().__init__(config, vocabulary, spec)
        own = config.classifier
        self.label_smoothing, self.mixup, self.cutmix = own.label_smoothing, own.mixup, own.cutmix
        self.random_erasing = own.random_erasing
        self.mean_pool, self.frozen_encoder = own.pool == "mean", own.frozen
        self.attentive, self.standardised = own.pool == "attention", own.frozen and own.batch_norm
        # Where the encoder learns, the mean is taken before its norm, and has one of its own (MAE's fc_norm).
        self.head_norm = self.mean_pool and not self.frozen_encoder
        self.final_norm = not self.head_norm
        self.loss_weights = {"class": 1.0}

    def init_std(self, name: str) -> float | None:
        if name != "head.linear.weight":
            return None
        return PROBE_STD if self.frozen_encoder else HEAD_STD

    @cached_property
    def blocks(self) -> list[Block]:
        """The model in order, with the forward FLOPs of one image."""
        width = self.model.width
        reading = linear_flops(self.patches, width, 2 * width) + 4 * self.patches * width if self.attentive else 0
        head = Block("class", "head", 0, linear_flops(1, width, self.classes) + reading)
        return [*super().blocks, head]

    def parts(self, stage: int) -> dict[str, Part]:
        """What `stage` holds: of the encoder, and the head."""
        found = {name: self.stack_part(stage, name) for name in ("encoder", "class")}
        return {name: part for name, part in found.items() if part is not None}

    def boundary(self, stage: int) -> Boundary | None:
        """What arrives at `stage` from the one before: hidden states of all tokens."""
        if not 0 < stage < len(self.stages):
            return None
        share = self.tensor if self.sequence_parallel else 1
        return Boundary({"latent": (self.latent_tokens // share, self.micro_batch, self.model.width)})

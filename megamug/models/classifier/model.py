"""A classifier of images: a MUG's encoder on every patch and a linear behind it, as MAE is fine-tuned (He et al. 2022,
arXiv 2111.06377, appendix A.1).

Axes: b images, h width, C classes. Hidden states are [1 + registers + patches, b, h].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megamug.models.blocks.batch_norm import BatchNorm
from megamug.models.blocks.layers import replicated
from megamug.models.classifier.plan import ClassifierPlan
from megamug.models.mug.model import Encoder
from megamug.models.stages import Stage, tensors_alone

STANDARDISED_EPS = 1e-6  # of the BatchNorm before a probe's linear (MAE)


@dataclass
class ClassBatch:
    """One micro-batch."""

    images: Tensor  # [b, 3, H, W] uint8; mixed ones as float32 of the same range
    labels: Tensor  # [b] int64, or the classes' shares [b, C] of mixed images
    rows: Tensor | None = None  # int64: the rows that count, where some are padding
    visible_ids: None = None  # the encoder sees every patch
    scales: Tensor | None = None  # [layers, 2, b, 1]: stochastic depth, see `megamug.data.pairs.mixing`


class AttentivePool(nn.Module):
    """One learned query that reads all patches by multi-head cross-attention, keys and values without biases (the
    attentive probe of AIM, El-Nouby et al. 2024, arXiv 2401.08541, after CAE's, arXiv 2202.03026)."""

    def __init__(self, width: int, heads: int, dtype: torch.dtype):
        super().__init__()
        self.heads, self.query_token = heads, nn.Parameter(torch.empty(1, width, dtype=dtype))
        self.key, self.value = (nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(2))

    def forward(self, patches: Tensor) -> Tensor:
        """[patches, b, h] -> [b, h]"""
        keys, values = (
            each(patches).unflatten(2, (self.heads, -1)).permute(1, 2, 0, 3) for each in (self.key, self.value)
        )
        query = self.query_token.view(1, self.heads, 1, -1).expand(len(keys), -1, -1, -1)
        return F.scaled_dot_product_attention(query, keys, values).flatten(1)


class Head(MegatronModule):
    """The mean of the patches and a LayerNorm, or the class token behind the encoder's norm; then a linear. Of a frozen
    encoder either, or each patch, which attention then reads, is taken behind its norm, and standardised unless
    `batch_norm` is off."""

    def __init__(self, plan: ClassifierPlan):
        config = plan.encoder_config
        super().__init__(config=config)
        self.plan, width, dtype = plan, config.hidden_size, config.params_dtype
        # Every tensor-parallel rank computes the same from the whole sequence.
        if plan.head_norm:
            self.norm = replicated(nn.LayerNorm(width, config.layernorm_epsilon, dtype=dtype), False)
        if plan.standardised:
            # of images (MAE), or of patches (AIM)
            self.standardised = BatchNorm(plan, width, eps=STANDARDISED_EPS, affine=False)
        if plan.attentive:
            self.attention = replicated(AttentivePool(width, config.num_attention_heads, dtype), False)
        self.linear = replicated(nn.Linear(width, plan.classes, dtype=dtype), False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (this rank's under sequence parallelism) -> logits [b, C] float32."""
        tokens = self.plan.gather(hidden)
        patches = tokens[1 + self.plan.registers :]
        read = patches if self.plan.attentive else patches.mean(dim=0) if self.plan.mean_pool else tokens[0]
        if self.plan.head_norm:
            read = self.norm(read)
        if self.plan.standardised:
            read = self.standardised(read.flatten(0, -2)).view_as(read)
        return self.linear(self.attention(read) if self.plan.attentive else read).float()


class Classifier(Stage):
    """One pipeline stage of a classifier."""

    def __init__(self, plan: ClassifierPlan, stage: int = 0):
        super().__init__(plan, stage)
        parts = plan.parts(stage)
        self.encoder = Encoder(plan, parts["encoder"]) if "encoder" in parts else None
        self.head = Head(plan) if "class" in parts else None
        if plan.frozen_encoder:
            self.encoder.requires_grad_(False)
        plan.mark(self, parts["encoder"].first if "encoder" in parts else 0)

    def forward(self, batch: ClassBatch) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor | int]]]:
        """Runs this stage: (packed tensors for the next stage or None, {"class": (sum, count)})."""
        hidden = self.hidden(batch)
        if self.head is None:
            return self.outgoing.pack({"latent": hidden}), {}
        return None, {"class": self.loss(batch, self.head(hidden))}

    def hidden(self, batch: ClassBatch) -> Tensor:
        """Hidden states behind this stage's part of the encoder."""
        hidden = self.incoming.unpack(self.received)["latent"] if self.incoming else None
        if self.encoder is None:
            return hidden
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.plan.frozen_encoder):
            return self.encoder(batch, hidden, batch.scales if self.training else None)

    def logits(self, batch: ClassBatch) -> Tensor:
        """[b, C] float32; of a stage that is the whole model."""
        return self.head(self.hidden(batch))

    def loss(self, batch: ClassBatch, logits: Tensor) -> tuple[Tensor, int]:
        """Cross-entropy in nat, (sum, number of images); labels are smoothed in training alone."""
        labels = batch.labels
        if batch.rows is not None:
            logits, labels = logits[batch.rows], labels[batch.rows]
        smoothing = self.plan.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing), len(labels)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state: dict = {}
        for name in ("encoder", "head"):
            part = getattr(self, name)
            if part is not None:
                state.update(part.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return tensors_alone(state)

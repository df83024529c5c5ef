"""MUG: an image encoder that learns by generating pixels and captions (*Vision Learners Meet Web Image-Text Pairs*,
arXiv 2301.07088).

The encoder sees a quarter of an image's patches. From its latent an image decoder paints the hidden patches (MAE, He et
al. 2022) and a text decoder writes the caption, attending to the latent. A loss weight of 0 removes that decoder:
without captions the model *is* MAE.

Axes: b images, N patches, V visible, M masked, s tokens of a stream, h width, p patch size. Streams are [s, b, h] as
Megatron wants them; a pipeline stage holds a contiguous run of the model's blocks (`stages.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megamug.losses import masked_patch_loss, vocab_parallel_cross_entropy
from megamug.models.blocks import specs
from megamug.models.blocks.layers import LayerRun, replicated
from megamug.models.blocks.positions import sincos_positions
from megamug.models.mug.plan import MugPlan
from megamug.models.stages import Part, Stage, second_copy, tensors_alone


@dataclass
class MugBatch:
    """One micro-batch. A stage that needs no pixels or no captions may get None for them."""

    visible_ids: Tensor  # [b, V] int64, ascending
    masked_ids: Tensor  # [b, M] int64, ascending
    images: Tensor | None = None  # [b, 3, H, W] uint8
    tokens: Tensor | None = None  # [b, T + 1] int64: bos, caption, eos, padding
    rows: Tensor | None = None  # int64: the rows that count, where some are padding (their captions are all padding)
    text_mask: Tensor | None = None  # [b, T] bool: which of tokens[:, 1:] a masked text decoder has to tell


def patchify(images: Tensor, patch: int) -> Tensor:
    """[b, c, H, W] -> [b, N, p * p * c]: patches in row-major order, their values as (row, column, channel)."""
    b, c, height, width = images.shape
    grid = images.view(b, c, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(patches: Tensor, patch: int, height: int) -> Tensor:
    """The inverse of `patchify` for images of `height` rows."""
    b, count, values = patches.shape
    rows = height // patch
    grid = patches.view(b, rows, count // rows, patch, patch, values // patch**2)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, height, count // rows * patch)


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` [b, k] of `x` [b, n, h] -> [b, k, h]."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class Encoder(MegatronModule):
    """ViT on the visible patches: class token, registers, fixed sin-cos positions, pre-norm layers, final norm."""

    def __init__(self, plan: MugPlan, part: Part):
        config = plan.encoder_config
        super().__init__(config=config)
        self.plan = plan
        if part.embedding:
            values = 3 * plan.patch_size**2
            mean, std = (torch.tensor(x).repeat(plan.patch_size**2) for x in (plan.mean, plan.std))
            self.register_buffer("pixel_scale", 1 / (255 * std), persistent=False)
            self.register_buffer("pixel_shift", -mean / std, persistent=False)
            self.register_buffer("positions", plan.positions().to(config.params_dtype), persistent=False)
            self.patch_embedding = nn.Linear(values, config.hidden_size, dtype=config.params_dtype)
            self.cls_token = nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))
            if plan.registers:
                self.register_tokens = nn.Parameter(self.cls_token.new_empty(plan.registers, config.hidden_size))
        spec = specs.transformer_layer(plan.spec, config, causal=False)
        self.stack = LayerRun(config, [spec] * config.num_layers, plan.norm, part.first, part.last, plan.final_norm)

    def embed(self, batch: MugBatch) -> Tensor:
        """Pixels of the visible patches (where `visible_ids` is None, of all) -> [1 + registers + V, b, h]."""
        pixels, positions = patchify(batch.images, self.plan.patch_size), self.positions
        if batch.visible_ids is not None:
            pixels, positions = take(pixels, batch.visible_ids), positions[batch.visible_ids]
        values = (pixels * self.pixel_scale + self.pixel_shift).to(self.cls_token.dtype)
        tokens = self.patch_embedding(values) + positions
        prefix = torch.cat([self.cls_token, self.register_tokens]) if self.plan.registers else self.cls_token
        tokens = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1).transpose(0, 1).contiguous()
        return scatter_to_sequence_parallel_region(tokens) if self.plan.sequence_parallel else tokens

    def forward(self, batch: MugBatch, hidden: Tensor | None, scales: Tensor | None = None) -> Tensor:
        return self.stack(self.embed(batch) if hidden is None else hidden, attention_mask=None, scales=scales)


class ImageDecoder(MegatronModule):
    """MAE's decoder: mask tokens where patches are hidden, a small transformer, pixels of each patch."""

    def __init__(self, plan: MugPlan, part: Part):
        config = plan.image_config
        super().__init__(config=config)
        self.plan, width = plan, config.hidden_size
        if part.embedding:
            # Under sequence parallelism each rank embeds its part of the latent.
            self.latent_embedding = replicated(
                nn.Linear(plan.encoder_config.hidden_size, width, dtype=config.params_dtype), plan.sequence_parallel
            )
            self.mask_token = nn.Parameter(torch.empty(1, width, dtype=config.params_dtype))
            if plan.decoder_registers:
                self.register_tokens = nn.Parameter(self.mask_token.new_empty(plan.decoder_registers, width))
            positions = sincos_positions(width, *plan.grid, prefix=0)
            self.register_buffer("positions", positions.to(config.params_dtype), persistent=False)
        spec = specs.transformer_layer(plan.spec, config, causal=False)
        self.stack = LayerRun(config, [spec] * config.num_layers, plan.norm, part.first, part.last)
        if part.head:
            self.prediction = nn.Linear(width, 3 * plan.patch_size**2, dtype=config.params_dtype)

    def embed(self, latent: Tensor, visible_ids: Tensor) -> Tensor:
        """The latent in place, mask tokens elsewhere -> [1 + decoder registers + N, b, h]."""
        latent = self.plan.gather(self.latent_embedding(latent)).transpose(0, 1)
        visible = latent[:, 1 + self.plan.registers :]
        places = visible_ids.unsqueeze(-1).expand_as(visible)
        patches = self.mask_token.expand(len(latent), self.plan.patches, -1).scatter(1, places, visible)
        streams = [latent[:, :1], patches + self.positions]
        if self.plan.decoder_registers:
            streams.insert(1, self.register_tokens.expand(len(latent), -1, -1))
        tokens = torch.cat(streams, dim=1).transpose(0, 1).contiguous()
        return scatter_to_sequence_parallel_region(tokens) if self.plan.sequence_parallel else tokens

    def forward(self, batch: MugBatch, latent: Tensor | None, hidden: Tensor | None) -> Tensor:
        return self.stack(self.embed(latent, batch.visible_ids) if hidden is None else hidden, attention_mask=None)

    def predict(self, hidden: Tensor, patch_ids: Tensor | None = None) -> Tensor:
        """Values of the patches `patch_ids` [b, k] (None: all) -> [b, k, p * p * 3], in the loss's normalised units."""
        patches = self.plan.gather(hidden).transpose(0, 1)[:, 1 + self.plan.decoder_registers :]
        return self.prediction(patches if patch_ids is None else take(patches, patch_ids))

    def loss(self, batch: MugBatch, hidden: Tensor) -> tuple[Tensor, int]:
        images, predictions, masked_ids = batch.images, self.predict(hidden, batch.masked_ids), batch.masked_ids
        if batch.rows is not None:
            images, predictions, masked_ids = (x[batch.rows] for x in (images, predictions, masked_ids))
            if len(batch.rows) == 0:
                return predictions.sum().float(), 0
        return masked_patch_loss(
            images, predictions, masked_ids, patch_size=self.plan.patch_size, norm_pix=self.plan.norm_pix,
            mean=self.plan.mean, std=self.plan.std,
        )


class TextDecoder(MegatronModule):
    """Tells the caption: uni-modal layers on text alone, then multi-modal ones that attend to the latent as well.

    `text_objective: autoregressive`: each token from those before it. `masked`: the tokens of `batch.text_mask`, in
    whose place a mask token stands, from all others and from one another's places; no token sees padding.
    """

    def __init__(self, plan: MugPlan, part: Part):
        config = plan.text_config
        super().__init__(config=config)
        self.plan, self.tied = plan, plan.tie_vocabulary
        vocabulary, width = plan.padded_vocabulary, config.hidden_size
        if part.embedding:
            self.word_embeddings = VocabParallelEmbedding(
                vocabulary, width, init_method=specs.leave_uninitialised, config=config,
                reduce_scatter_embeddings=plan.sequence_parallel,
            )
            self.text_positions = nn.Parameter(torch.empty(plan.caption_length, width, dtype=config.params_dtype))
            self.text_positions.sequence_parallel = plan.sequence_parallel
            if plan.masked_text:
                self.mask_token = nn.Parameter(self.text_positions.new_empty(1, width))
                self.mask_token.sequence_parallel = plan.sequence_parallel
        sees = {"causal": not plan.masked_text, "padded": plan.masked_text}
        uni = specs.transformer_layer(plan.spec, config, **sees)
        multi = specs.transformer_layer(plan.spec, config, **sees, context_width=plan.encoder_config.hidden_size)
        layer_specs = [uni] * plan.unimodal_layers + [multi] * plan.multimodal_layers
        self.stack = LayerRun(config, layer_specs, plan.norm, part.first, part.last)
        if part.head:
            self.output_layer = ColumnParallelLinear(
                width, vocabulary, config=config, init_method=specs.leave_uninitialised, bias=False,
                gather_output=False, skip_weight_param_allocation=self.tied and part.embedding,
            )
        # A tied weight whose two ends lie in different stages exists twice; Megatron sums its gradients over both.
        self.apart = self.tied and part.embedding != part.head
        if self.apart:
            self.shared_weight().shared_embedding = True
            self.shared_weight().shared = not part.embedding  # counted once in the gradient norm

    def shared_weight(self) -> Tensor:
        """The vocabulary matrix [V / tp, h] that this stage holds."""
        return self.word_embeddings.weight if hasattr(self, "word_embeddings") else self.output_layer.weight

    def embed(self, tokens: Tensor, first: int = 0, masked: Tensor | None = None) -> Tensor:
        """Token ids [b, t] at positions first, first + 1, ... -> [t, b, h] (its part under sequence parallelism).
        Where `masked` [b, t] is True the mask token stands in the token's place."""
        embedded = self.word_embeddings(tokens)
        positions = self.text_positions[first : first + tokens.shape[1]]
        if self.plan.sequence_parallel:
            positions = self._own_part(positions)
        else:
            embedded = embedded.transpose(0, 1)
        if masked is not None:
            places = self._own_part(masked.t()) if self.plan.sequence_parallel else masked.t()
            embedded = torch.where(places.unsqueeze(-1), self.mask_token, embedded)
        return (embedded + positions.unsqueeze(1)).contiguous()

    def _own_part(self, x: Tensor) -> Tensor:
        """This tensor-parallel rank's part of the sequence `x` [t, ...]."""
        return x.chunk(self.plan.tensor)[self.plan.tensor_rank]

    def forward(self, batch: MugBatch, latent: Tensor, hidden: Tensor | None) -> Tensor:
        if not self.plan.masked_text:
            hidden = self.embed(batch.tokens[:, :-1]) if hidden is None else hidden
            return self.stack(hidden, attention_mask=None, context=latent)
        tokens = batch.tokens[:, 1:]
        hidden = self.embed(tokens, masked=batch.text_mask) if hidden is None else hidden
        return self.stack(hidden, attention_mask=padding_mask(tokens, self.plan.marks.pad), context=latent)

    def logits(self, hidden: Tensor) -> Tensor:
        """[t, b, h] -> this rank's columns of the vocabulary, [t, b, V / tp]."""
        return self.output_layer(hidden, weight=self.shared_weight() if self.tied else None)[0]

    def loss(self, batch: MugBatch, hidden: Tensor, per_token: bool = False) -> tuple[Tensor, ...]:
        """Cross-entropy summed over the tokens to tell, and their number."""
        tokens = batch.tokens[:, 1:]
        if self.plan.masked_text:
            tokens = tokens.where(batch.text_mask, self.plan.marks.pad)
        return vocab_parallel_cross_entropy(
            self.logits(hidden), tokens.transpose(0, 1).contiguous(), vocab_size=self.plan.vocabulary,
            group=self.plan.tensor_group, ignore_index=self.plan.marks.pad, return_per_token=per_token,
        )

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.tied:
            second_copy(state, f"{prefix}output_layer.weight", f"{prefix}word_embeddings.weight")
        return state


def padding_mask(tokens: Tensor, pad: int) -> Tensor:
    """Token ids [b, t] -> bool [b, 1, 1, t], True for the keys that nothing attends to: padding. The first place stays
    open: a row may be padding altogether, and attention to nothing is no number."""
    hidden = tokens == pad
    hidden[:, 0] = False
    return hidden[:, None, None]


class Mug(Stage):
    """One pipeline stage of MUG."""

    def __init__(self, plan: MugPlan, stage: int = 0):
        super().__init__(plan, stage)
        parts = plan.parts(stage)
        self.encoder = Encoder(plan, parts["encoder"]) if "encoder" in parts else None
        self.image_decoder = ImageDecoder(plan, parts["image"]) if "image" in parts else None
        self.text_decoder = TextDecoder(plan, parts["text"]) if "text" in parts else None
        self.heads = [name for name, part in parts.items() if part.head and name != "encoder"]
        for name, parameter in self.named_parameters():
            parameter.no_weight_decay = parameter.dim() == 1 or name.endswith(("_token", "_tokens", "_positions"))

    def tied_weight(self) -> Tensor | None:
        apart = self.text_decoder is not None and self.text_decoder.apart
        return self.text_decoder.shared_weight() if apart else None

    def forward(self, batch: MugBatch) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor | int]]]:
        """Runs this stage: (packed tensors for the next stage or None, {"image" | "caption": (sum, count)})."""
        carry = self.incoming.unpack(self.received) if self.incoming else {}
        losses = {}
        if self.encoder is not None:
            carry = {"latent": self.encoder(batch, carry.get("latent"))}
        if self.image_decoder is not None:
            carry["image"] = self.image_decoder(batch, carry.get("latent"), carry.get("image"))
            if "image" in self.heads:
                losses["image"] = self.image_decoder.loss(batch, carry.pop("image"))
        if self.text_decoder is not None:
            carry["text"] = self.text_decoder(batch, carry.get("latent"), carry.get("text"))
            if "text" in self.heads:
                losses["caption"] = self.text_decoder.loss(batch, carry.pop("text"))
        if self.outgoing is None:
            return None, losses
        return self.outgoing.pack({name: carry[name] for name in self.outgoing.shapes}), losses

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state: dict = {}
        for name in ("encoder", "image_decoder", "text_decoder"):
            part = getattr(self, name)
            if part is not None:
                state.update(part.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return tensors_alone(state)

"""MUG's sizes: token counts, Megatron configurations of its three stacks, blocks with their FLOPs, pipeline stages."""

from __future__ import annotations

from functools import cached_property

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megamug.configuration.sections import Config
from megamug.data.text.marks import TRAINED_HERE, Marks
from megamug.models.blocks import specs
from megamug.models.blocks.positions import sincos_positions
from megamug.models.stages import Block, Boundary, Part, Plan
from megamug.telemetry.flops import layer_flops, linear_flops


class MugPlan(Plan):
    """Derived sizes of a MUG model under a layout."""

    final_norm = True  # behind the encoder's last layer
    frozen_encoder = False

    def __init__(self, config: Config, vocabulary: int, spec: str = "local", marks: Marks = TRAINED_HERE):
        """`marks`: ids that frame captions; the padding is an id of the vocabulary."""
        super().__init__(config, vocabulary)
        model, data = config.model, config.data
        self.model, self.spec, self.marks = model, spec, marks
        self.recompute, self.execution = config.parallel.recompute == "full", specs.execution(config)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision.dtype]
        self.patch_size, self.norm_pix = model.patch_size, model.norm_pix_loss
        self.mean, self.std = list(data.mean), list(data.std)
        self.grid = (data.image_size // model.patch_size,) * 2
        self.patches = self.grid[0] * self.grid[1]
        self.visible = int(self.patches * (1 - model.mask_ratio))  # as MAE rounds
        self.masked = self.patches - self.visible
        self.registers, self.decoder_registers = model.register_tokens, model.decoder_register_tokens
        self.caption_length, self.micro_batch = data.caption_length, data.micro_batch_size
        self.tie_vocabulary = model.tie_vocabulary
        self.unimodal_layers, self.multimodal_layers = model.text_unimodal_layers, model.text_multimodal_layers
        self.masked_text, self.text_mask_ratio = model.text_objective == "masked", model.text_mask_ratio
        self.paints, self.writes = model.image_loss_weight > 0, model.caption_loss_weight > 0
        self.loss_weights = {"image": model.image_loss_weight, "caption": model.caption_loss_weight}

    # ------------------------------------------------------------------------------------------ token counts

    @property
    def latent_tokens(self) -> int:
        return 1 + self.registers + self.visible

    @property
    def decoder_tokens(self) -> int:
        return 1 + self.decoder_registers + self.patches

    def positions(self) -> Tensor:
        """Of all patches, in the encoder: float32 [N, width]."""
        return sincos_positions(self.model.width, *self.grid, prefix=0)

    def gather(self, x: Tensor) -> Tensor:
        """The whole sequence on every tensor-parallel rank, for work that all of them do alike."""
        if not self.sequence_parallel:
            return x
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)

    # ------------------------------------------------------------------------------------------ configurations

    def _config(self, layers: int, width: int, heads: int, ffn_width: int, pipeline: int = 1) -> TransformerConfig:
        return specs.transformer_config(
            layers=layers, width=width, heads=heads, ffn_width=ffn_width, norm_eps=self.model.layer_norm_eps,
            dtype=self.dtype, tensor=self.tensor, sequence=self.sequence_parallel, recompute=self.recompute,
            pipeline=pipeline, **self.execution,
        )

    @cached_property
    def encoder_config(self) -> TransformerConfig:
        m = self.model
        return self._config(m.layers, m.width, m.heads, m.ffn_width)

    @cached_property
    def schedule_config(self) -> TransformerConfig:
        """The configuration that Megatron's schedules and gradient buffers read: the encoder's, with all stages."""
        m = self.model
        return self._config(m.layers, m.width, m.heads, m.ffn_width, self.pipeline)

    @cached_property
    def image_config(self) -> TransformerConfig:
        m = self.model
        return self._config(m.decoder_layers, m.decoder_width, m.decoder_heads, 4 * m.decoder_width)

    @cached_property
    def text_config(self) -> TransformerConfig:
        m = self.model
        return self._config(
            m.text_unimodal_layers + m.text_multimodal_layers, m.text_width, m.text_heads, 4 * m.text_width
        )

    @cached_property
    def norm(self) -> type:
        return specs.modules(self.spec).norm

    # ------------------------------------------------------------------------------------------ blocks and stages

    @cached_property
    def blocks(self) -> list[Block]:
        """The model in order, with the forward FLOPs of one image-caption pair."""
        m, values = self.model, 3 * self.patch_size**2
        blocks = [Block("encoder", "embedding", 0, linear_flops(self.visible, values, m.width))]
        flops = layer_flops(self.latent_tokens, m.width, m.ffn_width)
        blocks += [Block("encoder", "layer", i, flops) for i in range(m.layers)]
        if self.paints:
            blocks.append(Block("image", "embedding", 0, linear_flops(self.latent_tokens, m.width, m.decoder_width)))
            flops = layer_flops(self.decoder_tokens, m.decoder_width, 4 * m.decoder_width)
            blocks += [Block("image", "layer", i, flops) for i in range(m.decoder_layers)]
            blocks.append(Block("image", "head", 0, linear_flops(self.masked, m.decoder_width, values)))
        if self.writes:
            blocks.append(Block("text", "embedding", 0, 0.0))
            uni = layer_flops(self.caption_length, m.text_width, 4 * m.text_width)
            multi = layer_flops(
                self.caption_length, m.text_width, 4 * m.text_width,
                context_tokens=self.latent_tokens, context_width=m.width,
            )
            blocks += [Block("text", "layer", i, uni) for i in range(m.text_unimodal_layers)]
            blocks += [
                Block("text", "layer", m.text_unimodal_layers + i, multi) for i in range(m.text_multimodal_layers)
            ]
            head = linear_flops(self.caption_length, m.text_width, self.padded_vocabulary)
            blocks.append(Block("text", "head", 0, head))
        return blocks

    def parts(self, stage: int) -> dict[str, Part]:
        """What `stage` holds, by stack, in the order of execution."""
        found = {name: self.stack_part(stage, name) for name in ("encoder", "image", "text")}
        return {name: part for name, part in found.items() if part is not None}

    def boundary(self, stage: int) -> Boundary | None:
        """What arrives at `stage` from the one before (None at both ends of the pipeline)."""
        if not 0 < stage < len(self.stages):
            return None
        block = self.blocks[self.stages[stage][0]]
        share = self.tensor if self.sequence_parallel else 1
        latent = (self.latent_tokens // share, self.micro_batch, self.model.width)
        shapes: dict[str, tuple[int, ...]] = {}
        # The latent (or the encoder's hidden state on its way) rides along to whoever still needs it.
        needs_latent = block.part == "encoder" or block.name == "embedding" or (
            self.writes and not (block.part == "text" and block.name == "head")
        )
        if needs_latent:
            shapes["latent"] = latent
        if block.part == "image" and block.name != "embedding":
            shapes["image"] = (self.decoder_tokens // share, self.micro_batch, self.model.decoder_width)
        if block.part == "text" and block.name != "embedding":
            shapes["text"] = (self.caption_length // share, self.micro_batch, self.model.text_width)
        return Boundary(shapes)

    @property
    def vocabulary_stages(self) -> list[int]:
        """Stages that hold a copy of the tied vocabulary weight: one, or two where the text decoder is cut."""
        if not (self.writes and self.tie_vocabulary):
            return [0]
        ends = [i for i, block in enumerate(self.blocks) if block.part == "text" and block.name != "layer"]
        return sorted({stage for stage, run in enumerate(self.stages) for i in ends if i in run})

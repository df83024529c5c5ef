"""MUG's sizes: token counts, Megatron configurations of its three stacks, blocks with their FLOPs, pipeline stages.

Everything here follows from the configuration and the layout; nothing is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megamug.config import Config
from megamug.models import specs
from megamug.models.stages import Block, Boundary, cut
from megamug.telemetry.flops import layer_flops, linear_flops

VOCABULARY_MULTIPLE = 128  # the padded vocabulary must not depend on the layout


@dataclass(frozen=True)
class Part:
    """What a stage holds of one stack: its embedding?, layers [first, last), its head?"""

    embedding: bool
    first: int
    last: int
    head: bool


class MugPlan:
    """Derived sizes of a MUG model under a layout. `config` is resolved: every size is set."""

    def __init__(self, config: Config, vocabulary: int, spec: str = "local"):
        model, data, parallel = config.model, config.data, config.parallel
        self.model, self.spec = model, spec
        self.vocabulary = vocabulary
        self.padded_vocabulary = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        self.tensor, self.pipeline, self.sequence_parallel = parallel.tensor, parallel.pipeline, parallel.sequence
        self.virtual = parallel.virtual
        self.tensor_rank, self.tensor_group = 0, None
        self.recompute, self.fp8 = parallel.recompute == "full", config.precision.fp8
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
        self.paints, self.writes = model.image_loss_weight > 0, model.caption_loss_weight > 0
        self.loss_weights = {"image": model.image_loss_weight, "caption": model.caption_loss_weight}

    def place_tensor(self, rank: int, group) -> None:
        """This process's rank in the tensor-parallel group (None: alone)."""
        self.tensor_rank, self.tensor_group = rank, group

    # ------------------------------------------------------------------------------------------ token counts

    @property
    def latent_tokens(self) -> int:
        return 1 + self.registers + self.visible

    @property
    def decoder_tokens(self) -> int:
        return 1 + self.decoder_registers + self.patches

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
            pipeline=pipeline, fp8=self.fp8,
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

    @property
    def forward_flops(self) -> float:
        """Forward FLOPs of one image-caption pair (matrix products)."""
        return sum(block.flops for block in self.blocks)

    @cached_property
    def stages(self) -> list[range]:
        """Blocks of each pipeline stage, virtual ones counted: rank r of P holds the stages r, P + r, 2 P + r, ..."""
        return cut(self.blocks, self.pipeline * self.virtual)

    def parts(self, stage: int) -> dict[str, Part]:
        """What `stage` holds, by stack, in the order of execution."""
        parts: dict[str, Part] = {}
        for name in ("encoder", "image", "text"):
            own = [self.blocks[i] for i in self.stages[stage] if self.blocks[i].part == name]
            if not own:
                continue
            layers = [block.index for block in own if block.name == "layer"]
            kinds = {block.name for block in own}
            # A stage may hold an embedding or a head alone: then its run of layers is empty.
            total = sum(block.part == name and block.name == "layer" for block in self.blocks)
            empty = total if "head" in kinds else 0
            first, last = (layers[0], layers[-1] + 1) if layers else (empty, empty)
            parts[name] = Part("embedding" in kinds, first, last, "head" in kinds)
        return parts

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

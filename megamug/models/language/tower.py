"""A decoder-only tower: its sizes under a layout, its input embedding, and what its layers need beside hidden states.

Two families out of one table of parts: CM3leon's block (arXiv 2309.02591: LayerNorm, no biases, learned positions) and
LLaMA's (arXiv 2302.13971: RMSNorm, SwiGLU, rotary positions, grouped queries). `DecoderLM` is one tower, `JamCross`
two.

Axes: b rows, s tokens, h width, d head width, V padded vocabulary. Hidden states are [s, b, h]; under sequence
parallelism each tensor-parallel rank holds s / tp of them.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megamug.configuration.sections import Config, TowerConfig
from megamug.configuration.shapes import GRID_PREFIX
from megamug.models.blocks import specs
from megamug.models.blocks.elementwise import rotation_table
from megamug.models.blocks.layers import LayerRun
from megamug.telemetry.flops import layer_flops, linear_flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "swiglu": F.silu}


class TowerPlan:
    """Derived sizes of a tower under a layout. `tower` and `config` are resolved; nothing is allocated."""

    def __init__(self, tower: TowerConfig, config: Config, padded_vocabulary: int, spec: str = "local"):
        self.tower, self.spec, self.padded_vocabulary = tower, spec, padded_vocabulary
        self.tensor, self.sequence_parallel = config.parallel.tensor, config.parallel.sequence
        self.recompute, self.execution = config.parallel.recompute == "full", specs.execution(config)
        self.dtype = DTYPES[config.precision.dtype]
        self.context_length, self.micro_batch = config.data.context_length, config.data.micro_batch_size
        self.learned, self.plain_norm = tower.positions == "learned", tower.norm == "layernorm_plain"
        self.tensor_rank, self.tensor_group = 0, None
        self._rotary_table: Tensor | None = None

    def place_tensor(self, rank: int, group) -> None:
        """This process's rank in the tensor-parallel group (None: alone)."""
        self.tensor_rank, self.tensor_group = rank, group

    @property
    def hidden_shape(self) -> tuple[int, int, int]:
        """This rank's hidden states of a micro-batch, [s (/ tp), b, h]."""
        share = self.tensor if self.sequence_parallel else 1
        return self.context_length // share, self.micro_batch, self.tower.width

    # ------------------------------------------------------------------------------------------ Megatron's parts

    def transformer_config(self, pipeline: int = 1) -> TransformerConfig:
        """Megatron's configuration of this tower; `pipeline` is for the one that the schedules read."""
        t = self.tower
        return specs.transformer_config(
            layers=t.layers, width=t.width, heads=t.heads, ffn_width=t.ffn_width, norm_eps=t.norm_eps, dtype=self.dtype,
            tensor=self.tensor, sequence=self.sequence_parallel, recompute=self.recompute, pipeline=pipeline,
            **self.execution, num_query_groups=t.query_groups, qk_layernorm=t.qk_norm and not t.qk_norm_per_head,
            normalization="RMSNorm" if t.norm == "rmsnorm" else "LayerNorm", add_bias_linear=t.bias,
            activation_func=ACTIVATIONS[t.activation], gated_linear_unit=t.activation == "swiglu",
            # Megatron's name for "the layer's spec says which": here it is `elementwise.SwiGLU`.
            use_te_activation_func=t.activation == "swiglu",
        )  # fmt: skip

    @cached_property
    def config(self) -> TransformerConfig:
        return self.transformer_config()

    @property
    def norm(self) -> type:
        return specs.modules(self.spec, self.plain_norm).norm

    @property
    def layer(self) -> ModuleSpec:
        return specs.transformer_layer(
            self.spec, self.config, causal=True, plain_norm=self.plain_norm, per_head_norm=self.tower.qk_norm_per_head,
            res_post_norm=self.tower.res_post_norm,
        )  # fmt: skip

    def layers(self, first: int, last: int, final_norm: bool = True) -> LayerRun:
        """Layers [first, last) of the tower, with its final norm where they are its last ones."""
        return LayerRun(self.config, [self.layer] * self.tower.layers, self.norm, first, last, final_norm)

    # ------------------------------------------------------------------------------------------ FLOPs

    @property
    def layer_flops(self) -> int:
        """Forward FLOPs of one layer for one row."""
        t = self.tower
        return layer_flops(
            self.context_length, t.width, t.ffn_width, gated=t.activation == "swiglu",
            key_value_width=t.width // t.heads * t.query_groups,
        )  # fmt: skip

    @property
    def head_flops(self) -> int:
        """Forward FLOPs of a vocabulary projection for one row."""
        return linear_flops(self.context_length, self.tower.width, self.padded_vocabulary)

    # ------------------------------------------------------------------------------------------ what layers need

    def layer_inputs(self, tokens: Tensor, apart: Tensor | None = None, first: int = 0) -> dict[str, Tensor | None]:
        """Keyword arguments of a run of layers for `tokens` [b, s] at positions first, first + 1, ...; `apart` keeps
        documents apart, as `documents.for_attention` gives it.

        Rotary positions run on through a row: attention sees their differences alone, so documents need no restart.
        """
        rotary = None if self.learned else self.rotary(first, first + tokens.shape[1], tokens.device)
        return {"attention_mask": apart, "rotary_pos_emb": rotary}

    def rotary(self, first: int, last: int, device: torch.device) -> Tensor:
        """What `elementwise.rotate` turns the heads of positions [first, last) by: [last - first, 1, 1, d].

        A row has the cosines, then the sines of the planes of a head at one position; computed once and kept, for twice
        the positions asked for where it has to grow. Layers know nothing of how positions become angles: another
        arrangement, as the rows and columns of a grid, is another `angles`. Before a grid the table is zero: so are
        queries and keys there, as in LlamaGen's GPT (arXiv 2406.06525, as published).
        """
        table = self._rotary_table
        if table is None or table.device != device or len(table) < last:
            # Kept beyond inference_mode(), whose tensors no later backward may use.
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(max(self.context_length, 2 * last), device=device)
                table = rotation_table(self.angles(positions), self.dtype)
                if self.tower.positions == "rotary_grid":
                    table[:GRID_PREFIX] = 0
                self._rotary_table = table
        return table[first:last]

    def angles(self, positions: Tensor) -> Tensor:
        """Angles in radians, float32, of each plane of a head: positions int64 [s] -> [s, d/2].

        As Su et al. (arXiv 2104.09864): the plane i of a head turns by position / rotary_base^(2i/d). In a grid the
        first half of the planes does so by the row, the second by the column, each with d/2 for d (LlamaGen).
        """
        head, places = self.tower.width // self.tower.heads, [positions]
        if self.tower.positions == "rotary_grid":
            cells = (positions - GRID_PREFIX).clamp(min=0)
            head, places = head // 2, [cells // self.tower.grid, cells % self.tower.grid]
        exponents = torch.arange(0, head, 2, dtype=torch.float32, device=positions.device) / head
        if self.tower.rotary_scaling:
            frequencies = scaled_frequencies(1 / self.tower.rotary_base**exponents, *self.tower.rotary_scaling)
            return positions.float().unsqueeze(-1) * frequencies
        return torch.cat([p.float().unsqueeze(-1) / self.tower.rotary_base**exponents for p in places], dim=-1)


def scaled_frequencies(frequencies: Tensor, factor: float, low: float, high: float, positions: float) -> Tensor:
    """Rotary frequencies [d/2], radians a position, for contexts beyond the `positions` that a model began with, as
    LLaMA 3.1 (arXiv 2407.21783, and its published code) has them: waves shorter than positions / high stay, those
    longer than positions / low are `factor` times slower, between them both are mixed."""
    turns = positions * frequencies / (2 * math.pi)
    mix = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - mix) * frequencies / factor + mix * frequencies


class TowerEmbedding(MegatronModule):
    """Token embedding, its vocabulary split over the tensor-parallel ranks, plus learned positions where there are.

    `own_words=False`: only positions; another tower's table embeds the tokens.
    """

    def __init__(self, plan: TowerPlan, own_words: bool = True):
        config = plan.config
        super().__init__(config=config)
        self.plan = plan
        if own_words:
            self.word_embeddings = VocabParallelEmbedding(
                plan.padded_vocabulary, config.hidden_size, init_method=specs.leave_uninitialised, config=config,
                reduce_scatter_embeddings=plan.sequence_parallel,
            )  # fmt: skip
        if plan.learned:
            table = torch.empty(plan.tower.max_positions, config.hidden_size, dtype=config.params_dtype)
            self.positions = torch.nn.Parameter(table)
            self.positions.sequence_parallel = plan.sequence_parallel

    def words(self, tokens: Tensor) -> Tensor:
        """[b, s] -> [s (/ tp), b, h], without positions."""
        embedded = self.word_embeddings(tokens)
        return embedded if self.plan.sequence_parallel else embedded.transpose(0, 1).contiguous()

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, first: int = 0, words: Tensor | None = None
    ) -> Tensor:
        """Token ids [b, s] at `positions` [b, s] (None: first, first + 1, ...) -> [s (/ tp), b, h].

        `words`: what `words` of another table gave for these tokens.
        """
        embedded = self.words(tokens) if words is None else words
        if not self.plan.learned:
            return embedded
        if positions is None:
            found = self.positions[first : first + tokens.shape[1]].unsqueeze(1)  # [s, 1, h]
            if self.plan.sequence_parallel:
                found = found.chunk(self.plan.tensor)[self.plan.tensor_rank]
        else:
            positions = positions.transpose(0, 1)
            if self.plan.sequence_parallel:
                positions = positions.chunk(self.plan.tensor)[self.plan.tensor_rank]
            found = F.embedding(positions, self.positions)
        return embedded + found

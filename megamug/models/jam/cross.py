"""JamCross: two language models that read each other (JAM: *Jointly Training Large Autoregressive Multimodal Models*,
arXiv 2309.15564, section 3.3), here of any two sizes and families.

Both towers read the same tokens. Every few layers a cross block lets each look at the other's states at the same
relative depth, both directions computed from the states before it. A linear over both final states leads to one output
over the vocabulary. Gates start at zero (as in Flamingo, arXiv 2204.14198): the towers then compute what the parents
did. Cross-attention adds no positions: the states it compares carry their own.

Axes: b rows, s tokens, h width of the tower that reads, h' of the one that is read, n heads, d head width, V padded
vocabulary. Hidden states are [s, b, h]; under sequence parallelism each tensor-parallel rank holds s / tp of them.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megamug.configuration.shapes import TOWERS
from megamug.models.attention import documents
from megamug.models.blocks import functional, specs
from megamug.models.blocks.layers import LocalColumnParallelLinear, context_linear, recomputed, replicated
from megamug.models.jam.plan import JamPart, JamPlan
from megamug.models.language.losses import language_losses
from megamug.models.language.tower import TowerEmbedding, TowerPlan
from megamug.models.stages import Stage, tensors_alone

States = dict[str, Tensor]  # of the text and of the image tower


def _norm(kind: type, config: TransformerConfig, width: int) -> nn.Module:
    return kind(config=config, hidden_size=width, eps=config.layernorm_epsilon)


class Gate(MegatronModule):
    """What a cross block adds: hidden + tanh(gate) * update, or hidden + update where there are no gates."""

    def __init__(self, plan: TowerPlan, gated: bool):
        super().__init__(config=plan.config)
        if gated:
            self.gate = nn.Parameter(torch.zeros(1, dtype=plan.dtype))
            self.gate.sequence_parallel = plan.sequence_parallel  # each rank has the gradient of its part of the tokens

    def add(self, hidden: Tensor, update: Tensor, bias: Tensor | None) -> Tensor:
        update = update if bias is None else update + bias
        return hidden + (torch.tanh(self.gate) * update if hasattr(self, "gate") else update)


class Reading(Gate):
    """hidden + tanh(gate) * CrossAttention(norm(hidden), norm(context)): a token reads the other tower's states up to
    its own place. Heads, head width, norm and biases are those of the tower that reads; keys have a head each."""

    def __init__(self, plan: TowerPlan, context_width: int, gated: bool):
        super().__init__(plan, gated)
        self.local = plan.spec == "local"
        m = specs.modules(plan.spec, plan.plain_norm)
        config = copy.copy(plan.config)
        config.num_query_groups, config.qk_layernorm = config.num_attention_heads, False
        config.tp_comm_overlap = False  # Transformer Engine has no buffers for the linears of cross-attention
        self.norm = _norm(m.norm, config, config.hidden_size)
        self.context_norm = _norm(m.norm, config, context_width)
        self.attention = CrossAttention(
            config,
            CrossAttentionSubmodules(
                linear_q=m.column_linear, linear_kv=context_linear(m.column_linear, context_width),
                core_attention=m.attention, linear_proj=m.row_linear,
            ),
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
        )  # fmt: skip

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """hidden [s, b, h], context [s, b, h'], mask as of `documents.for_attention` -> [s, b, h]."""
        hidden_normed, context = self.norm(hidden), self.context_norm(context)
        if self.local:
            return self.add(hidden, functional.cross_attention(self.attention, hidden_normed, mask, context), None)
        return self.add(hidden, *self.attention(hidden_normed, mask, key_value_states=context))


class FeedForward(Gate):
    """hidden + tanh(gate) * MLP(norm(hidden)), of the tower's own feed-forward width and activation."""

    def __init__(self, plan: TowerPlan, gated: bool):
        super().__init__(plan, gated)
        self.local = plan.spec == "local"
        m, config = specs.modules(plan.spec, plan.plain_norm), plan.config
        self.norm = _norm(m.norm, config, config.hidden_size)
        linears = specs.feed_forward(config, m.column_linear, m.row_linear)
        self.mlp = MLP(config, linears, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.local:
            return self.add(hidden, functional.feed_forward(self.mlp, self.norm(hidden)), None)
        return self.add(hidden, *self.mlp(self.norm(hidden)))


class CrossHalf(MegatronModule):
    """One direction of a cross block: what changes one tower."""

    def __init__(self, plan: TowerPlan, other: TowerPlan, gated: bool, ffn: bool):
        super().__init__(config=plan.config)
        self.reading = Reading(plan, other.tower.width, gated)
        self.ffn = FeedForward(plan, gated) if ffn else None

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self.reading(hidden, context, mask)
        return hidden if self.ffn is None else self.ffn(hidden)


def cross_half(half: CrossHalf, hidden: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    """One direction of a cross block as a function of its module."""
    return half(hidden, context, mask)


class CrossBlock(MegatronModule):
    """Both towers read each other as they were before the block."""

    def __init__(self, plan: JamPlan):
        super().__init__(config=plan.text.config)
        fusion = plan.fusion
        with get_fp8_context(plan.text.config, is_init=True):  # weights in FP8 where the layers' are
            self.text = CrossHalf(plan.text, plan.image, fusion.gate, fusion.cross_ffn)
            self.image = CrossHalf(plan.image, plan.text, fusion.gate, fusion.cross_ffn)
        self.local = plan.text.spec == "local"
        self.layer_function = cross_half  # `compiled` replaces it

    def forward(self, text: Tensor, image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        training = self.training and torch.is_grad_enabled()
        again = training and self.config.recompute_granularity == "full"
        if self.local:
            function = self.layer_function if training else cross_half
            run = partial(recomputed, function) if again else function
            return run(self.text, text, image, mask), run(self.image, image, text, mask)
        if not again:
            return self._forward(text, image, mask)
        if self.config.fp8:
            from megatron.core.extensions.transformer_engine import te_checkpoint

            tracker, group = tensor_parallel.random.get_cuda_rng_tracker, self.text.reading.attention.tp_group
            return te_checkpoint(self._forward, False, tracker, group, text, image, mask)
        return tensor_parallel.checkpoint(self._forward, False, text, image, mask)

    def _forward(self, text: Tensor, image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        with get_fp8_context(self.config):
            return self.text(text, image, mask), self.image(image, text, mask)


class Tower(MegatronModule):
    """One tower's share of a stage: embedding, runs of layers between cross blocks, final norm."""

    def __init__(self, name: str, plan: TowerPlan, part: JamPart, own_words: bool):
        super().__init__(config=plan.config)
        self.name, self.plan = name, plan
        self.embedding = TowerEmbedding(plan, own_words) if part.embedding else None
        spans = [getattr(segment, name) for segment in part.segments]
        self.runs = nn.ModuleList(plan.layers(first, last, final_norm=False) for first, last in spans)
        self.final_layernorm = None
        if part.head:
            self.final_layernorm = _norm(plan.norm, plan.config, plan.tower.width)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The names do not tell how the layers are divided into runs."""
        from megatron.core.transformer.utils import sharded_state_dict_default

        state: dict = {}
        if self.embedding is not None:
            state.update(self.embedding.sharded_state_dict(f"{prefix}embedding.", (), metadata))
        for number, run in enumerate(self.runs):
            shards = run.sharded_state_dict(f"{prefix}stack.", (), metadata)
            # Keys of the dictionary, unlike global names, count each run's layers from 0.
            state.update({f"{number}.{name}": shard for name, shard in shards.items()})
        if self.final_layernorm is not None:
            name = f"{prefix}stack.final_layernorm."
            group = tensor_parallel.layers.get_tensor_model_parallel_group_if_none(None)
            state.update(sharded_state_dict_default(self.final_layernorm, name, (), metadata, tp_group=group))
        return state


class JamCross(Stage):
    """One pipeline stage of JamCross. The output has a vocabulary matrix of its own, so none is tied."""

    def __init__(self, plan: JamPlan, stage: int = 0):
        super().__init__(plan, stage)
        self.part = plan.part(stage)
        part, self.segments = self.part, self.part.segments
        self.text_tower = Tower("text", plan.text, part, own_words=True)
        self.image_tower = Tower("image", plan.image, part, own_words=not plan.shared_embedding)
        numbers = [segment.cross for segment in self.segments if segment.cross is not None]
        self.cross = nn.ModuleDict({str(number): CrossBlock(plan) for number in numbers})
        if part.head:
            # Held whole by each rank: split, its output would have to be gathered for the vocabulary's rows. Under
            # sequence parallelism each rank has its part of the tokens, so nothing is computed twice.
            widths = plan.text.tower.width + plan.image.tower.width
            self.mix = replicated(
                nn.Linear(widths, plan.output_width, bias=False, dtype=plan.dtype), plan.sequence_parallel
            )
            self.output_layer = LocalColumnParallelLinear(
                plan.output_width, plan.padded_vocabulary, config=plan.text.config, bias=False, gather_output=False,
                init_method=specs.leave_uninitialised,
            )  # fmt: skip
        for name, parameter in self.named_parameters():
            parameter.no_weight_decay = parameter.dim() == 1 or "norm" in name or name.endswith(".positions")
            parameter.requires_grad_(not plan.frozen(name))

    # ------------------------------------------------------------------------------------------ phases

    def embed(self, tokens: Tensor, positions: Tensor | None = None, first: int = 0) -> States:
        """Token ids [b, s] at `positions` [b, s] (None: first, first + 1, ...) -> both towers' [s (/ tp), b, h]."""
        text, image = self.text_tower.embedding, self.image_tower.embedding
        words = text.words(tokens)
        states = {
            "text": text(tokens, positions, first, words),
            "image": image(tokens, positions, first, words if self.plan.shared_embedding else None),
        }
        if torch.is_grad_enabled():
            # Frozen towers give states without a graph; recomputation and the pipeline pass gradients only through
            # tensors that have one, so the trained cross blocks behind would get none.
            states = {name: x if x.requires_grad else x.detach().requires_grad_() for name, x in states.items()}
        return states

    def run(
        self, states: States, tokens: Tensor, segments: Tensor | None = None, first: int = 0,
        most_documents: int | None = None,
    ) -> States:  # fmt: skip
        """This stage's layers and cross blocks on both towers' states of `tokens` [b, s], at places `first`, ...

        Inside `layers.key_value_cache` the tokens are those that follow the ones before. `segments` and
        `most_documents` as in a `TokenBatch`.
        """
        towers = {"text": self.text_tower, "image": self.image_tower}
        apart = documents.for_attention(segments, most_documents)
        inputs = {name: tower.plan.layer_inputs(tokens, apart, first) for name, tower in towers.items()}
        for number, segment in enumerate(self.segments):
            states = {name: towers[name].runs[number](states[name], **inputs[name]) for name in TOWERS}
            if segment.cross is not None:
                block = self.cross[str(segment.cross)]
                text, image = block(states["text"], states["image"], apart)
                states = {"text": text, "image": image}
        return states

    def normed(self, states: States) -> States:
        """The towers' final states, as their parents' outputs would read them."""
        return {"text": self.text_tower.final_layernorm(states["text"]),
                "image": self.image_tower.final_layernorm(states["image"])}  # fmt: skip

    def mixed(self, states: States) -> Tensor:
        """Final norms and the linear over both states -> [s (/ tp), b, output width]."""
        return self.mix(torch.cat([*self.normed(states).values()], dim=-1))

    def logits(self, states: States) -> Tensor:
        """The towers' last states -> this rank's columns of the vocabulary, [s, b, V / tp]."""
        return self.output_layer(self.mixed(states))[0]

    def losses(self, states: States, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """{"lm": cross-entropy, "z": squared log-sum-exp where it has a weight}, each (sum, count); labels [b, s]."""
        return language_losses(self.mixed(states), self.output_layer, self.output_layer.weight, labels, self.plan)

    # ------------------------------------------------------------------------------------------ a stage at work

    def forward(self, batch) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor]]]:
        """Runs this stage on a TokenBatch: (packed states for the next stage or None, {"lm" | "z": (sum, count)})."""
        states = self.incoming.unpack(self.received) if self.incoming else self.embed(batch.tokens, batch.positions)
        most = None if batch.segments is None else batch.most_documents
        states = self.run(states, batch.tokens, batch.segments, most_documents=most)
        if self.outgoing is None:
            return None, self.losses(states, batch.labels)
        return self.outgoing.pack(states), {}

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        from megatron.core.transformer.utils import sharded_state_dict_default

        modules = {"text_tower": self.text_tower, "image_tower": self.image_tower}
        modules |= {f"cross.{number}": block for number, block in self.cross.items()}
        if self.part.head:
            modules |= {"mix": self.mix, "output_layer": self.output_layer}
        group, state = tensor_parallel.layers.get_tensor_model_parallel_group_if_none(None), {}
        for name, module in modules.items():
            state.update(sharded_state_dict_default(module, f"{prefix}{name}.", (), metadata, tp_group=group))
        return tensors_alone(state)

"""DecoderLM: a decoder-only language model over text pieces and image codes, CM3leon's or LLaMA's by its options
(see `tower.py`).

Axes: b rows, s tokens, h width, V padded vocabulary. Hidden states are [s, b, h] as Megatron wants them; a pipeline
stage holds a contiguous run of the model's blocks (`stages.py`).
"""

from __future__ import annotations

from torch import Tensor

from megamug.models.attention import documents
from megamug.models.blocks import specs
from megamug.models.blocks.layers import LocalColumnParallelLinear
from megamug.models.language.losses import language_losses
from megamug.models.language.plan import LmPlan
from megamug.models.language.tower import TowerEmbedding
from megamug.models.stages import Stage, second_copy, tensors_alone


class DecoderLM(Stage):
    """One pipeline stage of a language model.

    Batches have `tokens` and `labels` [b, s] int64, `segments` [b, s] int32 (documents that may not read each other)
    with their `most_documents`, or None, `positions` [b, s] or None; see `TokenBatch`. `labels[t]` is the token to
    predict at t; `IGNORE` carries no loss.
    """

    def __init__(self, plan: LmPlan, stage: int = 0):
        super().__init__(plan, stage)
        self.tied, tower, part = plan.tie_vocabulary, plan.tower, plan.part(stage)
        self.embedding = TowerEmbedding(tower) if part.embedding else None
        self.stack = tower.layers(part.first, part.last)
        self.output_layer = None
        if part.head:
            self.output_layer = LocalColumnParallelLinear(
                tower.tower.width, plan.padded_vocabulary, config=tower.config, bias=False, gather_output=False,
                init_method=specs.leave_uninitialised, skip_weight_param_allocation=self.tied and part.embedding,
            )  # fmt: skip
        # A tied weight whose two ends lie in different stages exists twice; their gradients are summed over both.
        self.apart = self.tied and part.embedding != part.head
        if self.apart:
            self.vocabulary_weight().shared_embedding = True
            self.vocabulary_weight().shared = not part.embedding  # counted once in the gradient norm
        for name, parameter in self.named_parameters():
            parameter.no_weight_decay = parameter.dim() == 1 or "norm" in name or name == "embedding.positions"

    def vocabulary_weight(self) -> Tensor:
        """The output matrix [V / tp, h] in the stage of the head; in that of the embedding alone, its tied copy."""
        own = self.output_layer is not None and (self.apart or not self.tied)
        return self.output_layer.weight if own else self.embedding.word_embeddings.weight

    def tied_weight(self) -> Tensor | None:
        return self.vocabulary_weight() if self.apart else None

    # ------------------------------------------------------------------------------------------ phases

    def embed(self, tokens: Tensor, positions: Tensor | None = None, first: int = 0) -> Tensor:
        """Token ids [b, s] at `positions` [b, s] (None: first, first + 1, ...) -> [s, b, h], this rank's part."""
        return self.embedding(tokens, positions, first)

    def run(
        self, hidden: Tensor, tokens: Tensor, segments: Tensor | None = None, first: int = 0,
        most_documents: int | None = None,
    ) -> Tensor:  # fmt: skip
        """This stage's layers (and the final norm, behind the last one) on `hidden` of `tokens`: [s, b, h]."""
        apart = documents.for_attention(segments, most_documents)
        return self.stack(hidden, **self.plan.tower.layer_inputs(tokens, apart, first))

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states [s, b, h] -> this rank's columns of the vocabulary, [s, b, V / tp]."""
        return self.output_layer(hidden, weight=self.vocabulary_weight())[0]

    def losses(self, hidden: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """{"lm": cross-entropy, "z": squared log-sum-exp where it has a weight}, each (sum, count) over the tokens."""
        return language_losses(hidden, self.output_layer, self.vocabulary_weight(), labels, self.plan)

    def forward(self, batch) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor]]]:
        """Runs this stage: (packed tensors for the next stage or None, {"lm" | "z": (sum, count)})."""
        if self.embedding is not None:
            hidden = self.embed(batch.tokens, batch.positions)
        else:
            hidden = self.incoming.unpack(self.received)["hidden"]
        most = None if batch.segments is None else batch.most_documents
        hidden = self.run(hidden, batch.tokens, batch.segments, most_documents=most)
        if self.output_layer is None:
            return self.outgoing.pack({"hidden": hidden}), {}
        return None, self.losses(hidden, batch.labels)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.tied:
            second_copy(state, f"{prefix}output_layer.weight", f"{prefix}embedding.word_embeddings.weight")
        return tensors_alone(state)

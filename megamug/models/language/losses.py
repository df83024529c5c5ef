"""The losses of a language model, of its last states: shared by DecoderLM and JamCross."""

from __future__ import annotations

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megamug.data.documents.loader import IGNORE
from megamug.losses import linear_cross_entropy, vocab_parallel_cross_entropy
from megamug.models.stages import Plan


def language_losses(
    hidden: Tensor, output_layer: ColumnParallelLinear, weight: Tensor, labels: Tensor, plan: Plan
) -> dict[str, tuple[Tensor, Tensor]]:
    """{"lm": cross-entropy, "z": squared log-sum-exp where it has a weight}, each (sum, count) over the tokens.

    Args:
        hidden: normed states [s (/ tp), b, h].
        weight: the output matrix, this rank's rows [V / tp, h], by which `output_layer` makes logits of the states.
        labels: [b, s] int64, the token to predict at each place; `IGNORE` carries no loss.
    """
    targets = labels.transpose(0, 1).contiguous()
    shared = {"vocab_size": plan.vocabulary, "group": plan.tensor_group, "ignore_index": IGNORE}
    if "z" not in plan.loss_weights:
        loss = linear_cross_entropy(hidden, weight, targets, sequence_parallel=plan.sequence_parallel, **shared)
        return {"lm": loss}
    logits, _ = output_layer(hidden, weight=weight)
    # Two losses of the same logits, so neither may write its gradient over them.
    plain, count = vocab_parallel_cross_entropy(logits, targets, inplace_backward=False, **shared)
    both, _ = vocab_parallel_cross_entropy(logits, targets, inplace_backward=False, z_loss=1.0, **shared)
    return {"lm": (plain, count), "z": (both - plain, count)}

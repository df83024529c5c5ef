"""How many parameters a model has and what they weigh on one process, counted from its plan: nothing is built."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Count:
    """Parameters of a piece of a model: tensor-parallel ranks share `split`, each of them holds all of `whole`."""

    split: int = 0
    whole: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.split + other.split, self.whole + other.whole)

    def __mul__(self, times: int) -> Count:
        return Count(self.split * times, self.whole * times)

    @property
    def total(self) -> int:
        return self.split + self.whole

    def on_rank(self, tensor: int) -> int:
        """Parameters that one of `tensor` ranks holds."""
        return self.split // tensor + self.whole


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one process that live as long as the run. Activations, buffers of collectives, the allocator's waste and
    the padding of Megatron's buffers (at most 64 elements a parameter) are not in here."""

    weights: int
    gradients: int
    main_parameters: int
    moments: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.main_parameters + self.moments


def state_memory(parameters: int, trained: int, dtype: str, replicas: int, distributed_optimizer: bool) -> StateMemory:
    """What `parameters` on a process, `trained` of them, need: gradients are summed in fp32; AdamW has two fp32
    moments; bf16 weights have fp32 main parameters, fp32 weights are their own. `distributed_optimizer` shares main
    parameters and moments out among `replicas` data-parallel ranks; the fullest rank is told."""
    held = -(-trained // replicas) if distributed_optimizer else trained
    return StateMemory(
        weights=BYTES[dtype] * parameters,
        gradients=4 * trained,
        main_parameters=4 * held if dtype == "bf16" else 0,
        moments=8 * held,
    )


def linear(inputs: int, outputs: int, bias: bool = True) -> Count:
    """A linear that every rank holds whole."""
    return Count(0, inputs * outputs + outputs * bias)


def column_linear(inputs: int, outputs: int, bias: bool = True) -> Count:
    """A linear whose outputs are split: its bias, too."""
    return Count(inputs * outputs + outputs * bias)


def row_linear(inputs: int, outputs: int, bias: bool = True) -> Count:
    """A linear whose inputs are split: its bias is added after the sum, by all."""
    return Count(inputs * outputs, outputs * bias)


def norm(width: int) -> Count:
    """LayerNorm with scale and shift."""
    return Count(0, 2 * width)


def layer(width: int, ffn_width: int, context_width: int | None = None) -> Count:
    """A pre-norm transformer layer with biases; with cross-attention to a context of `context_width`, if given."""
    own = norm(width) + column_linear(width, 3 * width) + row_linear(width, width)
    mlp = norm(width) + column_linear(width, ffn_width) + row_linear(ffn_width, width)
    if context_width is None:
        return own + mlp
    cross = norm(width) + column_linear(width, width) + column_linear(context_width, 2 * width)
    return own + cross + row_linear(width, width) + mlp


def mug_stage(plan, stage: int) -> Count:
    """One pipeline stage of MUG (`megamug.models.mug_plan.MugPlan`), a second copy of the vocabulary included."""
    model, values, count = plan.model, 3 * plan.patch_size**2, Count()
    for name, part in plan.parts(stage).items():
        width, ffn_width, layers = {
            "encoder": (model.width, model.ffn_width, model.layers),
            "image": (model.decoder_width, 4 * model.decoder_width, model.decoder_layers),
            "text": (model.text_width, 4 * model.text_width, plan.unimodal_layers + plan.multimodal_layers),
        }[name]
        vocabulary = Count(plan.padded_vocabulary * width)
        if part.embedding:
            count += {
                "encoder": linear(values, width) + Count(0, (1 + plan.registers) * width),
                "image": linear(model.width, width) + Count(0, (1 + plan.decoder_registers) * width),
                "text": vocabulary + Count(0, plan.caption_length * width),
            }[name]
        # The text decoder's last layers attend to the latent.
        multimodal = max(0, part.last - max(part.first, plan.unimodal_layers)) if name == "text" else 0
        count += layer(width, ffn_width) * (part.last - part.first - multimodal)
        count += layer(width, ffn_width, context_width=model.width) * multimodal
        if part.first < part.last == layers:
            count += norm(width)
        if part.head and name == "image":
            count += linear(width, values)
        if part.head and name == "text" and not (plan.tie_vocabulary and part.embedding):
            count += vocabulary
    return count


def mug_total(plan) -> int:
    """Parameters of the whole model, each counted once."""
    total = sum(mug_stage(plan, stage).total for stage in range(len(plan.stages)))
    copies = len(plan.vocabulary_stages) - 1
    return total - copies * plan.padded_vocabulary * plan.model.text_width

"""A model as an ordered list of blocks, and the list cut into pipeline stages.

A stage is a contiguous run of blocks. The cut minimises the FLOPs of the heaviest stage, so a 12-layer encoder and an
8-layer decoder of another width are balanced by their work, not by their layer counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megamug.configuration.sections import Config
from megamug.data.padding import padded_vocabulary
from megamug.models.partition import cut


@dataclass(frozen=True)
class Block:
    """One piece of the model that a stage boundary may precede.

    `part` and `index` say what it is (`encoder` 3: its fourth layer); `flops` is one sample's forward work.
    """

    part: str
    name: str  # embedding | layer | head
    index: int
    flops: float


@dataclass(frozen=True)
class Part:
    """What a stage holds of one stack: its embedding?, layers [first, last), its head?"""

    embedding: bool
    first: int
    last: int
    head: bool


class Plan:
    """A model's sizes under a layout: what the plans of all models share. Each lists its `blocks`, and says what its
    stages hold and hand on.

    Everything in a plan follows from the configuration and the layout; nothing is allocated.
    """

    blocks: list[Block]  # the model in order, with the forward FLOPs of one sample
    schedule_config: TransformerConfig  # what Megatron's schedules and gradient buffers read

    def __init__(self, config: Config, vocabulary: int):
        """`config` is resolved: every size is set. `vocabulary` is the number of ids; tables have
        `padded_vocabulary` rows."""
        parallel = config.parallel
        self.vocabulary, self.padded_vocabulary = vocabulary, padded_vocabulary(vocabulary)
        self.tensor, self.pipeline, self.virtual = parallel.tensor, parallel.pipeline, parallel.virtual
        self.sequence_parallel = parallel.sequence
        self.tensor_rank, self.tensor_group = 0, None

    def place_tensor(self, rank: int, group) -> None:
        """This process's rank in the tensor-parallel group (None: alone)."""
        self.tensor_rank, self.tensor_group = rank, group

    def init_std(self, name: str) -> float | None:
        """Standard deviation of the weight `name` (a global name); None: by its shape, see `megamug.models.init`."""
        return None

    @property
    def forward_flops(self) -> float:
        """Forward FLOPs of one sample (matrix products)."""
        return sum(block.flops for block in self.blocks)

    @cached_property
    def stages(self) -> list[range]:
        """Blocks of each pipeline stage, virtual ones counted: rank r of P holds the stages r, P + r, 2 P + r, ..."""
        return cut([block.flops for block in self.blocks], self.pipeline * self.virtual)

    def boundary(self, stage: int) -> Boundary | None:
        """What arrives at `stage` from the one before (None at both ends of the pipeline)."""
        raise NotImplementedError

    def stack_part(self, stage: int, name: str) -> Part | None:
        """What `stage` holds of the stack `name`, None for nothing."""
        own = [self.blocks[i] for i in self.stages[stage] if self.blocks[i].part == name]
        if not own:
            return None
        layers = [block.index for block in own if block.name == "layer"]
        kinds = {block.name for block in own}
        # A stage may hold an embedding or a head alone: then its run of layers is empty.
        total = sum(block.part == name and block.name == "layer" for block in self.blocks)
        empty = total if "head" in kinds else 0
        first, last = (layers[0], layers[-1] + 1) if layers else (empty, empty)
        return Part("embedding" in kinds, first, last, "head" in kinds)


@dataclass(frozen=True)
class Boundary:
    """What one stage hands to the next: named tensors of static shapes, packed into one tensor [1, 1, numbers].

    Megatron's schedules send one 3-D tensor per boundary. Shapes are this rank's (sequence parallelism included).
    """

    shapes: dict[str, tuple[int, ...]]

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        return (1, 1, sum(math.prod(shape) for shape in self.shapes.values()))

    def pack(self, carry: dict[str, Tensor]) -> Tensor:
        assert list(carry) == list(self.shapes), (list(carry), list(self.shapes))
        for name, tensor in carry.items():
            assert tuple(tensor.shape) == self.shapes[name], (name, tensor.shape, self.shapes[name])
        # cat copies even a single tensor: the schedule may free what it has sent.
        return torch.cat([tensor.reshape(-1) for tensor in carry.values()]).view(self.packed_shape)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        carry, start = {}, 0
        flat = packed.reshape(-1)
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            carry[name] = flat[start : start + size].view(shape)
            start += size
        return carry


class Stage(MegatronModule):
    """One pipeline stage of a model (all of it where there is one stage): what Megatron's schedules and gradient
    reductions ask of it. With virtual stages a rank holds several."""

    def __init__(self, plan: Plan, stage: int):
        super().__init__(config=plan.schedule_config)
        self.plan, self.stage = plan, stage
        self.incoming, self.outgoing = plan.boundary(stage), plan.boundary(stage + 1)
        self.received: Tensor | None = None
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = stage == 0
        self.share_embeddings_and_output_weights = False  # `training.pipeline` sums the gradients of both copies

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Megatron's schedules hand over here what the previous stage sent."""
        self.received = tensors[0]

    def tied_weight(self) -> Tensor | None:
        """The vocabulary matrix, where another stage holds a copy of it."""
        return None


def tensors_alone(state: dict) -> dict:
    """A sharded state dict without Transformer Engine's pickled FP8 histories.

    Checkpoints hold tensors alone, and `local` has no such state. Delayed scaling refills its history in the first
    steps after a resume.
    """
    return {name: entry for name, entry in state.items() if not name.endswith("_extra_state")}


def second_copy(state: dict, output: str, table: str) -> None:
    """In a sharded state dict, calls a tied output matrix (where this stage has one) as the table it copies. It counts
    as the second copy: the stage of the table writes it."""
    if output in state:
        entry = state[output]
        entry.key, entry.replica_id = table, (1, *entry.replica_id[1:])


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones((), dtype=ctx.dtype, device=gradient.device)


def attach_loss(output: Tensor, loss: Tensor) -> Tensor:
    """Returns `output`; when backward reaches it, `loss` gets gradient 1, at the stage where it was computed.

    So a loss that stands before the last stage takes part in backward although only `output` is sent on (Megatron
    treats its auxiliary losses in the same way).
    """
    return _AttachLoss.apply(output, loss)

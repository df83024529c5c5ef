"""What the trainer knows of a model: its chunks, its batches, what its losses are divided by, its FLOPs."""

from __future__ import annotations

import torch

from megamug.configuration.sections import Config
from megamug.data.order import Cursor, GlobalOrder
from megamug.errors import UserError
from megamug.models.blocks import compiled, specs
from megamug.models.init import initialise
from megamug.models.stages import Plan


class Task:
    """What the tasks of all models share. Built on every rank; holds no parameters.

    A model's task sets `plan` and `model`, and says how its batches are made and counted.
    """

    plan_type: type[Plan]
    plan: Plan
    model: type[torch.nn.Module]  # model(plan, stage): a chunk
    loss_names: list[str]

    def __init__(self, config: Config):
        """`config` is resolved and validated. Needs no process group."""
        self.config = config
        self.spec, self.spec_reason = specs.choose(config)
        self.compiled, self.compiled_reason = compiled.choose(config, self.spec)

    def join(self, world) -> None:
        """Learns this process's place in the tensor-parallel group."""
        self.plan.place_tensor(world.tp_rank, world.tp_group if world.tp_size > 1 else None)

    def build(self, world, initialised: bool = True) -> list[torch.nn.Module]:
        """This rank's chunks of the model: the stages pp_rank, pp_size + pp_rank, ... of `plan.stages`.

        Initialised alike in every layout; `initialised=False` leaves the parameters to a checkpoint loaded next.
        """
        stages = range(world.pp_rank, len(self.plan.stages), world.pp_size)
        chunks = [self.model(self.plan, stage).to(world.device) for stage in stages]
        if initialised:
            for chunk in chunks:
                initialise(chunk.sharded_state_dict(), self.config.seed, self.plan.init_std)
        if self.compiled:
            compiled.compile_layers(chunks)
        return chunks

    def reading(self, world, train: bool) -> dict[str, object]:
        """What loaders of every kind are told of the configuration and of this process's place."""
        data = self.config.data
        return {
            "global_batch_size": data.global_batch_size, "micro_batch_size": data.micro_batch_size,
            "seed": self.config.seed, "dp_rank": world.dp_rank, "dp_size": world.dp_size, "device": world.device,
            "train": train,
        }  # fmt: skip

    def identity(self) -> dict:
        """What a checkpoint cannot be continued without, beside the model's sizes: by configuration key."""
        raise NotImplementedError

    def order(self) -> GlobalOrder:
        """Of the training samples. Raises UserError where the data are missing or damaged."""
        raise NotImplementedError

    def check_data(self) -> None:
        """Raises UserError where the data, held-out ones too, cannot be read. Before any process group exists."""
        raise NotImplementedError

    def held_out(self, chunks: list[torch.nn.Module], world) -> dict[str, float]:
        """Figures beside the losses, of what this rank's chunks saw in evaluation since the last call; the same on all
        ranks. A collective."""
        return {}

    def check_resumable(self, contents: dict) -> None:
        """Raises UserError where a checkpoint's `state.json` belongs to another identity (see there) or other data."""
        before = contents["identity"]
        for key, value in self.identity().items():
            if before.get(key) != value:
                raise UserError(
                    f"{key}: {self.config.run_dir} holds a run with {before.get(key)}, the configuration gives {value};"
                    " go back to that one or choose another run_dir"
                )
        self.order().check(Cursor.from_dict(contents["cursor"]))

    @property
    def flops_per_sample(self) -> float:
        """Model FLOPs of training on one sample: forward, and twice that for backward (recomputation not counted)."""
        return 3 * self.plan.forward_flops

"""What models share that are a MUG's encoder on every patch and a head behind it: layer-wise learning rates, stochastic
depth, replicas that know each other.

A head's parameters are named `head.`, and the encoder's `encoder.`.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from megamug.configuration.counts import as_mug
from megamug.configuration.sections import Config
from megamug.data.order import GlobalOrder
from megamug.data.pairs.loader import PairBatch, order_of
from megamug.data.pairs.mixing import path_scales
from megamug.models.mug.plan import MugPlan
from megamug.models.mug.task import MugTask


class FineTuningPlan(MugPlan):
    """Derived sizes of an encoder with a head; `config`'s section of the kind's name says what is behind it."""

    classes: int

    def __init__(self, config: Config, vocabulary: int, spec: str = "local"):
        super().__init__(as_mug(config), vocabulary, spec)
        own = getattr(config, config.model.kind)
        self.classes, self.drop_path, self.layer_decay = own.classes, own.drop_path, own.layer_decay
        assert self.classes is not None, "the number of classes is filled in from the data before"
        self.data_group = None  # of the replicas, once they have joined

    def rate_scale(self, name: str, first: int) -> float:
        """Share of the learning rate that the parameter `name` of a stage whose layers begin at `first` has.

        It is layer_decay to the power of how many layers lie behind it. The embedding, tokens included, counts as a
        layer; so does the head with the norm before it (BEiT's rule, arXiv 2106.08254, as MAE's code has it).
        """
        layer = re.match(r"encoder\.stack\.layers\.(\d+)\.", name)
        if layer:
            number = 1 + first + int(layer[1])
        else:
            number = 1 + self.model.layers if name.startswith(("head.", "encoder.stack.")) else 0
        return self.layer_decay ** (1 + self.model.layers - number)

    def mark(self, stage: torch.nn.Module, first: int) -> None:
        """Tells the optimizer of the parameters of a stage whose layers begin at `first` which decay, and their share
        of the learning rate."""
        for name, parameter in stage.named_parameters():
            parameter.no_weight_decay = parameter.dim() == 1 or name.endswith(("_token", "_tokens"))
            if self.layer_decay < 1:
                parameter.rate_scale = self.rate_scale(name, first)


class FineTuningTask(MugTask):
    """Of images without captions."""

    plan_type: type[FineTuningPlan]

    def __init__(self, config: Config):
        super().__init__(as_mug(config))
        self.config = config
        self.plan = self.plan_type(config, 0, self.spec)
        self.loss_names = list(self.plan.loss_weights)

    def order(self) -> GlobalOrder:
        return order_of(self.sources(train=True, captions=False), self.config.seed)

    def identity(self) -> dict:
        return super().identity() | {f"{self.config.model.kind}.classes": self.plan.classes}

    def join(self, world) -> None:
        super().join(world)
        self.plan.data_group = world.dp_group if world.dp_size > 1 else None

    def path_scales(self, pairs: PairBatch) -> Tensor | None:
        """[layers, 2, b, 1] of stochastic depth for a micro-batch of training; None without."""
        plan = self.plan
        if plan.drop_path == 0:
            return None
        drawn = path_scales(self.config.seed, pairs.epochs, pairs.indices, plan.model.layers, plan.drop_path)
        return torch.from_numpy(drawn).to(pairs.images.device, plan.dtype)

"""Checks of the optimizer: keys that it reads, layouts that it knows, and its schedule."""

from __future__ import annotations

from megamug.configuration.sections import Config, OptimizerConfig
from megamug.errors import UserError

# Which optimizer reads the keys that not all do.
READ_BY = {
    "beta1": ("adamw",), "beta2": ("adamw",), "eps": ("adamw",), "fused": ("adamw",),
    "momentum": ("sgd", "lars"), "trust_coefficient": ("lars",),
}  # fmt: skip


def optimizer(config: Config) -> None:
    """No key set that the optimizer does not read; states whole where it is not AdamW."""
    options, default = config.optimizer, OptimizerConfig()
    for key, names in READ_BY.items():
        value = getattr(options, key)
        if options.name not in names and value != getattr(default, key):
            raise UserError(f"optimizer.{key} is set to {value}, but it is of optimizer.name={' or '.join(names)} and"
                            f" optimizer.name is {options.name}; leave optimizer.{key} out, or set optimizer.name="
                            f"{names[0]}")  # fmt: skip
    if options.name != "adamw" and config.parallel.distributed_optimizer:
        raise UserError(f"parallel.distributed_optimizer(true) shards the states of AdamW alone, and optimizer.name is"
                        f" {options.name}; set parallel.distributed_optimizer=false or optimizer.name=adamw")


def schedule(config: Config) -> None:
    """Warm-up within the run, learning rates in order."""
    options, steps = config.optimizer, config.train.steps
    if options.warmup_steps > steps:
        raise UserError(f"optimizer.warmup_steps({options.warmup_steps}) is more than train.steps({steps});"
                        f" set optimizer.warmup_steps={steps // 10}")
    if options.min_learning_rate > options.learning_rate:
        raise UserError(
            f"optimizer.min_learning_rate({options.min_learning_rate:g}) is above"
            f" optimizer.learning_rate({options.learning_rate:g}); set optimizer.min_learning_rate=0"
        )

"""AdamW, SGD or LARS under Megatron's optimizers, the schedule, and the state by parameter name.

Megatron has three: plain (fp32), with fp32 main parameters (bf16), and distributed (states sharded over the
data-parallel ranks). `MainState` shows all three in one way, which is what makes a checkpoint of one loadable by
another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import Tensor

from megamug.checkpoint.optimizer_state import AVERAGE, BUFFER, MOMENTS, MainState, counts_per_parameter
from megamug.configuration.sections import Config, OptimizerConfig, TrainConfig
from megamug.models.blocks.specs import FP8_RECIPES
from megamug.training import adam, gradients
from megamug.training.gradients import GradientBuffers
from megamug.training.pipeline import finalise_gradients
from megamug.training.spikes import SpikeGuard
from megamug.training.updates import momentum
from megamug.training.updates.averages import Averages


def learning_rate(step: int, optimizer: OptimizerConfig, train: TrainConfig) -> float:
    """Rate of step `step` (1, 2, ...): linear warm-up, then half a cosine or a line (`schedule`) towards
    `min_learning_rate`, which it would reach one step after the last: an update of rate 0 would be none.

    A pure function of the step: nothing of the schedule needs saving. MAE's schedule, per step.
    """
    peak, low, warmup = optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    peaked = max(1, warmup)  # the step of the whole rate
    progress = min(1.0, (step - peaked) / max(1, train.steps - peaked + 1))
    if optimizer.schedule == "linear":
        return low + (peak - low) * (1 - progress)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))


def wrap_chunks(chunks: list[torch.nn.Module], config: Config) -> list[GradientBuffers]:
    """Megatron's gradient buffers and reductions around each chunk of this rank; gradients are summed in fp32.

    Tells the configuration that Megatron's schedules read (the first chunk's) what they need of all.
    """
    parallel = config.parallel
    models = [
        GradientBuffers(
            config=chunk.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
                use_distributed_optimizer=parallel.distributed_optimizer,
                average_in_collective=False,  # sums; gloo has no average
                fp8_param_gather=config.precision.fp8_parameters,
            ),
            module=chunk,
        )
        for chunk in chunks
    ]
    schedule, interleaved = chunks[0].config, len(chunks) > 1
    schedule.finalize_model_grads_func = finalise_gradients
    schedule.no_sync_func = [model.no_sync for model in models] if interleaved else models[0].no_sync
    schedule.virtual_pipeline_model_parallel_size = len(chunks) if interleaved else None
    return models


def _megatron_options(config: Config) -> MegatronOptimizerConfig:
    options, bf16 = config.optimizer, config.precision.dtype == "bf16"
    return MegatronOptimizerConfig(
        optimizer="adam" if options.name == "adamw" else "sgd",
        lr=options.learning_rate,
        min_lr=options.min_learning_rate,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.eps,
        sgd_momentum=options.momentum,
        clip_grad=options.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        fp8_recipe=FP8_RECIPES[config.precision.fp8].get("fp8_recipe"),
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )


def _overrides(models: list[GradientBuffers]) -> dict[ParamKey, dict[str, float]]:
    """What groups of parameters have of their own: no decay, a share of the learning rate (`rate_scale`). Megatron puts
    those together that a parameter has."""
    no_decay = ParamKey(predicate=ParamPredicate(name="no_weight_decay", fn=lambda p: p.no_weight_decay))
    scales = {getattr(p, "rate_scale", 1.0) for model in models for p in model.parameters()} - {1.0}
    shares = {
        ParamKey(predicate=ParamPredicate(name=f"rate {scale!r}", fn=partial(_has_rate, scale))): {"lr_mult": scale}
        for scale in sorted(scales)
    }
    return {no_decay: {"wd_mult": 0.0}, **shares}


def _has_rate(scale: float, parameter: Tensor) -> bool:
    return getattr(parameter, "rate_scale", 1.0) == scale


class Optimizer:
    """The optimizer of one rank: rate and decay, gradient norm, clipping; a bad gradient need not be applied."""

    def __init__(self, config: Config, models: list[GradientBuffers]):
        """`models` are this rank's chunks. Parameters that need no gradient (frozen) have no state and no update."""
        options = config.optimizer
        self.options, self.train = options, config.train
        self.models, self.distributed = models, config.parallel.distributed_optimizer
        self.fp8_parameters = config.precision.fp8_parameters
        self.kernel, self.kernel_name, self.kernel_reason, building = _kernel(config)
        self.counts = options.name == "adamw"  # torch's AdamW and the fused ones count updates by themselves
        self.moments = MOMENTS if self.counts else BUFFER
        self.spikes = SpikeGuard(options.skip_spikes) if options.skip_spikes > 0 else None
        with building:
            self.megatron = get_megatron_optimizer(
                _megatron_options(config), models, config_overrides=_overrides(models),
                use_gloo_process_groups=False,
            )  # fmt: skip
        self.parts = [o for o in self.megatron.chained_optimizers if not getattr(o, "is_stub_optimizer", False)]
        for part in self.parts:
            if not self.fp8_parameters:  # those are rounded by Transformer Engine, many at once
                part._copy_main_params_to_model_params = partial(_copy_main_parameters, part)
        for group in self._groups():
            if "fused" in group:  # torch's AdamW: one pass over the states instead of one per operation
                group["fused"], group["foreach"] = True, False
        # The names of `torch.nn.ModuleList(chunks)`: chunk, then the parameter's own; two chunks share the latter.
        self.names = {
            parameter: f"{chunk}.{name.removeprefix('module.')}"
            for chunk, model in enumerate(models)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.averages = None
        if config.model.kind == "classifier" and config.classifier.ema > 0:
            self.averages = Averages(list(self.main_states()), config.classifier.ema)
            self.moments += (AVERAGE,)

    def _groups(self) -> Iterator[dict]:
        return chain.from_iterable(part.param_groups for part in self.parts)

    def prepare(self, step: int) -> tuple[Tensor, float]:
        """Sets rate and decay of update `step`; (gradient norm before clipping, learning rate). Changes no parameter.

        The norm is that of the whole model, the same on every rank: a float32 scalar on the device, not waited for.
        """
        rate = learning_rate(step, self.options, self.train)
        for group in self._groups():
            group["lr"] = rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.options.weight_decay * group.get("wd_mult", 1.0)
        self.megatron.prepare_grads()
        return gradients.norm(self.megatron), rate

    def apply(self, norm: Tensor, finite: Tensor | None = None) -> Tensor:
        """Clips to `clip_grad` by the given norm and updates the parameters; nothing changes where the norm is not
        finite or a spike, or `finite` (a scalar: whether the losses are) is false, on any rank: a replica that skips
        alone would go on with parameters of its own. Returns a scalar: whether there was an update.

        torch's AdamW decides and clips on the device, so that the host need not wait and the device never does; with
        the others the host looks first.
        """
        fine = norm.isfinite() if finite is None else norm.isfinite() & finite
        if self.spikes is not None:
            fine &= self.spikes.fine(norm)
        fine = agreed(fine)
        if self.spikes is not None:
            self.spikes.remember(norm, fine)
        divisor = ((norm + 1e-6) / self.options.clip_grad).clamp(min=1.0) if self.options.clip_grad > 0 else None
        if self.kernel == "torch":
            bad = fine.logical_not().float()
            for part in self.parts:
                part.optimizer.grad_scale, part.optimizer.found_inf = divisor, bad
        elif not fine:
            return fine
        elif divisor is not None:
            gradients.scale_(self.megatron.get_parameters(), 1 / divisor)
        self.megatron.step_with_ready_grads()
        if not self.counts:
            self.restore_step(self.updates_done() + 1)
        if self.averages is not None:
            self.averages.update(fine)
        return fine

    def gather_parameters(self) -> None:
        """Fetches now what overlapped gathering leaves to the next forward pass: this rank then holds all updates."""
        for model in self.models:
            if model.ddp_config.overlap_param_gather:
                model.start_param_sync(force_sync=True)

    def round_parameters(self) -> None:
        """Makes FP8 parameters anew from their fp32 values, as an update does; nothing where there are none."""
        if not self.fp8_parameters:
            return
        for part in self.parts:
            part._copy_main_params_to_model_params()
        for model in self.models:
            model.start_param_sync(force_sync=True)

    def zero_grad(self) -> None:
        """Clears the gradients, those in the chunks' buffers as well."""
        for model in self.models:
            model.zero_grad_buffer()
        self.megatron.zero_grad()

    # ------------------------------------------------------------------------------------------ state by name

    def main_states(self) -> Iterator[MainState]:
        """Every parameter of these chunks that this rank updates, at least in part."""
        for part in self.parts:
            torch_optimizer = part.optimizer
            for parameter, main in _pairs(part):
                span = None
                if isinstance(part, DistributedOptimizer):
                    found = part._get_model_param_range_map(parameter)["param"]
                    span = (found.start, found.end)
                yield MainState(self.names[parameter], parameter, main, span, torch_optimizer)

    def restore_step(self, step: int) -> None:
        """Sets the number of updates done, from which AdamW corrects its bias."""
        for part in self.parts:
            for group in part.optimizer.param_groups:
                if "step" in group or not counts_per_parameter(part.optimizer):
                    group["step"] = step
            for state in part.optimizer.state.values():
                if "step" in state:
                    state["step"].fill_(step)

    def updates_done(self) -> int:
        """Number of updates so far (skipped steps not counted)."""
        for part in self.parts:
            for group in part.optimizer.param_groups:
                if "step" in group:
                    return int(group["step"])
            for state in part.optimizer.state.values():
                if "step" in state:
                    return int(state["step"])
        return 0


def _kernel(config: Config) -> tuple[str, str, str, AbstractContextManager]:
    """What updates the parameters: its name, how it is told, why it was taken, and where Megatron builds on it."""
    options = config.optimizer
    if options.name == "adamw":
        kernel, kernel_class, reason = adam.choose(options.fused)
        return kernel, adam.NAMES[kernel], reason, adam.used_by_megatron(kernel_class)
    group = parallel_state.get_tensor_model_parallel_group() if config.parallel.tensor > 1 else None
    building = momentum.used_by_megatron(options, group)
    return options.name, momentum.NAMES[options.name], f"optimizer.name={options.name}", building


def agreed(fine: Tensor) -> Tensor:
    """Whether the bool scalar `fine` is true on all ranks; on the device, waited for by nobody. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return fine
    everywhere = fine.to(torch.int32)
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return everywhere.bool()


@torch.no_grad()
def _copy_main_parameters(part) -> None:
    """The updated fp32 values into the model's bf16 parameters (of the distributed optimizer: into this rank's part of
    the buffers that are gathered next). As Megatron's own method, but all in one call."""
    if not isinstance(part, DistributedOptimizer):
        pairs = [(p.data, main.data) for p, main in _pairs(part) if p is not main]
    else:
        pairs = []
        for parameter, main in _pairs(part):
            buffer, _, bucket = part.model_param_gbuf_map[parameter]
            span = part._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
            assert span.size == main.nelement(), (span.size, main.nelement())
            pairs.append((part.buffers[buffer].buckets[bucket].param_data.view(-1)[span.start : span.end], main.data))
    gradients.copy_([target for target, _ in pairs], [source for _, source in pairs])


def _pairs(part) -> Iterator[tuple[Tensor, Tensor]]:
    """(model parameter, what the optimizer updates) of one Megatron optimizer."""
    if isinstance(part, DistributedOptimizer):
        model = chain(part.model_float16_groups, part.model_fp32_groups)
        main = chain(part.shard_fp32_from_float16_groups, part.shard_fp32_groups)
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        model = chain(part.float16_groups, part.fp32_from_fp32_groups)
        main = chain(part.fp32_from_float16_groups, part.fp32_from_fp32_groups)
    else:
        model = main = [group["params"] for group in part.optimizer.param_groups]
    for model_group, main_group in zip(model, main, strict=True):
        yield from zip(model_group, main_group, strict=True)

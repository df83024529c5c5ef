"""SGD with momentum (torch's) and LARS, the optimizers of linear probes: MoCo v3's (Chen et al. 2021, arXiv 2104.02057,
appendix A) and MAE's (He et al. 2022, arXiv 2111.06377, appendix A.1). What both keep of a parameter is
`momentum_buffer`; decay is added to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megamug.configuration.sections import OptimizerConfig

NAMES = {"sgd": "torch's SGD with momentum", "lars": "LARS"}


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888, algorithm 1), as MAE's code has it:

        u = gradient + weight_decay * w
        v = momentum * v + (trust_coefficient * |w| / |u|) * u        (the factor is 1 where a norm is 0)
        w = w - lr * v

    The rate stands outside of the momentum. Groups with `wd_mult` 0 (biases, norms, tokens) have neither decay nor
    factor. Norms are those of the whole parameter: of one that tensor-parallel ranks share, squares are summed over
    `tensor_group`, so that every rank of it must step.
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float, trust_coefficient: float,
                 tensor_group=None):  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum,
                                  "trust_coefficient": trust_coefficient})  # fmt: skip
        self.tensor_group = tensor_group

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            updates = [parameter.grad.float() for parameter in parameters]
            if group.get("wd_mult", 1.0) > 0:
                updates = torch._foreach_add(updates, parameters, alpha=group["weight_decay"])
                weights, own = self._norms(parameters, parameters), self._norms(parameters, updates)
                factors = torch.where((weights > 0) & (own > 0), group["trust_coefficient"] * weights / own, 1.0)
                updates = torch._foreach_mul(updates, list(factors.unbind()))
            buffers = [self._buffer(parameter) for parameter in parameters]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(parameters, buffers, alpha=-group["lr"])

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.float32)
        return state["momentum_buffer"]

    def _norms(self, parameters: list[Tensor], tensors: list[Tensor]) -> Tensor:
        """Norms [n] of `tensors`, each a rank's part of something as large as its parameter."""
        squares = torch.stack(torch._foreach_norm(tensors)).square()
        if self.tensor_group is not None:
            shared = [getattr(parameter, "tensor_model_parallel", False) for parameter in parameters]
            rows = torch.tensor(shared, device=squares.device).nonzero().squeeze(1)
            parts = squares[rows]
            dist.all_reduce(parts, group=self.tensor_group)
            squares[rows] = parts
        return squares.sqrt()


@contextmanager
def used_by_megatron(options: OptimizerConfig, tensor_group) -> Iterator[None]:
    """Inside, Megatron builds its optimizers (of its name "sgd") on what `optimizer.name` says."""
    from megatron.core import optimizer

    before, optimizer.SGD = optimizer.SGD, _maker(options, tensor_group)
    try:
        yield
    finally:
        optimizer.SGD = before


def _maker(options: OptimizerConfig, tensor_group) -> Callable[..., torch.optim.Optimizer]:
    def make(groups, lr: float, weight_decay: float, momentum: float) -> torch.optim.Optimizer:
        if options.name == "sgd":
            return torch.optim.SGD(groups, lr, momentum, weight_decay=weight_decay, foreach=True)
        return Lars(groups, lr, weight_decay, momentum, options.trust_coefficient, tensor_group)

    return make

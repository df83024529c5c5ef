"""Layers of `local` by torch.compile: between the matrix products everything becomes a few passes over memory.

What is compiled is a pure function of a layer and its hidden states (`functional.transformer_layer`, and one direction
of a cross block). All layers of a stack share one compilation, since they differ in their parameters alone. The plain
function stays, and is what evaluation and writing run. Before a compiled function is used it is held against the plain
one (with torch's attention, not ours), on the first hidden states that a layer gets, values and gradients; where they
differ by more than rounding, or it does not compile, the plain one stays and the log says so.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megamug.configuration.sections import LONG, Config
from megamug.models.attention import gpu as gpu_attention
from megamug.models.blocks.layers import kernel_order

logger = logging.getLogger(__name__)

# Relative difference (2-norms) of an output or gradient that rounding explains: a chain of a dozen operations, each
# result rounded to the type in the plain form, only the last in the compiled one.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
KINDS = 64  # of compiled layers in a process: dynamo counts them by the code that they share, and stops at 8


def choose(config: Config, spec: str) -> tuple[bool, str]:
    """Resolves `precision.compile` for layers of the kind `spec` ("local" | "te"): (whether, reason)."""
    requested, steps = config.precision.compile, config.train.steps  # a compilation takes what some hundred steps save
    if requested != "auto":
        return requested == "always", f"precision.compile={requested}"
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if config.parallel.tensor > 1 and spec == "local":
        return False, "layers are split over tensor-parallel ranks"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    if steps < LONG:
        return False, f"a run of {steps} steps is over sooner; precision.compile=always compiles all the same"
    return True, "on a GPU"


class Compiled:
    """A function `(module or None, tensor, ...) -> tensor`, compiled for each kind of module, used once it is proven.

    A kind is what a compilation is made for: parameters by name, shape and type, and the shapes of the arguments.
    """

    backend = "inductor"

    def __init__(self, plain: Callable[..., Tensor]):
        self.plain = plain
        self._of_kind: dict[tuple, Callable[..., Tensor]] = {}
        self._of_module: dict[tuple, Callable[..., Tensor]] = {}

    def __call__(self, module: nn.Module | None, *arguments) -> Tensor:
        return self.taken(module, *arguments)(module, *arguments)

    def taken(self, module: nn.Module | None, *arguments) -> Callable[..., Tensor]:
        """What computes it: compiled and proven now, if it is the first of its kind. Not inside of a recomputation,
        which would count what the proof keeps for backward."""
        key = id(module), arguments[0].shape
        function = self._of_module.get(key)
        if function is None:
            kind = _kind(module, arguments)
            if kind not in self._of_kind:
                self._of_kind[kind] = self._proven(module, arguments)
            function = self._of_module[key] = self._of_kind[kind]
        return function

    def _proven(self, module: nn.Module | None, arguments: tuple) -> Callable[..., Tensor]:
        began = time.perf_counter()
        count = sum(p.numel() for p in _parameters(module).values())
        what = f"{self.plain.__name__} on {list(arguments[0].shape)}, {count / 1e6:.2f} M parameters"
        try:
            function, name, difference, dtype = self._compare(module, arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the compiler: many kinds, none of them the user's
            logger.warning("%s: torch.compile failed, so it runs uncompiled (%s)", what, _first_line(error))
            logger.debug("the compiler's error", exc_info=True)
            return self.plain
        if not difference <= TOLERANCES[dtype]:
            logger.warning(
                "%s: compiled and plain differ by %.1e of the %s's norm, rounding explains %.0e; it runs uncompiled",
                what, difference, name, TOLERANCES[dtype],
            )  # fmt: skip
            gpu_attention.give_up()  # it may be what was wrong
            return self.plain
        logger.info(
            "%s: compiled in %.0f s; it differs from the plain form by %.1e at most, in the %s",
            what, time.perf_counter() - began, difference, name,
        )  # fmt: skip
        return function

    def _compare(
        self, module: nn.Module | None, arguments: tuple
    ) -> tuple[Callable[..., Tensor], str, float, torch.dtype]:
        """(the compiled function, name of the output or gradient that differs most, how much, the type)."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS)
        function = torch.compile(self.plain, fullgraph=True, dynamic=False, backend=self.backend)
        with gpu_attention.torch_instead():
            plain = _values_and_gradients(self.plain, module, arguments)
        with kernel_order():  # which kernel attention takes is decided when a layer is traced
            compiled = _values_and_gradients(function, module, arguments)
        worst = max(((_difference(compiled[name], plain[name]), name) for name in plain), key=_nan_first)
        return function, worst[1], worst[0], plain["output"].dtype


def _nan_first(pair: tuple[float, str]) -> float:
    return float("inf") if pair[0] != pair[0] else pair[0]


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def _values_and_gradients(function: Callable, module: nn.Module | None, arguments: tuple) -> dict[str, Tensor]:
    """The output, and the gradients of a fixed random sum of its values for floating-point arguments and parameters."""
    with torch.enable_grad():
        own = [_leaf(argument) for argument in arguments]
        output = function(module, *own)
        tensors = {f"gradient of argument {i}": x for i, x in enumerate(own) if isinstance(x, Tensor)}
        wanted = {name: x for name, x in tensors.items() if x.requires_grad}
        parameters = {name: p for name, p in _parameters(module).items() if p.requires_grad}
        wanted |= {f"gradient of {name}": parameter for name, parameter in parameters.items()}
        generator = torch.Generator(output.device).manual_seed(0)
        weights = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
        gradients = torch.autograd.grad(output, list(wanted.values()), weights, allow_unused=True)
    found = zip(wanted, gradients, strict=True)
    return {"output": output.detach(), **{name: g for name, g in found if g is not None}}


def _leaf(argument):
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.detach().clone().requires_grad_(argument.requires_grad)
    return argument


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _parameters(module: nn.Module | None) -> dict[str, nn.Parameter]:
    return {} if module is None else dict(module.named_parameters())


def _kind(module: nn.Module | None, arguments: tuple) -> tuple:
    parameters = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in _parameters(module).items())
    shapes = tuple(tuple(x.shape) if isinstance(x, Tensor) else type(x) for x in arguments)
    return parameters, shapes


def compile_layers(chunks: list[nn.Module]) -> int:
    """Makes what these chunks have of `local` layers and cross blocks compile when it first trains, and the elementwise
    parts of Transformer Engine's (rotary positions, SwiGLU). Returns how many there are."""
    made: dict[Callable, Compiled] = {}
    modules = [module for chunk in chunks for module in chunk.modules()]
    hosts = [m for m in modules if hasattr(m, "layer_function") and m.local]
    for host in hosts:
        host.layer_function = made.setdefault(host.layer_function, Compiled(host.layer_function))
    parts = [] if hosts else [m for m in modules if hasattr(m, "elementwise_function")]
    for part in parts:
        part.elementwise_function = made.setdefault(part.elementwise_function, Compiled(part.elementwise_function))
    return len(hosts) + len(parts)

"""The one door to the compiled kernels: loads the libraries built from `csrc/`, registers fakes and autograd rules.

Most are losses; the CPU library also has the attention that `megamug/models/attention/cpu.py` calls.

The schemas are in `csrc/cpu/operators.cpp`. The CPU library holds the schemas and the CPU kernels; the CUDA library
adds kernels and is loaded only where torch has CUDA. Loading happens on import, so that a first call under
`torch.compile` can be traced; it opens two small files and touches no device.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megamug.errors import UserError

if TYPE_CHECKING:
    from megamug.losses.cross_entropy import Terms

FOLDER = Path(__file__).parent / "_lib"
OPERATORS = (
    "cross_entropy_statistics", "cross_entropy", "cross_entropy_gradient", "cross_entropy_gradient_", "masked_patch",
    "masked_patch_gradient_", "attention_forward", "attention_backward", "packed_attention_forward",
    "packed_attention_backward", "cross_attention_forward", "cross_attention_backward", "draw_",
)  # fmt: skip
_COMPILED_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Libraries:
    """What of the compiled kernels is at hand. `reason` says what they are, or why they are missing."""

    cpu: bool
    cuda: bool
    reason: str


def libraries() -> Libraries:
    """What was loaded; said once in the log, and by `megamug doctor`."""
    return _LIBRARIES


def _load() -> Libraries:
    cpu, cuda = FOLDER / "megamug_cpu.so", FOLDER / "megamug_cuda.so"
    if not cpu.exists():
        return Libraries(False, False, "the compiled kernels are not built (in the checkout of megamug: pip install"
                         " --no-build-isolation -e .); torch stands in")  # fmt: skip
    try:
        torch.ops.load_library(cpu)
    except OSError as error:  # built for another system or a torch older than 2.10
        return Libraries(False, False, f"{cpu.name} does not load ({error}); torch stands in")
    missing = [name for name in OPERATORS if not hasattr(torch.ops.megamug, name)]
    if missing:
        return Libraries(False, False, f"{cpu.name} is of older sources, without {missing[0]} (pip install --no-build-"
                         "isolation -e . builds it anew); torch stands in")  # fmt: skip
    _register()
    function = ctypes.CDLL(str(cpu)).megamug_cpu_kernels
    function.restype = ctypes.c_char_p
    reason = f"compiled, CPU kernels {function().decode()}"
    if torch.version.cuda is None:
        return Libraries(True, False, f"{reason}; no CUDA in this torch")
    if not cuda.exists():
        return Libraries(True, False, f"{reason}; CUDA kernels not built, torch stands in on CUDA")
    try:
        torch.ops.load_library(cuda)
    except OSError as error:
        return Libraries(True, False, f"{reason}; {cuda.name} does not load ({error}), torch stands in on CUDA")
    return Libraries(True, True, f"{reason}, and CUDA kernels")


def choose(impl: str, *tensors: Tensor | None) -> bool:
    """Whether the compiled kernels take a call with these tensors; UserError if they are asked for and cannot."""
    if impl not in ("auto", "compiled", "torch"):
        raise UserError(f"losses: impl must be auto, compiled or torch, not {impl!r}")
    if impl == "torch":
        return False
    present = [t for t in tensors if t is not None]
    device = present[0].device.type
    built = device in ("cpu", "cuda") and getattr(libraries(), device)
    typed = all(t.dtype in _COMPILED_TYPES for t in present if t.dtype != torch.int64)
    if impl == "compiled" and not built:
        raise UserError(f"losses: impl is compiled but there are no kernels for {device}: {libraries().reason}")
    if impl == "compiled" and not typed:
        raise UserError("losses: the compiled kernels take float32, bfloat16 and float16; use impl='torch'")
    return built and typed


# ---- cross-entropy ----


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None, terms: Terms, inplace: bool) -> Tensor:
    """[R, V], [R], [R] or None -> weighted loss of each token, differentiable."""
    return _joined(logits, targets, weights, terms, inplace)[0]


def cross_entropy_forward(
    logits: Tensor, targets: Tensor, weights: Tensor | None, terms: Terms
) -> tuple[Tensor, Tensor]:
    """The weighted loss of each token and the normalisers: `cross_entropy.forward_torch`, compiled."""
    return _joined(logits, targets, weights, terms, False)


def cross_entropy_gradient_(
    logits: Tensor, targets: Tensor, weights: Tensor | None, normalisers: Tensor, grad_per_token: Tensor, terms: Terms
) -> Tensor:
    """Turn logits into their gradient: `cross_entropy.gradient_torch`, compiled and in place."""
    arguments = (terms.first_column, terms.valid_columns, terms.vocab_size, terms.ignore_index)
    torch.ops.megamug.cross_entropy_gradient_(
        logits, targets, weights, normalisers, grad_per_token, *arguments, terms.label_smoothing, terms.z_loss
    )
    return logits


def _joined(logits: Tensor, targets: Tensor, weights: Tensor | None, terms: Terms, inplace: bool):
    """One pass over this rank's logits, one collective of four floats a row, and the join."""
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    targets, weights = targets.contiguous(), None if weights is None else weights.contiguous()
    place = (terms.first_column, terms.valid_columns, terms.vocab_size, terms.ignore_index)
    statistics = torch.ops.megamug.cross_entropy_statistics(logits.detach(), targets, *place, terms.label_smoothing > 0)
    everybody = _all_gather(statistics, terms.group)
    return torch.ops.megamug.cross_entropy(
        logits, everybody, targets, weights, *place, terms.label_smoothing, terms.z_loss, inplace
    )


def _all_gather(statistics: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[4, R] on each rank -> [ranks, 4, R]. Gathered, not reduced: maximum and sums join in one message."""
    if group is None or dist.get_world_size(group) == 1:
        return statistics.unsqueeze(0)
    everybody = statistics.new_empty((dist.get_world_size(group), *statistics.shape))
    dist.all_gather_into_tensor(everybody.flatten(0, 1), statistics, group=group)  # gloo wants them concatenated
    return everybody


def _cross_entropy_setup(ctx, inputs, output) -> None:
    logits, _, targets, weights, *terms, inplace = inputs
    ctx.save_for_backward(logits, targets, weights, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.terms, ctx.inplace = terms, inplace


def _cross_entropy_backward(ctx, grad_per_token: Tensor | None, _):
    if grad_per_token is None:
        return (None,) * 11
    logits, targets, weights, normalisers = ctx.saved_tensors
    arguments = (targets, weights, normalisers, grad_per_token.contiguous(), *ctx.terms)
    if ctx.inplace and _is_eager(logits):
        gradient = logits.detach()
        torch.ops.megamug.cross_entropy_gradient_(gradient, *arguments)
        torch.autograd.graph.increment_version(logits)  # whoever else saved the logits is told
    else:
        gradient = torch.ops.megamug.cross_entropy_gradient(logits, *arguments)
    return gradient, *[None] * 10


# ---- masked patch ----


def masked_patch_sum(
    images: Tensor,
    predictions: Tensor,
    masked_ids: Tensor,
    patch_size: int,
    norm_pix: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    """`masked_patch.masked_patch_sum_torch`, compiled: loss and gradient in one pass."""
    wanted = predictions.requires_grad and torch.is_grad_enabled()
    total, _ = torch.ops.megamug.masked_patch(
        images.contiguous(),
        predictions.contiguous(),
        masked_ids.contiguous(),
        patch_size,
        norm_pix,
        list(mean or ()),
        list(std or ()),
        wanted,
    )
    return total


def _masked_patch_setup(ctx, inputs, output) -> None:
    images, predictions, masked_ids, *ctx.form, _ = inputs
    ctx.save_for_backward(images, predictions, masked_ids, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros of the gradient's size as "the gradient of the gradient"


def _masked_patch_backward(ctx, grad: Tensor | None, _):
    """Forward's gradient where `grad` is 1; any other makes it anew in place, so that it is rounded once."""
    if grad is None:
        return (None,) * 8
    *inputs, gradient = ctx.saved_tensors
    eager = _is_eager(gradient)
    if not eager or grad.is_cuda or grad != 1:  # on CUDA looking at the value would wait for the device
        gradient = gradient.detach() if eager else gradient.clone()
        torch.ops.megamug.masked_patch_gradient_(gradient, *inputs, *ctx.form, grad)
        if eager:
            torch.autograd.graph.increment_version(ctx.saved_tensors[-1])  # a second backward must not find this one's
    return None, gradient, *[None] * 6


# ---- attention ----


def _attention_setup(ctx, inputs, output) -> None:
    query, key, value, ctx.causal, ctx.scale, segments = inputs
    ctx.save_for_backward(query, key, value, *output, segments)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attention_backward(ctx, gradient: Tensor | None, _):
    if gradient is None:
        return (None,) * 6
    *tensors, segments = ctx.saved_tensors
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    gradients = torch.ops.megamug.attention_backward(gradient, *tensors, ctx.causal, ctx.scale, segments)
    return *gradients, None, None, None


def _is_eager(tensor: Tensor) -> bool:
    """False where a graph is being traced (fake and functional tensors are subclasses): nothing is mutated there."""
    return type(tensor) is Tensor


# ---- registration ----


def _register() -> None:
    """Shapes and dtypes of the results for tracing, and the autograd rules."""
    library = torch.library

    @library.register_fake("megamug::cross_entropy_statistics")
    def _(logits, targets, *_):
        return logits.new_empty((4, logits.shape[0]), dtype=torch.float32)

    @library.register_fake("megamug::cross_entropy")
    def _(logits, *_):
        rows = logits.shape[0]
        return logits.new_empty(rows, dtype=torch.float32), logits.new_empty((2, rows), dtype=torch.float32)

    @library.register_fake("megamug::cross_entropy_gradient")
    def _(logits, *_):
        return logits.new_empty(logits.shape)

    @library.register_fake("megamug::cross_entropy_gradient_")
    def _(logits, *_):
        return None

    @library.register_fake("megamug::masked_patch")
    def _(images, predictions, masked_ids, patch_size, norm_pix, mean, std, with_gradient):
        shape = (predictions.shape[0] if with_gradient else 0, *predictions.shape[1:])
        return predictions.new_empty((), dtype=torch.float32), predictions.new_empty(shape)

    @library.register_fake("megamug::masked_patch_gradient_")
    def _(gradient, *_):
        return None

    @library.register_fake("megamug::attention_forward")
    def _(query, *_):
        s, b, n, _width = query.shape
        return query.new_empty(query.shape), query.new_empty((b, n, s), dtype=torch.float32)

    @library.register_fake("megamug::attention_backward")
    def _(gradient, query, key, value, *_):
        return tuple(x.new_empty(x.shape) for x in (query, key, value))

    # What torch.utils.flop_counter counts, as it does for torch's own attention: two products, five in backward.
    @register_flop_formula(torch.ops.megamug.attention_forward)
    def _(query_shape, key_shape, *_, **__) -> int:
        s, b, n, width = query_shape
        return 2 * 2 * s * key_shape[0] * b * n * width

    @register_flop_formula(torch.ops.megamug.attention_backward)
    def _(_, query_shape, key_shape, *__, **___) -> int:
        s, b, n, width = query_shape
        return 5 * 2 * s * key_shape[0] * b * n * width

    library.register_autograd("megamug::cross_entropy", _cross_entropy_backward, setup_context=_cross_entropy_setup)
    library.register_autograd("megamug::masked_patch", _masked_patch_backward, setup_context=_masked_patch_setup)
    library.register_autograd("megamug::attention_forward", _attention_backward, setup_context=_attention_setup)


_LIBRARIES = _load()
_log.log(logging.INFO if _LIBRARIES.cpu else logging.WARNING, "losses: %s", _LIBRARIES.reason)

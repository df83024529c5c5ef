"""Checks of arithmetic and of what only GPUs do: FP8, Transformer Engine's layers, overlapped tensor parallelism, CUDA
graphs, the optimizer's kernel. Run by `validate`, and by the planner for each layout.

As there: one function per concern, a `UserError` with both numbers and the fix. Torch is imported only where this
machine's GPUs are looked at.
"""

from __future__ import annotations

import importlib.util
import math

from megamug.configuration.counts import as_mug, decoder_tokens, round_up, stack_layers, visible_tokens
from megamug.configuration.reading import towers
from megamug.configuration.sections import Config
from megamug.errors import UserError

# Transformer Engine's FP8 products (cuBLAS) want every inner dimension in multiples of 16 numbers. Forward that is
# features; in a weight's gradient it is tokens x micro-batch.
FP8_ROWS = FP8_COLUMNS = 16
PACKAGES = {"te": ("transformer_engine", "Transformer Engine",
                   "`pip install --no-build-isolation -e '.[te]'` in the checkout of megamug"),
            "apex": ("apex", "apex", "install it (see `megamug doctor`)")}  # fmt: skip


def check(config: Config, here: bool = True) -> None:
    """All of it. `here`: this machine is to train, so its devices and packages are looked at, too."""
    switches(config)
    overlap_tensor(config)
    cuda_graphs(config)
    compilation(config)
    if here:
        machine(config)
    if config.precision.fp8 != "none":
        sizes(config)


def switches(config: Config) -> None:
    """Keys of FP8 that need one another."""
    precision, parallel = config.precision, config.parallel
    kept = {key: getattr(precision, key) for key in ("first_layers_bf16", "last_layers_bf16")}
    said = next((f"precision.{key}({count})" for key, count in kept.items() if count), None)
    if precision.fp8 == "none":
        if said:
            raise UserError(f"{said} keeps layers out of FP8, but precision.fp8 is none; set precision.fp8=current, or"
                            f" precision.first_layers_bf16=0 precision.last_layers_bf16=0")
        if precision.fp8_parameters:
            raise UserError("precision.fp8_parameters(true) keeps weights in FP8, but precision.fp8 is none;"
                            " set precision.fp8=current or precision.fp8_parameters=false")
        return
    if precision.layers == "local":
        raise UserError(f"precision.fp8({precision.fp8}) needs Transformer Engine layers but precision.layers is local;"
                        f" set precision.layers=te or precision.fp8=none")
    if said and precision.fp8 == "delayed":
        raise UserError(f"{said}: delayed scaling keeps one history for all layers and cannot leave some in bf16;"
                        f" set precision.fp8=current, or precision.first_layers_bf16=0 precision.last_layers_bf16=0")
    if (said or precision.fp8_parameters) and precision.dtype != "bf16":
        raise UserError(f"{said or 'precision.fp8_parameters(true)'} needs precision.dtype(bf16), but it is"
                        f" {precision.dtype}; set precision.dtype=bf16")
    for name, layers in stack_layers(config).items():
        if said and sum(kept.values()) >= layers:
            first, last = kept.values()
            raise UserError(f"precision.first_layers_bf16({first}) + last_layers_bf16({last}) leave none of the"
                            f" {layers} layers of {name} in FP8; set precision.first_layers_bf16={int(layers > 1)}"
                            f" precision.last_layers_bf16={int(layers > 2)}")
    if precision.fp8_parameters and not parallel.distributed_optimizer:
        raise UserError("precision.fp8_parameters(true) needs parallel.distributed_optimizer(false) to be true: it"
                        " keeps the fp32 values; set parallel.distributed_optimizer=true"
                        " or precision.fp8_parameters=false")
    if precision.fp8_parameters and config.model.kind == "jam_cross" and config.fusion.freeze != "none":
        raise UserError(f"precision.fp8_parameters(true): a frozen tower (fusion.freeze({config.fusion.freeze})) has no"
                        f" fp32 values that its FP8 weights could be restored from; set precision.fp8_parameters=false")


def overlap_tensor(config: Config) -> None:
    """Transformer Engine's buffers for overlapped messages have one shape: the tokens x width of every layer."""
    parallel = config.parallel
    if not parallel.overlap_tensor:
        return
    needs, off = "parallel.overlap_tensor(true)", "parallel.overlap_tensor=false"
    if parallel.tensor == 1 or not parallel.sequence:
        found = "parallel.tensor(1)" if parallel.tensor == 1 else "parallel.sequence(false)"
        raise UserError(f"{needs} hides the messages of sequence parallelism, but there are none under {found};"
                        f" set {off}, or parallel.tensor=2 parallel.sequence=true")
    if config.precision.layers == "local":
        raise UserError(f"{needs} needs Transformer Engine layers but precision.layers is local;"
                        f" set precision.layers=te or {off}")
    if not towers(config):
        raise UserError(f"{needs} wants layers of one width and token count, and the stacks of model.kind"
                        f"({config.model.kind}) differ or are followed by others; set {off}")
    widths = {f"{name}.width({tower.width})": tower.width for name, tower in towers(config).items()}
    if len(set(widths.values())) > 1:
        raise UserError(f"{needs} wants towers of one width, but {' is not '.join(widths)}; set {off}")


def cuda_graphs(config: Config) -> None:
    """A graph holds forward and backward of one process, without messages to others."""
    parallel, precision = config.parallel, config.precision
    if not parallel.cuda_graphs:
        return
    if not towers(config) and (precision.layers == "te" or precision.fp8 != "none"):
        raise UserError(f"parallel.cuda_graphs(true): a graph of Transformer Engine's layers in model.kind"
                        f"({config.model.kind}) fails on the GPU when it is replayed; set parallel.cuda_graphs=false,"
                        " or precision.fp8=none precision.layers=local")
    for key, alone in (("tensor", 1), ("pipeline", 1), ("overlap_grad_reduce", False), ("overlap_param_gather", False)):
        value = getattr(parallel, key)
        if value != alone:
            said = str(value).lower()
            raise UserError(f"parallel.cuda_graphs(true) repeats forward and backward without messages to other"
                            f" processes, and parallel.{key}({said}) sends some; set"
                            f" parallel.{key}={str(alone).lower()} or parallel.cuda_graphs=false")


def compilation(config: Config) -> None:
    """`local` layers are compiled where one rank holds them whole."""
    precision, tensor = config.precision, config.parallel.tensor
    if precision.compile == "always" and precision.layers == "local" and tensor > 1:
        raise UserError(f"precision.compile(always) takes layers that one rank holds whole, and parallel.tensor is"
                        f" {tensor}; set precision.compile=auto or parallel.tensor=1")


def machine(config: Config) -> None:
    """What this run asks of this machine: packages, a GPU, its generation."""
    precision, parallel = config.precision, config.parallel
    needs: dict[str, str] = {}  # setting -> what to set instead
    if precision.layers == "te":
        needs["precision.layers(te)"] = "precision.layers=auto and precision.fp8=none"
    if precision.fp8 != "none":
        needs[f"precision.fp8({precision.fp8})"] = "precision.layers=auto and precision.fp8=none"
    if parallel.overlap_tensor:
        needs["parallel.overlap_tensor(true)"] = "parallel.overlap_tensor=false"
    for setting, fix in needs.items():
        _package("te", setting, fix)
    if config.optimizer.fused in PACKAGES:
        setting = f"optimizer.fused({config.optimizer.fused})"
        needs[setting] = "optimizer.fused=auto"
        _package(config.optimizer.fused, setting, needs[setting])
    if parallel.cuda_graphs:
        needs["parallel.cuda_graphs(true)"] = "parallel.cuda_graphs=false"
    if not needs:
        return
    import torch

    if torch.cuda.device_count() == 0:
        setting, fix = next(iter(needs.items()))
        raise UserError(f"{setting} needs a GPU and this machine has none that torch sees; set {fix}")
    capability = torch.cuda.get_device_capability()
    if precision.fp8 != "none" and capability < (9, 0):
        found = f"{capability[0]}.{capability[1]}"
        raise UserError(f"precision.fp8({precision.fp8}) needs compute capability 9.0 (Hopper) and this GPU has"
                        f" {found}; set precision.fp8=none")


def _package(which: str, setting: str, fix: str) -> None:
    module, name, get = PACKAGES[which]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{setting} needs {name}, which is not installed; {get} or set {fix}")


def sizes(config: Config) -> None:
    """Rows and features that Transformer Engine's FP8 products take, on each tensor-parallel rank.

    Passes without gradients have the same rows (a validation's last batch is filled up), or, in pictures while
    training, eight times as many as there are tokens, which is what a product forward asks for.
    """
    rows = _rows_of_language(config) if towers(config) else _rows_of_mug(as_mug(config))
    needs, micro = f"precision.fp8({config.precision.fp8})", config.data.micro_batch_size
    shared_by = config.parallel.tensor if config.parallel.sequence else 1
    step = shared_by * (FP8_ROWS // math.gcd(FP8_ROWS, micro))  # token counts have to be multiples of it
    for what, (tokens, key, value) in rows.items():
        if tokens % step:
            shared = f" / parallel.tensor({shared_by})" if shared_by > 1 else ""
            raise UserError(f"{needs}: {what} x data.micro_batch_size({micro}){shared} = {tokens * micro / shared_by:g}"
                            f" is not divisible by {FP8_ROWS}; set {key}={value + -tokens % step}")
    multiple = FP8_COLUMNS * config.parallel.tensor
    for name, size in _features(config).items():
        if size % multiple:
            raise UserError(f"{needs}: {name}({size}) is not divisible by {FP8_COLUMNS} x parallel.tensor"
                            f"({config.parallel.tensor}) = {multiple}; set {name}={round_up(size, multiple)}")


def _rows_of_mug(config: Config) -> dict[str, tuple[int, str, int]]:
    """{what it is: (tokens, key that makes them more, its value)}."""
    model, data = config.model, config.data
    tokens = visible_tokens(config)
    rows = {f"visible tokens({tokens})": (tokens, "model.register_tokens", model.register_tokens)}
    if model.image_loss_weight > 0:
        tokens = decoder_tokens(config)
        rows[f"image decoder tokens({tokens})"] = (
            tokens, "model.decoder_register_tokens", model.decoder_register_tokens
        )  # fmt: skip
    if model.caption_loss_weight > 0:
        length = data.caption_length
        rows[f"data.caption_length({length})"] = (length, "data.caption_length", length)
    return rows


def _rows_of_language(config: Config) -> dict[str, tuple[int, str, int]]:
    length = config.data.context_length
    return {f"data.context_length({length})": (length, "data.context_length", length)}


def _features(config: Config) -> dict[str, int]:
    """Widths of all linears in FP8, by key. MUG's decoders have feed-forwards of four times their width."""
    model = as_mug(config).model
    if towers(config):
        return {f"{name}.{key}": getattr(tower, key) for name, tower in towers(config).items()
                for key in ("width", "ffn_width")}  # fmt: skip
    keys = ["width", "ffn_width"]
    keys += ["decoder_width"] * (model.image_loss_weight > 0) + ["text_width"] * (model.caption_loss_weight > 0)
    return {f"model.{key}": getattr(model, key) for key in keys}

"""Checks of a whole configuration, before any device or process group is touched.

One function per concern; each raises `UserError` with both numbers and the fix, such as
`parallel: tensor(4) x pipeline(2) x data(2) = 16 but WORLD_SIZE is 8; set parallel.data=1`.
The formula for blocks is that of `megamug.models.mug.plan`, which needs torch; a test compares them.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from pathlib import Path

from megamug.configuration import validate_classifier, validate_lm, validate_optimizer, validate_precision
from megamug.configuration.checks import segmenter
from megamug.configuration.counts import (
    as_mug,
    data_parallel,
    decoder_tokens,
    patch_count,
    round_up,
    visible_patches,
    visible_tokens,
)
from megamug.configuration.parts import initial_parts
from megamug.configuration.presets import FINE_TUNED
from megamug.configuration.ranges import check_keys, check_values
from megamug.configuration.reading import load_config, resolve, towers
from megamug.configuration.sections import Config, ModelConfig
from megamug.data.padding import VOCABULARY_MULTIPLE, padded_vocabulary
from megamug.durable import folder_problem
from megamug.errors import UserError


def validate(config: Config, world_size: int, here: bool = True) -> None:
    """Raises UserError for the first thing that could not work on `world_size` processes; changes nothing.

    `here`: on this machine, with its devices; otherwise what only those can tell is not checked.
    What needs torch (tokenizer, devices, FP8) comes last, so that most mistakes are told before it is imported.
    """
    config = resolve(config)
    sizes(config, world_size)
    trackers(config)
    own = {"mug": (files, run_folder, vocabulary), "segmenter": (segmenter.files, run_folder),
           "classifier": (validate_classifier.augmentation, validate_classifier.files, run_folder)}  # fmt: skip
    for check in own.get(config.model.kind, (validate_lm.files, run_folder)):
        check(config)
    if here:
        devices(config)
    validate_precision.check(config, here)


def sizes(config: Config, world_size: int) -> None:
    """Values, sizes and layout of a resolved configuration: all that can be told without files and devices."""
    model(config)
    layout(config, world_size)
    batch(config, world_size)
    validate_optimizer.optimizer(config)
    validate_optimizer.schedule(config)
    tensor_parallel(config)
    sequence_parallel(config)
    pipeline(config, world_size)


def model(config: Config) -> None:
    """Sizes of the model of a resolved configuration, whatever the layout."""
    check_values(config)
    check_keys(config)
    language = (validate_lm.widths, validate_lm.context, validate_lm.fusion)
    own = {"mug": (losses, text, image, widths, initial_parts),
           "classifier": (image, widths, validate_classifier.head, initial_parts),
           "segmenter": (image, widths, segmenter.head, initial_parts)}  # fmt: skip
    for check in own.get(config.model.kind, language):
        check(config)


def losses(config: Config) -> None:
    """At least one loss."""
    if config.model.image_loss_weight == config.model.caption_loss_weight == 0:
        raise UserError(
            "model: image_loss_weight(0) and caption_loss_weight(0) leave nothing to learn; set one of them above 0"
        )
    if config.data.captions != "own" and config.model.caption_loss_weight == 0:
        raise UserError(f"data.captions is {config.data.captions}, but model.caption_loss_weight is 0: no caption is"
                        " read; set data.captions=own or model.caption_loss_weight above 0")


def text(config: Config) -> None:
    """A share of hidden tokens where some are hidden."""
    ratio = config.model.text_mask_ratio
    if config.model.text_objective != "masked" and ratio != ModelConfig.text_mask_ratio:
        raise UserError(f"model.text_mask_ratio({ratio:g}) hides tokens of captions, but model.text_objective"
                        f"({config.model.text_objective}) hides none; set model.text_objective=masked, or leave"
                        " model.text_mask_ratio out")


def image(config: Config) -> None:
    """Whole patches, some of them visible and, for the image loss, some hidden."""
    config = as_mug(config)
    size, patch, ratio = config.data.image_size, config.model.patch_size, config.model.mask_ratio
    if size % patch:
        fix = max(patch, round(size / patch) * patch)
        raise UserError(f"data.image_size({size}) is not divisible by model.patch_size({patch});"
                        f" set data.image_size={fix}")
    patches, visible = patch_count(config), visible_patches(config)
    if visible < 1:
        fix = math.floor((1 - 1 / patches) * 1000) / 1000
        raise UserError(f"model.mask_ratio({ratio}) leaves 0 of {patches} patches visible; set model.mask_ratio={fix}"
                        if patches > 1 else f"data.image_size({size}) makes one patch; set data.image_size={8 * patch}")
    if config.model.image_loss_weight > 0 and visible == patches:
        raise UserError(
            f"model.mask_ratio({ratio}) hides 0 of {patches} patches: there is nothing to paint;"
            f" set model.mask_ratio=0.75 or model.image_loss_weight=0"
        )


def widths(config: Config) -> None:
    """Widths that heads share evenly; widths that 2-D sine-cosine positions (four equal parts) can fill."""
    model = as_mug(config).model
    stacks = [("width", "heads", 4)]
    if model.image_loss_weight > 0:
        stacks.append(("decoder_width", "decoder_heads", 4))
    if model.caption_loss_weight > 0:
        stacks.append(("text_width", "text_heads", 1))
    for width_key, heads_key, multiple in stacks:
        width, heads = getattr(model, width_key), getattr(model, heads_key)
        step = math.lcm(heads, multiple)
        fix = f"set model.{width_key}={round_up(width, step)}"
        if width % heads:
            raise UserError(f"model.{width_key}({width}) is not divisible by model.{heads_key}({heads}); {fix}")
        if width % multiple:
            raise UserError(f"model.{width_key}({width}) is not divisible by 4, which 2-D positions need; {fix}")


def layout(config: Config, world_size: int) -> None:
    """tensor x pipeline x data = WORLD_SIZE, and switches that need one another."""
    parallel = config.parallel
    tensor, stages, data = parallel.tensor, parallel.pipeline, parallel.data
    product = tensor * stages * (data or 1)
    if product != world_size and (data is not None or world_size % product):
        said = f"parallel: tensor({tensor}) x pipeline({stages})" + (f" x data({data})" if data is not None else "")
        said += f" = {product} but WORLD_SIZE is {world_size}"
        if world_size % (tensor * stages) == 0:
            raise UserError(f"{said}; set parallel.data={world_size // (tensor * stages)}")
        fewer_tensor = math.gcd(tensor, world_size)
        fewer_stages = math.gcd(stages, world_size // fewer_tensor)
        free = " parallel.data=null" if data is not None else ""
        raise UserError(
            f"{said}; start {product} processes (torchrun --nproc-per-node N), or set parallel.tensor={fewer_tensor}"
            f" parallel.pipeline={fewer_stages}{free}"
        )
    if parallel.sequence and tensor == 1:
        raise UserError("parallel.sequence(true) shares tokens among tensor-parallel ranks, but parallel.tensor is 1;"
                        " set parallel.sequence=false or parallel.tensor=2")
    if parallel.overlap_param_gather and not parallel.distributed_optimizer:
        raise UserError("parallel.overlap_param_gather(true) needs parallel.distributed_optimizer(false) to be true;"
                        " set parallel.distributed_optimizer=true or parallel.overlap_param_gather=false")


def batch(config: Config, world_size: int) -> None:
    """Whole micro-batches for every data-parallel rank, which a BatchNorm has more than one image of."""
    whole, micro, data = config.data.global_batch_size, config.data.micro_batch_size, data_parallel(config, world_size)
    if micro > whole:
        raise UserError(f"data.micro_batch_size({micro}) is larger than data.global_batch_size({whole});"
                        f" set data.micro_batch_size={max(1, whole // data)}")
    if whole % (micro * data):
        if whole % data == 0:
            share = whole // data
            fix = f"data.micro_batch_size={max(n for n in range(1, min(micro, share) + 1) if share % n == 0)}"
        else:
            fix = f"data.global_batch_size={round_up(whole, micro * data)}"
        raise UserError(f"data: global_batch_size({whole}) is not divisible by micro_batch_size({micro}) x"
                        f" data-parallel ranks({data}) = {micro * data}; set {fix}")
    kind = config.model.kind
    own = config.classifier
    if micro * data == 1 and (kind == "segmenter" or own.frozen and own.batch_norm and own.pool != "attention"):
        raise UserError(f"data.micro_batch_size(1): the BatchNorm of this {kind} takes its statistics over the images"
                        " of a micro-batch of all replicas, and that is one image; set data.micro_batch_size=2")


def tensor_parallel(config: Config) -> None:
    """Heads and feed-forward shared evenly. The decoders' feed-forwards are 4 x width, and the heads divide the width,
    so their heads say it all."""
    model, tensor = as_mug(config).model, config.parallel.tensor
    if towers(config):
        return validate_lm.tensor_parallel(config)
    shared = {"heads": model.heads, "ffn_width": model.ffn_width}
    if model.image_loss_weight > 0:
        shared["decoder_heads"] = model.decoder_heads
    if model.caption_loss_weight > 0:
        shared["text_heads"] = model.text_heads
    common = math.gcd(*shared.values())
    for name, number in shared.items():
        if number % tensor:
            fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise UserError(f"model.{name}({number}) is not divisible by parallel.tensor({tensor});"
                            f" set parallel.tensor to one of {fits}")


def sequence_parallel(config: Config) -> None:
    """Tokens of each stack shared evenly under parallel.sequence."""
    model, tensor = as_mug(config).model, config.parallel.tensor
    if not config.parallel.sequence:
        return
    if towers(config):
        return validate_lm.sequence_parallel(config)
    tokens = visible_tokens(config)
    if tokens % tensor:
        raise UserError(
            f"visible tokens: 1 class + {model.register_tokens} register + {visible_patches(config)} visible patches ="
            f" {tokens} is not divisible by parallel.tensor({tensor}) under parallel.sequence;"
            f" set model.register_tokens={model.register_tokens + -tokens % tensor}"
        )
    tokens = decoder_tokens(config)
    if model.image_loss_weight > 0 and tokens % tensor:
        raise UserError(
            f"image decoder tokens: 1 class + {model.decoder_register_tokens} register + {patch_count(config)} patches"
            f" = {tokens} is not divisible by parallel.tensor({tensor}) under parallel.sequence;"
            f" set model.decoder_register_tokens={model.decoder_register_tokens + -tokens % tensor}"
        )
    tokens = config.data.caption_length
    if model.caption_loss_weight > 0 and tokens % tensor:
        raise UserError(f"data.caption_length({tokens}) is not divisible by parallel.tensor({tensor}) under"
                        f" parallel.sequence; set data.caption_length={round_up(tokens, tensor)}")


def pipeline(config: Config, world_size: int) -> None:
    """A block for every stage; with virtual stages, micro-batches that the interleaved schedule can deal out."""
    parallel = config.parallel
    stages, virtual, blocks = parallel.pipeline, parallel.virtual, block_count(config)
    if stages > blocks:
        raise UserError(f"parallel.pipeline({stages}) is more than the model's blocks({blocks});"
                        f" set parallel.pipeline to at most {blocks}")
    if virtual == 1:
        return
    if stages == 1:
        raise UserError(f"parallel.virtual({virtual}) cuts pipeline stages further, but parallel.pipeline is 1;"
                        f" set parallel.virtual=1 or parallel.pipeline=2")
    if stages * virtual > blocks:
        raise UserError(f"parallel.pipeline({stages}) x parallel.virtual({virtual}) = {stages * virtual} is more than"
                        f" the model's blocks({blocks}); set parallel.virtual={blocks // stages}")
    data = data_parallel(config, world_size)
    share = config.data.micro_batch_size * data
    count = config.data.global_batch_size // share
    if count % stages:
        raise UserError(
            f"micro-batches of a step: data.global_batch_size({config.data.global_batch_size}) /"
            f" (data.micro_batch_size({config.data.micro_batch_size}) x data-parallel ranks({data})) = {count} is not"
            f" divisible by parallel.pipeline({stages}) under parallel.virtual({virtual});"
            f" set data.global_batch_size={round_up(count, stages) * share} or parallel.virtual=1"
        )


def trackers(config: Config) -> None:
    """The package of every tracker that is asked for by name."""
    log = config.log
    for name in log.trackers or []:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise UserError(f"log.trackers: {name} is not installed here; pip install {name}, or take it out of"
                            " log.trackers (metrics.jsonl holds the same)")
    if log.trackers and "tensorboard" in log.trackers and not log.tensorboard:
        raise UserError("log.tensorboard is false and log.trackers has tensorboard; set log.tensorboard=true, or take"
                        " it out of log.trackers")


def files(config: Config) -> None:
    """Data sets are there and indexed, and the tokenizer is there."""
    data = config.data
    if data.train is None:
        raise UserError("data.train is not set; give it a folder of tar shards, a glob, or a list of {path, weight}")
    from megamug.data.pairs import selection
    from megamug.data.shards.sources import WithoutCaptions, resolve_sources

    captions = config.model.caption_loss_weight
    for key, sources in (("data.train", data.train), ("data.validation", data.validation)):
        try:
            found = [] if sources is None else resolve_sources(sources, captions=captions > 0)
            if key == "data.train":
                selection.check(found, data.fraction, data.captions)
        except WithoutCaptions as error:
            raise UserError(f"{key}: {error}, and model.caption_loss_weight is {captions:g}; set"
                            " model.caption_loss_weight=0 to learn from the images alone, or give them captions and"
                            " index them again") from None
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    if config.model.caption_loss_weight > 0 and data.tokenizer is None:
        raise UserError(f"data.tokenizer is not set and model.caption_loss_weight is"
                        f" {config.model.caption_loss_weight:g}; make one with `megamug data tokenizer SHARDS"
                        f" --output FILE --vocab-size N`, or set model.caption_loss_weight=0")
    if data.tokenizer is not None and not Path(data.tokenizer).exists():
        raise UserError(f"data.tokenizer: there is no file {data.tokenizer}; make it with"
                        f" `megamug data tokenizer SHARDS --output {data.tokenizer} --vocab-size N`")


def vocabulary(config: Config) -> None:
    """A tokenizer that can be read, and its padded vocabulary shared evenly."""
    if config.model.caption_loss_weight == 0:
        return
    from megamug.data.pairs.text import Tokenizer

    try:
        size = Tokenizer(config.data.tokenizer).vocab_size
    except UserError as error:
        raise UserError(f"data.tokenizer: {error}") from None
    padded, tensor = padded_vocabulary(size), config.parallel.tensor
    if padded % tensor:
        fits = ", ".join(str(n) for n in range(1, tensor) if padded % n == 0 and config.model.text_heads % n == 0)
        raise UserError(f"the vocabulary of {config.data.tokenizer}, padded to a multiple of {VOCABULARY_MULTIPLE}"
                        f" ({padded}), is not divisible by parallel.tensor({tensor});"
                        f" set parallel.tensor to one of {fits}")


def run_folder(config: Config) -> None:
    """RUN can be written, and holds no run of another model, nor one that computes another thing from its weights."""
    run = Path(config.run_dir)
    if problem := folder_problem(run):
        raise UserError(f"run_dir: {problem}; set run_dir to another folder")
    written = run / "config.yaml"
    if written.exists() and any((run / "checkpoints").glob("step-*")):
        saved = resolve(load_config(written))
        before, now = model_identity(saved), model_identity(config)
        for key in now:
            if before.get(key) != now[key]:
                raise UserError(f"run_dir: {run} holds checkpoints of another model: {key} was {before.get(key)} and is"
                                f" now {now[key]}; set run_dir to a new folder, or {key} as it was")
        before, now = meaning(saved), meaning(config)
        for key in now:
            if before[key] != now[key]:
                raise UserError(f"run_dir: {run} holds checkpoints whose loss, optimizer or function is another:"
                                f" {key} was {before[key]} and is now {now[key]}; set {key} as it was, or run_dir to a"
                                f" new folder and model.initial={run} to start from these weights")


def devices(config: Config) -> None:
    """One GPU for every process of this machine, where there are GPUs."""
    import torch

    gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if 0 < gpus < processes:
        raise UserError(f"{processes} processes on this machine but {gpus} GPUs; start torchrun with --nproc-per-node"
                        f" {gpus}, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on the CPU")


def block_count(config: Config) -> int:
    """What a pipeline can be cut into: layers, and each stack's embedding and head."""
    model = as_mug(config).model
    if towers(config):
        return validate_lm.block_count(config)
    blocks = 1 + model.layers + (config.model.kind in FINE_TUNED)
    if model.image_loss_weight > 0:
        blocks += 1 + model.decoder_layers + 1
    if model.caption_loss_weight > 0:
        blocks += 1 + model.text_unimodal_layers + model.text_multimodal_layers + 1
    return blocks


def model_identity(config: Config) -> dict[str, object]:
    """What makes checkpoints of one model unfit for another."""
    model = config.model
    if towers(config):
        return validate_lm.identity(config)
    if model.kind == "classifier":
        return validate_classifier.identity(config)
    if model.kind == "segmenter":
        return segmenter.identity(config)
    sizes = ["patch_size", "layers", "width", "heads", "ffn_width", "register_tokens"]
    if model.image_loss_weight > 0:
        sizes += ["decoder_layers", "decoder_width", "decoder_heads", "decoder_register_tokens"]
    if model.caption_loss_weight > 0:
        sizes += ["text_unimodal_layers", "text_multimodal_layers", "text_width", "text_heads", "tie_vocabulary",
                  "text_objective"]
    found = {
        "model.kind": model.kind,
        "model.image_loss_weight above 0": model.image_loss_weight > 0,
        "model.caption_loss_weight above 0": model.caption_loss_weight > 0,
        "data.image_size": config.data.image_size,
        "data.caption_length": config.data.caption_length if model.caption_loss_weight > 0 else None,
    }
    return found | {f"model.{name}": getattr(model, name) for name in sizes}


def meaning(config: Config) -> dict[str, object]:
    """`function`, and what the weights are trained for, on and by: a run that went on with another value would have one
    curve of two losses, or states of another optimizer. New runs may start from its weights (`model.initial`)."""
    keys = ("loss_on",) if towers(config) else ("fraction", "captions")
    told = {f"data.{key}": getattr(config.data, key) for key in keys}
    if config.model.kind == "classifier":
        told["classifier.ema above 0"] = config.classifier.ema > 0
    return function(config) | told | {"optimizer.name": config.optimizer.name}


def function(config: Config) -> dict[str, object]:
    """What the same weights compute something else under, beside `model_identity`, or what pixels mean to them."""
    model, data = config.model, config.data
    if towers(config):  # the base of rotary positions is in `model_identity`
        return {f"{name}.norm_eps": tower.norm_eps for name, tower in towers(config).items()}
    painted = {"model.norm_pix_loss": model.norm_pix_loss} if model.kind == "mug" else {}
    return {"model.layer_norm_eps": model.layer_norm_eps, **painted, "data.mean": data.mean, "data.std": data.std}

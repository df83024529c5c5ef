"""What each configuration key may hold on its own: numbers within ranges, words out of choices, lists of a length."""

from __future__ import annotations

from megamug.command_line.arguments import Range
from megamug.configuration.presets import BY_KIND, FINE_TUNED
from megamug.configuration.reading import keys, nearest
from megamug.configuration.sections import Config
from megamug.data.pairs.selection import CAPTIONS
from megamug.data.shards.captions import LINES
from megamug.errors import UserError

_COUNT, _FROM_ZERO, _POSITIVE = Range(1), Range(0), Range(0, open_low=True)
_DECAY = Range(0, 1, open_high=True)

RANGES = {
    "seed": Range(0, 2**31 - 1),
    "model.image_loss_weight": _FROM_ZERO, "model.caption_loss_weight": _FROM_ZERO, "model.mask_ratio": _DECAY,
    "model.patch_size": _COUNT, "model.layers": _COUNT, "model.width": _COUNT, "model.heads": _COUNT,
    "model.ffn_width": _COUNT, "model.register_tokens": _FROM_ZERO, "model.decoder_layers": _COUNT,
    "model.decoder_width": _COUNT, "model.decoder_heads": _COUNT, "model.decoder_register_tokens": _FROM_ZERO,
    "model.text_unimodal_layers": _FROM_ZERO, "model.text_multimodal_layers": _COUNT, "model.text_width": _COUNT,
    "model.text_heads": _COUNT, "model.text_mask_ratio": Range(0, 1, open_low=True),
    "model.layer_norm_eps": _POSITIVE, "model.z_loss_weight": _FROM_ZERO,
    "fusion.cross_every": _COUNT, "fusion.output_width": _COUNT,
    "classifier.classes": Range(2), "classifier.label_smoothing": _DECAY,
    "classifier.drop_path": _DECAY, "classifier.mixup": _FROM_ZERO, "classifier.cutmix": _FROM_ZERO,
    "classifier.random_erasing": Range(0, 1), "classifier.ema": _DECAY,
    "classifier.layer_decay": Range(0, 1, open_low=True),
    "segmenter.classes": Range(2, 255), "segmenter.position_image_size": _COUNT, "segmenter.blocks": _FROM_ZERO,
    "segmenter.channels": _COUNT, "segmenter.pool_scales": _COUNT, "segmenter.auxiliary_weight": _FROM_ZERO,
    "segmenter.auxiliary_channels": _COUNT, "segmenter.dropout": _DECAY, "segmenter.drop_path": _DECAY,
    "segmenter.layer_decay": Range(0, 1, open_low=True), "segmenter.scale": _POSITIVE,
    "segmenter.most_of_one_class": Range(0, 1, open_low=True),
    "data.context_length": _COUNT, "data.cm3_spans": _FROM_ZERO, "data.hidden_text": Range(0, 1),
    "data.fraction": Range(0, 1, open_low=True),
    "data.image_size": _COUNT, "data.caption_length": _COUNT, "data.global_batch_size": _COUNT,
    "data.micro_batch_size": _COUNT, "data.crop_scale": Range(0, 1, open_low=True), "data.mean": Range(0, 1),
    "data.background": Range(0, 255),
    "data.std": _POSITIVE, "data.validation_samples": _COUNT, "data.threads": _COUNT, "data.prefetch": _COUNT,
    "data.max_failure_rate": Range(0, 1),
    "parallel.tensor": _COUNT, "parallel.pipeline": _COUNT, "parallel.virtual": _COUNT, "parallel.data": _COUNT,
    "parallel.timeout_minutes": _POSITIVE,
    "optimizer.learning_rate": _POSITIVE, "optimizer.min_learning_rate": _FROM_ZERO,
    "optimizer.warmup_steps": _FROM_ZERO, "optimizer.weight_decay": _FROM_ZERO, "optimizer.beta1": _DECAY,
    "optimizer.beta2": _DECAY, "optimizer.momentum": _DECAY,
    "optimizer.trust_coefficient": _POSITIVE, "optimizer.eps": _POSITIVE, "optimizer.clip_grad": _FROM_ZERO,
    "precision.first_layers_bf16": _FROM_ZERO, "precision.last_layers_bf16": _FROM_ZERO,
    "train.steps": _COUNT, "train.validate_every": _FROM_ZERO, "train.pictures_every": _FROM_ZERO,
    "train.compare_replicas_every": _FROM_ZERO, "optimizer.skip_spikes": _FROM_ZERO,
    "checkpoint.every": _FROM_ZERO, "checkpoint.keep": _FROM_ZERO, "checkpoint.go_back_to": _FROM_ZERO,
    "log.every": _COUNT,
}  # fmt: skip

CHOICES = {
    "model.kind": tuple(BY_KIND),
    "model.text_objective": ("autoregressive", "masked"),
    "fusion.freeze": ("none", "text", "image", "both"),
    "classifier.pool": ("mean", "class_token", "attention"),
    "data.caption_lines": LINES,
    "data.captions": CAPTIONS,
    "data.loss_on": ("all", "response", "text", "image"),
    "parallel.recompute": ("none", "full"),
    "precision.dtype": ("fp32", "bf16"),
    "precision.fp8": ("none", "delayed", "current", "blockwise"),
    "precision.layers": ("auto", "local", "te"),
    "precision.compile": ("auto", "always", "never"),
    "optimizer.name": ("adamw", "lars", "sgd"),
    "optimizer.schedule": ("cosine", "linear"),
    "optimizer.fused": ("auto", "te", "apex", "torch"),
    "log.trackers": ("tensorboard", "wandb"),
}

for _tower in ("lm", "text_tower", "image_tower"):
    RANGES |= {f"{_tower}.{key}": _COUNT for key in ("layers", "width", "heads", "query_groups", "ffn_width")}
    RANGES |= {f"{_tower}.max_positions": _COUNT, f"{_tower}.norm_eps": _POSITIVE, f"{_tower}.init_std": _POSITIVE}
    RANGES[f"{_tower}.grid"] = _FROM_ZERO
    RANGES[f"{_tower}.rotary_base"], RANGES[f"{_tower}.rotary_scaling"] = Range(1, open_low=True), _POSITIVE
    CHOICES[f"{_tower}.norm"] = ("layernorm", "layernorm_plain", "rmsnorm")
    CHOICES[f"{_tower}.activation"] = ("gelu", "relu", "swiglu")
    CHOICES[f"{_tower}.positions"] = ("learned", "rotary", "rotary_grid")

LARGEST = 2**31 - 1  # of whole numbers: what C++ underneath takes everywhere
EMPTY = {f"{_tower}.rotary_scaling" for _tower in ("lm", "text_tower", "image_tower")}  # or may be []
LENGTHS = {"data.crop_scale": 2, "data.background": 3, "data.mean": 3, "data.std": 3} | dict.fromkeys(EMPTY, 4)
LENGTHS |= {"segmenter.blocks": 4, "segmenter.scale": 2}


def check_values(config: Config) -> None:
    """Every number in its range, every word one of its choices, every list of its length; else UserError."""
    for key in keys():
        value = get(config, key)
        if isinstance(value, int) and value > LARGEST:
            raise UserError(f"{key}({value}) must be at most {LARGEST}")
        for text in _texts(value):
            if not text.strip():
                raise UserError(f"{key} is empty; leave it out, or set {key}=null where it may be unset")
            if any(ord(character) < 32 for character in text):
                raise UserError(f"{key}: {text!r} holds a control character; write it without")
        for word in value if isinstance(value, list) else [value]:
            if key in CHOICES and word is not None and word not in CHOICES[key]:
                choices, near = CHOICES[key], nearest(word, CHOICES[key])
                near = f"[{near}]" if isinstance(value, list) else near
                raise UserError(f"{key}: {word!r} is none of {', '.join(choices)}; set {key}={near}")
        may_lack = value is None or key in EMPTY and not value
        if key in LENGTHS and not may_lack and len(value) != LENGTHS[key]:
            raise UserError(f"{key}: {LENGTHS[key]} numbers wanted, found {len(value)}: {value}")
        if key in RANGES and value is not None:
            for number in value if isinstance(value, list) else [value]:
                if number not in RANGES[key]:
                    raise UserError(f"{key}({number}) must be {RANGES[key]}")
    for key in ("data.crop_scale", "segmenter.scale"):
        low, high = get(config, key)
        if low > high:
            raise UserError(f"{key}: {low} is above {high}; set {key}=[{high}, {low}]")


def _texts(value: object) -> list[str]:
    """The texts of a value: itself, or the paths of its data sets."""
    if isinstance(value, list):
        return [text for entry in value for text in _texts(entry.get("path") if isinstance(entry, dict) else entry)]
    return [value] if isinstance(value, str) else []


# What only models of some kinds read; the rest of `model` belongs to mug.
_KINDS = {"lm": ("decoder_lm",), "text_tower": ("jam_cross",), "image_tower": ("jam_cross",), "fusion": ("jam_cross",)}
_VISION = ("mug", *FINE_TUNED)
_LANGUAGE = tuple(kind for kind in BY_KIND if kind not in _VISION)
_KINDS |= dict.fromkeys(("model.kind", "model.preset", "model.initial"), tuple(BY_KIND)) | {"model": ("mug",)}
_KINDS |= {"model.z_loss_weight": _LANGUAGE, "data.tokenizer": ("mug", *_LANGUAGE)}
_KINDS |= {kind: (kind,) for kind in FINE_TUNED}
_KINDS |= {f"model.{key}": _VISION for key in ("initial_parts", "patch_size", "layers", "width", "heads", "ffn_width",
                                               "register_tokens", "layer_norm_eps")}  # fmt: skip
_KINDS |= {f"data.{key}": _LANGUAGE for key in ("context_length", "cm3_spans", "hidden_text",
                                                  "separate_documents", "loss_on")}  # fmt: skip
_KINDS |= {f"data.{key}": _VISION for key in ("fraction", "image_size", "flip", "background",
                                              "mean", "std", "threads", "prefetch", "max_failure_rate")}  # fmt: skip
_KINDS |= {f"data.{key}": ("mug",) for key in ("captions", "caption_length", "caption_lines")}
_KINDS["data.crop_scale"] = ("mug", "classifier")


def check_keys(config: Config) -> None:
    """No key set (to something else than its default) that this kind of model does not read."""
    kind, default = config.model.kind, Config()
    for key in keys():
        kinds = _KINDS.get(key) or _KINDS.get(key.partition(".")[0])
        if kinds and kind not in kinds and get(config, key) != get(default, key):
            raise UserError(f"{key} is set to {get(config, key)!r}, but it is of model.kind={' or '.join(kinds)} and"
                            f" model.kind is {kind}; leave {key} out, or set model.kind={kinds[0]}")


def get(config: Config, key: str) -> object:
    """The value of `section.key` (or `key` at the top level)."""
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)

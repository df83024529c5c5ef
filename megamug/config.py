"""Typed configuration sections, and how they are read and written.

`megamug train CONFIG.yaml section.key=value ...`: the YAML file holds these sections, overrides win over it (the last
one of a key wins), and what comes out is written to `RUN/config.yaml`. Every key has one type and one meaning; what
`None` (`null` in YAML) means is said beside it. The comments beside the keys are the text of docs/configuration.md.

Reading is strict: a key that is unknown or given twice and a value of another type are a `UserError`.
Whether the values make sense together is the business of `megamug.validate`.
"""

from __future__ import annotations

import copy
import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path

import yaml

from megamug.durable import replace_text
from megamug.errors import UserError
from megamug.models.presets import PRESETS

Sources = str | list[dict]  # a folder of shards, a glob, or a list of {path, weight}


@dataclass
class ModelConfig:
    """The model. A `None` size is taken from the preset (`megamug.models.presets`)."""

    kind: str = "mug"  # mug: multimodal generative vision learner
    preset: str = "vit_b16"  # vit_ti16 | vit_s16 | vit_b16 | vit_l16 | vit_h14 | vit_g14 | demo
    image_loss_weight: float = 1.0  # 0 removes the image decoder
    caption_loss_weight: float = 0.1  # 0 removes the text decoder: the model is then MAE
    mask_ratio: float = 0.75  # share of patches hidden from the encoder
    norm_pix_loss: bool = True  # targets normalised per patch (MAE)
    patch_size: int | None = None  # pixels; this and the sizes below: null = the preset's
    # encoder
    layers: int | None = None  # transformer layers of the encoder
    width: int | None = None  # hidden size of the encoder
    heads: int | None = None  # attention heads of the encoder
    ffn_width: int | None = None  # hidden size of the encoder's feed-forward
    register_tokens: int = 0  # learned tokens beside the class token: make the visible count divisible
    # image decoder
    decoder_layers: int | None = None  # transformer layers of the image decoder
    decoder_width: int | None = None  # its hidden size; its feed-forward is four times as wide
    decoder_heads: int | None = None  # its attention heads
    decoder_register_tokens: int = 0  # learned tokens beside its class token
    # text decoder
    text_unimodal_layers: int | None = None  # text decoder layers that see text only
    text_multimodal_layers: int | None = None  # text decoder layers with cross-attention to the image
    text_width: int | None = None  # hidden size of the text decoder; its feed-forward is four times as wide
    text_heads: int | None = None  # its attention heads
    tie_vocabulary: bool = True  # output projection = token embedding
    layer_norm_eps: float = 1e-6  # added to the variance in every LayerNorm


@dataclass
class DataConfig:
    """Data. Batch sizes count image-caption pairs."""

    train: Sources | None = None  # folder of shards | glob | list of {path, weight}; must be set
    validation: Sources | None = None  # the same; None: no validation
    tokenizer: str | None = None  # SentencePiece model; needed while caption_loss_weight > 0
    image_size: int = 224  # pixels; images are cropped to squares
    caption_length: int = 64  # tokens predicted per caption
    global_batch_size: int = 256  # pairs per optimizer step, over all processes
    micro_batch_size: int = 32  # pairs per forward and backward of one data-parallel rank
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])  # area share of the random crop
    flip: bool = True  # random horizontal flip; switch off where captions say left and right
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # of red, green, blue in 0..1
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])  # pixels become (x - mean) / std
    validation_samples: int = 1024  # at most so many held-out pairs per validation
    threads: int = 2  # decoding threads per process
    prefetch: int = 2  # global batches decoded ahead of the step
    max_failure_rate: float = 0.001  # share of samples that may fail at run time before the run ends


@dataclass
class ParallelConfig:
    """How the processes share the work: tensor x pipeline x data = WORLD_SIZE."""

    tensor: int = 1  # processes that share each layer
    pipeline: int = 1  # stages that the layers are cut into, by FLOPs
    data: int | None = None  # None: WORLD_SIZE / (tensor x pipeline)
    sequence: bool = False  # sequence parallelism inside the tensor-parallel group
    distributed_optimizer: bool = False  # optimizer state sharded over the data-parallel ranks
    overlap_grad_reduce: bool = False  # reduce gradients while backward goes on
    overlap_param_gather: bool = False  # gather parameters during forward; needs distributed_optimizer
    recompute: str = "none"  # none | full: recompute activations layer by layer in backward
    timeout_minutes: float = 10.0  # of every collective


@dataclass
class PrecisionConfig:
    """Arithmetic. bf16 keeps fp32 main parameters and fp32 main gradients."""

    dtype: str = "fp32"  # fp32 | bf16
    fp8: str = "none"  # none | delayed | current | blockwise (Transformer Engine on Hopper)
    layers: str = "auto"  # auto | local | te: Transformer Engine layers where there is a GPU and the package


@dataclass
class OptimizerConfig:
    """AdamW with a cosine schedule. Biases, norms and tokens do not decay."""

    learning_rate: float = 1.5e-4  # at the end of warm-up, as it stands: not scaled by the batch
    min_learning_rate: float = 0.0  # at the last step
    warmup_steps: int = 0  # linear from 0
    weight_decay: float = 0.05  # decoupled
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    clip_grad: float = 1.0  # largest global gradient norm; 0: no clipping


@dataclass
class TrainConfig:
    """How long, and how often to look."""

    steps: int = 1000  # optimizer steps
    validate_every: int = 0  # steps; 0: only after the last step
    pictures_every: int = 0  # steps; 0: only with the last validation


@dataclass
class CheckpointConfig:
    """What a crash costs: at most `every` steps."""

    every: int = 0  # steps; 0: only after the last step
    keep: int = 3  # newest complete checkpoints kept; 0 keeps all
    asynchronous: bool = False  # write in the background while training goes on


@dataclass
class LogConfig:
    """What is written down while training runs."""

    every: int = 10  # steps between console lines and flushes of metrics.jsonl
    tensorboard: bool = True  # write RUN/tensorboard


@dataclass
class Config:
    """A run. The sections follow the two keys that belong to none."""

    seed: int = 1234  # of initialisation, sample order, crops, flips and masks
    run_dir: str = "runs/mug"  # holds config.yaml, metrics.jsonl, tensorboard/, checkpoints/, pictures/, log/
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of YAML file `path` (None: the defaults) with `section.key=value` overrides; not yet resolved.

    Raises UserError: file missing or not YAML, unknown or repeated key, value of another type.
    """
    config = Config()
    if path is not None:
        tree = _read_yaml(Path(path))
        try:
            _fill(config, tree)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    for override in overrides:
        try:
            _apply(config, override)
        except UserError as error:
            raise UserError(f"override {override}: {error}") from None
    return config


def resolve(config: Config) -> Config:
    """A copy in which the preset has filled every model size left at None. Raises UserError for an unknown preset."""
    config = copy.deepcopy(config)
    preset = PRESETS.get(config.model.preset)
    if preset is None:
        raise UserError(
            f"model.preset: there is no preset {config.model.preset!r}; the nearest is"
            f" {nearest(config.model.preset, PRESETS)!r} (of {', '.join(PRESETS)})"
        )
    for name, size in preset.items():
        if getattr(config.model, name) is None:
            setattr(config.model, name, size)
    return config


def to_yaml(config: Config) -> str:
    """YAML text that `load_config` reads back as an equal configuration."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def save_config(config: Config) -> Path:
    """Write RUN/config.yaml whole or not at all; returns its path. One process of a run calls it."""
    path = Path(config.run_dir, "config.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, to_yaml(config))
    return path


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` that looks most like `name`."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def keys() -> dict[str, object]:
    """Every key as `section.key` (or `key` at the top level), in order, with its type."""
    found: dict[str, object] = {}
    for name, kind in typing.get_type_hints(Config).items():
        if is_dataclass(kind):
            found.update({f"{name}.{key}": hint for key, hint in typing.get_type_hints(kind).items()})
        else:
            found[name] = kind
    return found


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML forbids and PyYAML lets pass (the last one would win)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key_node.value in seen and key_node.value != "<<":
                problem = f"key {key_node.value!r} is given twice, first on line {seen[key_node.value]}; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen[key_node.value] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"configuration file {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); is it a YAML file?") from None
    except OSError as error:
        raise UserError(f"configuration file {path} cannot be read: {error.strerror}") from None
    tree = _parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: sections such as `model:` wanted at the top level, found {_describe(tree)}")
    return tree


def _parse_yaml(text: str, where: str) -> object:
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # odd characters; an impossible date; deep nesting
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _fill(config: Config, tree: dict) -> None:
    """Set what the mapping `tree` holds."""
    known = keys()
    for name, value in tree.items():
        if not is_dataclass(getattr(config, str(name), None)):
            _set(config, str(name), value, known)
        elif isinstance(value, dict):
            for key, item in value.items():
                _set(config, f"{name}.{key}", item, known)
        elif value is not None:  # a section whose keys are all commented out is None
            raise UserError(f"{name}: a section with keys wanted, such as {_example(name)}; found {_describe(value)}")


def _apply(config: Config, override: str) -> None:
    """Set the one key of `section.key=value`. The value is YAML; a text key takes `*.tar` or `2024` as it stands."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name:
        raise UserError("section.key=value wanted, such as train.steps=100")
    known = keys()
    if is_dataclass(getattr(config, name, None)):
        raise UserError(f"{name} is a section; set one of its keys, such as {_example(name)}")
    text = text.strip()
    as_it_stands = name in known and str in _alternatives(known[name]) and text not in ("", "~", "null")
    _set(config, name, text if as_it_stands and text[0] not in "[{'\"" else _parse_yaml(text, name), known)


def _set(config: Config, name: str, value: object, known: dict[str, object]) -> None:
    if name not in known:
        raise UserError(f"unknown key {name}; the nearest is {_nearest_key(name, known)}")
    section, _, key = name.rpartition(".")
    setattr(getattr(config, section) if section else config, key, _coerce(value, known[name], name))


def _nearest_key(name: str, known: Iterable[str]) -> str:
    """The same key in another section where there is one, else the key, or the section, spelled most like it."""
    known = list(known)
    moved = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    if moved:
        return moved[0]
    return nearest(name, known if "." in name else known + [key.partition(".")[0] for key in known])


def _coerce(value: object, kind: object, name: str) -> object:
    """`value` as type `kind`: whole numbers pass for decimals, and so does text like 1e-3, which YAML reads as text."""
    for option in _alternatives(kind):
        if option is type(None) and value is None:
            return None
        if option is bool and isinstance(value, bool) or option is str and isinstance(value, str):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and (number := _as_float(value)) is not None:
            return number
        if typing.get_origin(option) is list and isinstance(value, list):
            (item,) = typing.get_args(option)
            if item is dict:
                return [_source(entry, f"{name}[{position}]") for position, entry in enumerate(value)]
            return [_coerce(entry, item, f"{name}[{position}]") for position, entry in enumerate(value)]
    wanted = " or ".join(_KIND_NAMES[option] for option in _alternatives(kind))
    raise UserError(f"{name}: {wanted} wanted, found {_describe(value)}")


def _as_float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _source(entry: object, name: str) -> dict:
    """One entry of a list of data sets: a path, or a path with its weight."""
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict) or "path" not in entry:
        raise UserError(f"{name}: {{path: FOLDER_OR_GLOB, weight: NUMBER}} wanted, found {_describe(entry)}")
    for key in entry:
        if key not in ("path", "weight"):
            raise UserError(f"{name}: unknown key {key}; the nearest is {nearest(str(key), ('path', 'weight'))}")
    kinds = {"path": str, "weight": float}
    return {key: _coerce(value, kinds[key], f"{name}.{key}") for key, value in entry.items()}


_KIND_NAMES = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null",
    list[float]: "a list of numbers", list[dict]: "a list of {path, weight}",
}  # fmt: skip


def _alternatives(kind: object) -> tuple:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _example(section: str) -> str:
    return next(key for key in keys() if key.startswith(f"{section}."))


def _describe(value: object) -> str:
    if value is None:
        return "nothing (null)"
    text = repr(value)
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list",
            dict: "a mapping"}.get(type(value), type(value).__name__)  # fmt: skip
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"

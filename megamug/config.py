"""Typed configuration sections.

`megamug train CONFIG.yaml section.key=value ...`: the YAML file holds these sections, overrides win over it, and what
comes out is written to `RUN/config.yaml`. Every key has one type and one meaning; what `None` means is said beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelConfig:
    """The model. A `None` size is taken from the preset (`megamug.models.presets`)."""

    kind: str = "mug"  # mug
    preset: str = "vit_b16"
    image_loss_weight: float = 1.0  # 0 removes the image decoder
    caption_loss_weight: float = 0.1  # 0 removes the text decoder: the model is then MAE
    mask_ratio: float = 0.75  # share of patches hidden from the encoder
    norm_pix_loss: bool = True  # targets normalised per patch (MAE)
    patch_size: int | None = None
    # encoder
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    ffn_width: int | None = None
    register_tokens: int = 0  # learned tokens beside the class token: make the visible count divisible
    # image decoder
    decoder_layers: int | None = None
    decoder_width: int | None = None
    decoder_heads: int | None = None
    decoder_register_tokens: int = 0
    # text decoder
    text_unimodal_layers: int | None = None
    text_multimodal_layers: int | None = None
    text_width: int | None = None
    text_heads: int | None = None
    tie_vocabulary: bool = True  # output projection = token embedding
    layer_norm_eps: float = 1e-6


@dataclass
class DataConfig:
    """Data. Batch sizes count image-caption pairs."""

    train: object = None  # folder of shards | glob | list of {path, weight}
    validation: object = None  # the same; None: no validation
    tokenizer: str | None = None  # SentencePiece model; needed while caption_loss_weight > 0
    image_size: int = 224
    caption_length: int = 64  # tokens predicted per caption
    global_batch_size: int = 256
    micro_batch_size: int = 32
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])  # area share of the random crop
    flip: bool = True  # random horizontal flip; switch off where captions say left and right
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    validation_samples: int = 1024  # at most so many held-out pairs per validation
    threads: int = 2  # decoding threads per process
    prefetch: int = 2  # global batches decoded ahead of the step
    max_failure_rate: float = 0.001  # share of samples that may fail at run time before the run ends


@dataclass
class ParallelConfig:
    """How the processes share the work: tensor x pipeline x data = WORLD_SIZE."""

    tensor: int = 1
    pipeline: int = 1
    data: int | None = None  # None: WORLD_SIZE / (tensor x pipeline)
    sequence: bool = False  # sequence parallelism inside the tensor-parallel group
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False  # needs distributed_optimizer
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

    learning_rate: float = 1.5e-4
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0  # 0: no clipping


@dataclass
class TrainConfig:
    steps: int = 1000
    validate_every: int = 0  # 0: only after the last step
    pictures_every: int = 0  # 0: only with the last validation


@dataclass
class CheckpointConfig:
    every: int = 0  # 0: only after the last step
    keep: int = 3  # newest complete checkpoints kept; 0 keeps all
    asynchronous: bool = False  # write in the background while training goes on


@dataclass
class LogConfig:
    every: int = 10  # steps between console lines and flushes of metrics.jsonl
    tensorboard: bool = True


@dataclass
class Config:
    seed: int = 1234
    run_dir: str = "runs/mug"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

"""The sections of a configuration: every key with its type, its default and what it means.

The comments beside the keys are the text of docs/configuration.md. What `None` (`null` in YAML) means is said there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LONG = 200  # steps of a run from which it pays to compile and to record, which takes up to a minute
Sources = str | list[dict]  # a folder of shards, a glob, or a list of {path, weight}


@dataclass
class ModelConfig:
    """The model. What follows `initial` and `z_loss_weight` is for `kind: mug`, the sizes of its encoder for `kind:
    classifier` and `segmenter` too; the sizes of the other kinds are in the sections `lm`, or `text_tower`,
    `image_tower` and `fusion`. A `None` size is taken from the preset (`megamug.configuration.presets`)."""

    kind: str = "mug"  # mug: vision learner | decoder_lm, jam_cross: language | classifier, segmenter: of images
    preset: str | None = None  # a name of the tables below; null: see the tables below
    initial: str | None = None  # run folder or checkpoint folder whose weights start the run; unused once it resumes
    initial_parts: list[str] | None = None  # of `initial`: encoder, image_decoder, text_decoder; null: all
    z_loss_weight: float = 0.0  # factor of the mean squared log-sum-exp of the logits; decoder_lm and jam_cross
    # mug
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
    text_objective: str = "autoregressive"  # each token from those before it | masked: hidden ones from all others
    text_mask_ratio: float = 0.75  # masked: share of a caption's tokens that are hidden, rounded, at least one
    tie_vocabulary: bool = True  # output projection = token embedding
    layer_norm_eps: float = 1e-6  # added to the variance in every LayerNorm


@dataclass
class TowerConfig:
    """A decoder-only language model: all of one (`lm`), or one of two (`text_tower`, `image_tower`). Every key left at
    `None` is taken from the preset."""

    layers: int | None = None  # transformer layers
    width: int | None = None  # hidden size
    heads: int | None = None  # attention heads
    query_groups: int | None = None  # key-value heads, each shared by heads/query_groups queries; null = heads
    ffn_width: int | None = None  # hidden size of the feed-forward
    norm: str | None = None  # layernorm | layernorm_plain (no affine parameters) | rmsnorm
    norm_eps: float | None = None  # added to the variance in every norm
    activation: str | None = None  # gelu | relu | swiglu (gated: a second input projection)
    bias: bool | None = None  # biases in the linears of the layers
    positions: str | None = None  # learned (a table) | rotary | rotary_grid (LlamaGen: row and column)
    grid: int | None = None  # rotary_grid: side of the square of image codes behind a row's first token; 0: none
    max_positions: int | None = None  # rows of the learned table; holds data.context_length; unused by rotary
    rotary_base: float | None = None  # theta: rotary frequencies are theta^(-2i/d) for a head of width d
    rotary_scaling: list[float] | None = None  # LLaMA 3.1: factor, low and high frequency factor, positions; []: none
    qk_norm: bool | None = None  # norm of every query and key head before attention
    qk_norm_per_head: bool | None = None  # it is a LayerNorm with weights and biases of its own for each head
    res_post_norm: bool | None = None  # norms stand behind attention and feed-forward, before the residual sum
    tie_vocabulary: bool | None = None  # output projection = token embedding; unused in a tower of jam_cross
    init_std: float | None = None  # of linear weights and embeddings: normal, truncated at 3 deviations


@dataclass
class FusionConfig:
    """How the two towers of `kind: jam_cross` read each other, and where they end."""

    cross_every: int = 2  # layers between cross blocks, counted on the shallower tower
    cross_ffn: bool = True  # a feed-forward behind each cross-attention
    gate: bool = True  # each cross block times tanh(gate), which starts at 0: the towers then compute what they did
    shared_embedding: bool = False  # one table of token embeddings for both towers; needs equal widths
    output_width: int | None = None  # of the linear over both towers' states; null: the wider tower's
    freeze: str = "none"  # none | text | image | both: towers whose parameters stay as they are


@dataclass
class ClassifierConfig:
    """What `kind: classifier` puts behind a MUG's encoder, which sees every patch of an image: one linear."""

    classes: int | None = None  # null: those of data.train (names in classes.txt, else its largest label and one)
    pool: str = "mean"  # the linear reads: mean (of the patches, then a LayerNorm) | class_token | attention (frozen)
    frozen: bool = False  # linear probe: the encoder stays as it is
    batch_norm: bool = True  # frozen: features are standardised, BatchNorm without parameters (MAE); false: as they are
    label_smoothing: float = 0.1  # share of a target that all classes get alike; in training, held-out losses have none
    drop_path: float = 0.0  # share of images that skip a part of the last layer; linearly fewer before it
    mixup: float = 0.0  # alpha of the beta distribution by which images are mixed in pairs; 0: not
    cutmix: float = 0.0  # alpha of that by which one has a box of the other; 0: not; with mixup, half of them each
    rand_augment: str | None = None  # a policy of timm (MAE: rand-m9-mstd0.5-inc1), whose package it needs; null: none
    random_erasing: float = 0.0  # share of images of which a box becomes noise (MAE: 0.25)
    ema: float = 0.0  # decay of averages of the weights, which validation, evaluation and exports read; 0: none
    layer_decay: float = 1.0  # each layer's learning rate is so many times that of the next one; 1: all have the same


@dataclass
class SegmenterConfig:
    """What `kind: segmenter` puts behind a MUG's encoder, which sees every patch of an image: UperNet and an auxiliary
    FCN head. `data.image_size` is the side of its crops."""

    classes: int | None = None  # null: those of data.train (names in classes.txt, else the largest value of its maps)
    reduce_zero_label: bool = False  # 0 in a map is no class, 1 the first one (ADE20K); else 0 is; 255 never is one
    position_image_size: int | None = None  # side whose positions are resampled; null: model.initial's, else data's
    blocks: list[int] | None = None  # four blocks that are read, from 0, the last one last; null: at 1/3, 1/2, 2/3, 1
    channels: int = 768  # of UperNet
    pool_scales: list[int] = field(default_factory=lambda: [1, 2, 3, 6])  # sides of the grids of pyramid pooling
    auxiliary_weight: float = 0.4  # of the auxiliary head's loss; 0: no such head
    auxiliary_channels: int = 256  # of that head, on the third of the blocks
    dropout: float = 0.1  # share of the channels of an image that either head's last layer does not see in training
    drop_path: float = 0.0  # share of images that skip a part of the last layer; linearly fewer before it
    layer_decay: float = 1.0  # each layer's learning rate is so many times that of the next one; 1: all have the same
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])  # shorter side before the crop, in crops
    most_of_one_class: float = 0.75  # share of a crop above which it is drawn again, ten times at most; 1: never
    distortion: bool = False  # random brightness, contrast, saturation and hue


@dataclass
class DataConfig:
    """Data. Batch sizes count images with their captions, classes or maps; rows of `context_length` tokens for
    decoder_lm and jam_cross."""

    train: Sources | None = None  # folder of shards | glob | list of {path, weight}; tokenised documents; must be set
    validation: Sources | None = None  # the same; None: no validation
    tokenizer: str | None = None  # tokenizer, a file or its folder (mug); vocabulary folder (decoder_lm, jam_cross)
    verify: bool = False  # compare every pair as it is read, and all documents at the start, with their SHA-256
    # rows of tokens
    context_length: int = 2048  # tokens of a row
    cm3_spans: float = 1.0  # mean number of masked spans of a document (CM3); 0: plain left to right
    hidden_text: float = 0.0  # share of documents with images that show <mask> for text: what guidance compares to
    separate_documents: bool = False  # no document reads another of its row
    loss_on: str = "all"  # all | response | text | image: the tokens that carry loss
    # pairs
    fraction: float = 1.0  # share of every training set that is seen, drawn by seed; smaller shares lie within larger
    captions: str = "own"  # own | shuffled: each image has that of another, by seed; to see what captions are worth
    image_size: int = 224  # pixels; images are cropped to squares
    caption_length: int = 64  # tokens predicted per caption
    caption_lines: str = "join"  # join | first | random (by sample and epoch): of a caption file of several lines
    global_batch_size: int = 256  # pairs or rows per optimizer step, over all processes
    micro_batch_size: int = 32  # pairs or rows per forward and backward of one data-parallel rank
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])  # area share of the random crop
    flip: bool = True  # random horizontal flip; switch off where captions say left and right
    background: list[int] = field(default_factory=lambda: [255, 255, 255])  # red, green, blue behind transparency
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # of red, green, blue in 0..1
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])  # pixels become (x - mean) / std
    validation_samples: int = 1024  # at most so many held-out pairs or rows per validation
    threads: int = 2  # decoding threads per process
    prefetch: int = 2  # global batches decoded ahead of the step
    max_failure_rate: float = 0.001  # share of samples that may fail at run time before the run ends


@dataclass
class ParallelConfig:
    """How the processes share the work: tensor x pipeline x data = WORLD_SIZE."""

    tensor: int = 1  # processes that share each layer
    pipeline: int = 1  # stages that the layers are cut into, by FLOPs
    virtual: int = 1  # model chunks per pipeline rank (interleaved schedule): smaller bubbles, more messages
    data: int | None = None  # None: WORLD_SIZE / (tensor x pipeline)
    sequence: bool = False  # sequence parallelism inside the tensor-parallel group
    distributed_optimizer: bool = False  # optimizer state sharded over the data-parallel ranks
    overlap_grad_reduce: bool = False  # reduce gradients while backward goes on
    overlap_param_gather: bool = False  # gather parameters during forward; needs distributed_optimizer
    overlap_tensor: bool = False  # tensor-parallel messages during matrix products; GPUs, layers te, sequence
    recompute: str = "none"  # none | full: recompute activations layer by layer in backward
    cuda_graphs: bool | None = None  # forward and backward of a step as one launch; null: on one GPU, from 200 steps on
    timeout_minutes: float = 10.0  # of every collective


@dataclass
class PrecisionConfig:
    """Arithmetic. bf16 keeps fp32 main parameters and fp32 main gradients."""

    dtype: str = "fp32"  # fp32 | bf16
    fp8: str = "none"  # none | delayed | current | blockwise (Transformer Engine on Hopper)
    first_layers_bf16: int = 0  # layers at the start of every stack that FP8 leaves in bf16; not with delayed
    last_layers_bf16: int = 0  # layers at the end of every stack that FP8 leaves in bf16; not with delayed
    fp8_parameters: bool = False  # keep and gather weights in FP8; needs distributed_optimizer and bf16
    layers: str = "auto"  # auto | local | te (Transformer Engine); auto: te for FP8 and tensor parallelism on a GPU
    compile: str = "auto"  # auto | always | never: layers by torch.compile; auto: on GPUs, in runs of 200 steps or more


@dataclass
class OptimizerConfig:
    """An optimizer with a linear warm-up and a decay. Biases, norms and tokens have no weight decay, and LARS does not
    adapt their rates."""

    name: str = "adamw"  # adamw | lars (MAE's linear probe) | sgd (with momentum; MoCo v3's)
    learning_rate: float = 1.5e-4  # at the end of warm-up, as it stands: not scaled by the batch
    min_learning_rate: float = 0.0  # that the rate falls towards; reached one step after the last
    schedule: str = "cosine"  # cosine | linear: how the rate falls behind the warm-up
    warmup_steps: int = 0  # linear from 0
    weight_decay: float = 0.05  # adamw: decoupled; lars, sgd: added to the gradient, times the weight
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    momentum: float = 0.9  # of lars and sgd: share of the last update in the next
    trust_coefficient: float = 1e-3  # of lars: norm of an update of rate 1, as a share of the norm of what it changes
    clip_grad: float = 1.0  # largest global gradient norm; 0: no clipping
    fused: str = "auto"  # auto | te | apex | torch: whose AdamW kernel; auto: torch's
    skip_spikes: float = 0.0  # no update where the gradient norm is so many deviations above its last 128; 0: always


@dataclass
class TrainConfig:
    """How long, and how often to look."""

    steps: int = 1000  # optimizer steps
    validate_every: int = 0  # steps; 0: only after the last step
    pictures_every: int | None = None  # steps; null: a tenth of the run, at least 100; 0: only after the last step
    compare_replicas_every: int = 100  # steps between comparisons of the parameters that ranks share; 0: never


@dataclass
class CheckpointConfig:
    """What a crash costs: at most `every` steps."""

    every: int = 0  # steps; 0: only after the last step
    keep: int = 3  # newest complete checkpoints kept; 0 keeps all
    asynchronous: bool = False  # write in the background while training goes on
    go_back_to: int | None = None  # step of the checkpoint to go on from, once; later ones are set aside, not removed


@dataclass
class LogConfig:
    """What is written down while training runs."""

    every: int = 10  # steps between console lines and flushes of metrics.jsonl
    tensorboard: bool = True  # write RUN/tensorboard; where `trackers` is set, that says it
    trackers: list[str] | None = None  # of tensorboard and wandb (Weights & Biases); null: what `tensorboard` says


@dataclass
class Config:
    """A run. The sections follow the two keys that belong to none."""

    seed: int = 1234  # of initialisation, sample order, crops, flips and masks
    run_dir: str = "runs/mug"  # holds config.yaml, metrics.jsonl, environment.json, tensorboard/, checkpoints/, log/
    model: ModelConfig = field(default_factory=ModelConfig)
    lm: TowerConfig = field(default_factory=TowerConfig)
    text_tower: TowerConfig = field(default_factory=TowerConfig)
    image_tower: TowerConfig = field(default_factory=TowerConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

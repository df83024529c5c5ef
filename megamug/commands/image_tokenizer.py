"""Train an image tokenizer (VQ autoencoder) on the images in shards:
megamug data image-tokenizer DATA... --output FOLDER --image-size 64 --f 8 --codes 512

DATA is a folder of indexed .tar shards, a glob or a shard. FOLDER gets config.json and model.safetensors (the
tokenizer), round_trip.png (originals beside round trips) and metrics.jsonl. A run that was interrupted, or stopped by
SIGTERM (exit code 3), is continued by the same command. Under torchrun the processes share the batch.
"""

from __future__ import annotations

from megamug.command_line.arguments import COUNT, FROM_ZERO, Parser, Range, expand_home, number, output_folder
from megamug.errors import UserError
from megamug.models.image_tokenizer.model import ImageTokenizerConfig
from megamug.models.image_tokenizer.run import RunOptions, train
from megamug.models.image_tokenizer.training import TrainingOptions

MULTIPLIERS = {4: (1, 2, 4), 8: (1, 2, 2, 4), 16: (1, 1, 2, 2, 4)}  # by f, as in the published models


def main(argv: list[str], prog: str | None = None) -> int:
    args = _parser(prog).parse_args(argv)
    multipliers = tuple(args.multipliers or MULTIPLIERS[args.f])
    if 1 << (len(multipliers) - 1) != args.f:
        raise UserError(f"--multipliers has {len(multipliers)} levels, which make f {1 << (len(multipliers) - 1)}; "
                        f"give as many as --f {args.f} needs, or another --f")  # fmt: skip
    config = ImageTokenizerConfig(
        image_size=args.image_size, channels=args.channels, channel_multipliers=multipliers,
        residual_blocks=args.residual_blocks, attention_resolutions=tuple(args.attention),
        middle_attention=not args.no_middle_attention, latent_channels=args.latent_channels,
        code_width=args.code_width, codes=args.codes, normalise_codes=args.normalise_codes,
        norm_groups=args.norm_groups, background=tuple(args.background),
    )  # fmt: skip
    options = TrainingOptions(
        steps=args.steps, learning_rate=args.learning_rate, warmup_steps=args.warmup_steps,
        reconstruction=args.reconstruction, commitment_weight=args.commitment_weight, codebook=args.codebook,
        ema_decay=args.ema_decay, quantise_from=args.quantise_from, dead_below=args.dead_below,
        perceptual_weights=args.perceptual_weights, perceptual_weight=args.perceptual_weight,
        adversarial_weight=args.adversarial_weight, adversarial_from=args.adversarial_from,
        dtype=args.dtype, seed=args.seed,
    )  # fmt: skip
    run = RunOptions(
        data=args.data, output=args.output, validation=args.validation, batch_size=args.batch_size,
        crop_scale=(args.smallest_crop, 1.0), flip=not args.no_flip, validation_samples=args.validation_samples,
        validate_every=args.validate_every, checkpoint_every=args.checkpoint_every, log_every=args.log_every,
        threads=args.threads,
    )  # fmt: skip
    return train(config, options, run)


def _parser(prog: str | None) -> Parser:
    parser = Parser(prog, description=__doc__)
    sizes, training = ImageTokenizerConfig(), TrainingOptions()
    share, positive = number(float, Range(0, 1, open_low=True)), number(float, Range(0, open_low=True))
    weight = number(float, Range(0))

    def add(where, name: str, type_, default, text: str, **more) -> None:
        where.add_argument(name, type=type_, default=default, help=f"{text} (default %(default)s)", **more)

    parser.add_argument("data", nargs="+", metavar="DATA", help="a folder of indexed .tar shards, a glob or a shard")
    parser.add_argument("--output", type=output_folder, required=True, metavar="FOLDER", help="for the tokenizer")
    parser.add_argument("--validation", nargs="+", default=[], metavar="DATA", help="held-out shards: error, picture")
    size = parser.add_argument_group("sizes")
    add(size, "--image-size", COUNT, sizes.image_size, "pixels a side")
    add(size, "--f", int, 16, "pixels per code, along a side", choices=sorted(MULTIPLIERS))
    add(size, "--codes", COUNT, sizes.codes, "vectors in the codebook")
    add(size, "--code-width", COUNT, sizes.code_width, "of a vector")
    add(size, "--channels", COUNT, sizes.channels, "of the convolutions at full resolution")
    size.add_argument("--multipliers", type=COUNT, nargs="+", help="of the channels, per level (default: by --f)")
    add(size, "--residual-blocks", COUNT, sizes.residual_blocks, "of a level")
    size.add_argument("--attention", type=COUNT, nargs="*", default=[], metavar="PIXELS", help="sides with attention")
    size.add_argument("--no-middle-attention", action="store_true", help="none at the lowest resolution either")
    add(size, "--latent-channels", COUNT, sizes.latent_channels, "between encoder and codebook")
    add(size, "--norm-groups", COUNT, sizes.norm_groups, "of GroupNorm")
    add(size, "--background", number(int, Range(0, 255)), sizes.background, "behind transparency, 0 to 255 each",
        nargs=3, metavar=("RED", "GREEN", "BLUE"))  # fmt: skip
    size.add_argument("--normalise-codes", action="store_true", help="codes on the unit sphere, as in LlamaGen")
    loop = parser.add_argument_group("training")
    add(loop, "--steps", COUNT, training.steps, "optimizer steps")
    add(loop, "--batch-size", COUNT, 32, "images per step, over all processes")
    add(loop, "--learning-rate", positive, training.learning_rate, "after warm-up; then a cosine to a hundredth of it")
    add(loop, "--warmup-steps", FROM_ZERO, training.warmup_steps, "with a linearly growing rate")
    add(loop, "--seed", FROM_ZERO, training.seed, "of weights, order, crops and revived codes")
    add(loop, "--dtype", str, training.dtype, "of the convolutions", choices=["fp32", "bf16"])
    add(loop, "--smallest-crop", share, 0.5, "area share that random crops begin with")
    loop.add_argument("--no-flip", action="store_true", help="do not mirror images")
    add(loop, "--reconstruction", str, training.reconstruction, "pixel error", choices=["l1", "l2"])
    add(loop, "--commitment-weight", positive, training.commitment_weight, "of the pull of latents towards codes")
    add(loop, "--codebook", str, training.codebook, "how codes learn", choices=["ema", "gradient"])
    add(loop, "--ema-decay", share, training.ema_decay, "per step, of code averages and usage counts")
    add(loop, "--quantise-from", FROM_ZERO, training.quantise_from, "step up to which there are no codes yet")
    add(loop, "--dead-below", weight, training.dead_below, "share of the mean use that revives a code")
    loop.add_argument("--perceptual-weights", type=expand_home, metavar="FILE",
                      help="torchvision's vgg16-*.pth: adds a perceptual loss")  # fmt: skip
    add(loop, "--perceptual-weight", positive, training.perceptual_weight, "of that loss")
    add(loop, "--adversarial-weight", weight, training.adversarial_weight, "0: no discriminator")
    add(loop, "--adversarial-from", FROM_ZERO, training.adversarial_from, "step at which it begins to count")
    report = parser.add_argument_group("reports and states")
    add(report, "--validation-samples", COUNT, 512, "held-out images at most")
    add(report, "--validate-every", FROM_ZERO, 0, "steps; 0: after the last")
    add(report, "--checkpoint-every", FROM_ZERO, 200, "steps between saved states; 0: after the last")
    add(report, "--log-every", COUNT, 50, "steps between lines")
    add(report, "--threads", COUNT, 2, "that decode, per process")
    return parser

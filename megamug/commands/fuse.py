"""Fuse two parents (runs of model.kind=decoder_lm with one vocabulary) into one model:
megamug fuse TEXT_RUN IMAGE_RUN --kind cross --output RUN

TEXT_RUN and IMAGE_RUN are run folders (the newest complete checkpoint is taken) or checkpoint folders, of any layout.
The output is a run folder that starts a training: megamug train CONFIG.yaml model.initial=RUN. One parameter is in
memory at a time.

kinds: uniform (the mean of the parents' parameters), width (twice as wide, each parent a half), cross (both towers as
they are, joined by cross-attention).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megamug.command_line.arguments import COUNT, FROM_ZERO, Parser, output_folder
from megamug.configuration.sections import FusionConfig
from megamug.data.tooling import Progress
from megamug.errors import UserError
from megamug.models.jam import fuse


def main(argv: list[str], prog: str | None = None) -> None:
    args = arguments(argv, prog)
    text, image = fuse.Parent.load(args.text_run), fuse.Parent.load(args.image_run)
    vocabulary = fuse.one_vocabulary(text, image, args.vocabulary)
    if args.kind == "uniform":
        fusion = fuse.uniform(text, image)
    elif args.kind == "width":
        fusion = fuse.width(text, image, args.off_diagonal or "copy")
    else:
        if vocabulary is None:
            raise UserError("--kind cross must know which tokens are text: give --vocabulary FOLDER")
        options = FusionConfig(
            cross_every=args.cross_every or FusionConfig.cross_every, cross_ffn=not args.no_ffn, gate=not args.no_gate,
            shared_embedding=args.shared_embedding, output_width=args.output_width,
        )  # fmt: skip
        fusion = fuse.cross(text, image, options, vocabulary.first_code, args.seed)
    progress = Progress("parameters", len(fusion.tensors))
    folder = fuse.write(fusion, args.output, text, lambda name: progress.update(note=name))
    print(f"{folder}: {fusion.config.model.kind}, {fusion.parameters / 1e6:.2f} M parameters")
    print(f"train it: megamug train CONFIG.yaml model.kind={fusion.config.model.kind} model.initial={args.output}")


def arguments(argv: list[str], prog: str | None = None) -> argparse.Namespace:
    parser = Parser(prog, description=__doc__)
    parser.add_argument("text_run", metavar="TEXT_RUN", type=Path, help="the parent that knows text")
    parser.add_argument("image_run", metavar="IMAGE_RUN", type=Path, help="the parent that knows text with images")
    parser.add_argument("--kind", choices=("uniform", "width", "cross"), required=True)
    parser.add_argument("--output", type=output_folder, required=True, metavar="RUN", help="the run folder to write")
    parser.add_argument("--vocabulary", type=Path, metavar="FOLDER", help="default: TEXT_RUN's data.tokenizer")
    width = parser.add_argument_group("--kind width")
    width.add_argument("--off-diagonal", choices=("copy", "average"), help="blocks between the parents (default copy)")
    cross = parser.add_argument_group("--kind cross")
    cross.add_argument("--cross-every", type=COUNT, metavar="K", help="layers of the shallower tower (default 2)")
    cross.add_argument("--no-ffn", action="store_true", help="cross blocks of attention alone")
    cross.add_argument("--no-gate", action="store_true", help="cross blocks that act from the first step")
    cross.add_argument("--shared-embedding", action="store_true", help="one table: text rows and image rows")
    cross.add_argument("--output-width", type=COUNT, metavar="W", help="of the linear over both states (default: the"
                       " wider tower's width; the sum of both makes the first step's logits the parents' own)")
    cross.add_argument("--seed", type=FROM_ZERO, default=1234, help="of the cross blocks (default 1234)")
    args = parser.parse_args(argv)
    others = {
        "--off-diagonal": args.kind != "width" and args.off_diagonal,
        "--cross-every": args.kind != "cross" and args.cross_every,
        "--no-ffn": args.kind != "cross" and args.no_ffn,
        "--no-gate": args.kind != "cross" and args.no_gate,
        "--shared-embedding": args.kind != "cross" and args.shared_embedding,
        "--output-width": args.kind != "cross" and args.output_width,
    }
    for option, given in others.items():
        if given:
            raise UserError(f"{option} means nothing to --kind {args.kind}; leave it out")
    return args

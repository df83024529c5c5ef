"""Write an encoder's features of images: megamug features RUN --data SHARDS... --output FILE

RUN is a run folder, a checkpoint, or what `megamug convert` writes of an encoder. FILE ends in .safetensors (beside it
a .jsonl of keys, labels and captions) or in .npz. Under torchrun, or as several processes with RANK and WORLD_SIZE, the
images are shared out; a run that was stopped goes on where it was. See docs/transfer.md.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megamug.command_line import launcher
from megamug.command_line.arguments import COUNT, Parser, Range, device, number, output_file
from megamug.command_line.console import counted
from megamug.data.pairs.images import SHARE
from megamug.errors import UserError

ENDINGS = (".safetensors", ".npz")
DTYPES = ("fp32", "bf16")


def main(argv: list[str], prog: str | None = None) -> None:
    parser = Parser(prog, description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="shards, as data.train takes them")
    parser.add_argument("--output", type=output_file, required=True, metavar="FILE")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of RUN (default: the newest complete one)")
    parser.add_argument("--untrained", action="store_true", help="the encoder as the run began, to compare with")
    parser.add_argument("--layers", type=int, nargs="+", default=[], metavar="N",
                        help="blocks whose mean over the patches is kept as well, from 0; -1 is the last")  # fmt: skip
    parser.add_argument("--image-size", type=COUNT, metavar="S", help="in pixels (default: that of training)")
    parser.add_argument("--share", type=number(float, Range(0, 1, open_low=True)), default=SHARE,
                        help="of the shorter side that is seen, the centre (default %(default)s)")  # fmt: skip
    parser.add_argument("--batch", type=COUNT, default=64, help="images at a time (default %(default)s)")
    parser.add_argument("--threads", type=COUNT, default=2, help="that decode (default %(default)s)")
    parser.add_argument("--device", type=device, help="default: the GPU of this process where there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the encoder (default %(default)s)")
    parser.add_argument("--verify", action="store_true", help="compare every image with the checksum of its index")
    options = parser.parse_args(argv)
    if options.output.suffix not in ENDINGS:
        raise UserError(f"--output {options.output}: a name that ends in {' or '.join(ENDINGS)} wanted")
    size, rank = launcher.world_size(), launcher.rank()

    import torch

    from megamug.data.shards.sources import resolve_sources
    from megamug.transfer.encoder import load_encoder
    from megamug.transfer.extraction import extract

    sources = resolve_sources(options.data, options.verify)  # told before weights are read
    place = options.device
    if place is None:
        local = int(os.environ.get("LOCAL_RANK", rank))
        place = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    encoder = load_encoder(
        options.run, device=place, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype],
        image_size=options.image_size, step=options.step, untrained=options.untrained,
    )  # fmt: skip
    for remark in encoder.remarks if rank == 0 else ():
        print(remark, file=sys.stderr)
    summary = extract(
        encoder, sources, options.output, batch=options.batch, layers=options.layers, share=options.share,
        threads=options.threads, rank=rank, size=size,
    )  # fmt: skip
    if summary is None and rank == 0:
        print(f"{options.output} holds these features already", file=sys.stderr)
    elif summary is not None:
        print(f"written: {options.output}: {', '.join(summary.names)} of {counted(summary.images, 'image')},"
              f" {summary.width} numbers each; {summary.labelled:,} with a label", file=sys.stderr)  # fmt: skip
        if summary.left_out:
            print(f"left out: {counted(summary.left_out, 'image')} that did not decode", file=sys.stderr)

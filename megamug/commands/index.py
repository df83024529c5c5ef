"""Verify shards and write their indexes: megamug data index PATH...

PATH is a folder of .tar shards, a glob or a shard. A sample is an image with its caption, its label and its map of
classes, where it has them; --images-alone, --labels and --maps say what it must have. Each image is decoded in full;
what fails is quarantined with its reason and never trained on. Shards that are up to date cost nothing, so repeat this
after any change. An index lies beside its shard; where that folder is read-only, under $MEGAMUG_INDEX_DIRECTORY
(default: ~/.cache/megamug/index).
"""

from __future__ import annotations

from megamug.command_line.arguments import COUNT, Parser, Range, new_file, number
from megamug.data.shards.annotations import Limits
from megamug.data.shards.indexing import check_usable, index_paths, summary, write_quarantine
from megamug.data.shards.verify import LARGEST


def main(argv: list[str], prog: str | None = None) -> None:
    parser = Parser(prog, description=__doc__)
    limits = Limits()
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a folder of .tar shards, a glob or a shard")
    parser.add_argument("--processes", type=COUNT, help="shards verified at the same time (default: one per core)")
    parser.add_argument("--quarantine", type=new_file, metavar="FILE", help="write the quarantine list as JSON lines")
    parser.add_argument("--max-pixels", type=number(int, Range(1, LARGEST)), default=limits.pixels,
                        help="of an image (default %(default)s)")  # fmt: skip
    parser.add_argument("--max-pixels-per-byte", type=COUNT, default=limits.pixels_per_byte,
                        help="of its file, in images above a million pixels (default %(default)s)")  # fmt: skip
    parser.add_argument("--max-caption-bytes", type=COUNT, default=limits.caption_bytes, help="(default %(default)s)")
    parser.add_argument("--images-alone", action="store_true",
                        help="keep images without a caption in shards where others have one")  # fmt: skip
    parser.add_argument("--labels", action="store_true",
                        help="quarantine what has no class (KEY.cls, or `label` in KEY.json); where labels are names"
                        " and no classes.txt numbers them, write it")  # fmt: skip
    parser.add_argument("--maps", action="store_true",
                        help="quarantine what has no usable map of classes, KEY.seg.png of its image's size")
    args = parser.parse_args(argv)
    chosen = Limits(
        pixels=args.max_pixels, pixels_per_byte=args.max_pixels_per_byte, caption_bytes=args.max_caption_bytes,
        images_alone=args.images_alone, labels=args.labels, maps=args.maps,
    )  # fmt: skip
    reports = index_paths(args.paths, limits=chosen, processes=args.processes)
    if args.quarantine:
        write_quarantine(args.quarantine, reports)
    print(summary(reports))
    check_usable(reports)

"""Pack images and captions into shards: megamug data shards SOURCE --output FOLDER

SOURCE is a folder of images, each beside a .txt or .json (key `caption`) of the same name or all without, or a .tsv
file with lines `path of the image<TAB>caption` (paths relative to the file). Images are stored as they are; the shards
are indexed. --captions FILE takes captions from a .json as COCO writes it (images, annotations); an image keeps all of
its own. --labels folders makes classes of the folders in SOURCE, in the order of their names; --labels FILE takes
them from a .json as COCO and iNaturalist write it (images, annotations, categories), or a .txt of lines `path label`.
--maps FOLDER packs a class for every pixel beside each image: of SOURCE/a/b.jpg the PNG FOLDER/a/b.png (ADE20K).
"""

from __future__ import annotations

from pathlib import Path

from megamug.command_line.arguments import COUNT, Parser, output_folder
from megamug.command_line.console import counted
from megamug.data.shards.annotations import Limits
from megamug.data.shards.indexing import check_usable, index_paths, summary
from megamug.data.shards.packing import make_shards
from megamug.errors import printable


def main(argv: list[str], prog: str | None = None) -> None:
    parser = Parser(prog, description=__doc__)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a folder of images, or a .tsv file of paths and"
                        " captions")  # fmt: skip
    parser.add_argument("--output", type=output_folder, required=True, metavar="FOLDER", help="where the shards go")
    parser.add_argument("--prefix", default="shard", help="shards are called PREFIX-000000.tar (default %(default)s)")
    parser.add_argument("--shard-size", type=COUNT, default=10000, metavar="N", help="pairs each (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of this prefix in FOLDER")
    parser.add_argument("--images-alone", action="store_true",
                        help="pack images without a caption, too, where others have one")  # fmt: skip
    parser.add_argument("--captions", type=Path, metavar="FILE",
                        help="a .json of captions as COCO writes it, not files beside the images")  # fmt: skip
    parser.add_argument("--labels", metavar="folders|FILE", help="the class of each image; what has none is left out")
    parser.add_argument("--maps", type=Path, metavar="FOLDER",
                        help="of the maps of classes of the images; what has none is left out")  # fmt: skip
    parser.add_argument("--no-index", action="store_true", help="do not index the shards")
    args = parser.parse_args(argv)
    shards, skipped = make_shards(
        args.source, args.output, prefix=args.prefix, shard_size=args.shard_size, overwrite=args.overwrite,
        images_alone=args.images_alone, labels=args.labels, captions=args.captions, maps=args.maps,
    )  # fmt: skip
    for path, reason in skipped[:20]:
        print(printable(f"  left out: {path}: {reason}"))
    print(printable(f"{args.output}: {counted(len(shards), 'shard')}; {counted(len(skipped), 'image')} left out"))
    if not args.no_index:
        reports = index_paths(shards, limits=Limits(images_alone=args.images_alone, maps=args.maps is not None))
        print(summary(reports))
        check_usable(reports)

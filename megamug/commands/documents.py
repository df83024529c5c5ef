"""Tokenise documents for language models: megamug data documents SHARDS... --vocabulary V --output FOLDER

SHARDS are folders of .tar shards, globs or shards: indexed ones hold image-caption pairs (megamug data index), the
others documents, KEY.json with `{"segments": [{"text": ...}, {"image": "0.jpg", "role": "response"}, ...]}` beside
KEY.0.jpg, or `{"text": ...}`, or KEY.txt. Writes Megatron's indexed dataset and documents.json. Repeat an interrupted
call to go on; what cannot be used is listed in FOLDER/quarantine.jsonl with its reason.
"""

from __future__ import annotations

from pathlib import Path

from megamug.command_line.arguments import COUNT, FROM_ZERO, Parser, device, output_folder
from megamug.data.documents.reading import PAIR_ORDERS
from megamug.data.documents.tokenizer import tokenize_documents
from megamug.data.shards.captions import LINES
from megamug.models.image_tokenizer.encoder import ImageEncoder


def main(argv: list[str], prog: str | None = None) -> None:
    parser = Parser(prog, description=__doc__)
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="a folder of .tar shards, a glob or a shard")
    parser.add_argument("--vocabulary", type=Path, required=True, metavar="FOLDER", help="of megamug data vocabulary")
    parser.add_argument("--output", type=output_folder, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--pair-order", choices=PAIR_ORDERS, default="random", help="of a pair (default %(default)s)")
    parser.add_argument("--caption-lines", choices=LINES, default="join",
                        help="of a pair whose caption has several lines (default %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=FROM_ZERO, default=1, help="of what is random of pairs (default %(default)s)")
    parser.add_argument("--workers", type=COUNT, help="processes at work (default: one per core)")
    parser.add_argument("--device", type=device, default="cpu", help="of the image tokenizer (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace other tokenised documents in FOLDER")
    args = parser.parse_args(argv)
    report = tokenize_documents(
        args.shards, args.vocabulary, args.output, ImageEncoder, pair_order=args.pair_order,
        caption_lines=args.caption_lines, seed=args.seed, workers=args.workers, device=args.device,
        overwrite=args.overwrite,
    )  # fmt: skip
    made = report.header
    print(
        f"{args.output}: {report.action}: {made.documents:,} documents, {made.tokens:,} tokens, "
        f"{made.text_segments:,} texts, {made.images:,} images, {made.responses:,} responses, "
        f"{made.quarantined:,} quarantined"
    )
    for entry in report.quarantine[:20]:
        print(f"  {entry['shard']}: {entry['member'] or entry['key'] or 'shard'}: {entry['reason']}")
    if len(report.quarantine) > 20:
        print(f"  and {len(report.quarantine) - 20:,} more in {args.output / 'quarantine.jsonl'}")

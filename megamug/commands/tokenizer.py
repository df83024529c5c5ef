"""Train a SentencePiece tokenizer on the texts in shards:
megamug data tokenizer PATH... --output FILE --vocab-size N

PATH is a folder of .tar shards, a glob or a shard: captions where a shard is indexed, else the texts of its documents.
The same texts give the same file. Ids: padding 0, begin 1, end 2, unknown 3; bytes stand in for characters without a
piece.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from megamug.command_line.arguments import COUNT, Parser, output_file
from megamug.command_line.console import counted
from megamug.data.documents.reading import iterate_texts, open_shard
from megamug.data.pairs.text import MAX_TRAINING_CAPTIONS, iterate_captions, train_tokenizer
from megamug.data.shards.index_file import find_index, index_command
from megamug.data.shards.sources import Source, WithoutCaptions, find_shards, resolve_sources
from megamug.data.tooling import Progress
from megamug.errors import UserError


def main(argv: list[str], prog: str | None = None) -> None:
    parser = Parser(prog, description=__doc__)
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a folder of .tar shards, a glob or a shard")
    parser.add_argument("--output", type=output_file, required=True, metavar="FILE", help="the model to write")
    parser.add_argument("--vocab-size", type=COUNT, required=True, metavar="N", help="pieces at most, with 256 bytes")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it is another model")
    args = parser.parse_args(argv)
    shards = list(dict.fromkeys(shard for path in args.paths for shard in find_shards(path)))
    indexed = [shard for shard in shards if find_index(shard) is not None]
    documents = [open_shard(shard) for shard in shards if shard not in indexed]
    sources = _captioned(indexed, needed=not documents)
    total = sum(len(source) for source in sources) + sum(shard.count for shard in documents)
    progress = Progress("samples", min(total, MAX_TRAINING_CAPTIONS))
    count = 0

    def texts():
        nonlocal count
        captions = ([caption] for caption in iterate_captions(sources)) if sources else ()
        for sample in itertools.chain(captions, iterate_texts(documents)):
            for text in sample[: MAX_TRAINING_CAPTIONS - count]:
                yield text
                count += 1
            progress.update()
            if count == MAX_TRAINING_CAPTIONS:
                return

    first = next(found := texts(), None)
    if first is None:
        command = index_command(args.paths)
        raise UserError(f"{shards[0]}: no text; a shard of image-caption pairs needs its index: {command}")
    size = train_tokenizer(itertools.chain([first], found), args.output, args.vocab_size, overwrite=args.overwrite)
    asked = "" if size == args.vocab_size else f" (of {args.vocab_size} asked for: the texts have no more pieces)"
    print(f"{args.output}: {size} pieces{asked}, from {count:,} texts")


def _captioned(shards: list[Path], needed: bool) -> list[Source]:
    """What of the shards has captions; how many images have none is told. Raises `UserError` where captions are
    `needed` and there is none."""
    sources, missing, problem = [], 0, None
    for shard in shards:
        try:
            sources += resolve_sources(shard, captions=True)
            missing += sources[-1].without_caption()
        except WithoutCaptions as error:
            missing, problem = missing + len(resolve_sources(shard)[0]), problem or error
    if problem and needed and not sources:
        raise problem
    if missing:
        print(f"  left out: {counted(missing, 'image')} without a caption")
    return sources

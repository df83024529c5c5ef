"""Train a SentencePiece tokenizer on the captions in shards:
python tools/train_tokenizer.py PATH... --output FILE --vocab-size N

PATH is a folder of indexed .tar shards, a glob or a shard. The same captions give the same file. Ids: padding 0,
begin 1, end 2, unknown 3; bytes stand in for characters without a piece.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megamug.data.sources import resolve_sources
from megamug.data.text import MAX_TRAINING_CAPTIONS, iterate_captions, train_tokenizer
from megamug.data.tooling import Progress, run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a folder of indexed .tar shards, a glob or a shard")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the SentencePiece model to write")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces at most, 256 bytes included")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it is another model")
    args = parser.parse_args()
    sources = resolve_sources(args.paths)
    total = min(sum(len(source) for source in sources), MAX_TRAINING_CAPTIONS)
    progress = Progress("captions", total)

    def captions():
        for caption in iterate_captions(sources):
            yield caption
            progress.update()

    size = train_tokenizer(captions(), args.output, args.vocab_size, overwrite=args.overwrite)
    asked = "" if size == args.vocab_size else f" (of {args.vocab_size} asked for: the captions have no more pieces)"
    print(f"{args.output}: {size} pieces{asked}")


if __name__ == "__main__":
    run_tool(main)

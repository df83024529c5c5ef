"""Render image-caption pairs to train on: megamug data demo OUTPUT

Writes OUTPUT/train/*.tar and OUTPUT/heldout/*.tar with their indexes: scenes of two coloured shapes with one-sentence
captions. The same arguments give the same bytes; an interrupted call is continued by repeating it.
"""

from __future__ import annotations

from megamug.command_line.arguments import COUNT, Parser
from megamug.command_line.console import counted
from megamug.data.demo.arguments import add_output, add_scenes
from megamug.data.demo.scenes import DemoParameters, make_demo_data
from megamug.data.shards.indexing import index_paths, summary


def main(argv: list[str], prog: str | None = None) -> None:
    parser = Parser(prog, description=__doc__)
    default = DemoParameters()
    add_output(parser)
    parser.add_argument("--train", type=COUNT, default=default.train, help="scenes to train on (default %(default)s)")
    add_scenes(parser, default)
    parser.add_argument("--no-index", action="store_true", help="do not index the shards")
    args = parser.parse_args(argv)
    parameters = DemoParameters(args.train, args.heldout, args.seed, args.size, args.tidy)
    shards = make_demo_data(args.output, parameters, args.processes)
    written = counted(len(shards), "shard")
    print(f"{args.output}: {args.train} scenes to train on, {args.heldout} held out, in {written}")
    if not args.no_index:
        print(summary(index_paths(shards, processes=args.processes)))

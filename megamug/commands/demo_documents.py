"""Write documents for language models to train on: megamug data demo-documents OUTPUT

Writes OUTPUT/{text,instructions}/{train,heldout}/*.tar: texts about the scenes of megamug data demo, and
instructions whose responses show a picture after each step. For megamug data documents; not to be indexed. The
same arguments give the same bytes; an interrupted call is continued by repeating it.
"""

from __future__ import annotations

from megamug.command_line.arguments import COUNT, Parser
from megamug.command_line.console import counted
from megamug.data.demo.arguments import add_output, add_scenes
from megamug.data.demo.documents import DemoDocuments, make_demo_documents


def main(argv: list[str], prog: str | None = None) -> None:
    parser = Parser(prog, description=__doc__)
    default = DemoDocuments()
    add_output(parser)
    parser.add_argument("--text", type=COUNT, default=default.text, help="texts to train on (default %(default)s)")
    parser.add_argument("--instructions", type=COUNT, default=default.instructions, help="(default %(default)s)")
    add_scenes(parser, default)
    args = parser.parse_args(argv)
    parameters = DemoDocuments(args.text, args.instructions, args.heldout, args.seed, args.size, args.tidy)
    shards = make_demo_documents(args.output, parameters, args.processes)
    print(
        f"{args.output}: {args.text} texts and {args.instructions} instructions to train on, {args.heldout} of each "
        f"held out, in {counted(len(shards), 'shard')}"
    )

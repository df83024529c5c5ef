"""Write documents for language models to train on: python tools/make_demo_documents.py OUTPUT

Writes OUTPUT/{text,instructions}/{train,heldout}/*.tar: texts about the scenes of tools/make_demo_data.py, and
instructions whose responses show a picture after each step. For tools/tokenize_documents.py; not to be indexed. The
same arguments give the same bytes; an interrupted call is continued by repeating it.
"""

from __future__ import annotations

from megamug.command_line.arguments import COUNT, Parser
from megamug.command_line.tool import run_tool
from megamug.data.demo.arguments import add_output, add_scenes
from megamug.data.demo.documents import DemoDocuments, make_demo_documents


def main() -> None:
    parser = Parser(description=__doc__)
    default = DemoDocuments()
    add_output(parser)
    parser.add_argument("--text", type=COUNT, default=default.text, help="texts to train on (default %(default)s)")
    parser.add_argument("--instructions", type=COUNT, default=default.instructions, help="(default %(default)s)")
    add_scenes(parser, default)
    args = parser.parse_args()
    parameters = DemoDocuments(args.text, args.instructions, args.heldout, args.seed, args.size, args.tidy)
    shards = make_demo_documents(args.output, parameters, args.processes)
    print(
        f"{args.output}: {args.text} texts and {args.instructions} instructions to train on, {args.heldout} of each "
        f"held out, in {len(shards)} shards"
    )


if __name__ == "__main__":
    run_tool(main)

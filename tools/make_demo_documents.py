"""Write documents for language models to train on: python tools/make_demo_documents.py OUTPUT

Writes OUTPUT/{text,instructions}/{train,heldout}/*.tar: texts about the scenes of tools/make_demo_data.py, and
instructions whose responses show a picture after each step. For tools/tokenize_documents.py; not to be indexed. The
same arguments give the same bytes; an interrupted call is continued by repeating it.
"""

from __future__ import annotations

from megamug.command_line.arguments import COUNT, FROM_ZERO, Parser, output_folder
from megamug.command_line.tool import run_tool
from megamug.data.demo.documents import DemoDocuments, make_demo_documents


def main() -> None:
    parser = Parser(description=__doc__)
    default = DemoDocuments()
    parser.add_argument("output", type=output_folder, metavar="OUTPUT", help="a new folder")
    parser.add_argument("--text", type=COUNT, default=default.text, help="texts to train on (default %(default)s)")
    parser.add_argument("--instructions", type=COUNT, default=default.instructions, help="(default %(default)s)")
    parser.add_argument("--heldout", type=COUNT, default=default.heldout, help="held out of each (default %(default)s)")
    parser.add_argument("--seed", type=FROM_ZERO, default=default.seed, help="(default %(default)s)")
    parser.add_argument("--size", type=COUNT, default=default.size, help="pixels a side (default %(default)s)")
    parser.add_argument("--tidy", action="store_true", help="upright on a grid, before plain greys: easily drawn")
    parser.add_argument("--processes", type=COUNT, help="processes at work (default: one per core)")
    args = parser.parse_args()
    parameters = DemoDocuments(args.text, args.instructions, args.heldout, args.seed, args.size, args.tidy)
    shards = make_demo_documents(args.output, parameters, args.processes)
    print(
        f"{args.output}: {args.text} texts and {args.instructions} instructions to train on, {args.heldout} of each "
        f"held out, in {len(shards)} shards"
    )


if __name__ == "__main__":
    run_tool(main)

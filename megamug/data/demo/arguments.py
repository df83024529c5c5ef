"""Command-line options that both makers of demo data have."""

from __future__ import annotations

import argparse

from megamug.command_line.arguments import COUNT, FROM_ZERO, output_folder
from megamug.data.demo.documents import DemoDocuments
from megamug.data.demo.scenes import DemoParameters


def add_output(parser: argparse.ArgumentParser) -> None:
    """The folder to write into."""
    parser.add_argument("output", type=output_folder, metavar="OUTPUT", help="a new folder")


def add_scenes(parser: argparse.ArgumentParser, default: DemoParameters | DemoDocuments) -> None:
    """How scenes look, and how many processes draw them."""
    parser.add_argument("--heldout", type=COUNT, default=default.heldout, help="held out of each (default %(default)s)")
    parser.add_argument("--seed", type=FROM_ZERO, default=default.seed, help="of the scenes (default %(default)s)")
    parser.add_argument("--size", type=COUNT, default=default.size, help="pixels a side (default %(default)s)")
    parser.add_argument("--tidy", action="store_true", help="upright on a grid, before plain greys: easily drawn")
    parser.add_argument("--processes", type=COUNT, help="processes at work (default: one per core)")

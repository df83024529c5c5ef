"""What prepares data, converts, inspects, fuses and measures: the bodies of `megamug data ...`, `megamug convert` and
the like, one module each with `main(argv, prog) -> exit code or None`.

`megamug.cli` runs them as subcommands, `tools/*.py` by their paths. A module is imported when it is asked for: most
bring torch with them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from megamug.command_line.tool import run_tool

DATA = {  # `megamug data NAME`: (module, what it does)
    "shards": ("shards", "pack images and captions into shards"),
    "index": ("index", "verify shards and write their indexes"),
    "tokenizer": ("tokenizer", "train a SentencePiece tokenizer on the texts in shards"),
    "image-tokenizer": ("image_tokenizer", "train an image tokenizer on the images in shards"),
    "vocabulary": ("vocabulary", "join a text tokenizer and an image tokenizer"),
    "documents": ("documents", "tokenise documents for language models"),
    "demo": ("demo_data", "render image-caption pairs to try things with"),
    "demo-documents": ("demo_documents", "write documents to try things with"),
}
COMMANDS = {  # `megamug NAME`
    "convert": ("convert", "convert between megamug's checkpoints and other libraries'"),
    "inspect": ("inspect", "say what a checkpoint holds, and whether it is complete"),
    "features": ("transfer.features", "write an encoder's features of images"),
    "probe": ("transfer.probe", "measure features by k-NN and by a linear probe"),
    "study": ("transfer.study", "ask one question of many trainings, and tell what is more than chance"),
    "fuse": ("fuse", "fuse two parents into one model"),
    "benchmark": ("benchmark", "measure megamug beside what it is compared with"),
}


def split(argv: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """(module, `megamug NAME` as it was called, its arguments) where `argv` calls one of these commands, else None."""
    depth, names = (2, DATA) if argv[:1] == ["data"] else (1, COMMANDS)
    if len(argv) < depth or argv[depth - 1] not in names:
        return None
    return names[argv[depth - 1]][0], " ".join(["megamug", *argv[:depth]]), list(argv[depth:])


def run(module: str, argv: list[str], prog: str | None = None) -> int:
    """Runs one of them; `prog` is what its help calls it (None: the name of the script). Returns its exit code."""
    return importlib.import_module(f"{__name__}.{module}").main(argv, prog) or 0


def door(module: str, said: str = "error") -> None:
    """A script's way in: runs it on the script's arguments and ends the process. `said` begins an error's sentence."""
    run_tool(lambda: sys.exit(run(module, sys.argv[1:])), said)

"""megamug benchmark NAME [options]

    mug         training steps of MUG, against transformers' ViTMAE
    jam         training steps of DecoderLM and JAM-Cross, and writing, against transformers' LLaMA
    losses      each loss, forward and gradient, against eager and compiled torch and others' kernels
    loader      images read, decoded and cropped, against webdataset and Pillow
    checkpoint  saving and loading, against the disk and torch.save

All take --json PATH, --compare PATH.json (a stored run) and --profile FOLDER; `NAME --help` tells the rest. mug, jam
and checkpoint also run under torchrun.
"""

import importlib
import os
import pkgutil

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler announces its beginning and its end
from megamug import benchmarks  # noqa: E402
from megamug.errors import UserError  # noqa: E402


def main(argv: list[str], prog: str | None = None) -> None:
    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name[0] != "_")
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    if not argv or argv[0] not in names:
        asked = f"there is no benchmark {argv[0]!r}" if argv else "which benchmark?"
        raise UserError(f"{asked}; available: {', '.join(names)}")
    importlib.import_module(f"megamug.benchmarks.{argv[0]}").main(argv[1:])

"""megamug trains MUG, a vision transformer that learns by generating pixels and captions, in every parallel layout.

    encoder = megamug.load_encoder("runs/mug")      see docs/python.md
    model = megamug.load("runs/mug")
"""

from importlib import import_module

__version__ = "0.1.0"
# Public names and where they are defined; nothing is imported before it is used.
_PUBLIC = {
    "load": "megamug.transfer.whole", "LoadedMug": "megamug.transfer.whole",
    "LoadedLanguageModel": "megamug.transfer.whole", "Document": "megamug.transfer.whole",
    "load_encoder": "megamug.transfer.encoder", "VisionEncoder": "megamug.transfer.encoder",
    "Features": "megamug.transfer.encoder", "Preprocessor": "megamug.transfer.preprocessing",
    "UserError": "megamug.errors",
}  # fmt: skip
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

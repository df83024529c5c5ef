"""The foreign formats by name."""

from __future__ import annotations

from megamug.configuration.reading import nearest
from megamug.convert.formats import Format
from megamug.convert.image_tokenizer import LAYOUTS
from megamug.convert.language import formats as language
from megamug.convert.vision import hf_vit, hf_vitmae, mae, timm
from megamug.errors import UserError

FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        mae.FORMAT, timm.FORMAT, hf_vit.FORMAT, hf_vit.FORMAT5, hf_vitmae.FORMAT, hf_vitmae.FORMAT5, language.LLAMA,
        language.CHAMELEON, language.LLAMAGEN, language.OPT,
    )
}  # fmt: skip
MEGAMUG = "megamug"
IMAGE_TOKENIZERS = {f"vq_{layout}": layout for layout in LAYOUTS}


def format_named(name: str) -> Format:
    """Raises UserError where there is no such format."""
    if name not in FORMATS:
        known = [MEGAMUG, *FORMATS, *IMAGE_TOKENIZERS]
        raise UserError(f"there is no format {name!r}; the nearest is {nearest(name, known)!r} (of {', '.join(known)})")
    return FORMATS[name]

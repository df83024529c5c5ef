"""The foreign formats by name."""

from __future__ import annotations

from megamug.config import nearest
from megamug.convert import hf_vit, hf_vitmae, language, mae, timm
from megamug.convert.formats import Format
from megamug.convert.image_tokenizer import LAYOUTS
from megamug.errors import UserError

FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        mae.FORMAT, timm.FORMAT, hf_vit.FORMAT, hf_vit.FORMAT5, hf_vitmae.FORMAT, hf_vitmae.FORMAT5, language.LLAMA,
        language.OPT,
    )
}  # fmt: skip
MEGAMUG = "megamug"
IMAGE_TOKENIZERS = {f"vq_{layout}": layout for layout in LAYOUTS}
UNSUPPORTED = {
    "hf_chameleon": "Chameleon normalises every query and key head by a LayerNorm with weights and biases of its own; "
    "DecoderLM's lm.qk_norm is a norm of the tower's kind (RMSNorm here) that all heads share, so its outputs could "
    "not be the same. Its image tokenizer converts: vq_taming reads the published vqgan.ckpt",
    "llamagen_gpt": "LlamaGen's GPT turns queries and keys by two-dimensional rotary positions (row and column of the "
    "image) and starts from an embedded condition; DecoderLM's positions are learned or one-dimensional, so its "
    "outputs could not be the same. Its image tokenizer converts: vq_llamagen",
}


def format_named(name: str) -> Format:
    """Raises UserError where there is no such format."""
    if name in UNSUPPORTED:
        raise UserError(f"{name} cannot be converted: {UNSUPPORTED[name]}")
    if name not in FORMATS:
        known = [MEGAMUG, *FORMATS, *IMAGE_TOKENIZERS]
        raise UserError(f"there is no format {name!r}; the nearest is {nearest(name, known)!r} (of {', '.join(known)})")
    return FORMATS[name]

"""Named model sizes. A preset fills the `model.*` keys that the configuration leaves at None.

ViT sizes: Dosovitskiy et al. 2021 (ViT) and Zhai et al. 2022 (Scaling Vision Transformers); the image decoder is MAE's
(He et al. 2022: 8 layers of 512, 16 heads); the text decoder is 768 wide with 12 heads (MUG, arXiv 2301.07088), its
6 + 6 layers are ours.
"""

from __future__ import annotations


def _vit(layers: int, width: int, heads: int, ffn_width: int, patch_size: int) -> dict:
    return dict(
        patch_size=patch_size, layers=layers, width=width, heads=heads, ffn_width=ffn_width,
        decoder_layers=8, decoder_width=512, decoder_heads=16,
        text_unimodal_layers=6, text_multimodal_layers=6, text_width=768, text_heads=12,
    )


PRESETS: dict[str, dict] = {
    "vit_ti16": _vit(12, 192, 3, 768, 16),
    "vit_s16": _vit(12, 384, 6, 1536, 16),
    "vit_b16": _vit(12, 768, 12, 3072, 16),
    "vit_l16": _vit(24, 1024, 16, 4096, 16),
    "vit_h14": _vit(32, 1280, 16, 5120, 14),
    "vit_g14": _vit(40, 1408, 16, 6144, 14),
    # Small enough to learn its task on two CPU cores in minutes (`make demo`).
    "demo": dict(
        patch_size=8, layers=6, width=192, heads=6, ffn_width=768,
        decoder_layers=2, decoder_width=128, decoder_heads=4,
        text_unimodal_layers=1, text_multimodal_layers=2, text_width=192, text_heads=6,
    ),
}

"""Named model sizes. A preset fills the keys of its kind that the configuration leaves at None.

ViT sizes: Dosovitskiy et al. 2021 (ViT) and Zhai et al. 2022 (Scaling Vision Transformers); the image decoder is MAE's
(He et al. 2022: 8 layers of 512, 16 heads); the text decoder is 768 wide with 12 heads (MUG, arXiv 2301.07088), its
6 + 6 layers are ours.
Towers: CM3leon (arXiv 2309.02591, table of sizes; heads as in GPT-3's sizes), LLaMA (arXiv 2302.13971), OPT (arXiv
2205.01068). Fusions are of two towers of one size (JAM, arXiv 2309.15564: 2 x 7B).
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


def _cm3leon(layers: int, width: int, heads: int, init_std: float = 0.006) -> dict:
    """No biases, LayerNorm without affine parameters, feed-forward 4x, learned positions, tied embeddings."""
    return dict(
        layers=layers, width=width, heads=heads, ffn_width=4 * width, norm="layernorm_plain", norm_eps=1e-5,
        activation="gelu", bias=False, positions="learned", max_positions=4096, rotary_base=10000.0,
        rotary_scaling=[], qk_norm=False, qk_norm_per_head=False, res_post_norm=False, grid=0,
        tie_vocabulary=True, init_std=init_std,
    )


def _llama(layers: int, width: int, heads: int, ffn_width: int) -> dict:
    return _cm3leon(layers, width, heads, 0.02) | dict(
        ffn_width=ffn_width, norm="rmsnorm", activation="swiglu", positions="rotary", tie_vocabulary=False,
    )


TOWERS: dict[str, dict] = {
    "cm3leon_350m": _cm3leon(24, 1024, 16),
    "cm3leon_760m": _cm3leon(24, 1536, 16),
    "cm3leon_7b": _cm3leon(32, 4096, 32),
    "llama_7b": _llama(32, 4096, 32, 11008),
    "opt_125m": _cm3leon(12, 768, 12) | dict(norm="layernorm", activation="relu", bias=True, max_positions=2048),
    # Small enough to learn on two CPU cores: in seconds, and in minutes (`make demo-jam`).
    "lm_tiny": _cm3leon(2, 64, 4, 0.02),
    "lm_demo": _cm3leon(4, 128, 4, 0.02),
}


def _jam(tower: str) -> dict:
    return {"text_tower": TOWERS[tower], "image_tower": TOWERS[tower]}


_OF_ENCODER = ("patch_size", "layers", "width", "heads", "ffn_width")

# kind -> preset -> section -> key -> size
BY_KIND: dict[str, dict[str, dict[str, dict]]] = {
    "mug": {name: {"model": sizes} for name, sizes in PRESETS.items()},
    "decoder_lm": {name: {"lm": sizes} for name, sizes in TOWERS.items()},
    "jam_cross": {
        "jam_2x350m": _jam("cm3leon_350m"), "jam_2x7b": _jam("cm3leon_7b"), "jam_demo": _jam("lm_demo"),
    },
}  # fmt: skip
FINE_TUNED = ("classifier", "segmenter")  # kinds that are the encoder of a MUG on every patch, and a head
BY_KIND |= {
    kind: {name: {"model": {key: sizes[key] for key in _OF_ENCODER}} for name, sizes in PRESETS.items()}
    for kind in FINE_TUNED
}
DEFAULT = {"mug": "vit_b16", "decoder_lm": "cm3leon_350m", "jam_cross": "jam_2x350m"} | dict.fromkeys(
    FINE_TUNED, "vit_b16"
)
# Ids that the planner assumes where neither data.tokenizer nor its command says how many: LLaMA's for captions, and
# CM3leon's (arXiv 2309.02591). Classifiers and segmenters have none.
VOCABULARY = {"mug": 32000, "decoder_lm": 56320, "jam_cross": 56320} | dict.fromkeys(FINE_TUNED, 0)

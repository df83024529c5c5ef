"""Chameleon's language model as transformers keeps it (`ChameleonForConditionalGeneration`), and DecoderLM: LLaMA's
block with a LayerNorm of every query and key head, whose weights and biases each head has of its own; in the 34B model
(`swin_norm`) the other norms stand behind attention and feed-forward, before the residual sum.

The encoder of its image tokenizer lies in the same file (`model.vqmodel.`); it is another model and not of this format.
"""

from __future__ import annotations

from dataclasses import replace

from megamug.configuration.sections import TowerConfig
from megamug.convert import parts
from megamug.convert.described import Described, flag
from megamug.convert.language import llama
from megamug.errors import UserError

NAME = "hf_chameleon"
TABLES = 1  # of embeddings
# vocabulary_map hides logits of image codes in transformers, see docs/conversion.md; vq_config is of another model.
DESCRIBED = Described(
    ("chameleon",), llama.READ | {"swin_norm"},
    free=llama.FREE | {"model_parallel_size", "vq_config", "vocabulary_map", "image_token_id"},
)  # fmt: skip
HEAD_NORM_EPS = 1e-5  # fixed in transformers; ours is that of all norms


def tower_config(hf_config: dict) -> TowerConfig:
    """The tower of a `config.json`. Raises UserError for what DecoderLM has not, see `llama.tower_config`, and for two
    different epsilons."""
    tower = llama.tower_config({"rms_norm_eps": 1e-5, "max_position_embeddings": 4096} | hf_config, NAME)
    if tower.norm_eps != HEAD_NORM_EPS:
        raise UserError(f"{NAME}: rms_norm_eps is {tower.norm_eps}, and {HEAD_NORM_EPS} in the norms of query and key"
                        " heads; one value for all norms is supported")  # fmt: skip
    return replace(tower, qk_norm=True, qk_norm_per_head=True, res_post_norm=flag(hf_config, "swin_norm", False))


def pieces(tower: TowerConfig, vocabulary: int) -> list[parts.Piece]:
    """The table, which both directions follow from; `vocabulary` rows of the tables exist."""
    head_norms = [
        parts.Piece(
            f"stack.layers.{i}.self_attention.{x}_layernorm.{kind}", [f"model.layers.{i}.self_attn.{x}_norm.{kind}"]
        )
        for i in range(tower.layers) for x in "qk" for kind in ("weight", "bias")
    ]  # fmt: skip
    return llama.pieces(tower, vocabulary) + head_norms

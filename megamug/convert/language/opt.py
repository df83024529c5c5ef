"""OPT as transformers keeps it (`OPTForCausalLM`), and DecoderLM with LayerNorm, biases and learned positions.

OPT's position table has two rows more, for position -1 and one of no use: they are dropped, and zero on the way back.
"""

from __future__ import annotations

import torch

from megamug.configuration.sections import TowerConfig
from megamug.convert import parts
from megamug.convert.described import Described, flag
from megamug.errors import UserError

NAME = "hf_opt"
TABLES = 1  # of embeddings
DESCRIBED = Described(
    ("opt",),
    frozenset("""
        vocab_size hidden_size num_hidden_layers num_attention_heads ffn_dim word_embed_proj_dim max_position_embeddings
        activation_function enable_bias layer_norm_elementwise_affine do_layer_norm_before _remove_final_layer_norm
        tie_word_embeddings
    """.split()),
    free=frozenset({"dropout", "attention_dropout", "activation_dropout", "layerdrop", "init_std"}),
)  # fmt: skip
OFFSET = 2  # rows of the position table before that of position 0


def tower_config(hf_config: dict) -> TowerConfig:
    """The tower of a `config.json`. Raises UserError for what DecoderLM has not: norms behind the residual, a narrower
    token embedding, an output projection of its own, another activation."""
    width = hf_config["hidden_size"]
    if not flag(hf_config, "do_layer_norm_before", True):
        raise UserError(f"{NAME}: do_layer_norm_before is false (OPT-350m); only norms before each block are supported")
    if (hf_config.get("word_embed_proj_dim") or width) != width:
        raise UserError(f"{NAME}: word_embed_proj_dim({hf_config['word_embed_proj_dim']}) is not hidden_size({width});"
                        f" projected embeddings are not supported")  # fmt: skip
    if flag(hf_config, "_remove_final_layer_norm", False):
        raise UserError(f"{NAME}: a model without final norm is not supported")
    if not flag(hf_config, "tie_word_embeddings", True):
        raise UserError(f"{NAME}: tie_word_embeddings is false; only tied embeddings are supported")
    activation = hf_config.get("activation_function", "relu")
    if activation not in ("relu", "gelu"):
        raise UserError(f"{NAME}: activation_function is {activation!r}; relu and gelu are supported")
    heads, affine = hf_config["num_attention_heads"], flag(hf_config, "layer_norm_elementwise_affine", True)
    return TowerConfig(
        layers=hf_config["num_hidden_layers"], width=width, heads=heads, query_groups=heads,
        ffn_width=hf_config["ffn_dim"], norm="layernorm" if affine else "layernorm_plain", norm_eps=1e-5,
        activation=activation, bias=flag(hf_config, "enable_bias", True), positions="learned",
        max_positions=hf_config["max_position_embeddings"], rotary_base=10000.0, qk_norm=False,
        qk_norm_per_head=False, res_post_norm=False, tie_vocabulary=True,
        init_std=float(hf_config.get("init_std", 0.02)),
    )  # fmt: skip


def pieces(tower: TowerConfig, vocabulary: int) -> list[parts.Piece]:
    """The table, which both directions follow from; `vocabulary` rows of the tables exist."""
    Piece, decoder = parts.Piece, "model.decoder"
    found = [
        parts.vocabulary_rows("embedding.word_embeddings.weight", f"{decoder}.embed_tokens.weight", vocabulary),
        Piece(
            "embedding.positions", [f"{decoder}.embed_positions.weight"], lambda table: table[OFFSET:],
            lambda table: [torch.nn.functional.pad(table, (0, 0, OFFSET, 0))],
        ),
    ]  # fmt: skip
    affine = ("weight", "bias") if tower.norm == "layernorm" else ()
    found += [Piece(f"stack.final_layernorm.{kind}", [f"{decoder}.final_layer_norm.{kind}"]) for kind in affine]
    for i in range(tower.layers):
        ours, theirs = f"stack.layers.{i}", f"{decoder}.layers.{i}"
        for kind in affine:
            found += [
                Piece(f"{ours}.self_attention.linear_qkv.layer_norm_{kind}", [f"{theirs}.self_attn_layer_norm.{kind}"]),
                Piece(f"{ours}.mlp.linear_fc1.layer_norm_{kind}", [f"{theirs}.final_layer_norm.{kind}"]),
            ]
        found += parts.linears(
            ours, tower, [f"{theirs}.self_attn.{x}_proj" for x in "qkv"], f"{theirs}.self_attn.out_proj",
            [f"{theirs}.fc1"], f"{theirs}.fc2",
        )  # fmt: skip
    return found

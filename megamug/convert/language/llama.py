"""LLaMA as transformers keeps it (`LlamaForCausalLM`), and DecoderLM with RMSNorm, SwiGLU and rotary positions.

Both turn the halves of a head (numbers i and i + d/2 together), so query and key rows stay in their order.
"""

from __future__ import annotations

from megamug.configuration.sections import TowerConfig
from megamug.convert import parts
from megamug.convert.described import Described, flag, positive, rotary
from megamug.errors import UserError

NAME = "hf_llama"
TABLES = 1  # of embeddings
READ = frozenset("""
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters attention_bias mlp_bias
    tie_word_embeddings hidden_act
""".split())  # fmt: skip
# Training alone reads dropouts; pretraining_tp cuts the same products into pieces; LLaMA-1 wrote max_sequence_length.
FREE = frozenset({"attention_dropout", "hidden_dropout", "resid_pdrop", "pretraining_tp", "max_sequence_length"})
# Mistral without a window is LLaMA. Its keys have defaults of their own, see `tower_config`.
DESCRIBED = Described(("llama", "mistral"), READ | {"sliding_window"}, free=FREE)
MISTRAL_SAYS = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps")


def tower_config(hf_config: dict, name: str = NAME) -> TowerConfig:
    """The tower of a `config.json`; `name` is the format's in messages. Raises UserError for what DecoderLM has not:
    positions scaled otherwise than LLaMA 3.1's, heads whose width is not hidden_size / num_attention_heads, another
    activation, biases in a part of the linears."""
    heads, width = hf_config["num_attention_heads"], hf_config["hidden_size"]
    _check_window(hf_config, name)
    head_dim = hf_config.get("head_dim") or width // heads
    if head_dim * heads != width:
        raise UserError(f"{name}: head_dim({head_dim}) x num_attention_heads({heads}) is not hidden_size({width});"
                        f" such heads are not supported")  # fmt: skip
    base, scaling = rotary(hf_config, name, ("llama3",) if name == NAME else ())
    if hf_config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{name}: hidden_act is {hf_config['hidden_act']!r}; only silu is supported")
    bias = flag(hf_config, "attention_bias", False)
    if bias != flag(hf_config, "mlp_bias", False):
        raise UserError(f"{name}: attention_bias and mlp_bias differ; biases in all linears or in none are supported")
    return TowerConfig(
        layers=hf_config["num_hidden_layers"], width=width, heads=heads,
        query_groups=hf_config.get("num_key_value_heads") or heads, ffn_width=hf_config["intermediate_size"],
        norm="rmsnorm", norm_eps=positive(hf_config.get("rms_norm_eps", 1e-6), "rms_norm_eps"), activation="swiglu",
        bias=bias,
        positions="rotary", max_positions=hf_config.get("max_position_embeddings", 2048),
        rotary_base=base, rotary_scaling=scaling, qk_norm=False, qk_norm_per_head=False, res_post_norm=False,
        tie_vocabulary=flag(hf_config, "tie_word_embeddings", False),
        init_std=float(hf_config.get("initializer_range", 0.02)),
    )  # fmt: skip


def _check_window(hf_config: dict, name: str) -> None:
    """Raises UserError for attention that sees fewer positions than the model has, and for a config.json of Mistral
    that leaves out what has another default there."""
    if hf_config.get("model_type") == "mistral":
        lacking = [key for key in MISTRAL_SAYS if hf_config.get(key) is None]
        lacking += ["sliding_window"] if "sliding_window" not in hf_config else []
        if lacking:
            raise UserError(f"its config.json is of Mistral and does not say {lacking[0]}; write it there"
                            " (sliding_window: null for no window)")  # fmt: skip
    window, positions = hf_config.get("sliding_window"), hf_config.get("max_position_embeddings", 2048)
    if window is not None and window < positions:
        raise UserError(f"its config.json says sliding_window {window} with max_position_embeddings {positions}: a"
                        f" position sees {window} before it, in {name} all; it does not convert")  # fmt: skip


def pieces(tower: TowerConfig, vocabulary: int) -> list[parts.Piece]:
    """The table, which both directions follow from; `vocabulary` rows of the tables exist."""
    Piece = parts.Piece
    found = [
        parts.vocabulary_rows("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocabulary),
        Piece("stack.final_layernorm.weight", ["model.norm.weight"]),
    ]
    for i in range(tower.layers):
        ours, theirs = f"stack.layers.{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        norms = "self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"
        if tower.res_post_norm:  # transformers calls them alike in both places
            norms = "post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"
        found += [
            Piece(f"{ours}.{norms[0]}", [f"{theirs}.input_layernorm.weight"]),
            Piece(f"{ours}.{norms[1]}", [f"{theirs}.post_attention_layernorm.weight"]),
        ]
        found += parts.linears(
            ours, tower, [f"{attention}.{x}_proj" for x in "qkv"], f"{attention}.o_proj",
            [f"{mlp}.gate_proj", f"{mlp}.up_proj"], f"{mlp}.down_proj",
        )  # fmt: skip
    if not tower.tie_vocabulary:
        found.append(parts.vocabulary_rows("output_layer.weight", "lm_head.weight", vocabulary))
    return found

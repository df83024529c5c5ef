"""transformers' LLaMA, Chameleon and OPT, LlamaGen's GPT, and DecoderLM. The tables are in `llama`, `chameleon`, `opt`
and `llamagen`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from types import ModuleType

from megamug.configuration.sections import Config, DataConfig, TowerConfig
from megamug.configuration.shapes import tower_shapes
from megamug.convert.described import LLAMA3_KEYS
from megamug.convert.formats import Format, View, VocabularyRows, is_count
from megamug.convert.language import chameleon, llama, llamagen, opt
from megamug.convert.table import Row
from megamug.data.padding import padded_vocabulary
from megamug.errors import UserError

COUNTS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "ffn_dim", "word_embed_proj_dim", "max_position_embeddings", "vocab_size",
)  # fmt: skip
PARTS = ("embedding.", "stack.", "output_layer.")


def settings(module: ModuleType, view: View) -> dict[str, object]:
    """The tower that config.json tells of, and rows no longer than its positions."""
    if not view.config:
        raise UserError("there is no config.json beside the tensors; copy the whole folder")
    wrong = [key for key in COUNTS if view.config.get(key) is not None and not is_count(view.config[key])]
    if wrong:
        raise UserError(
            f"its config.json says {wrong[0]} {view.config[wrong[0]]!r} where a whole number above 0 belongs; copy the"
            " whole folder again"
        )
    try:
        tower = module.tower_config(view.config)
    except KeyError as error:
        raise UserError(f"its config.json does not say {error}; copy the whole folder") from None
    context = min(DataConfig().context_length, tower.max_positions)
    found = {"model.kind": "decoder_lm", "data.context_length": context}
    return found | {f"lm.{key}": value for key, value in asdict(tower).items() if value is not None}


def rows(module: ModuleType, config: Config, vocabulary: VocabularyRows) -> list[Row]:
    tower, padded = config.lm, padded_vocabulary(sum(vocabulary))
    _check(module, tower)
    if len(vocabulary) != module.TABLES:
        raise UserError(f"{module.NAME} has {module.TABLES} tables of embeddings, and this run does not tell which of "
                        f"its {sum(vocabulary)} rows belong to which: it is no run converted from {module.NAME}")
    shapes = tower_shapes(tower, padded)
    if not tower.tie_vocabulary:
        shapes["output_layer.weight"] = (padded, tower.width)
    return [Row(piece, shapes[piece.name]) for piece in module.pieces(tower, *vocabulary)]


def _check(module: ModuleType, tower: TowerConfig) -> None:
    """Raises UserError for a tower that the format does not have."""
    wanted = {
        "hf_llama": {
            "norm": ("rmsnorm",), "activation": ("swiglu",), "positions": ("rotary",), "qk_norm": (False,),
            "res_post_norm": (False,),
        },
        "hf_chameleon": {
            "norm": ("rmsnorm",), "activation": ("swiglu",), "positions": ("rotary",), "qk_norm": (True,),
            "qk_norm_per_head": (True,), "rotary_scaling": ([],), "norm_eps": (chameleon.HEAD_NORM_EPS,),
        },
        "llamagen_gpt": {
            "norm": ("rmsnorm",), "activation": ("swiglu",), "positions": ("rotary_grid",), "qk_norm": (False,),
            "res_post_norm": (False,), "bias": (False,), "tie_vocabulary": (False,), "norm_eps": (llamagen.NORM_EPS,),
            "rotary_base": (llamagen.ROTARY_BASE,), "rotary_scaling": ([],),
        },
        "hf_opt": {
            "norm": ("layernorm", "layernorm_plain"), "activation": ("relu", "gelu"), "positions": ("learned",),
            "qk_norm": (False,), "res_post_norm": (False,), "tie_vocabulary": (True,), "query_groups": (tower.heads,),
            "norm_eps": (1e-5,),
        },
    }[module.NAME]  # fmt: skip
    for key, values in wanted.items():
        if getattr(tower, key) not in values:
            said = " or ".join(str(value) for value in values)
            found = getattr(tower, key)
            raise UserError(f"{module.NAME} has lm.{key} {said}, and the model has {found}; it does not convert")


def vocabulary(names: tuple[str, ...], view: View) -> VocabularyRows:
    for name in names:
        if name not in view:
            raise UserError(f"it holds no {name}: it is no model in this format; give another --from")
    return tuple(view.shape(name)[0] for name in names)


def llama_files(config: Config, vocabulary: VocabularyRows) -> dict[str, dict]:
    tower = config.lm
    rope = {"rope_type": "default", "rope_theta": tower.rotary_base}
    if tower.rotary_scaling:
        rope |= {"rope_type": "llama3"} | dict(zip(LLAMA3_KEYS, tower.rotary_scaling, strict=True))
        rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    return {"config.json": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": sum(vocabulary),
        "hidden_size": tower.width, "num_hidden_layers": tower.layers, "num_attention_heads": tower.heads,
        "num_key_value_heads": tower.query_groups, "intermediate_size": tower.ffn_width, "hidden_act": "silu",
        "max_position_embeddings": tower.max_positions, "rms_norm_eps": tower.norm_eps,
        "rope_theta": tower.rotary_base,  # transformers 4
        **({"rope_scaling": rope} if tower.rotary_scaling else {}),
        "rope_parameters": rope,  # transformers 5
        "attention_bias": tower.bias, "mlp_bias": tower.bias, "tie_word_embeddings": tower.tie_vocabulary,
        "initializer_range": tower.init_std,
    }}  # fmt: skip


def chameleon_files(config: Config, vocabulary: VocabularyRows) -> dict[str, dict]:
    """Of the language model alone. `vq_config` and `vocabulary_map` (empty: no logit is hidden) are the tokenizers'."""
    described = llama_files(config, vocabulary)["config.json"]
    return {"config.json": described | {
        "model_type": "chameleon", "architectures": ["ChameleonForConditionalGeneration"],
        "swin_norm": config.lm.res_post_norm, "vocabulary_map": {},
    }}  # fmt: skip


def opt_files(config: Config, vocabulary: VocabularyRows) -> dict[str, dict]:
    tower = config.lm
    return {"config.json": {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": sum(vocabulary),
        "hidden_size": tower.width, "word_embed_proj_dim": tower.width, "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads, "ffn_dim": tower.ffn_width, "activation_function": tower.activation,
        "max_position_embeddings": tower.max_positions, "do_layer_norm_before": True, "enable_bias": tower.bias,
        "layer_norm_elementwise_affine": tower.norm == "layernorm", "dropout": 0.0, "tie_word_embeddings": True,
        "init_std": tower.init_std,
    }}  # fmt: skip


def with_model(name: str) -> str:
    """Some of the published OPT files lack the first word."""
    return f"model.{name}" if name.startswith("decoder.") else name


LLAMA = Format(
    llama.NAME, "transformers' LlamaForCausalLM", "decoder_lm", PARTS, partial(settings, llama), partial(rows, llama),
    files=llama_files, vocabulary=partial(vocabulary, ("model.embed_tokens.weight",)), ignored=r"rotary_emb\.inv_freq$",
    described=llama.DESCRIBED,
)  # fmt: skip
CHAMELEON = Format(
    chameleon.NAME, "the language model of transformers' ChameleonForConditionalGeneration", "decoder_lm", PARTS,
    partial(settings, chameleon), partial(rows, chameleon), files=chameleon_files,
    vocabulary=partial(vocabulary, ("model.embed_tokens.weight",)), ignored=r"rotary_emb\.inv_freq$",
    described=chameleon.DESCRIBED, apart=("model.vqmodel.", "the encoder of the image tokenizer, a model of its own"),
)  # fmt: skip
LLAMAGEN = Format(
    llamagen.NAME, "LlamaGen's class-conditional GPT (.pt or safetensors)", "decoder_lm", PARTS, llamagen.settings,
    partial(rows, llamagen), vocabulary=partial(vocabulary, (llamagen.CODES, llamagen.CLASSES)),
    complete=llamagen.complete,
)  # fmt: skip
OPT = Format(
    opt.NAME, "transformers' OPTForCausalLM", "decoder_lm", PARTS, partial(settings, opt), partial(rows, opt),
    files=opt_files, vocabulary=partial(vocabulary, ("model.decoder.embed_tokens.weight",)), canonical=with_model,
    described=opt.DESCRIBED,
)  # fmt: skip

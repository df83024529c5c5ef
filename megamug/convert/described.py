"""What a format computes of what a `config.json` may say: names of parameters and their shapes do not tell a model's
function. Granite multiplies by four numbers, Mistral looks at a window, SmolLM3 turns three layers of four, and all of
them keep LLaMA's parameters under LLaMA's names.

So a format names the `model_type`s that it computes and every key that it knows. A known key holds a value that the
format computes, or the conversion ends; so it does for a key that nobody here has heard of, because a library writes
down what differs from its defaults. The user may vouch for such a key by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from megamug.errors import UserError

# What transformers writes of any model and no model computes with: who made it, for what, and how text is sampled.
_ANY = frozenset("""
    _name_or_path _commit_hash _attn_implementation _attn_implementation_internal attn_implementation architectures
    model_type transformers_version dtype torch_dtype use_bfloat16 torchscript tf_legacy_loss return_dict use_cache
    use_return_dict output_hidden_states output_attentions chunk_size_feed_forward id2label label2id num_labels
    problem_type finetuning_task task_specific_params tokenizer_class prefix bos_token_id eos_token_id pad_token_id
    sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens
    bad_words_ids max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_return_sequences output_scores return_dict_in_generate exponential_decay_length_penalty remove_invalid_values
    cross_attention_hidden_size initializer_range
""".split())  # fmt: skip
_ANY_VALUES = {
    "is_encoder_decoder": (False,), "is_decoder": (False, True), "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,), "pruned_heads": ({},),
}  # fmt: skip
ROPE_KEYS = {"rope_type", "type", "rope_theta"}
# In the order of `rotary_scaling` of a tower.
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Described:
    """The part of a library's `config.json` that a format computes exactly.

    `model_types`: the values of `type_key` that it is written for. `read`: keys that the format itself reads and
    checks. `values`: keys that must have one of these values where they are there. `free`: keys that change training,
    memory or other parts of the program alone. Anything else is unknown.
    """

    model_types: tuple[str, ...]
    read: frozenset[str]
    values: Mapping[str, tuple] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    type_key: str = "model_type"


def check(config: Mapping, described: Described, name: str, allow: Iterable[str] = ()) -> list[str]:
    """Raises UserError where `config`, a `config.json`, tells of a model that the format `name` does not compute, or of
    something unknown that `allow` (names or patterns) does not name. Returns a remark, if there is one, on the latter.
    """
    found = config.get(described.type_key)
    if found not in described.model_types:
        said = f"says {described.type_key} {found!r}" if found is not None else f"says no {described.type_key}"
        computed = " and ".join(described.model_types)
        raise UserError(f"its config.json {said}, and {name} computes {computed} alone: equal names of parameters"
                        " do not make an equal model; it does not convert")  # fmt: skip
    values = _ANY_VALUES | dict(described.values)
    for key, computed in values.items():
        value = config.get(key)
        if value is not None and not any(type(value) is type(c) and value == c or _numbers(value, c) for c in computed):
            said = " or ".join(repr(value) for value in computed)
            raise UserError(f"its config.json says {key} {value!r}, and {name} computes {said}; it does not convert")
    known = _ANY | described.read | values.keys() | described.free | {described.type_key}
    unknown = [key for key, value in config.items() if key not in known and value is not None]
    allow = list(allow)
    refused = [key for key in unknown if not any(fnmatchcase(key, pattern) for pattern in allow)]
    if refused:
        said = ", ".join(f"{key} {config[key]!r:.60}" for key in refused[:5])
        raise UserError(
            f"its config.json says {said}{f' and {len(refused) - 5} more' if len(refused) > 5 else ''}, which {name} "
            f"does not know and which may change what the model computes; it converts as if they were not there where "
            f"you name them: --allow-missing {' '.join(refused[:5])}"
        )
    return [f"not looked at in config.json: {', '.join(unknown)}"] if unknown else []


def _numbers(one: object, other: object) -> bool:
    """0 and 0.0 are one value of JSON; 1 and true are not."""
    return type(one) in (int, float) and type(other) in (int, float) and one == other


def flag(config: Mapping, key: str, default: bool) -> bool:
    """A switch. Raises UserError for what is neither true nor false: a text is true to Python whatever it says."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"its config.json says {key} {value!r} where true or false belongs; copy the whole folder")
    return value


def positive(value: object, key: str) -> float:
    """A number above 0. Raises UserError for anything else, infinity and NaN included (Python's JSON reads both)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _odd(key, value)
    if not 0 < value < math.inf:
        raise UserError(f"its config.json says {key} {value!r} where a number above 0 belongs; copy the whole folder"
                        " again")  # fmt: skip
    return float(value)


def _odd(key: str, value: object) -> UserError:
    return UserError(f"its config.json is not what the library writes ({key} is {value!r:.60}); copy the whole folder")


def rotary(
    config: Mapping, name: str, scalings: Iterable[str] = (), default: float = 10000.0
) -> tuple[float, list[float]]:
    """(theta, scaling) of rotary positions, the scaling as `rotary_scaling` of a tower, [] for none. transformers 5
    keeps both in `rope_parameters`; before it `rope_theta` and `rope_scaling` stood for themselves, and converted files
    have both. Raises UserError for kinds of scaling that `scalings` does not name, for a part of a head turned, for one
    set of positions per kind of layer, and where the two say unlike things."""
    bases, scaled = {}, {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        if not isinstance(rope, dict):
            raise _odd(key, rope)
        kind = rope.get("rope_type", rope.get("type", "default"))
        known = ROPE_KEYS
        if kind == "llama3" and kind in scalings:
            lacking = [part for part in LLAMA3_KEYS if rope.get(part) is None]
            if lacking:
                raise UserError(f"its config.json does not say {key}.{lacking[0]}; copy the whole folder")
            scaled[key] = [positive(rope[part], f"{key}.{part}") for part in LLAMA3_KEYS]
            known = ROPE_KEYS | set(LLAMA3_KEYS)
        elif kind not in ("default", None):
            raise UserError(f"{name}: rotary positions scaled by {kind!r} are not supported, only"
                            f" {' and '.join(['unscaled ones', *scalings])}")  # fmt: skip
        elif rope:
            scaled[key] = []
        unknown = [part for part, value in rope.items() if part not in known and value is not None]
        if unknown == ["partial_rotary_factor"] and rope["partial_rotary_factor"] == 1:
            unknown = []
        if unknown:
            raise UserError(f"its config.json says {key}.{unknown[0]} {rope[unknown[0]]!r}, and {name} computes plain"
                            " rotary positions; it does not convert")  # fmt: skip
        if rope.get("rope_theta") is not None:
            bases[f"{key}.rope_theta"] = positive(rope["rope_theta"], f"{key}.rope_theta")
    if config.get("rope_theta") is not None:
        bases["rope_theta"] = positive(config["rope_theta"], "rope_theta")
    if len(set(bases.values())) > 1:
        said = " and ".join(f"{key} {value:g}" for key, value in bases.items())
        raise UserError(f"its config.json says {said}: one of them is of another model; copy the whole folder again")
    if len(set(map(tuple, scaled.values()))) > 1:
        raise UserError("its config.json says one scaling of positions in rope_parameters and another in rope_scaling:"
                        " one of them is of another model; copy the whole folder again")  # fmt: skip
    return next(iter(bases.values()), default), next(iter(scaled.values()), [])

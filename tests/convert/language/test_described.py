"""A config.json decides what a model computes, not the names of its parameters: equal logits, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from megamug.convert.conversion import to_megamug
from megamug.convert.registry import FORMATS
from megamug.errors import UserError
from tests.convert.language.test_formats import logits, theirs

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `dev`)")

VOCABULARY = 100
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=160, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 500000.0,
}
# Class of transformers without "Config" and "ForCausalLM", its options, and what is said; None: the same logits.
MODELS = {
    "granite": ("Granite", {"attention_multiplier": 0.1, "residual_multiplier": 0.5}, "model_type 'granite'"),
    "mistral": ("Mistral", {"sliding_window": None}, None),
    "mistral, a window of all": ("Mistral", {"sliding_window": 64, "rms_norm_eps": 1e-5}, None),
    "mistral, sliding window": ("Mistral", {"sliding_window": 4}, "sliding_window 4 with max_position_embeddings 64"),
    "smollm3": ("SmolLM3", {}, "model_type 'smollm3'"),
    "qwen2": ("Qwen2", {}, "model_type 'qwen2'"),
    "qwen3": ("Qwen3", {"head_dim": 16}, "model_type 'qwen3'"),
    "gemma": ("Gemma", {"head_dim": 16}, "model_type 'gemma'"),
    "gemma2": ("Gemma2", {"head_dim": 16}, "model_type 'gemma2'"),
    "phi3": ("Phi3", {}, "model_type 'phi3'"),
    "olmo": ("Olmo", {}, "model_type 'olmo'"),
    "stablelm": ("StableLm", {}, "model_type 'stablelm'"),
    "cohere": ("Cohere", {}, "model_type 'cohere'"),
    "helium": ("Helium", {"head_dim": 16}, "model_type 'helium'"),
    "ministral": ("Ministral", {"sliding_window": 4, "head_dim": 16}, "model_type 'ministral'"),
    "arcee": ("Arcee", {}, "model_type 'arcee'"),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}, "rotary positions scaled by 'yarn'"),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
                      "rotary positions scaled by 'linear'"),
    "llama, 3.1's scaling": ("Llama", {"rope_parameters": LLAMA3}, None),
    "llama, theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, None),
    "llama, relu": ("Llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    "llama, wide heads": ("Llama", {"head_dim": 32}, "head_dim"),
    "llama, biases of attention": ("Llama", {"attention_bias": True}, "attention_bias and mlp_bias differ"),
}  # fmt: skip


def written(folder, name: str, options: dict):
    """A tiny model of transformers with random weights in `folder`, as it writes it."""
    config_class = getattr(transformers, f"{name}Config", None)
    if config_class is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**SIZES, **options})).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", MODELS)
def test_a_model_of_llama_s_names_has_its_logits_or_is_refused_by_name(tmp_path, case):
    """Granite, a window, layers without positions: the same names, and logits off by 1 to 7 without a word."""
    name, options, said = MODELS[case]
    model = written(tmp_path / "model", name, options)
    if said is not None:
        with pytest.raises(UserError, match=f"model: .*{said}"):
            to_megamug(FORMATS["hf_llama"], tmp_path / "model", tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return
    assert to_megamug(FORMATS["hf_llama"], tmp_path / "model", tmp_path / "run") == []
    tokens = torch.randint(3, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(logits(tmp_path / "run", tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form, key, value, said", [
    ("hf_llama", "model_type", None, "says no model_type, and hf_llama computes llama and mistral alone"),
    ("hf_llama", "model_type", "opt", "model_type 'opt'"),
    ("hf_llama", "logits_scaling", 8.0, r"logits_scaling 8.0, which hf_llama does not know .*--allow-missing log"),
    ("hf_llama", "partial_rotary_factor", 0.5, "partial_rotary_factor 0.5"),
    ("hf_llama", "quantization_config", {"bits": 4}, "quantization_config"),
    ("hf_llama", "auto_map", {"AutoModelForCausalLM": "modeling.Own"}, "auto_map"),
    ("hf_llama", "rope_scaling", {"factor": 2.0}, "rope_scaling.factor 2.0"),
    ("hf_llama", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "does not say rope_scaling.low_freq_factor"),
    ("hf_llama", "rope_scaling", LLAMA3 | {"factor": -8.0}, "rope_scaling.factor -8.0 where a number above 0"),
    ("hf_llama", "rope_scaling", LLAMA3 | {"rope_theta": 10000.0}, "one scaling of positions in rope_parameters and"),
    ("hf_llama", "rope_scaling", LLAMA3 | {"mscale": 2.0}, "rope_scaling.mscale 2.0"),
    ("hf_llama", "rope_theta", 500.0, "rope_parameters.rope_theta 10000 and rope_theta 500"),
    ("hf_llama", "rope_theta", -1, "rope_theta -1 where a number above 0"),
    ("hf_llama", "rms_norm_eps", "1e-5", "not what the library writes .rms_norm_eps is '1e-5'"),
    ("hf_llama", "tie_word_embeddings", "false", "tie_word_embeddings 'false' where true or false"),
    ("hf_llama", "sliding_window", 8, "sliding_window 8"),
    ("hf_llama", "num_attention_heads", 3, "hidden_size"),
    ("hf_llama", "is_encoder_decoder", True, "is_encoder_decoder True, and hf_llama computes False"),
    ("hf_opt", "model_type", "bart", "model_type 'bart', and hf_opt computes opt alone"),
    ("hf_opt", "scale_embedding", True, "scale_embedding True, which hf_opt does not know"),
    ("hf_opt", "activation_function", "gelu_new", "activation_function is 'gelu_new'"),
    ("hf_opt", "do_layer_norm_before", 0, "do_layer_norm_before 0 where true or false"),
])  # fmt: skip
def test_values_that_a_format_does_not_compute(tmp_path, form, key, value, said):
    theirs(form).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=said):
        to_megamug(FORMATS[form], tmp_path / "model", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_that_the_user_vouches_for_is_told(tmp_path):
    theirs("hf_llama").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unsloth_version": "2025.1", "unset": None}))
    with pytest.raises(UserError, match="unsloth_version '2025.1'"):
        to_megamug(FORMATS["hf_llama"], tmp_path / "model", tmp_path / "run")
    [remark] = to_megamug(FORMATS["hf_llama"], tmp_path / "model", tmp_path / "run", allow=["unsloth_version"])
    assert remark == "not looked at in config.json: unsloth_version"


def test_two_spellings_of_one_tensor_are_refused(tmp_path):
    theirs("hf_opt").save_pretrained(tmp_path / "model")
    from tests.convert.common import tensors_in

    state = tensors_in(tmp_path / "model")
    name = "model.decoder.final_layer_norm.weight"
    save_file(state | {name.removeprefix("model."): torch.ones(64)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=f"holds one tensor twice, as .*{name}"):
        to_megamug(FORMATS["hf_opt"], tmp_path / "model", tmp_path / "run")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    from tests.data.language import tiny_vocabulary

    return tiny_vocabulary(tmp_path_factory.mktemp("vocabulary"))


def llama(folder, rows: int):
    sizes = {**SIZES, "vocab_size": rows, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)


@pytest.mark.parametrize("more", [-1, 1000, -200])
def test_a_vocabulary_of_another_size_is_told_at_conversion_and_at_loading(tmp_path, vocabulary, more):
    """It said "written", and generate died in a traceback, or drew ids that nothing was learned of."""
    from megamug.configuration.reading import load_config, to_yaml
    from megamug.generation.loading import load_run

    llama(tmp_path / "model", vocabulary.size + more)
    said = f"has {vocabulary.size} ids and the model's tables have {vocabulary.size + more} rows"
    with pytest.raises(UserError, match=said):
        to_megamug(FORMATS["hf_llama"], tmp_path / "model", tmp_path / "run", [f"data.tokenizer={vocabulary.folder}"])
    assert not (tmp_path / "run").exists()
    to_megamug(FORMATS["hf_llama"], tmp_path / "model", tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    config = load_config(path)
    config.data.tokenizer = str(vocabulary.folder)
    path.write_text(to_yaml(config))
    with pytest.raises(UserError, match=said), load_run(tmp_path / "run"):
        pass
    assert not torch.distributed.is_initialized()


def test_rows_that_publishers_round_up_to_are_told_and_loaded(tmp_path, vocabulary):
    from megamug.data.padding import padded_vocabulary
    from megamug.generation.loading import load_run

    rows = padded_vocabulary(vocabulary.size)
    llama(tmp_path / "model", rows)
    [remark] = to_megamug(
        FORMATS["hf_llama"], tmp_path / "model", tmp_path / "run", [f"data.tokenizer={vocabulary.folder}"]
    )
    assert remark.startswith(f"{rows - vocabulary.size} of {rows} rows of the tables are of no id of ")
    with load_run(tmp_path / "run") as run:
        assert run.task.plan.padded_vocabulary == rows


def test_scaled_frequencies_are_the_library_s_and_go_back(tmp_path):
    """At LLaMA 3.1's sizes, where waves of all three kinds are; there and back the same config.json."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from megamug.convert.conversion import from_megamug
    from megamug.models.language.tower import scaled_frequencies
    from tests.convert.common import tensors_in

    rope = LLAMA3 | {"original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(hidden_size=4096, num_attention_heads=32, rope_parameters=rope)
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    found = scaled_frequencies(plain, 8.0, 1.0, 4.0, 8192)
    assert factor == 1 and (found == plain).any() and (found == plain / 8).any()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

    model = written(tmp_path / "model", "Llama", {"rope_parameters": LLAMA3})
    to_megamug(FORMATS["hf_llama"], tmp_path / "model", tmp_path / "run")
    from_megamug(FORMATS["hf_llama"], tmp_path / "run", tmp_path / "out")
    again = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path / "out")).eval()
    again.load_state_dict(tensors_in(tmp_path / "out"))
    tokens = torch.randint(3, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    to_megamug(FORMATS["hf_llama"], tmp_path / "out", tmp_path / "run again")

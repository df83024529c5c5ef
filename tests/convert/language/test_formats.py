"""Language models of transformers: the same tokens give the same logits, there and back is bitwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megamug.checkpoint.tensors import TensorReader
from megamug.convert.conversion import config_of, from_megamug, to_megamug
from megamug.convert.registry import FORMATS, format_named
from megamug.errors import UserError
from tests.convert.common import assert_same_bits, tensors_in

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `dev`)")

VOCABULARY = 100  # no multiple of 128: the tables are padded
CASES = {
    "llama, grouped queries": ("hf_llama", {"num_key_value_heads": 2}),
    "llama, tied, biases": ("hf_llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "opt": ("hf_opt", {}),
    "opt without biases and norm weights": (
        "hf_opt", {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"}),
}  # fmt: skip


def theirs(name: str, **options):
    torch.manual_seed(11)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=32)  # fmt: skip
    if name == "hf_llama":
        options = {"intermediate_size": 160, "rms_norm_eps": 1e-5, "initializer_range": 0.2, **options}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **options))
    else:
        options = {"ffn_dim": 160, "word_embed_proj_dim": 64, "init_std": 0.2, "dropout": 0.0, **options}
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, **options))
    with torch.no_grad():  # biases and norms that are not zero and one: each has to reach its place
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for table in (m for n, m in model.named_parameters() if n.endswith("embed_positions.weight")):
            table[:2] = 0  # the two rows that mean nothing
    return model.eval()


def logits(run_dir: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Of the DecoderLM whose weights the trainer's own loader reads, [b, s, vocabulary]."""
    from megamug.checkpoint import state
    from megamug.distributed import cpu_backend, setup

    cpu_backend.apply()
    from megamug.models.language.decoder_lm import DecoderLM
    from megamug.models.language.plan import LmPlan

    reader = TensorReader(run_dir)
    config = config_of(reader)
    config.data.context_length = tokens.shape[1]
    world = setup.start(config.parallel, seed=0)  # left again before transformers reads a model: it looks for groups
    try:
        chunk = DecoderLM(LmPlan(config, VOCABULARY)).eval()
        state.load_tensors([chunk], None, world, reader.folder / "model", step=0)
        with torch.no_grad():
            hidden = chunk.run(chunk.embed(tokens), tokens)
            return chunk.logits(hidden).transpose(0, 1)[..., :VOCABULARY]
    finally:
        setup.stop()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_library_s_and_back_is_bitwise(tmp_path, case):
    name, options = CASES[case]
    model = theirs(name, **options)
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    to_megamug(FORMATS[name], tmp_path / "model", tmp_path / "run")
    tokens = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(logits(tmp_path / "run", tokens), expected, rtol=1e-4, atol=1e-4)

    from_megamug(FORMATS[name], tmp_path / "run", tmp_path / "out", max_shard_bytes=50_000)
    assert_same_bits(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "model"))
    _, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    again = type(model)(transformers.AutoConfig.from_pretrained(tmp_path / "out")).eval()
    again.load_state_dict(tensors_in(tmp_path / "out"), strict=False)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)


CHAMELEON_VQ = {
    "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1],
    "num_res_blocks": 1, "attn_type": "none", "resolution": 16,
}  # fmt: skip


def chameleon(**options):
    """Ids 90 ... 97 are image codes, which transformers hides from its logits."""
    torch.manual_seed(11)
    model = transformers.ChameleonForConditionalGeneration(transformers.ChameleonConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=160, max_position_embeddings=32, initializer_range=0.2, vq_config=CHAMELEON_VQ,
        vocabulary_map={"<image>": 99} | {f"IMGIMG{chr(65 + i)}Z": 90 + i for i in range(8)}, **options,
    ))  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "q_norm" in name or "k_norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


@pytest.mark.parametrize("options", [
    {}, {"swin_norm": True, "attention_bias": True, "mlp_bias": True},
], ids=["7B", "34B, biases"])  # fmt: skip
def test_chameleon_s_logits_are_the_library_s_and_back_is_bitwise(tmp_path, options):
    model, form = chameleon(**options), FORMATS["hf_chameleon"]
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    [remark] = to_megamug(form, tmp_path / "model", tmp_path / "run")
    assert remark.startswith("left out (the encoder of the image tokenizer, a model of its own): ")
    tokens = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(tokens).logits
    hidden = expected == torch.finfo(torch.float32).min
    assert hidden.any(dim=(0, 1)).nonzero().flatten().tolist() == [*range(90, 98)]
    found = logits(tmp_path / "run", tokens)
    assert found[hidden].std() > 0.1
    torch.testing.assert_close(found[~hidden], expected[~hidden], rtol=1e-4, atol=1e-4)

    from_megamug(form, tmp_path / "run", tmp_path / "out", max_shard_bytes=50_000)
    written = tensors_in(tmp_path / "out")
    own = {name: tensor for name, tensor in tensors_in(tmp_path / "model").items() if "vqmodel" not in name}
    assert_same_bits(written, own)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    config.vq_config = model.config.vq_config
    again = transformers.ChameleonForConditionalGeneration(config).eval()
    missing, unexpected = again.load_state_dict(written, strict=False)
    assert not unexpected and all(name.startswith("model.vqmodel.") for name in missing)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits[~hidden], expected[~hidden])


def test_bf16_stays_bf16(tmp_path):
    model = theirs("hf_llama").bfloat16()
    model.save_pretrained(tmp_path / "model")
    to_megamug(FORMATS["hf_llama"], tmp_path / "model", tmp_path / "run")
    reader = TensorReader(tmp_path / "run")
    assert config_of(reader).precision.dtype == "bf16"
    assert {reader.dtype(name) for name in reader.names} == {torch.bfloat16}
    from_megamug(FORMATS["hf_llama"], tmp_path / "run", tmp_path / "out")
    assert_same_bits(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "model"))


def test_models_that_the_other_side_has_not_are_refused(tmp_path):
    theirs("hf_opt").save_pretrained(tmp_path / "opt")
    to_megamug(FORMATS["hf_opt"], tmp_path / "opt", tmp_path / "run")
    with pytest.raises(UserError, match="hf_llama has lm.norm rmsnorm, and the model has layernorm"):
        from_megamug(FORMATS["hf_llama"], tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="is a model of kind decoder_lm; timm is one of kind mug"):
        from_megamug(FORMATS["timm"], tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="hf_chameleon has lm.norm rmsnorm, and the model has layernorm"):
        from_megamug(FORMATS["hf_chameleon"], tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    chameleon(rms_norm_eps=1e-6).save_pretrained(tmp_path / "chameleon")
    with pytest.raises(UserError, match="hf_chameleon: rms_norm_eps is 1e-06, and 1e-05 in the norms of query and key"):
        to_megamug(FORMATS["hf_chameleon"], tmp_path / "chameleon", tmp_path / "x")
    with pytest.raises(UserError, match="nearest is 'hf_llama'"):
        format_named("llama")

"""DecoderLM: transformers' LLaMA and OPT of the same weights give the same logits; documents stay apart; the cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megamug.configuration.presets import TOWERS
from megamug.configuration.reading import resolve
from megamug.configuration.sections import Config, TowerConfig
from megamug.convert.language import llama, opt

VOCABULARY, CONTEXT = 100, 24
LLAMA = {
    "norm": "rmsnorm", "activation": "swiglu", "positions": "rotary", "tie_vocabulary": False, "query_groups": 2,
    "qk_norm": True,
}  # fmt: skip
GROUPED = {**LLAMA, "qk_norm": False}  # without gradients queries and keys turn at once
CHAMELEON = LLAMA | {"qk_norm_per_head": True, "res_post_norm": True}
GRID = {"positions": "rotary_grid", "grid": 5}
OPT = {"norm": "layernorm", "activation": "relu", "bias": True}


def build(options: dict | TowerConfig, context: int = CONTEXT, **model):
    """An initialised DecoderLM of `lm_tiny` with `options`, or of a whole tower."""
    from megamug.models.init import initialise
    from megamug.models.language.decoder_lm import DecoderLM
    from megamug.models.language.plan import LmPlan

    config = Config()
    config.model.__dict__.update(kind="decoder_lm", preset="lm_tiny", **model)
    config.data.__dict__.update(context_length=context, micro_batch_size=2, global_batch_size=2)
    config.lm.__dict__.update(vars(options) if isinstance(options, TowerConfig) else options)
    plan = LmPlan(resolve(config), VOCABULARY)
    chunk = DecoderLM(plan)
    initialise(chunk.sharded_state_dict(), 3, plan.init_std)
    return chunk


def tensors_of(chunk) -> dict[str, torch.Tensor]:
    """By global name; both halves of a gated feed-forward are one tensor."""
    return {getattr(entry, "key", name): entry.data.detach() for name, entry in chunk.sharded_state_dict().items()}


def rows(count: int = 2, length: int = CONTEXT) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(5))


def logits(chunk, tokens, segments=None) -> torch.Tensor:
    """[b, s, vocabulary]."""
    hidden = chunk.run(chunk.embed(tokens), tokens, segments)
    return chunk.logits(hidden).transpose(0, 1)[..., :VOCABULARY]


def theirs(family: str, **sizes):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `dev`)")
    torch.manual_seed(11)
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
            intermediate_size=160, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.2, **sizes,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, ffn_dim=160,
            max_position_embeddings=64, word_embed_proj_dim=64, dropout=0.0, init_std=0.2, **sizes,
        )  # fmt: skip
        model = transformers.OPTForCausalLM(config)
    with torch.no_grad():  # biases and norms that are not zero and one: each has to reach its place
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


FAMILIES = {
    "llama, grouped queries": (llama, "llama", {}),
    "llama, tied": (llama, "llama", {"tie_word_embeddings": True}),
    "llama, biases, another base": (
        llama, "llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": {
            "rope_type": "default", "rope_theta": 500000.0}}),
    "opt": (opt, "opt", {}),
    "opt, gelu, no biases, plain norms": (
        opt, "opt", {"activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_with_the_same_weights(world, name):
    family, kind, sizes = FAMILIES[name]
    model = theirs(kind, **sizes)
    state = {n: p.detach() for n, p in model.named_parameters()}
    tower = family.tower_config(model.config.to_dict())
    chunk = build(tower)
    ours = tensors_of(chunk)
    pieces = family.pieces(tower, VOCABULARY)
    assert {piece.name for piece in pieces} == set(ours)
    for piece in pieces:
        tensor = piece.join(*(state[name] for name in piece.others))
        assert tensor.shape == ours[piece.name].shape, piece.name
        ours[piece.name].copy_(tensor)
    tokens = rows()
    expected = model(tokens).logits
    found = logits(chunk, tokens)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5
    # and back: the same tensors under the same names
    back = {
        n: tensor for piece in pieces for n, tensor in zip(piece.others, piece.split(ours[piece.name]), strict=True)
    }
    assert set(back) == set(state)
    for n, tensor in back.items():
        assert tensor.shape == state[n].shape, n
        skipped = opt.OFFSET if "embed_positions" in n else 0
        assert torch.equal(tensor[skipped:], state[n][skipped:]), n


def test_loss_is_the_cross_entropy_of_the_logits_and_gradients_flow_everywhere(world):
    for options in ({}, LLAMA, CHAMELEON, OPT):
        chunk = build(options)
        tokens, labels = rows(), rows().roll(-1, dims=1)
        labels[0, 5:9] = -100
        _, losses = chunk(SimpleNamespace(tokens=tokens, labels=labels, segments=None, positions=None))
        total, count = losses["lm"]
        wanted = torch.nn.functional.cross_entropy(
            logits(chunk, tokens).flatten(0, 1), labels.flatten(), reduction="sum"
        )
        assert count == (labels != -100).sum() == labels.numel() - 4
        assert torch.allclose(total, wanted, rtol=1e-5)
        parameters = dict(chunk.named_parameters())
        expected = torch.autograd.grad(wanted, list(parameters.values()))
        total.backward()
        for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
            assert gradient.any(), name
            assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-5), name


def test_z_loss_is_the_mean_squared_log_sum_exp(world):
    chunk, plain = build({}, z_loss_weight=0.01), build({})
    tokens, labels = rows(), rows().roll(-1, dims=1)
    labels[1, :7] = -100
    batch = SimpleNamespace(tokens=tokens, labels=labels, segments=None, positions=None)
    losses = chunk(batch)[1]
    assert list(losses) == list(chunk.plan.loss_weights) == ["lm", "z"]
    assert torch.allclose(losses["lm"][0], plain(batch)[1]["lm"][0], rtol=1e-6)
    scores = logits(chunk, tokens)
    z = scores.logsumexp(-1).square()[labels != -100].sum()
    assert torch.allclose(losses["z"][0], z, rtol=1e-5) and losses["z"][1] == (labels != -100).sum()
    weight = chunk.vocabulary_weight()
    (found,) = torch.autograd.grad(losses["z"][0], weight, retain_graph=True)
    (expected,) = torch.autograd.grad(z, weight)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_rotary_table_grows_with_the_row_and_serves_training_after_inference(world):
    chunk, tokens = build(LLAMA), rows()
    with torch.inference_mode():
        before = logits(chunk, tokens)
    after = logits(chunk, tokens)
    after.sum().backward()
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-6)
    tower = chunk.plan.tower
    near = tower.rotary(3, 9, tokens.device).clone()
    far = tower.rotary(0, 5 * CONTEXT, tokens.device)
    assert len(far) == 5 * CONTEXT and torch.equal(near, far[3:9])
    assert not torch.is_inference(far)


@pytest.mark.parametrize("options", [{}, LLAMA, OPT], ids=["cm3leon", "llama", "opt"])
def test_separate_documents_are_as_if_alone(world, options):
    chunk = build(options)
    tokens, length = rows(1), 9
    segments = torch.zeros_like(tokens, dtype=torch.int32)
    segments[:, length:] = 1
    positions = torch.cat([torch.arange(length), torch.arange(CONTEXT - length)]).unsqueeze(0)
    hidden = chunk.run(chunk.embed(tokens, positions), tokens, segments)
    together = chunk.logits(hidden)[:, 0, :VOCABULARY]
    alone = torch.cat([logits(chunk, part)[0] for part in (tokens[:, :length], tokens[:, length:])])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(chunk, tokens)[0], alone, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("options", [{}, LLAMA, GROUPED, CHAMELEON, GRID, OPT], ids=str)
def test_a_key_value_cache_gives_the_same_logits(world, options):
    from megamug.models.blocks.layers import key_value_cache

    chunk = build(options).eval()
    tokens, prompt = rows(), 7
    with torch.no_grad(), key_value_cache(chunk, CONTEXT):
        found = []
        for first, last in [(0, prompt), *((i, i + 1) for i in range(prompt, CONTEXT))]:
            part = tokens[:, first:last]
            hidden = chunk.run(chunk.embed(part, first=first), part, first=first)
            assert not hidden.requires_grad
            found.append(chunk.logits(hidden).transpose(0, 1)[..., :VOCABULARY])
    assert torch.allclose(torch.cat(found, dim=1), logits(chunk, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, LLAMA, GROUPED, CHAMELEON, GRID, OPT], ids=str)
def test_evaluation_gives_the_logits_of_training(world, options):
    """Without gradients layers run without Megatron's forward (`functional`)."""
    chunk, tokens = build(options), rows()
    segments = torch.arange(CONTEXT, dtype=torch.int32).div(9, rounding_mode="floor").expand(2, -1).contiguous()
    for documents in (None, segments):
        expected = logits(chunk.train(), tokens, documents)
        with torch.no_grad():
            assert torch.allclose(logits(chunk.eval(), tokens, documents), expected, rtol=1e-6, atol=1e-7)


def test_initialisation_is_truncated_and_names_are_the_contract(world):
    chunk = build({"init_std": 0.006})
    ours = tensors_of(chunk)
    for name, tensor in ours.items():
        assert tensor.abs().max() <= 3 * 0.006, name
        assert 0.9 < tensor.std() / (0.006 * 0.98658) < 1.1, name  # the deviation of a normal cut at 3
    layers = [f"stack.layers.{i}.{part}.weight" for i in range(2) for part in (
        "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")]  # fmt: skip
    assert set(ours) == {"embedding.word_embeddings.weight", "embedding.positions", *layers}
    extra = set(tensors_of(build(LLAMA))) - set(tensors_of(build({})))
    assert {"output_layer.weight", "stack.final_layernorm.weight",
            "stack.layers.0.self_attention.q_layernorm.weight"} <= extra  # fmt: skip


# Parameters without the vocabulary's rows, of the published sizes.
BODY = {"cm3leon_350m": 306e6, "cm3leon_760m": 686e6, "cm3leon_7b": 6.46e9, "llama_7b": 6.476e9, "opt_125m": 86.6e6}


@pytest.mark.parametrize("preset", BODY)
def test_presets_have_the_published_sizes(preset):
    t = TOWERS[preset]
    h, gated = t["width"], t["activation"] == "swiglu"
    body = t["layers"] * (4 * h * h + (3 if gated else 2) * h * t["ffn_width"])
    body += t["max_positions"] * h if t["positions"] == "learned" else 0
    assert abs(body / BODY[preset] - 1) < 0.01

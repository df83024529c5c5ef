"""Building blocks against formulas written out: positions, norms, attention, cross-attention to another width."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megamug.models.blocks import functional, layers, specs
from megamug.models.blocks.layers import LocalAttention, Norm
from megamug.models.blocks.positions import sincos_positions


def config_of():
    return specs.transformer_config(
        layers=2, width=32, heads=4, ffn_width=64, norm_eps=1e-6, dtype=torch.float32, tensor=1, sequence=False,
        recompute=False,
    )


# ---------------------------------------------------------------------------------------------- positions

def mae_positions(width: int, rows: int, columns: int) -> np.ndarray:
    """MAE's formula, element by element: [sin(x w), cos(x w), sin(y w), cos(y w)], x the column and y the row."""
    quarter = width // 4
    table = np.zeros((rows * columns, width))
    for y in range(rows):
        for x in range(columns):
            for i in range(quarter):
                frequency = 10000.0 ** (-i / quarter)
                table[y * columns + x, i :: quarter] = (
                    math.sin(x * frequency), math.cos(x * frequency), math.sin(y * frequency), math.cos(y * frequency)
                )
    return table


@pytest.mark.parametrize("width, rows, columns, prefix", [(16, 3, 3, 0), (32, 2, 5, 1), (768, 14, 14, 1), (8, 4, 2, 3)])
def test_positions_equal_maes_formula(width, rows, columns, prefix):
    table = sincos_positions(width, rows, columns, prefix)
    assert table.dtype == torch.float32 and table.shape == (prefix + rows * columns, width)
    assert not table[:prefix].any()
    np.testing.assert_allclose(table[prefix:].numpy(), mae_positions(width, rows, columns), rtol=0, atol=1e-7)


def test_positions_need_a_width_divisible_by_four():
    with pytest.raises(ValueError, match="divisible by 4, not 30"):
        sincos_positions(30, 2, 2, 0)


# ---------------------------------------------------------------------------------------------- norm

@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norm_equals_its_formula(kind):
    config = config_of()
    config.normalization = kind
    norm = Norm(config, 32, eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 32, generator=generator) * 3 + 1
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(32, generator=generator))
    centred = x - x.mean(-1, keepdim=True) if kind == "LayerNorm" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    expected = expected + norm.bias if kind == "LayerNorm" else expected
    torch.testing.assert_close(norm(x), expected)
    assert (norm.bias is None) == (kind == "RMSNorm")


@pytest.mark.parametrize("sequence", [False, True])
def test_norm_marks_partial_gradients(sequence):
    config = config_of()
    config.sequence_parallel = sequence
    assert all(p.sequence_parallel is sequence for p in Norm(config, 32).parameters())


# ---------------------------------------------------------------------------------------------- attention

def explicit_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """softmax(q k / sqrt(d)) v of [s, b, n, d] and [t, b, n, d] -> [s, b, n d], one product after another."""
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) / math.sqrt(query.shape[-1])
    if causal:
        s, t = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(s, t).triu(1).bool(), -torch.inf)
    return torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), value).flatten(2)


@pytest.mark.parametrize("causal, queries, keys", [(False, 7, 7), (True, 7, 7), (False, 6, 9), (True, 1, 5)])
def test_local_attention_equals_explicit_softmax(causal, queries, keys):
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    attention = LocalAttention(config_of(), layer_number=1, attn_mask_type=mask, attention_type="self")
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, 2, 4, 8) for length in (queries, keys, keys)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    # One causal query is the newest token: it sees every key that is cached.
    expected = explicit_attention(query, key, value, causal and queries > 1)
    torch.testing.assert_close(attention(query, key, value), expected)


def layer_of(world, causal: bool, context_width: int | None):
    from megatron.core.transformer import build_module

    config = config_of()
    layer = build_module(specs.transformer_layer("local", config, causal, context_width), config=config, layer_number=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return layer


def explicit_layer(layer, x: Tensor, context: Tensor | None, causal: bool) -> Tensor:
    """The pre-norm layer from its parameters, written out. Fused rows run [q, k, v] or [k, v] within each head."""
    p = dict(layer.named_parameters())
    heads = 4

    def linear(name: str, y: Tensor) -> Tensor:
        return y @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name: str, y: Tensor) -> Tensor:
        variance, mean = torch.var_mean(y, -1, correction=0, keepdim=True)
        return (y - mean) / (variance + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    qkv = linear("self_attention.linear_qkv", norm("input_layernorm", x)).unflatten(-1, (heads, 3, -1))
    x = x + linear("self_attention.linear_proj", explicit_attention(*qkv.unbind(-2), causal))
    if context is not None:
        query = linear("cross_attention.linear_q", norm("pre_cross_attn_layernorm", x)).unflatten(-1, (heads, -1))
        key_value = linear("cross_attention.linear_kv", context).unflatten(-1, (heads, 2, -1))
        x = x + linear("cross_attention.linear_proj", explicit_attention(query, *key_value.unbind(-2), False))
    hidden = torch.nn.functional.gelu(linear("mlp.linear_fc1", norm("pre_mlp_layernorm", x)))  # the exact one
    return x + linear("mlp.linear_fc2", hidden)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("context_width", [None, 32, 20])
def test_layer_equals_its_formula(world, causal, context_width):
    layer = layer_of(world, causal, context_width)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 2, 32, generator=generator)
    context = None if context_width is None else torch.randn(9, 2, context_width, generator=generator)
    output, _ = layer(x, attention_mask=None, context=context)
    torch.testing.assert_close(output, explicit_layer(layer, x, context, causal), rtol=1e-5, atol=1e-5)


def test_kept_keys_and_values_change_nothing(world):
    layer = layer_of(world, True, 20)
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(6, 2, 32, generator=generator), torch.randn(9, 2, 20, generator=generator)
    with torch.no_grad():
        expected, _ = layer(x, attention_mask=None, context=context)
        layer.cross_attention.keep = True
        first, _ = layer(x, attention_mask=None, context=context)
        again, _ = layer(x, attention_mask=None, context=torch.full_like(context, torch.nan))  # not looked at any more
        assert torch.equal(first, expected) and torch.equal(again, expected)
        layer.cross_attention.keep, layer.cross_attention.kept = False, None
        assert torch.equal(layer(x, attention_mask=None, context=context)[0], expected)


@pytest.mark.parametrize("context_width", [None, 20])
def test_without_gradients_a_layer_is_the_same(world, context_width):
    layer = layer_of(world, True, context_width).eval()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 2, 32, generator=generator)
    context = None if context_width is None else torch.randn(9, 2, context_width, generator=generator)
    with torch.no_grad():
        found = functional.transformer_layer(layer, x, None, None, context)
        assert torch.equal(found, layer(x, attention_mask=None, context=context)[0])


# ---------------------------------------------------------------------------------------------- runs of layers

def test_a_run_of_layers_keeps_its_numbers(world):
    """Names follow the layer's number in the whole stack, the final norm the last layer; an empty run has none."""
    config = config_of()
    spec = specs.transformer_layer("local", config, causal=False)

    def keys(first: int, last: int) -> set[str]:
        run = layers.LayerRun(config, [spec] * 2, layers.Norm, first, last)
        return {entry.key for entry in run.sharded_state_dict("stack.").values()}

    whole = keys(0, 2)
    assert keys(0, 1) | keys(1, 2) == whole and not keys(0, 1) & keys(1, 2)
    assert {key for key in keys(1, 2) if "final_layernorm" in key} == {
        "stack.final_layernorm.weight", "stack.final_layernorm.bias"
    }
    assert keys(0, 0) == keys(2, 2) == set()
    assert any(key.startswith("stack.layers.1.self_attention.linear_qkv.layer_norm_") for key in keys(1, 2))


def test_training_evaluation_and_recomputation_run_one_function(world, monkeypatch):
    """What a compiled layer stands in for in training, and for nothing else."""
    config = config_of()
    run = layers.LayerRun(config, [specs.transformer_layer("local", config, causal=True)] * 2, layers.Norm, 0, 2)
    plain, compiled, short = [], [], functional.transformer_layer
    monkeypatch.setattr(functional, "transformer_layer", lambda *a: plain.append(a[0]) or short(*a))
    run.layer_function = lambda *a: compiled.append(a[0]) or short(*a)
    x = torch.zeros(3, 1, 32)
    run.train()
    run(x, attention_mask=None)
    assert compiled == list(run.layers) and not plain
    with torch.no_grad():
        run(x, attention_mask=None)
    run.eval()
    run(x, attention_mask=None)
    assert plain == list(run.layers) * 2 and len(compiled) == 2
    run.train()
    run.config.recompute_granularity = "full"
    run(x.requires_grad_(), attention_mask=None).sum().backward()
    assert compiled == list(run.layers) * 2 + list(run.layers)[::-1]  # forward, and again from behind

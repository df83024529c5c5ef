"""The masked text decoder against plain torch in float64: loss, every gradient, and which tokens are hidden."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamug.data.random import random_words
from megamug.data.text.marks import Marks
from megamug.models.mug.model import padding_mask
from megamug.models.mug.text_masks import hidden_tokens
from tests.distributed.cases.layout_worker import micro_batches, tiny
from tests.models.mug.test_mae_parity import ours, run

MARKS = Marks(bos=1, eos=2, pad=0, unk=3)


def drawn(tokens: Tensor, ratio: float, first: int = 0, epoch: int = 0, seed: int = 5) -> Tensor:
    words = random_words(seed, "text mask", epoch, np.arange(first, first + len(tokens)), tokens.shape[1] - 1)
    return hidden_tokens(tokens, torch.from_numpy(words.astype("int64")), MARKS, ratio)


def captions(count: int, length: int) -> Tensor:
    """Of 0, 1, ... tokens in turn: begin, tokens, end, padding; the longest are cut and have no end."""
    tokens = torch.full((count, length + 1), MARKS.pad)
    for row in range(count):
        words = [1, *range(10, 10 + row % (length + 2)), 2][: length + 1]
        tokens[row, : len(words)] = torch.tensor(words)
    return tokens


@pytest.mark.parametrize("ratio", [0.01, 0.15, 0.5, 0.75, 1.0])
def test_of_each_caption_a_share_is_hidden_and_never_a_mark(ratio):
    tokens = captions(300, 20)
    hidden, own = drawn(tokens, ratio), tokens[:, 1:]
    assert hidden.shape == own.shape and not hidden[own <= 2].any()
    words = (own > 2).sum(dim=1)
    wanted = [max(1, int(n * ratio + 0.5)) if n else 0 for n in words.tolist()]
    assert hidden.sum(dim=1).tolist() == wanted and min(words) == 0 and max(words) == 20


def test_what_is_hidden_is_a_function_of_seed_epoch_and_sample():
    tokens = captions(4000, 6)
    hidden = drawn(tokens, 0.5)
    assert torch.equal(drawn(tokens[900:950], 0.5, first=900), hidden[900:950])  # whatever the batch
    for other in (drawn(tokens, 0.5, epoch=1), drawn(tokens, 0.5, seed=6)):
        assert 0.3 < (other == hidden)[tokens[:, 1:] > 2].float().mean() < 0.7
    whole = hidden[(tokens[:, 1:] > 2).all(dim=1)]  # six tokens, three of them hidden, each as often as the others
    assert len(whole) > 400 and (whole.float().mean(dim=0) - 0.5).abs().max() < 0.08


def test_padding_hides_every_key_but_leaves_none_of_a_row_alone():
    tokens = torch.tensor([[5, 2, 0, 0], [0, 0, 0, 0], [5, 6, 7, 2]])
    mask = padding_mask(tokens, 0)
    assert mask.shape == (3, 1, 1, 4)
    assert mask[:, 0, 0].tolist() == [[False, False, True, True], [False, True, True, True], [False] * 4]


# ------------------------------------------------------------------------------------------ plain torch


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, hidden: Tensor | None) -> Tensor:
    """[b, s, h], [b, t, h] -> [b, s, h]; `hidden` [b, t] True for keys that nobody sees."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def reference(weights: dict[str, Tensor], latent: Tensor, tokens: Tensor, hidden: Tensor, heads: int) -> Tensor:
    """The mean cross-entropy of the hidden tokens; latent [b, l, h'], tokens [b, T], hidden [b, T]."""
    w = {name.removeprefix("text_decoder."): x for name, x in weights.items() if name.startswith("text_decoder.")}

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    words = w["word_embeddings.weight"]
    x = torch.where(hidden.unsqueeze(-1), w["mask_token"][0], words[tokens]) + w["text_positions"]
    padding = tokens == MARKS.pad
    layers = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("stack.layers."))
    for number in range(layers):
        layer = f"stack.layers.{number}"
        mixed = linear(f"{layer}.self_attention.linear_qkv", norm(f"{layer}.input_layernorm", x))
        q, k, v = (part.flatten(2) for part in mixed.unflatten(-1, (heads, 3, -1)).unbind(3))
        x = x + linear(f"{layer}.self_attention.linear_proj", attend(q, k, v, heads, padding))
        if f"{layer}.cross_attention.linear_q.weight" in w:
            q = linear(f"{layer}.cross_attention.linear_q", norm(f"{layer}.pre_cross_attn_layernorm", x))
            mixed = linear(f"{layer}.cross_attention.linear_kv", latent)
            k, v = (part.flatten(2) for part in mixed.unflatten(-1, (heads, 2, -1)).unbind(3))
            x = x + linear(f"{layer}.cross_attention.linear_proj", attend(q, k, v, heads, None))
        inner = F.gelu(linear(f"{layer}.mlp.linear_fc1", norm(f"{layer}.pre_mlp_layernorm", x)))
        x = x + linear(f"{layer}.mlp.linear_fc2", inner)
    logits = norm("stack.final_layernorm", x) @ w.get("output_layer.weight", words).T
    return F.cross_entropy(logits[..., :70][hidden], tokens[hidden])


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_plain_torch(world, tied):
    config = tiny({
        "model": {"text_objective": "masked", "text_mask_ratio": 0.5, "image_loss_weight": 0.0, "tie_vocabulary": tied},
        "data": {"micro_batch_size": 8},
    })  # fmt: skip
    model = ours(config)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):  # biases and norms as well
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(noise, alpha=0.1)
    (batch,), totals = micro_batches(0, model.plan, config, world)
    assert (batch.tokens[:, 1:] == MARKS.pad).any() and 8 < batch.text_mask.sum() == totals["caption"]
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    latent = model.encoder(batch, None).detach().requires_grad_()
    seen = latent.detach().double().requires_grad_()
    hidden = model.text_decoder(batch, latent, None)
    total, count = model.text_decoder.loss(batch, hidden)
    (total / count).backward()
    expected = reference(
        weights, seen.transpose(0, 1), batch.tokens[:, 1:], batch.text_mask, config.model.text_heads
    )
    expected.backward()
    assert int(count) == totals["caption"]
    assert float(total.detach() / count) == pytest.approx(float(expected), rel=1e-5)
    assert float((latent.grad - seen.grad).norm() / seen.grad.norm()) < 2e-5
    compared = 0
    for name, parameter in model.text_decoder.named_parameters():
        gradient = weights[f"text_decoder.{name}"].grad
        assert gradient.any(), name
        assert float((parameter.grad - gradient).norm() / gradient.norm()) < 2e-5, name
        compared += 1
    assert compared > 40 and model.text_decoder.mask_token.no_weight_decay


def test_the_decoder_does_not_see_what_it_has_to_tell_nor_padding(world):
    config = tiny({"model": {"text_objective": "masked"}, "data": {"micro_batch_size": 8}})
    model = ours(config)
    (batch,), _ = micro_batches(0, model.plan, config, world)
    own = batch.tokens[:, 1:]
    with torch.no_grad():
        latent = model.encoder(batch, None)
        before = model.text_decoder(batch, latent, None).transpose(0, 1)
        own[batch.text_mask] = 5  # other tokens in their places
        after = model.text_decoder(batch, latent, None).transpose(0, 1)
        assert torch.equal(before, after)
        model.text_decoder.word_embeddings.weight[MARKS.pad] += 1
        padded = model.text_decoder(batch, latent, None).transpose(0, 1)
        seen = own != MARKS.pad
        assert torch.equal(before[seen], padded[seen]) and not torch.equal(before, padded)
        row, place = (seen & ~batch.text_mask).nonzero()[-1].tolist()
        own[row, place] = 6  # a token that is seen reaches all places, those before it as well
        changed = model.text_decoder(batch, latent, None).transpose(0, 1)
        assert (changed[row] != padded[row]).any(-1)[: place + 1].all()


def test_with_caption_weight_zero_the_objective_changes_no_bit(world):
    sizes = {"caption_loss_weight": 0.0}
    models = [ours(tiny({"model": {**sizes, "text_objective": name}})) for name in ("autoregressive", "masked")]
    (batch, *_), _ = micro_batches(0, models[0].plan, tiny({"model": sizes}), world)
    batch.tokens = None
    results = [run(model, batch, {"image": 1.0}) for model in models]
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in results[0][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(results[0][1][name], gradient) for name, gradient in results[1][1].items())


def test_both_objectives_start_from_the_same_weights(world):
    """All but the mask token, which is one's own, are drawn alike."""
    both = [dict(ours(tiny({"model": {"text_objective": n}})).named_parameters()) for n in ("autoregressive", "masked")]
    assert both[1].keys() - both[0].keys() == {"text_decoder.mask_token"}
    assert all(torch.equal(parameter, both[1][name]) for name, parameter in both[0].items())

"""Writing captions (with and without a cache, greedy and drawn) against plain passes over all tokens."""

import numpy as np
import pytest
import torch

from megamug.data.pairs.text import BOS, EOS, PAD
from megamug.data.random import uniform
from megamug.generation import captions as generate
from megamug.generation.captions import all_visible, encode, generate_captions, generate_tokens
from megamug.generation.loading import load_run
from megamug.models.blocks.layers import LatentCrossAttention, LocalAttention, key_value_cache
from megamug.models.mug.model import MugBatch
from tests.evaluate.tiny_run import make_data, make_run, tiny_config

IMAGES = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_data(tmp_path_factory.mktemp("generate"))
    make_run(tiny_config(folder, folder / "run"))
    with load_run(folder / "run") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def latent(run):
    pixels = torch.randint(0, 256, (IMAGES, 3, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    batch = all_visible(MugBatch(None, None, pixels), run.task.plan.patches)
    with torch.no_grad():
        return encode(run.model, batch)


def logits_of(model, latent, row, tokens) -> np.ndarray:
    """Of the token behind `tokens` [t], by one pass over one image's tokens."""
    decoder = model.text_decoder
    batch = MugBatch(None, None, tokens=torch.tensor([[*tokens, PAD]]))
    with torch.no_grad():
        logits = decoder.logits(decoder(batch, latent[:, row : row + 1], None))
    return logits[-1, 0, : model.plan.vocabulary].double().numpy()


def test_the_likeliest_tokens(run, latent):
    written = generate_tokens(run.model, latent)
    assert written.dtype == torch.int64 and written.shape[0] == IMAGES
    assert len({tuple(row) for row in written.tolist()}) > 1, "captions that do not depend on the image test nothing"
    for row, tokens in enumerate(written.tolist()):
        for position, token in enumerate(tokens):
            if EOS in tokens[:position]:
                assert token == PAD
                continue
            logits = logits_of(run.model, latent, row, [BOS, *tokens[:position]])
            logits[[PAD, BOS]] = -np.inf
            assert logits[token] >= logits.max() - 1e-4
    assert torch.equal(written, generate_tokens(run.model, latent))
    texts = generate_captions(run.model, run.task.tokenizer, latent)
    assert texts == [run.task.tokenizer.decode(row) for row in written.tolist()]


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9}, {"top_p": 1.0, "temperature": 2.0, "seed": 5}])
def test_the_cache_changes_no_token(run, latent, sampling):
    cached = generate_tokens(run.model, latent, **sampling)
    plain = generate_tokens(run.model, latent, cache=False, **sampling)
    assert cached.shape[1] > 4 and torch.equal(cached, plain)


def test_the_cache_saves_the_work_it_stands_for(run, latent, monkeypatch):
    """Each forward runs one token through the layers, and the latent through each key-value projection once."""
    lengths, contexts = [], []
    decoder = run.model.text_decoder
    cross = [m for m in decoder.modules() if isinstance(m, LatentCrossAttention)]
    hooks = [m.linear_kv.register_forward_hook(lambda m, a, _: contexts.append(len(a[0]))) for m in cross]
    first = decoder.stack.layers[0].self_attention.linear_qkv
    hooks.append(first.register_forward_hook(lambda m, a, _: lengths.append(len(a[0]))))
    try:
        written = generate_tokens(run.model, latent)
    finally:
        for hook in hooks:
            hook.remove()
    assert lengths == [1] * written.shape[1] and contexts == [len(latent)] * len(cross)


def test_the_cache_is_gone_afterwards(run, latent):
    def attached():
        modules = list(run.model.modules())
        own = [m for m in modules if isinstance(m, LocalAttention) and m.cache is not None]
        return own + [m for m in modules if isinstance(m, LatentCrossAttention) and (m.keep or m.kept is not None)]

    with key_value_cache(run.model.text_decoder, 4):
        assert len(attached()) == 3 + 2  # self-attention of three layers, cross-attention of two
        with pytest.raises(AssertionError), key_value_cache(run.model.text_decoder, 4):
            pass
    with pytest.raises(RuntimeError), key_value_cache(run.model.text_decoder, 4):
        raise RuntimeError
    generate_tokens(run.model, latent)
    assert not attached()
    first = generate_tokens(run.model, latent[:, :2])  # nothing of another batch or latent is left
    assert torch.equal(first, generate_tokens(run.model, latent[:, :2], cache=False))


def test_finished_rows_are_padded_and_writing_ends_with_the_last(run, latent, monkeypatch):
    """Logits that let row r end behind r tokens."""
    vocabulary, calls = run.task.plan.padded_vocabulary, []

    def logits(hidden):
        scores = torch.zeros(1, IMAGES, vocabulary)
        scores[..., run.task.plan.vocabulary :] = 9  # padding columns of the vocabulary are never chosen
        scores[..., [PAD, BOS]] = 8
        scores[..., 7] = 1
        for row in range(min(len(calls), IMAGES - 1) + 1):
            scores[0, row, EOS] = 2
        calls.append(len(hidden))
        return scores

    monkeypatch.setattr(run.model.text_decoder, "logits", logits)
    written = generate_tokens(run.model, latent)
    assert written.tolist() == [[7] * row + [EOS] + [PAD] * (IMAGES - 1 - row) for row in range(IMAGES)]
    assert calls == [1] * IMAGES  # and logits of the last token alone


def test_drawn_captions_depend_on_seed_and_sample_number_alone(run, latent):
    def draw(rows, **options):
        return generate_tokens(run.model, latent[:, rows], top_p=0.95, samples=np.array(rows) + 40, **options).tolist()

    def unpadded(tokens):
        return [[t for t in row if t != PAD] for row in tokens]

    everything = unpadded(draw(list(range(IMAGES)), seed=1))
    assert unpadded(draw([4, 2], seed=1)) == [everything[4], everything[2]]
    assert unpadded(draw(list(range(IMAGES)), seed=2)) != everything
    greedy = unpadded(generate_tokens(run.model, latent).tolist())
    assert everything != greedy
    assert unpadded(draw(list(range(IMAGES)), temperature=1e-4)) == greedy


def test_the_nucleus():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 20)
    p = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-p)
    inside = order[: np.searchsorted(np.cumsum(p[order]), 0.8) + 1]  # the fewest tokens that hold 0.8
    assert 1 < len(inside) < 20
    draws = torch.from_numpy(uniform(0, "test", 0, np.arange(1), 20000)[0])
    chosen = generate.nucleus_choice(torch.from_numpy(logits).expand(len(draws), -1), 0.8, draws).numpy()
    frequency = np.bincount(chosen, minlength=20) / len(draws)
    expected = np.zeros(20)
    expected[inside] = p[inside] / p[inside].sum()
    assert set(chosen) == set(inside) and np.abs(frequency - expected).max() < 0.015
    edge = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for top_p in (1e-9, 0.8, 1.0):  # the ends of the draw stay inside
        low, high = generate.nucleus_choice(torch.from_numpy(logits).expand(2, -1), top_p, edge).tolist()
        among = {1e-9: order[:1], 0.8: inside, 1.0: order}[top_p]
        assert (low, high) == (among.min(), among.max())

"""Writing documents: the grammar, the cache, batches, guidance by hand."""

import numpy as np
import pytest
import torch

from megamug.data.random import uniform
from megamug.generation import decoding
from megamug.generation.captions import nucleus_choice
from megamug.generation.decoding import Row, Sampling, guide, possible, write_documents
from megamug.generation.loading import load_run
from tests.data.language import image
from tests.generation.language_run import MODELS, make_data, make_run

LIMIT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoding")
    make_data(folder)
    for name in MODELS:
        make_run(name, folder)
    return folder


@pytest.fixture(params=MODELS)
def run(request, folder):
    with load_run(folder / request.param) as loaded:
        yield loaded


def prompts(v) -> list[list[int]]:
    """Short, with an image first, long, and before an image."""
    text = v.encode_text("first draw, then look")
    return [
        [v.bos_id, *text[:2]], [v.bos_id, *image(v).tolist(), v.break_id], [v.bos_id, *text, *text],
        [v.bos_id, *text[:5], v.break_id],
    ]  # fmt: skip


def write(run, starts, sampling, **more) -> list[list[int]]:
    more = {"limits": [LIMIT] * len(starts), **more}
    return [row.tokens for row in write_documents(run.model, run.task.vocabulary, starts, sampling, **more)]


SAMPLINGS = [
    Sampling(top_p=0.9, seed=5), Sampling(temperature=0.0), Sampling(guidance=2.5, seed=1),
    Sampling(contrastive=0.3, contrastive_top_k=3, temperature=0.8, seed=2),
]  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["nucleus", "greedy", "guided", "contrastive"])
def test_cache_and_batch_change_no_token(run, sampling):
    starts = prompts(run.task.vocabulary)
    together = write(run, starts, sampling)
    assert len({tuple(row[-10:]) for row in together}) == len(starts), "rows that do not differ test nothing"
    assert together == write(run, starts, sampling, cache=False)
    alone = [write(run, [start], sampling, samples=[i])[0] for i, start in enumerate(starts)]
    assert together == alone


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_scores_are_those_of_plain_passes(run, cache, monkeypatch):
    """A token may well be the same where the scores that it is drawn by are not."""
    seen, choose = [], decoding._choose

    def watched(rows, active, logits, ids, sampling, draws):
        seen.extend((list(rows[i].tokens), logits[i].double()) for i in active)
        return choose(rows, active, logits, ids, sampling, draws)

    monkeypatch.setattr(decoding, "_choose", watched)
    starts = prompts(run.task.vocabulary)
    write(run, starts, Sampling(seed=4), limits=[len(start) + 4 for start in starts], cache=cache)
    assert len(seen) > 8 and min(len(tokens) for tokens, _ in seen) == min(map(len, starts))
    for tokens, logits in seen:
        batch = torch.tensor([tokens])
        with torch.no_grad():
            plain = run.model.logits(run.model.run(run.model.embed(batch), batch))[-1, 0].double()
        torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-4)


def reference(run, start, sampling, sample, limit) -> list[int]:
    """One document, written by plain passes over one row and the rules in words: no Row, no cache, no batch."""
    v, tokens, written = run.task.vocabulary, list(start), 0
    draws = uniform(sampling.seed, "document", 0, np.array([sample]), limit)[0]

    def scores(tokens):
        batch = torch.tensor([tokens])
        with torch.no_grad():
            states = run.model.run(run.model.embed(batch), batch)
            return run.model.logits(states)[-1, 0].double()

    def text(token):
        return 3 <= token < v.text_pieces

    while len(tokens) < limit:
        codes = 0
        while v.is_image(np.array(tokens[-codes - 1])):
            codes += 1
        before = tokens[-codes - 1]
        x = scores(tokens)
        if codes == v.image_tokens:
            allowed = [v.eos_id, v.break_id]
        elif codes or (before == v.break_id and text(tokens[-2])):
            if codes == 0 and limit - len(tokens) < v.image_tokens:
                break
            allowed = list(range(v.first_code, v.first_code + v.codes))
            if sampling.guidance:
                y = scores([v.mask_id if text(t) else t for t in tokens])
                x = y + sampling.guidance * (x - y)
            if sampling.contrastive:
                y = scores([v.mask_id if text(t) else t for t in tokens])
                p, q = (z[allowed].softmax(0) for z in (x, y))
                keep = p >= sampling.contrastive * p.sort(descending=True).values[sampling.contrastive_top_k - 1]
                x[allowed] = torch.where(keep, (p / q).log(), -torch.inf)
        elif before in (v.bos_id, v.break_id):
            allowed = list(range(3, v.text_pieces))
        else:
            allowed = [v.eos_id, *range(3, v.text_pieces), v.break_id]
        x = x[allowed]
        if sampling.temperature == 0:
            token = allowed[int(x.argmax())]
        else:
            choice = nucleus_choice(x[None] / sampling.temperature, sampling.top_p, torch.tensor([draws[len(tokens)]]))
            token = allowed[int(choice)]
        tokens.append(token)
        written += 1
        if token == v.eos_id:
            break
    return tokens


@pytest.mark.parametrize("sampling", SAMPLINGS[::3] + SAMPLINGS[2:3], ids=["nucleus", "contrastive", "guided"])
def test_tokens_are_those_of_plain_passes(folder, sampling):
    with load_run(folder / "jam") as run:
        starts = prompts(run.task.vocabulary)[2:]
        expected = [reference(run, start, sampling, 7 + i, 40) for i, start in enumerate(starts)]
        assert write(run, starts, sampling, samples=[7, 8], limits=[40, 40]) == expected


def test_what_may_follow(tmp_path, folder):
    from megamug.data.documents.vocabulary import Vocabulary

    v = Vocabulary.load(folder / "vocabulary")
    text, codes = v.encode_text("two triangles"), image(v).tolist()

    def after(tokens, **more):
        row = Row([v.bos_id, *tokens], v, more.get("max_images"), more.get("limit", 90))
        return row.ended or set(possible(v, torch.device("cpu"))[row.place].tolist())

    pieces = set(range(3, v.text_pieces))
    assert after([]) == pieces == after([*codes, v.break_id]) == after([*text, v.break_id, *codes, v.break_id])
    assert after(text) == pieces | {v.eos_id, v.break_id}
    all_codes = set(range(v.first_code, v.first_code + v.codes))
    assert after([*text, v.break_id]) == after([*text, v.break_id, *codes[:-1]]) == after(codes[:3]) == all_codes
    assert after(codes) == after([*text, v.break_id, *codes]) == {v.eos_id, v.break_id}
    assert after([*text, v.break_id], max_images=0) == "images"
    assert after([*text, v.break_id], limit=len(text) + 17) == "length"  # <bos>, <break>, one code too few
    assert after([*text, v.break_id], limit=len(text) + 18) == all_codes
    assert after(text, limit=len(text) + 1) == "length"
    assert after([*text, v.eos_id]) == "eos"
    v.bos_id = v.eos_id  # one mark for both, as OPT has it
    assert after([]) != "eos" and after(text) != "eos" and after([*text, v.eos_id]) == "eos"


def test_images_are_whole_and_counted(folder):
    with load_run(folder / "learned") as run:
        v = run.task.vocabulary
        start = [v.bos_id, *v.encode_text("two triangles"), v.break_id]
        rows = write_documents(run.model, v, [start] * 12, Sampling(seed=3), limits=[96] * 12, max_images=1)
        for row in rows:
            codes = v.is_image(np.array(row.tokens))
            assert codes[len(start) : len(start) + v.image_tokens].all() and codes.sum() == v.image_tokens
            assert row.ended in ("eos", "images", "length") and len(row.tokens) <= 96
            assert (row.ended == "eos") == (row.tokens[-1] == v.eos_id)
        assert len({row.ended for row in rows}) > 1
        assert all(a.tokens != b.tokens for a, b in zip(rows, rows[1:], strict=False))


def test_guidance_by_hand():
    conditional = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().unsqueeze(0)
    other = torch.tensor([0.7, 0.1, 0.1, 0.1]).log().unsqueeze(0)
    assert torch.allclose(guide(conditional, other, Sampling(guidance=1.0)), conditional)
    assert torch.allclose(guide(conditional, other, Sampling(guidance=0.0)), other)
    threefold = guide(conditional, other, Sampling(guidance=3.0))
    assert torch.allclose(threefold, 3 * conditional - 2 * other)
    scores = guide(conditional + 5, other - 2, Sampling(contrastive=0.5, contrastive_top_k=2))
    assert torch.allclose(scores[0, :3].exp(), torch.tensor([4 / 7, 3, 2])), "0.5 x 0.3 lets 0.2 in"
    assert scores[0, 3] == -torch.inf
    plain = guide(conditional, other, Sampling(contrastive=1.0))
    assert torch.isfinite(plain).tolist() == [[True, False, False, False]]


def test_text_gives_way_to_masks(folder):
    from megamug.data.documents.vocabulary import Vocabulary

    v = Vocabulary.load(folder / "vocabulary")
    ids = [v.bos_id, 5, v.text_pieces - 1, v.break_id, v.first_code, v.break_id - 1, v.eos_id, v.pad_id]
    tokens = torch.tensor(ids)
    masked = v.without_text(tokens)
    assert (masked == v.mask_id).tolist() == [False, True, True] + [False] * 5
    assert torch.equal(masked[3:], tokens[3:])
    stored = v.without_text(np.array(ids, np.uint16))  # as tokenised documents are kept
    assert stored.dtype == np.int64 and np.array_equal(stored, masked.numpy())

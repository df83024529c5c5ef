"""Captions in the tokens of tokenizers that others made: framed by theirs, padding alone without a loss."""

from __future__ import annotations

import shutil

import pytest
import torch

from megamug.checkpoint import tokenizer_copy
from megamug.generation.captions import encode, generate_captions, generate_tokens
from megamug.generation.loading import load_run
from megamug.generation.pictures import held_out
from tests.data.text.foreign import llama_sentencepiece, tokenizer_json
from tests.evaluate.tiny_run import HELD_OUT, make_data, make_run, tiny_config

MARKS = {"llama": (1, 2, None), "bpe": (0, 0, None), "wordpiece": (2, 3, 0)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("framing"))


@pytest.mark.parametrize("kind", MARKS)
def test_captions_of_a_foreign_tokenizer(data, tmp_path, monkeypatch, kind):
    path = (
        llama_sentencepiece(tmp_path / "t") if kind == "llama" else tokenizer_json(kind, tmp_path / "t" / "x.json")
    )
    config = tiny_config(data, tmp_path / "run")
    config.data.tokenizer, config.data.caption_length = str(path), 120
    make_run(config)
    tokenizer_copy.keep(config)
    shutil.rmtree(tmp_path / "t")
    bos, eos, pad = MARKS[kind]
    with load_run(tmp_path / "run") as run, torch.no_grad():
        tokenizer, plan, model = run.task.tokenizer, run.task.plan, run.model
        pad = tokenizer.pieces if pad is None else pad
        assert (plan.marks.bos, plan.marks.eos, plan.marks.pad) == (bos, eos, pad) and plan.vocabulary > pad
        pairs = 0
        for batch, captions in held_out(run.task, run.world, HELD_OUT):
            latent, expected, count = encode(model, batch), 0.0, 0
            logits = model.text_decoder.logits(model.text_decoder(batch, latent, None))[..., : plan.vocabulary]
            losses = logits.double().log_softmax(-1)
            for row, caption in enumerate(captions):
                ids = tokenizer.encode(" ".join(caption.split()))
                assert batch.tokens[row].tolist() == ([bos, *ids, eos] + [pad] * 120)[:121] and len(ids) < 119
                for place, token in enumerate([*ids, eos]):  # the end is learned
                    expected -= float(losses[place, row, token])
                count += len(ids) + 1
            total, terms = model.text_decoder.loss(batch, model.text_decoder(batch, latent, None))
            assert int(terms) == count and float(total) == pytest.approx(expected, rel=1e-4)
            pairs += len(captions)
        assert pairs == HELD_OUT

        calls = []

        def scores(hidden):
            """The text of `ids`, then the end; padding and a begin that is no end are likeliest, and never taken."""
            made = torch.zeros(1, latent.shape[1], plan.padded_vocabulary)
            made[..., pad] = made[..., bos] = 8
            made[..., ids[len(calls)] if len(calls) < len(ids) else eos] = 9
            made[..., pad] = 10
            calls.append(hidden)
            return made

        monkeypatch.setattr(model.text_decoder, "logits", scores)
        assert generate_tokens(model, latent)[0].tolist() == [*ids, eos]
        calls.clear()
        assert generate_captions(model, tokenizer, latent)[0] == tokenizer.decode(ids)

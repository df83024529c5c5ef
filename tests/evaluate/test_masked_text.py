"""A run whose text decoder fills in hidden words: trained and gone on with, measured, and what it does not do."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from megamug import cli, evaluate
from megamug.configuration.reading import load_config, to_yaml
from megamug.data.random import random_words
from megamug.errors import UserError
from megamug.generation.captions import all_visible, generate_tokens
from megamug.generation.images import generate_from_images
from megamug.generation.loading import load_run
from megamug.generation.pictures import held_out, true_and_written
from tests.evaluate.test_evaluate import all_pairs
from tests.evaluate.tiny_run import HELD_OUT, make_data, make_run, tiny_config
from tests.training.runs import hooked, metrics, tensors

MASKED = {"text_objective": "masked", "text_mask_ratio": 0.5}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = make_data(tmp_path_factory.mktemp("masked"))
    make_run(tiny_config(folder, folder / "run", **MASKED))
    return folder / "run"


def whole(run):
    """All held-out pairs in one batch in their order of storage, with the hidden tokens drawn here."""
    batch, captions = all_pairs(run)
    own = batch.tokens[:, 1:].numpy()
    noise = random_words(run.config.seed, "text mask", 0, np.arange(HELD_OUT), own.shape[1])
    hidden = np.zeros(own.shape, bool)
    for row in range(HELD_OUT):
        (words,) = np.nonzero(own[row] > 2)  # neither padding nor begin nor end
        count = max(1, int(0.5 * len(words) + 0.5))
        hidden[row, words[np.argsort(noise[row, words])[:count]]] = True
    return dataclasses.replace(batch, text_mask=torch.from_numpy(hidden)), captions


def test_figures_are_those_of_the_logits(run_dir, tmp_path, capsys):
    figures = evaluate.run_task(run_dir, "masked_text", output=tmp_path)
    with load_run(run_dir) as run, torch.no_grad():
        model, plan = run.model, run.task.plan
        batch, captions = whole(run)
        seen = [b for b, _ in held_out(run.task, run.world, 1000)]
        drawn = {tuple(t.tolist()): m.tolist() for b in seen for t, m in zip(b.tokens, b.text_mask, strict=True)}
        assert drawn == {tuple(t.tolist()): m.tolist() for t, m in zip(batch.tokens, batch.text_mask, strict=True)}
        for name, view in {"masked": batch, "all_visible": all_visible(batch, plan.patches)}.items():
            logits = model.text_decoder.logits(model.text_decoder(view, model.encoder(view, None), None))
            chances = logits[..., : plan.vocabulary].double().softmax(-1).numpy().transpose(1, 0, 2)  # [b, T, V]
            true, hidden = batch.tokens[:, 1:].numpy(), batch.text_mask.numpy()
            losses = -np.log(np.take_along_axis(chances, true[..., None], -1)[..., 0])[hidden]
            right = (chances.argmax(-1) == true)[hidden]
            assert figures[name]["masked_token_loss"] == pytest.approx(losses.mean(), rel=1e-5)
            assert figures[name]["masked_token_accuracy"] == pytest.approx(right.mean())
            assert abs(figures[name]["gap"]) > 1e-3  # it looks at the image
    assert figures["hidden_tokens"] == hidden.sum() and figures["text_mask_ratio"] == 0.5
    assert (figures["samples"], figures["masked"]["visible_patches"]) == (HELD_OUT, 4)
    results = [json.loads(line) for line in (tmp_path / "masked_text.jsonl").read_text().splitlines()]
    assert sorted(r["hidden_tokens"] for r in results) == sorted(hidden.sum(1).tolist())
    assert sorted(r["caption"] for r in results) == sorted(captions)
    assert sum(r["all_visible"]["right_tokens"] for r in results) == right.sum()
    assert (tmp_path / "masked_text.png").is_file()
    assert re.search(r"hidden tokens right +[\d.]+% +[\d.]+%", capsys.readouterr().err)


def test_what_is_seen_of_a_caption_stays_in_what_is_filled_in(run_dir):
    with load_run(run_dir) as run:
        batch, captions = next(held_out(run.task, run.world, 4))
        lines = true_and_written(run.model, run.task.tokenizer, batch, captions)
        assert [line[0] for line in lines] == [f"true: {caption}" for caption in captions]
        assert all(line[1].startswith("filled in: ") for line in lines)
        with pytest.raises(AssertionError):
            generate_tokens(run.model, torch.zeros(5, 1, 32))


def test_what_a_masked_decoder_does_not_do_is_told(run_dir, tmp_path):
    with pytest.raises(UserError, match="model.text_objective=masked.* writes none; choose --task masked_text"):
        evaluate.run_task(run_dir, "captioning", output=tmp_path / "x")
    plain = tiny_config(run_dir.parent, tmp_path / "plain")
    make_run(plain)
    with pytest.raises(UserError, match="model.text_objective=autoregressive.*; choose --task captioning"):
        evaluate.run_task(tmp_path / "plain", "masked_text", output=tmp_path / "x")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.yaml").write_text(
        to_yaml(tiny_config(run_dir.parent, tmp_path / "alone", image_loss_weight=0.0, **MASKED))
    )
    with pytest.raises(UserError, match="there is nothing else to generate; measure it by"):
        generate_from_images(tmp_path / "alone", [tmp_path])
    with pytest.raises(UserError, match="--top-p draws the words of captions; leave it out, or measure"):
        generate_from_images(run_dir, [tmp_path], top_p=0.9)
    assert not (tmp_path / "x").exists()


def test_pictures_are_repainted_without_captions(run_dir, tmp_path):
    from PIL import Image

    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    figures = generate_from_images(run_dir, [tmp_path / "a.png"], output=tmp_path / "out")
    assert [entry["caption"] for entry in figures["captions"]] == [None]
    assert "text_objective" in figures["no_captions"] and len(figures["pictures"]) == 1


def test_a_run_goes_on_to_the_bit(run_dir, tmp_path):
    config = tiny_config(run_dir.parent, tmp_path / "run", **MASKED)
    config.train.__dict__.update(steps=4, pictures_every=2, validate_every=2)
    config.log.tensorboard = False
    config.optimizer.learning_rate = 2e-3
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))

    def train(run: str, stop_step: int | None = None) -> list[dict]:
        with hooked(stop_step=stop_step):
            code = cli.main(["train", str(tmp_path / "recipe.yaml"), f"run_dir={tmp_path / run}"])
        assert code == (0 if stop_step is None else 3)
        return metrics(tmp_path / run)[0]

    straight = train("straight")
    assert len(train("cut", stop_step=2)) == 2
    assert train("cut") == straight and straight[-1]["caption_loss"] < straight[0]["caption_loss"]
    ends = [tensors(tmp_path / run / "checkpoints" / "step-00000004") for run in ("straight", "cut")]
    assert ends[0].keys() == ends[1].keys() and "optimizer.exp_avg.text_decoder.mask_token" in ends[0]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert load_config(tmp_path / "cut" / "config.yaml").model.text_objective == "masked"
    other = ["model.text_objective=autoregressive", "model.text_mask_ratio=0.75", f"run_dir={tmp_path / 'cut'}"]
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), *other]) == 2

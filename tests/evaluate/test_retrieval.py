"""Retrieval against one image with one text at a time, ranks counted in plain loops; a trained model beats chance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megamug import cli, evaluate
from megamug.configuration.reading import load_config, to_yaml
from megamug.data.pairs.text import train_tokenizer
from megamug.data.shards.sources import resolve_sources
from megamug.errors import UserError
from megamug.evaluate import retrieval
from megamug.generation.loading import load_run
from megamug.models.mug.model import MugBatch
from tests.evaluate.tiny_run import make_run, tiny_config

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (250, 250, 250),
           "black": (5, 5, 5), "yellow": (230, 230, 20)}  # fmt: skip
HELD_OUT = 12


def make_photos(folder, count: int, seed: int):
    """Indexed shards of noisy pictures of one colour with two captions each; of a colour all have the same second
    one, so that texts are shared."""
    rng = np.random.default_rng(seed)
    names = list(COLOURS)
    images, annotations = [], []
    (folder / "photos").mkdir(parents=True)
    for i in range(count):
        name = names[i % len(names)]
        pixels = np.clip(np.array(COLOURS[name]) + rng.integers(-20, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png"})
        annotations += [{"image_id": i, "caption": text} for text in (f"{name} picture {i}", f"all of it is {name}")]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    words = ["data", "shards", folder / "photos", "--output", folder / "shards", "--captions", folder / "captions.json"]
    assert cli.main(list(map(str, words))) == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a tiny run; `caption_lines` as pictures with several captions are trained."""
    folder = tmp_path_factory.mktemp("retrieval")
    train, heldout = make_photos(folder / "train", 48, 1), make_photos(folder / "heldout", HELD_OUT, 2)
    (source,) = resolve_sources(str(train))
    captions = [shard.caption(i) for shard, i in map(source.locate, range(len(source)))]
    train_tokenizer(captions, folder / "tokenizer.model", 300)
    config = tiny_config(folder, folder / "run")
    config.data.__dict__.update(train=str(train), validation=str(heldout), caption_lines="random", caption_length=32)
    return config


@pytest.fixture(scope="module")
def run_dir(config):
    make_run(config)
    return config.run_dir


def brute_force(run, data) -> tuple[np.ndarray, list[int]]:
    """log p(text | image) of each pair by itself in float64, and the texts' lengths in tokens."""
    model, config = run.model, run.config
    tokens = run.task.tokenizer.encode_batch(data.texts, config.data.caption_length)
    images = {}
    for pairs in run.task.loader(run.world, train=False):
        for micro in pairs.micro_batches:
            images.update({place: micro.images[i] for i, place in enumerate(micro.places()) if micro.valid[i]})
    scores = np.zeros((len(data.places), len(data.texts)))
    lengths = [int((row[1:] != model.plan.marks.pad).sum()) for row in tokens]
    everything = torch.arange(model.plan.patches)[None]
    with torch.no_grad():
        for i, place in enumerate(data.places):
            latent = model.encoder(MugBatch(everything, None, images[place][None]), None)
            for t, row in enumerate(tokens):
                batch = MugBatch(None, None, tokens=row[None])
                logits = model.text_decoder.logits(model.text_decoder(batch, latent, None))[:, 0]
                chances = logits[:, : model.plan.vocabulary].double().log_softmax(-1).numpy()
                scores[i, t] = sum(chances[at, row[at + 1]] for at in range(lengths[t]))
    return scores, lengths


def position(scores: dict[int, float], right: set[int]) -> int:
    """Of the first right one in the order of falling scores."""
    return 1 + [key in right for key in sorted(scores, key=lambda key: (-scores[key], key in right))].index(True)


@pytest.mark.parametrize("bound", [None, 1])
def test_figures_are_those_of_every_pair_by_itself(run_dir, tmp_path, capsys, monkeypatch, bound):
    if bound is not None:  # a pair at a time: as much memory as it must have
        monkeypatch.setattr(retrieval, "LOGITS_BYTES", bound)
    figures = evaluate.run_task(run_dir, "retrieval", output=tmp_path)
    told = capsys.readouterr().err
    with load_run(run_dir) as run:
        data = retrieval.read_texts(run, 1000)
        scores, lengths = brute_force(run, data)
    texts, own = data.texts, [set(some) for some in data.own]
    assert len(data.places) == HELD_OUT == figures["samples"]
    assert len(texts) == figures["texts"] == HELD_OUT + len(COLOURS) and figures["captions"] == 2 * HELD_OUT
    prior = [math.log(sum(math.exp(scores[i, t]) for i in range(HELD_OUT)) / HELD_OUT) for t in range(len(texts))]
    queries = [json.loads(line) for line in open(tmp_path / "retrieval.jsonl", encoding="utf-8")]
    by_image = [query for query in queries if query["query"] == "image"]
    for name, (alpha, per_token) in retrieval.RANKINGS.items():
        ranks = [
            position({t: (scores[i, t] - alpha * prior[t]) / (lengths[t] if per_token else 1)
                      for t in range(len(texts))}, own[i])
            for i in range(HELD_OUT)
        ]  # fmt: skip
        assert [query["ranks"][name] for query in by_image] == ranks
        got = figures["image_to_text"][name]
        assert got["median_rank"] == np.median(ranks) and got["mean_rank"] == pytest.approx(np.mean(ranks))
        for k in (1, 5, 10):
            assert got[f"r{k}"] == pytest.approx(sum(rank <= k for rank in ranks) / HELD_OUT)
    ranks = [
        position({i: scores[i, t] for i in range(HELD_OUT)}, {i for i in range(HELD_OUT) if t in own[i]})
        for some in data.own for t in some
    ]  # fmt: skip
    got = figures["text_to_image"]
    assert [got[f"r{k}"] for k in (1, 5, 10)] == [pytest.approx(np.mean([r <= k for r in ranks])) for k in (1, 5, 10)]
    assert got["median_rank"] == np.median(ranks)
    for query in by_image:
        number = [key for _, key in data.places].index(query["key"])
        for one in query["top"]:
            t = texts.index(one["text"])
            assert one["score"] == pytest.approx(scores[number, t] - prior[t], abs=1e-3) and one["right"] == (
                t in own[number]
            )
    assert len(queries) == HELD_OUT + len(texts) and all(len(query["top"]) == 10 for query in queries)
    assert f"{figures['image_to_text']['prior']['r5']:.1%}" in told and f"{HELD_OUT} images and 18 texts" in told
    for picture in figures["pictures"]:
        with Image.open(picture) as opened:
            assert min(opened.size) > 192


def test_a_few_samples_and_what_is_refused(run_dir, tmp_path, monkeypatch):
    data = load_config(Path(run_dir) / "config.yaml").data.validation
    words = ["evaluate", run_dir, "--task", "retrieval", "--samples", "5", "--data", data, "--output", tmp_path]
    assert cli.main(list(map(str, words))) == 0
    assert json.loads((tmp_path / "retrieval.json").read_text())["samples"] == 5
    with pytest.raises(UserError, match="needs two images and two different texts"):
        evaluate.run_task(run_dir, "retrieval", samples=1, output=tmp_path)
    monkeypatch.setattr(retrieval, "SCORE_BYTES", 1000)
    with pytest.raises(UserError, match="lower --samples"):
        evaluate.run_task(run_dir, "retrieval", output=tmp_path)


def test_the_encoder_sees_each_image_once(run_dir, tmp_path, monkeypatch):
    seen, encode = [], retrieval.encode
    monkeypatch.setattr(retrieval, "encode", lambda model, some: seen.append(len(some.images)) or encode(model, some))
    evaluate.run_task(run_dir, "retrieval", output=tmp_path)
    assert sum(seen) == HELD_OUT


def test_a_model_that_says_nothing_of_images_ranks_no_better_than_chance():
    """Ties count against: a constant score is no hit."""
    data = retrieval.Set([(None, str(i)) for i in range(4)], list("abcd"), [[0], [1], [2], [3]])
    figures, _ = retrieval.rank_all(data, np.zeros((4, 4)), np.ones(4))
    assert {one["r1"] for name, one in figures["image_to_text"].items() if name != "chance"} == {0.0}
    assert figures["text_to_image"]["r1"] == 0 and figures["text_to_image"]["median_rank"] == 4
    assert figures["image_to_text"]["chance"] == {"r1": 0.25, "r5": 1.0, "r10": 1.0}
    assert retrieval.by_chance(10, 3, 2) == pytest.approx(1 - 7 / 10 * 6 / 9)


def test_the_prior_finds_what_plain_likelihood_does_not():
    """A text that is likely beside every image hides the right ones, until its prior is taken off."""
    data = retrieval.Set([(None, str(i)) for i in range(3)], list("abc"), [[0], [1], [2]])
    scores = np.full((3, 3), -20.0) + np.diag([3.0, 3.0, 3.0])
    scores[:, 0] += 10
    figures, queries = retrieval.rank_all(data, scores, np.array([5, 9, 9]))
    assert figures["image_to_text"]["likelihood"]["r1"] == pytest.approx(1 / 3)
    assert figures["image_to_text"]["prior"]["r1"] == figures["text_to_image"]["r1"] == 1.0
    assert retrieval.log_prior(scores)[1] == pytest.approx(math.log((2 * math.exp(-20) + math.exp(-17)) / 3))


def test_a_trained_model_is_better_than_chance(config, run_dir, tmp_path):
    config.data.caption_lines = "random"
    config.optimizer.__dict__.update(learning_rate=3e-3, warmup_steps=5)
    config.train.__dict__.update(steps=80, validate_every=0, pictures_every=0)
    config.log.tensorboard = False
    config.model.image_loss_weight = 0.0
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    words = [tmp_path / "recipe.yaml", f"run_dir={tmp_path / 'run'}", "data.validation=null"]
    assert cli.main(["train", *map(str, words)]) == 0
    figures = evaluate.run_task(tmp_path / "run", "retrieval", data=config.data.validation, output=tmp_path)
    texts, images = figures["image_to_text"], figures["text_to_image"]
    assert images["r1"] > 2 * images["chance"]["r1"] and images["r5"] > images["chance"]["r5"] + 0.2
    assert texts["prior"]["r1"] > 2 * texts["chance"]["r1"] and texts["prior"]["median_rank"] <= 2

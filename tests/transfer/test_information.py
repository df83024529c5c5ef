"""Bounds of mutual information against joint distributions whose mutual information is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megamug import cli
from megamug.errors import UserError
from megamug.transfer import information
from megamug.transfer.information import bags, of_classes, of_pairs
from megamug.transfer.logistic import fit
from megamug.transfer.stored import _packed

# P(T = column | X = row), P(X)
TABLE = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.05, 0.05, 0.6, 0.3], [0.2, 0.2, 0.1, 0.5],
                  [0.3, 0.3, 0.2, 0.2]])  # fmt: skip
MARGINAL = np.array([0.35, 0.25, 0.2, 0.15, 0.05])


def discrete(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """X as a feature, one of five rows, and T."""
    draw = np.random.default_rng(seed)
    x = draw.choice(5, count, p=MARGINAL)
    t = (draw.random((count, 1)) > TABLE[x].cumsum(1)).sum(1)
    return torch.eye(5)[torch.from_numpy(x)], torch.from_numpy(t)


def discrete_truth() -> float:
    joint = MARGINAL[:, None] * TABLE
    return float((joint * np.log(TABLE / joint.sum(0))).sum())


def gaussians(count: int, seed: int, nats: float, width: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """`width` correlated pairs, those of one side mixed into twice as many numbers, with that mutual information."""
    generator = torch.Generator().manual_seed(seed)
    correlation = math.sqrt(1 - math.exp(-2 * nats / width))
    z, noise = (torch.randn(count, width, generator=generator) for _ in range(2))
    mixed = z @ torch.randn(width, 2 * width, generator=torch.Generator().manual_seed(7))
    return mixed, correlation * z + math.sqrt(1 - correlation**2) * noise


def test_barber_agakov_of_a_discrete_joint_is_below_the_truth_and_near():
    truth, found = discrete_truth(), []
    for seed in range(8):
        bound = of_classes(*discrete(3000, seed), *discrete(6000, 100 + seed), strengths=(1.0,))
        found.append(bound.nats)
        assert abs(bound.nats - truth) < 4 * bound.standard_error and bound.at_most < math.log(4)
        assert bound.details["cross_entropy"] == pytest.approx(bound.at_most - bound.nats)
    assert 0.9 * truth < np.mean(found) < truth and 0.3 < truth < 0.4
    # The error that one estimate tells is how far estimates lie from one another.
    assert 0.4 < np.std(found, ddof=1) / bound.standard_error < 2.0


def test_infonce_of_gaussians_is_below_the_truth_and_near():
    bound = of_pairs(*gaussians(4000, 1, 1.0), *gaussians(4096, 2, 1.0), candidates=128)
    assert 0.9 < bound.nats < 1.0 and bound.standard_error < 0.03
    assert bound.at_most == math.log(128) and bound.details["batches"] == 32 and bound.details["pairs"] == 4096
    assert bound.details["critic"] == "networks"  # a bilinear form lacks the square of the target


def test_several_dimensions_and_none_in_common():
    bound = of_pairs(*gaussians(4000, 1, 1.5, 4), *gaussians(4096, 2, 1.5, 4), candidates=128)
    assert 0.9 * 1.5 < bound.nats < 1.5
    (z, t), (test_z, test_t) = gaussians(1000, 3, 1.0), gaussians(1000, 4, 1.0)
    nothing = of_pairs(z, t[torch.randperm(1000)], test_z, test_t[torch.randperm(1000)], candidates=64)
    assert nothing.nats < 3 * nothing.standard_error + 0.01


def test_pairs_of_one_group_are_all_in_the_part_that_is_chosen_on_or_none(monkeypatch):
    parts, (z, t) = [], gaussians(200, 1, 1.0)
    learn = information._learn

    def noted(critic, pairs, stopping, *more):
        parts.append((pairs[0][:, 0].tolist(), stopping[0][:, 0].tolist()))
        return learn(critic, pairs, stopping, *more)

    monkeypatch.setattr(information, "_learn", noted)
    monkeypatch.setattr(information, "STEPS", information.LOOK)
    z[:, 0] = torch.arange(200) % 40  # of a group
    of_pairs(z, t, z, t, candidates=10, groups=[f"thing {i % 40}" for i in range(200)])
    of_pairs(z, t, z, t, candidates=10)
    for learned, stopping in parts[:2]:
        assert (len(learned), len(stopping), len(set(stopping))) == (160, 40, 8) and not set(learned) & set(stopping)
    assert set(parts[2][0]) & set(parts[2][1]) and len(parts[2][1]) == 40  # each alone


def test_infonce_is_the_mean_over_batches_of_a_softmax_over_candidates():
    generator = torch.Generator().manual_seed(0)
    critic = information.Critic(3, 2, 0, generator)
    z, t = torch.randn(11, 3, generator=generator), torch.randn(11, 2, generator=generator)
    gains = information._gains(critic, z, t, 4).detach().numpy()
    with torch.no_grad():
        g, h, u = (m(x).double().numpy() for m, x in ((critic.g, z), (critic.h, t), (critic.u, t)))
    assert len(gains) == 2  # the last three are no batch
    for batch, gain in enumerate(gains):
        own = range(4 * batch, 4 * batch + 4)
        terms = []
        for i in own:
            scores = [g[i] @ h[j] / math.sqrt(information.RANK) + u[j, 0] for j in own]
            terms.append(math.log(np.exp(scores[i - 4 * batch]) / np.mean(np.exp(scores))))
        assert gain == pytest.approx(np.mean(terms), rel=1e-5)


def test_classes_that_are_not_learned_from_count_as_one():
    (x, t), (test, test_labels) = discrete(400, 0), discrete(500, 1)
    train_labels, test_labels = t * 3 + 5, torch.where(test_labels == 3, 3 + test_labels % 2, test_labels * 3 + 5)
    kept = train_labels != 14
    found = of_classes(x[kept], train_labels[kept], test, test_labels, strengths=(1.0,))
    other = test_labels < 5
    assert found.details["of_classes_not_learned"] == int(other.sum()) > 20 and found.details["classes"] == 3
    probe = fit(x[kept], (train_labels[kept] - 5) // 3, 1.0, 3)
    chances = probe.logits(test).softmax(1) * (1 - 1 / (kept.sum() + 1))
    classes = torch.where(other, 3, (test_labels - 5) // 3)
    shares = np.bincount(classes.numpy()) / 500
    unknown = 1 / (int(kept.sum()) + 1)
    terms = [math.log(unknown if c == 3 else chances[i, c]) for i, c in enumerate(classes)]
    entropy = -(shares * np.log(shares)).sum()
    assert found.nats == pytest.approx(entropy + np.mean(terms)) and found.at_most == pytest.approx(entropy)


def test_bags_hold_the_frequent_words_of_the_captions_to_learn_from():
    train = ["A red  square", "a RED disc", "the red, red star", "a disc", "a disc; a star"]
    known, other = bags(train, ["a blue disc", "Red!", ""])
    assert known.tolist() == [[1, 0, 1], [1, 1, 1], [0, 0, 1], [1, 1, 0], [1, 1, 0]]  # a, disc, red
    assert other.tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]
    with pytest.raises(UserError, match="no word is in 3 or more"):
        bags(["a", "b"], ["a"])


@pytest.fixture
def files(tmp_path):
    """Features of captioned, labelled images, and others of the same images in another order, as .npz."""
    colours, shapes = ["red", "blue", "green", "grey"], ["square", "disc", "star", "ring"]
    for name, count, seed in (("a", 300, 0), ("b", 160, 1)):
        draw = np.random.default_rng(seed)
        colour, shape = draw.integers(0, 4, (2, count))
        features = np.concatenate([np.eye(4)[colour], np.eye(4)[shape], draw.normal(0, 1, (count, 4))], 1)
        features = torch.from_numpy(features + 0.1 * draw.normal(0, 1, features.shape)).float()
        save_file({"mean": features, "labels": torch.from_numpy(shape)}, tmp_path / f"{name}.safetensors", {
            "settings": "{}"})  # fmt: skip
        captions = [f"a {colours[c]} {shapes[s]}" for c, s in zip(colour, shape, strict=True)]
        captions[0] = ""  # that image has none
        lines = [{"shard": f"{name}.tar", "key": f"{i:03d}", "label": int(shape[i]), "caption": caption}
                 for i, caption in enumerate(captions)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        order = np.random.default_rng(2).permutation(count)[:-10]
        np.savez(
            tmp_path / f"{name}.npz", text=np.eye(4)[colour][order], labels=np.full(len(order), -1),
            **_packed("keys", [f"{name}.tar: {i:03d}" for i in order]),
            **_packed("captions", [captions[i] for i in order]),
        )  # fmt: skip
    return tmp_path


def probe(files, *words: str) -> int:
    own = [str(files / "a.safetensors"), "--test", str(files / "b.safetensors")]
    return cli.main(["probe", *own, "--methods", "information", *words])


def test_the_command(files, capsys):
    paired = ["--paired", str(files / "a.npz"), str(files / "b.npz")]
    assert probe(files, "--about", "labels", "captions", *paired, "--candidates", "32") == 0
    out, err = capsys.readouterr()
    figures = json.loads(out)
    found = figures["results"]["mean"]["information"]
    # Shape and colour are in the features as they are: log 4 of either, and log 16 of both.
    assert 1.2 < found["labels"]["nats"] < math.log(4) and found["labels"]["bound"] == "barber_agakov"
    assert 1.9 < found["captions"]["nats"] < math.log(16) and found["captions"]["pairs"] == 128  # of 159 in 32s
    assert 1.1 < found["paired"]["nats"] < math.log(4) and found["paired"]["pairs"] == 128  # of 150
    assert found["captions"]["at_most"] == math.log(32) and figures["paired"] == paired[1:]
    assert "nats   error  at most" in err and "top-1" not in err and "the other features" in err
    assert probe(files, "--candidates", "16") == 0
    again = json.loads(capsys.readouterr().out)["results"]["mean"]["information"]
    assert set(again) == {"labels", "captions"} and again["labels"] == found["labels"]


def test_mistakes_are_told(files, capsys, tmp_path):
    def refused(match: str, *words: str):
        assert probe(files, *words) == 2
        assert match in capsys.readouterr().err

    assert cli.main(["probe", str(files / "a.safetensors"), "--test", str(files / "b.safetensors"), "--about",
                     "labels"]) == 2  # fmt: skip
    assert "--about is for --methods information" in capsys.readouterr().err
    refused("too few for an InfoNCE bound of 100 candidates", "--about", "captions", "--candidates", "100")
    refused("no image in common", "--paired", str(files / "b.npz"), str(files / "a.npz"))
    np.savez(tmp_path / "c.npz", text=np.eye(4), labels=np.full(4, -1))
    refused("has 300 rows and ", "--paired", str(tmp_path / "c.npz"), str(tmp_path / "c.npz"))
    np.savez(tmp_path / "d.npz", one=np.eye(4), two=np.eye(4), labels=np.full(4, -1))
    refused("has one, two, and none of them is called mean", "--paired", str(tmp_path / "d.npz"),
            str(tmp_path / "d.npz"))  # fmt: skip
    lines = (files / "a.jsonl").read_text().splitlines(keepends=True)
    (files / "a.jsonl").write_text("".join(lines[:-1]))
    refused("describes 299 rows", "--about", "captions")
    (files / "a.jsonl").write_text("{")
    refused("cannot be read", "--about", "captions")
    (files / "a.jsonl").unlink()
    refused("has no captions beside it", "--about", "captions")
    assert probe(files) == 0  # of what both files have
    assert set(json.loads(capsys.readouterr().out)["results"]["mean"]["information"]) == {"labels"}

"""k-NN against a brute-force one in numpy, the linear probe against scikit-learn's objective and minimiser."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megamug import cli
from megamug.errors import UserError
from megamug.transfer import logistic
from megamug.transfer.knn import _nearest, knn
from megamug.transfer.logistic import choose_strength, fit, linear_probe
from tests.command_line.test_arguments import called


def clouds(count: int, classes: int = 5, width: int = 12, noise: float = 2.0, seed: int = 0):
    """Features [n, h] around a centre for each class, and labels."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return centres[labels] + noise * torch.randn(count, width, generator=generator), labels


def brute_force(train, train_labels, test, test_labels, k: int, temperature: float) -> tuple[int, int]:
    """(right, among the five likeliest), by loops over numpy rows in float64."""
    train, test = (x.double().numpy() for x in (train, test))
    lengths, one, five = np.linalg.norm(train, axis=1), 0, 0
    for row, label in zip(test, test_labels.tolist(), strict=True):
        similar = np.array([row @ other / length for other, length in zip(train, lengths, strict=True)])
        similar /= np.linalg.norm(row)
        votes: dict[int, float] = {}
        for i in np.argsort(-similar, kind="stable")[:k]:
            votes[int(train_labels[i])] = votes.get(int(train_labels[i]), 0.0) + np.exp(similar[i] / temperature)
        order = sorted(votes, key=lambda c: (-votes[c], c))
        one, five = one + (order[0] == label), five + (label in order[:5])
    return one, five


def test_knn_is_the_brute_force_one(monkeypatch):
    monkeypatch.setattr("megamug.transfer.knn.ROWS", 100)
    (train, train_labels), (test, test_labels) = clouds(200, classes=8), clouds(250, classes=8, seed=1)
    for temperature in (0.07, 1.0):
        found = knn(train, train_labels, test, test_labels, (1, 3, 20, 200), temperature)
        for k in (1, 3, 20, 200):
            one, five = brute_force(train, train_labels, test, test_labels, k, temperature)
            assert found[k] == {"top1": one / 250, "top5": five / 250}, (k, temperature)


def test_of_rows_equally_near_the_earlier_ones_vote():
    """Also where more are as near as the last that votes."""
    train = torch.tensor([[0.0, 1.0], *[[1.0, 0.0]] * 50])
    labels = torch.tensor([9, 3, 3, *[5] * 48])
    assert knn(train, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([3]), (1, 2, 3, 40))[2]["top1"] == 1
    assert knn(train, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([5]), (1, 2, 3, 40))[40]["top1"] == 1
    near, who = _nearest(torch.tensor([[0.5, 0.9, 0.5, 0.9, 0.5]]), 3)
    assert who.tolist() == [[1, 3, 0]] and near.tolist() == [[pytest.approx(0.9), pytest.approx(0.9), 0.5]]


def test_equal_votes_go_to_the_smaller_class_and_none_to_a_class_without_a_vote():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([4, 2, 0])
    test = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    assert knn(train, labels, test, torch.tensor([2, 4, 0]), (2,))[2] == {"top1": 1 / 3, "top5": 2 / 3}


def sklearn_minimum(x, labels, strength, classes):
    sklearn = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed (extra `dev`)")
    model = sklearn.LogisticRegression(C=strength, tol=1e-8, max_iter=5000)
    model.fit(x.numpy(), labels.numpy())
    return torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_the_linear_probe_finds_the_minimum_of_scikit_learn(strength):
    (x, labels), (test, test_labels) = clouds(400), clouds(3000, seed=1)
    standard = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    weight, bias = sklearn_minimum(standard, labels, strength, 5)
    theirs = torch.nn.functional.cross_entropy(standard @ weight.T + bias, labels)
    theirs = float(theirs + weight.square().sum() / (2 * strength * len(x)))
    probe = fit(x, labels, strength)
    assert probe.converged and abs(probe.loss - theirs) < 1e-6 * theirs
    assert (probe.weight - weight).abs().max() < 1e-3 * weight.abs().max()
    logits = ((test.double() - probe.mean) / probe.deviation) @ weight.T + bias
    found = probe.measure(test, test_labels)
    assert abs(found["top1"] - float((logits.argmax(1) == test_labels).double().mean())) < 1e-3
    assert abs(found["loss"] - float(torch.nn.functional.cross_entropy(logits, test_labels))) < 1e-4


def test_the_gradient_is_zero_at_the_end():
    """Without another library: what is claimed to be a minimum is one, in float64."""
    x, labels = clouds(300)
    probe = fit(x, labels, 1.0)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    standard = (x.double() - probe.mean) / probe.deviation
    loss = torch.nn.functional.cross_entropy(standard @ weight.T + bias, labels) + weight.square().sum() / 600
    loss.backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-5
    assert loss.item() == pytest.approx(probe.loss, rel=1e-12)


def test_correlated_features_have_the_same_minimum_from_wherever_it_is_sought():
    """As an encoder's are: a few directions hold nearly all of the variance, and one number is constant."""
    x, labels = clouds(200, width=30)
    mixing = torch.randn(30, 30, generator=torch.Generator().manual_seed(5)) * torch.logspace(0, -3, 30)
    x = torch.cat([x @ mixing.T, torch.ones(200, 1)], dim=1)
    standard = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0).clamp(min=1e-30)
    standard[:, -1] = 0
    weight, bias = sklearn_minimum(standard, labels, 10.0, 5)
    theirs = torch.nn.functional.cross_entropy(standard @ weight.T + bias, labels) + weight.square().sum() / (20 * 200)
    cold = fit(x, labels, 10.0)
    warm = fit(x, labels, 10.0, start=fit(x, labels, 0.1))
    assert cold.converged and warm.converged
    assert cold.loss == pytest.approx(float(theirs), rel=1e-6) and warm.loss == pytest.approx(cold.loss, rel=1e-7)
    assert (warm.weight - cold.weight).abs().max() < 1e-3 * cold.weight.abs().max()


def test_the_benchmark_beside_scikit_learn():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra `dev`)")
    code, told, _ = called("benchmark/probe", "--images", 100, "--width", 8, "--classes", 3, "--tolerance", 1e-8)
    excess = [float(number) for number in re.findall(r"scikit-learn's ([+-]\S+)$", told, re.MULTILINE)]
    assert code == 0 and told.startswith("80 images x 8, 3 classes: megamug ") and len(excess) == 7
    assert max(map(abs, excess)) < 1e-6


def test_the_strength_is_chosen_on_what_is_held_out():
    train, labels = clouds(250, width=40, noise=4.0)
    strength, found = choose_strength(train, labels, (1e-4, 1e-2, 100.0))
    assert found[strength] == max(found.values()) and strength < 100
    again = choose_strength(train, labels, (100.0, 1e-2, 1e-4))
    assert again == (strength, found)
    assert choose_strength(train, labels, (1e-4, 1e-2, 100.0), seed=1)[1] != found


def test_a_class_that_is_not_learned_from_is_never_right():
    (train, labels), (test, test_labels) = clouds(200, noise=0.1), clouds(100, noise=0.1, seed=1)
    known = labels != 4
    found = linear_probe(train[known], labels[known], test, test_labels, strengths=(1.0,))
    assert found["top1"] == pytest.approx(float((test_labels != 4).double().mean()))
    constant = torch.cat([train, torch.ones(len(train), 1)], dim=1)
    assert linear_probe(constant, labels, constant, labels, strengths=(1.0,))["top1"] == 1


def write(path, features, labels, **settings):
    save_file({"mean": features, "labels": labels}, path, {"settings": json.dumps(settings)})
    return path


def test_the_command(tmp_path, capsys):
    train = write(tmp_path / "a.safetensors", *clouds(300))
    test = write(tmp_path / "b.safetensors", *clouds(100, seed=1))
    assert cli.main(["probe", str(train), "--test", str(test), "--output", str(tmp_path / "out" / "f.json")]) == 0
    out, err = capsys.readouterr()
    figures = json.loads(out)
    assert json.loads((tmp_path / "out" / "f.json").read_text()) == figures
    assert figures["images"] == [300, 100] and {*figures["results"]["mean"]["knn"]} == {"10", "20", "100", "200"}
    (a, b), (c, d) = clouds(300), clouds(100, seed=1)
    assert figures["results"]["mean"]["linear"]["top1"] == linear_probe(a, b, c, d)["top1"] > 0.6
    assert "300 images to learn from, 100 to be measured on" in err and "k-NN, k 20" in err and "linear, C " in err


def test_mistakes_are_told(tmp_path, capsys):
    train = write(tmp_path / "a.safetensors", *clouds(30), encoder="x")

    def refused(match: str, *words: str, test=train):
        assert cli.main(["probe", str(train), "--test", str(test), *words]) == 2
        assert match in capsys.readouterr().err

    refused("k: 31; between 1 and the 30 images", "--k", "31")
    refused("has no feature 'x'; it has mean", "--features", "x")
    refused("no such file; write it: megamug features", test=tmp_path / "no.npz")
    refused("end in .safetensors or .npz", test=tmp_path / "no.txt")
    other = write(tmp_path / "o.safetensors", *clouds(30), encoder="y")
    refused("extracted otherwise than", test=other)
    narrow = write(tmp_path / "w.safetensors", *clouds(9, width=3))
    refused("features of 12 numbers to learn from and of 3", test=narrow)
    refused("has no labels", test=write(tmp_path / "n.safetensors", clouds(5)[0], torch.full((5,), -1)))
    refused("not finite", test=write(tmp_path / "i.safetensors", clouds(5)[0] / 0, clouds(5)[1]))
    (tmp_path / "cut.safetensors").write_bytes(train.read_bytes()[:90])
    refused("cannot be read", test=tmp_path / "cut.safetensors")
    refused("whole numbers [n] wanted", test=write(tmp_path / "f.safetensors", clouds(5)[0], clouds(5)[1].float()))
    refused("numbers [4, h] wanted", test=write(tmp_path / "c.safetensors", clouds(5)[0], clouds(4)[1]))
    with pytest.raises(UserError, match="all of one class"):
        linear_probe(clouds(9)[0], torch.zeros(9, dtype=torch.int64), *clouds(9))
    with pytest.raises(UserError, match="too few to choose"):
        choose_strength(clouds(2)[0], clouds(2)[1])
    assert logistic.STRENGTHS[0] == pytest.approx(1e-4)

"""What studies ask."""

from __future__ import annotations

import json

import pytest

from megamug.configuration.reading import load_config
from megamug.errors import UserError
from megamug.transfer.study import questions


def made(question):
    """What each variant sets, as configurations read it."""
    return {v.name: load_config(None, v.overrides) for v in question.variants}


def test_weights_are_held_against_pixels_alone():
    question = questions.weights([(0.0, 1.0), (1.0, 0.1), (1.0, 0.0)])
    found = {name: (c.model.image_loss_weight, c.model.caption_loss_weight) for name, c in made(question).items()}
    assert found == {"image1-caption0": (1, 0), "image0-caption1": (0, 1), "image1-caption0.1": (1, 0.1)}
    assert [pair[1] for pair in question.pairs] == ["image1-caption0"] * 2
    assert made(questions.weights())["image1-caption0.1"].model.caption_loss_weight == 0.1  # the paper's
    for grid in ([(1.0, 0.0), (1.0, 0.0)], [(0.0, 0.0)]):
        with pytest.raises(UserError, match="--grid"):
            questions.weights(grid)


def test_captions_are_left_out_shuffled_and_of_another_set():
    found = made(questions.captions('["a, b/*.tar", "c"]'))
    assert list(found) == ["pixels", "captions", "both", "shuffled", "other-pixels", "other"]
    assert found["pixels"].model.caption_loss_weight == found["other-pixels"].model.caption_loss_weight == 0
    assert found["captions"].model.image_loss_weight == 0 and found["shuffled"].data.captions == "shuffled"
    assert found["other"].data.train == [{"path": "a, b/*.tar"}, {"path": "c"}] == found["other-pixels"].data.train
    pairs = questions.captions().pairs
    assert ("both", "pixels") in pairs and ("both", "shuffled") in pairs and ("both", "untrained") in pairs
    assert not any("other" in name for pair in pairs for name in pair)


def test_scaling_has_every_objective_at_every_size():
    question = questions.scaling([1.0, 0.25])
    found = made(question)
    found = {(c.data.fraction, c.model.image_loss_weight > 0, c.model.caption_loss_weight > 0) for c in found.values()}
    assert found == {
        (fraction, *which) for fraction in (0.25, 1) for which in ((True, False), (False, True), (True, True))
    }
    assert question.curves["both"] == [(0.25, "both-0.25"), (1.0, "both-1")]
    assert ("both-0.25", "pixels-0.25") in question.pairs and ("both-1", "both-0.25") in question.pairs


@pytest.mark.parametrize("make", [questions.weights, questions.captions, questions.scaling])
def test_questions_are_read_back(make):
    question = make()
    assert questions.from_tree(json.loads(json.dumps(question.as_tree()))) == question
    names = {"untrained"} | {v.name for v in question.variants}
    assert len(names) == len(question.variants) + 1 and {name for pair in question.pairs for name in pair} <= names


def test_any_other_question(tmp_path):
    path = tmp_path / "v.yaml"
    path.write_text("variants:\n  a: [train.steps=3]\n  b:\n  c: ['data.captions=shuffled']\n")
    question = questions.custom(path)
    assert [v.overrides for v in question.variants] == [("train.steps=3",), (), ("data.captions=shuffled",)]
    assert ("b", "a") in question.pairs and ("c", "untrained") in question.pairs
    path.write_text("variants: {a: [], b: []}\ncompare: [[b, a]]")
    assert questions.custom(path).pairs == (("b", "a"),)


@pytest.mark.parametrize(("text", "said"), [
    ("varants: {a: []}", "unknown key varants"), ("variants: []", "NAME: "), ("variants: {a/b: []}", "'a/b' cannot be"),
    ("variants: {untrained: []}", "which every study has"), ("variants: {a: seed=1}", "a list of section.key=value"),
    ("variants: {a: []}\ncompare: [[a, x]]", "pairs of two of a, untrained"),
    ("variants: {a: []}\ncompare: [[a, a]]", "found"),
])  # fmt: skip
def test_mistakes_in_a_file_are_told(tmp_path, text, said):
    (tmp_path / "v.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        questions.custom(tmp_path / "v.yaml")


def test_seeds_and_folders_are_the_studys(tmp_path):
    (tmp_path / "v.yaml").write_text("variants: {a: ['seed=3']}")
    with pytest.raises(UserError, match="variant a: seed is set by the study"):
        questions.check_overrides(questions.custom(tmp_path / "v.yaml"))

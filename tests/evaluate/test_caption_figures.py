"""Caption figures against the equations of their papers, written out here in float64."""

from __future__ import annotations

import math
import sys
from collections import Counter

import numpy as np
import pytest

from megamug.errors import UserError
from megamug.evaluate.caption_figures import caption_figures, check_libraries, words

TRUE = [
    ["A brown dog runs across the green field.", "a dog is running on grass", "The dog runs fast"],
    ["Two men sit on a wooden bench", "two people sitting on the bench near a tree"],
    ["a red bus, parked on the street", "The bus is parked.", "a big red bus on a street"],
    ["a plate of food with rice"],
]
WRITTEN = ["a brown dog running on the field", "two men sit near tree", "a red red red bus parked", "one cat"]


def counts(row: list[str], n: int) -> Counter:
    return Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1))


def cider_d(own: list[list[str]], true: list[list[list[str]]]) -> float:
    """Vedantam et al., equations 1 to 3 with the clipping and the length penalty (sigma 6) of CIDEr-D, times 10."""
    images = len(own)
    total = 0.0
    for n in range(1, 5):
        seen = Counter(gram for rows in true for gram in set().union(*(counts(row, n) for row in rows)))

        def weights(row, n=n, seen=seen):
            return {gram: count * math.log(images / max(1, seen[gram])) for gram, count in counts(row, n).items()}

        for row, rows in zip(own, true, strict=True):
            g = weights(row)
            for reference in rows:
                s = weights(reference)
                dot = sum(min(value, s.get(gram, 0)) * s.get(gram, 0) for gram, value in g.items())
                norms = [math.sqrt(sum(value**2 for value in side.values())) for side in (g, s)]
                cosine = dot / (norms[0] * norms[1]) if all(norms) else 0.0
                total += cosine * math.exp(-((len(row) - len(reference)) ** 2) / (2 * 6**2)) / len(rows) / 4
    return 10 * total / images


def bleu(own: list[list[str]], true: list[list[list[str]]], most: int) -> float:
    """Papineni et al., section 2.3, of the whole set, equal weights up to `most`."""
    length = sum(map(len, own))
    nearest = sum(min((abs(len(r) - len(row)), len(r)) for r in rows)[1] for row, rows in zip(own, true, strict=True))
    logs = []
    for n in range(1, most + 1):
        clipped = sum(
            min(count, max(counts(r, n)[gram] for r in rows))
            for row, rows in zip(own, true, strict=True) for gram, count in counts(row, n).items()
        )  # fmt: skip
        logs.append(math.log(clipped / sum(max(0, len(row) - n + 1) for row in own)))
    return min(1.0, math.exp(1 - nearest / length)) * math.exp(sum(logs) / most)


def rouge_l(row: list[str], rows: list[list[str]]) -> float:
    """Lin, section 3: F of the longest common subsequence, beta 1.2; precision and recall each the best of all."""

    def common(a, b):
        table = np.zeros((len(a) + 1, len(b) + 1))
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        return table[-1, -1]

    precision, recall = (max(common(row, r) / len(side(r)) for r in rows) for side in (lambda _: row, lambda r: r))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision else 0.0


def test_each_figure_is_its_papers():
    own, true = [words(text) for text in WRITTEN], [[words(text) for text in texts] for texts in TRUE]
    got = caption_figures(WRITTEN, TRUE)
    assert got["cider_d"] == pytest.approx(cider_d(own, true), rel=1e-9) and 0.5 < got["cider_d"] < 5
    for n in (1, 2, 3):
        assert got[f"bleu_{n}"] == pytest.approx(bleu(own, true, n), rel=1e-7)
    assert got["bleu_4"] < 1e-2  # no four words in a row: the library's smallest number, where the papers have 0
    assert got["rouge_l"] == pytest.approx(np.mean([rouge_l(*both) for both in zip(own, true, strict=True)]), rel=1e-9)
    longer = ["a plate of food with rice and beans"] * 4
    assert caption_figures(longer, TRUE[3:] * 4)["bleu_4"] == pytest.approx(
        bleu([words(longer[0])] * 4, [[words(TRUE[3][0])]] * 4, 4), rel=1e-7
    )


def test_meteor_is_banerjees_and_lavies():
    """Matches worked out by hand, no word twice: 10 P R / (R + 9 P), less half the cube of chunks a match."""

    def score(matches, chunks, written, true):
        precision, recall = matches / written, matches / true
        return 10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 * (chunks / matches) ** 3)

    # `dog`, `runs`/`running` (one stem), `field` behind it in another place: two chunks; the second reference is worse
    got = caption_figures(["brown dog running over field"], [["a brown dog runs past field", "cats"]])
    assert got["meteor_exact_stem"] == pytest.approx(score(4, 2, 5, 6), rel=1e-9)
    got = caption_figures(["one cat", ""], [["cat one"], ["a dog"]])
    assert got["meteor_exact_stem"] == pytest.approx(score(2, 2, 2, 2) / 2, rel=1e-9)


def test_captions_that_are_true_and_ones_that_say_nothing():
    best = caption_figures([texts[0] for texts in TRUE], TRUE)
    assert best["rouge_l"] == pytest.approx(1) and best["bleu_4"] == pytest.approx(1) and best["cider_d"] > 3
    nothing = caption_figures([""] * 4, TRUE)
    assert nothing["cider_d"] == nothing["rouge_l"] == nothing["meteor_exact_stem"] == 0 and nothing["bleu_1"] < 1e-6


def test_words():
    assert words('A man\'s dog, "Rex". It isn\'t big: 3.5 feet (or so) - U.S. size...') == [
        "a", "man", "'s", "dog", "rex", "it", "is", "n't", "big", "3.5", "feet", "or", "so", "u.s.", "size",
    ]  # fmt: skip
    assert words(" ... !") == []


def test_a_missing_library_is_told_before_a_model_is_built(monkeypatch, tmp_path):
    from megamug import evaluate
    from megamug.configuration.reading import save_config
    from megamug.configuration.sections import Config

    config = Config(run_dir=str(tmp_path))
    config.data.validation = "somewhere"
    save_config(config)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(UserError, match="pip install pycocoevalcap nltk"):
        evaluate.run_task(tmp_path, "captioning")
    with pytest.raises(UserError, match="pip install pycocoevalcap nltk"):
        check_libraries()

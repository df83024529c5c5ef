"""What written captions are worth beside true ones: CIDEr-D, BLEU, ROUGE-L, METEOR.

CIDEr-D (Vedantam et al., arXiv 1411.5726), BLEU-1 to -4 (Papineni et al. 2002) and ROUGE-L (Lin 2004; as Chen et al.,
arXiv 1504.00325, take it over several references) are computed by `pycocoevalcap`, the code of COCO's server, whose
figures papers print; its parts of these are plain Python. aac-metrics computes the same and brings four neural
libraries; sacrebleu, torchmetrics and rouge-score have no CIDEr and another ROUGE. METEOR is `nltk`'s (Banerjee and
Lavie 2005), with matches of words and of stems: no WordNet is read, so it lies below the METEOR that papers print.

Words: COCO's tokenizer is Stanford's, in Java. Here captions are cut by the rules of the Penn Treebank in nltk's
implementation, in lower case, and what COCO drops is dropped (`PUNCTUATION`, and parentheses). Both cut the same words
out of plain English captions; abbreviations and unusual punctuation can differ, so a last digit of published figures
may, too. `captioning.coco.json` is for the server itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from megamug.errors import UserError

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", *"()[]{}"])
NAMES = {
    "cider_d": "CIDEr-D", "bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3", "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L", "meteor_exact_stem": "METEOR, words and stems",
}  # fmt: skip
TOKENIZATION = "Penn Treebank rules (nltk), lower case, punctuation dropped as COCO does"


class _NoSynonyms:
    """In the place of nltk's WordNet, which would have to be downloaded."""

    @staticmethod
    def synsets(word: str) -> tuple:
        return ()


def check_libraries() -> None:
    """Raises UserError where a library is missing."""
    try:
        import nltk.translate.meteor_score  # noqa: F401
        import pycocoevalcap.bleu.bleu_scorer
        import pycocoevalcap.cider.cider
        import pycocoevalcap.rouge.rouge  # noqa: F401
    except ImportError as error:
        raise UserError(f"--task captioning measures by pycocoevalcap and nltk ({error}); run:"
                        " pip install pycocoevalcap nltk") from error  # fmt: skip


def words(caption: str) -> list[str]:
    """The words of a caption, see above."""
    cut = _tokenizer().tokenize(caption.lower())
    # The rules split a full stop off at the end of the text alone: `a dog. a cat`
    cut = [word[:-1] if word.endswith(".") and word.count(".") == 1 else word for word in cut]
    return [word for word in cut if word and word not in PUNCTUATION]


@functools.cache
def _tokenizer():
    from nltk.tokenize.treebank import TreebankWordTokenizer

    return TreebankWordTokenizer()


def caption_figures(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Figures of n captions, of which each has one reference or more.

    `cider_d`: from 0 to 10, mean of the captions (papers print a hundred times this); words are weighed by how few of
    the n images have them in a reference, so it depends on the set, and is 0 for one image. `bleu_1` to `bleu_4`: 0..1,
    of the whole set, against the reference of the nearest length. `rouge_l`, `meteor_exact_stem`: 0..1, means of the
    captions; METEOR takes the best reference.
    """
    from nltk.stem.porter import PorterStemmer
    from nltk.translate.meteor_score import meteor_score
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    own = [words(text) for text in written]
    true = [[words(text) for text in texts] for texts in references]
    results = {i: [" ".join(row)] for i, row in enumerate(own)}
    given = {i: [" ".join(row) for row in rows] for i, rows in enumerate(true)}
    bleu = BleuScorer(n=4)
    for i, texts in given.items():
        bleu += (results[i][0], texts)
    shares, _ = bleu.compute_score(option="closest")
    stemmer = PorterStemmer()
    meteor = [
        meteor_score(rows, row, stemmer=stemmer, wordnet=_NoSynonyms) if row else 0.0
        for row, rows in zip(own, true, strict=True)
    ]
    return {
        "cider_d": float(Cider().compute_score(given, results)[0]),
        **{f"bleu_{n}": float(share) for n, share in enumerate(shares, start=1)},
        "rouge_l": float(Rouge().compute_score(given, results)[0]),
        "meteor_exact_stem": sum(meteor) / len(meteor),
    }

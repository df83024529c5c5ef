"""What a study asks: variants of one configuration, and which of them are held against which.

    weights     what a pixel and a caption loss of these weights teach
    captions    whether captions help, and whether it is what they say
    scaling     what more data are worth, by pixels, by captions and by both
    custom      variants that a file names
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megamug.configuration.reading import read_yaml
from megamug.errors import UserError

NAMES = ("weights", "captions", "scaling", "custom")
UNTRAINED = "untrained"  # the encoder as the first variant began: the control of every study
# (image, caption): from pixels alone (MAE) to captions alone. 1 : 0.1 is the paper's; the rest are powers of ten
# around it and the equal weights between.
GRID = ((1.0, 0.0), (1.0, 0.01), (1.0, 0.1), (1.0, 1.0), (0.1, 1.0), (0.0, 1.0))
FRACTIONS = (0.1, 0.3, 1.0)
OBJECTIVES = {
    "pixels": ("model.caption_loss_weight=0",), "captions": ("model.image_loss_weight=0",), "both": (),
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OURS = ("run_dir", "seed")  # keys that a study sets


@dataclass(frozen=True)
class Variant:
    name: str
    overrides: tuple[str, ...] = ()  # section.key=value, over CONFIG


@dataclass(frozen=True)
class Question:
    """The first variant is what the others are held against where `pairs` do not say more."""

    name: str
    variants: tuple[Variant, ...]
    pairs: tuple[tuple[str, str], ...]  # differences that are told: one minus other
    curves: dict[str, list[tuple[float, str]]]  # of the plot: (x, variant) of each line; empty: variants side by side
    axis: str = ""

    def as_tree(self) -> dict:
        """For JSON; `from_tree` reads it back."""
        return asdict(self)


def from_tree(tree: dict) -> Question:
    """Raises KeyError or TypeError where it is none."""
    return Question(
        tree["name"], tuple(Variant(v["name"], tuple(v["overrides"])) for v in tree["variants"]),
        tuple((one, other) for one, other in tree["pairs"]),
        {name: [(x, variant) for x, variant in points] for name, points in tree["curves"].items()}, tree["axis"],
    )  # fmt: skip


def weights(grid: Sequence[tuple[float, float]] = GRID) -> Question:
    """Pairs of (image, caption) weights. The baseline is the first without captions, else the first."""
    variants = [Variant(f"image{image:g}-caption{caption:g}",
                        (f"model.image_loss_weight={image!r}", f"model.caption_loss_weight={caption!r}"))
                for image, caption in grid]  # fmt: skip
    if len(set(grid)) < len(grid):
        raise UserError("--grid has a pair of weights twice; give each once")
    if (0, 0) in grid:
        raise UserError("--grid: 0:0 leaves nothing to learn; give one of the two a weight")
    first = next((number for number, (_, caption) in enumerate(grid) if caption == 0), 0)
    variants.insert(0, variants.pop(first))
    return Question("weights", tuple(variants), _against_first(variants), {})


def captions(other_data: str | None = None) -> Question:
    """`other_data`: what `data.train` is set to (YAML) for another set of pairs."""
    variants = [Variant(name, overrides) for name, overrides in OBJECTIVES.items()]
    variants.append(Variant("shuffled", ("data.captions=shuffled",)))
    pairs = [("both", "pixels"), ("both", "shuffled"), ("shuffled", "pixels"), ("captions", "pixels")]
    if other_data is not None:
        data = f"data.train={other_data}"
        variants += [Variant("other-pixels", (*OBJECTIVES["pixels"], data)), Variant("other", (data,))]
        pairs += [("other", "other-pixels"), ("other", "both")]
    return Question("captions", tuple(variants), _against_untrained(variants) + tuple(pairs), {})


def scaling(fractions: Sequence[float] = FRACTIONS) -> Question:
    """Shares of the training data; every variant trains for as many steps."""
    fractions = sorted(set(fractions))
    variants = [
        Variant(f"{name}-{fraction:g}", (*overrides, f"data.fraction={fraction!r}"))
        for fraction in reversed(fractions) for name, overrides in OBJECTIVES.items()
    ]  # fmt: skip
    pairs = [(f"{name}-{share:g}", f"pixels-{share:g}") for share in fractions for name in ("captions", "both")]
    if len(fractions) > 1:
        pairs += [(f"{name}-{fractions[-1]:g}", f"{name}-{fractions[0]:g}") for name in OBJECTIVES]
    curves = {name: [(fraction, f"{name}-{fraction:g}") for fraction in fractions] for name in OBJECTIVES}
    return Question("scaling", tuple(variants), tuple(pairs), curves, "share of the training data")


def custom(path: Path) -> Question:
    """Reads `variants: {NAME: [section.key=value, ...]}` and `compare: [[ONE, OTHER], ...]` (default: each with the
    first, and all with the untrained encoder).

    Raises UserError: no such file, other keys, names that are no names of folders.
    """
    tree = read_yaml(path)
    if unknown := sorted(map(str, set(tree) - {"variants", "compare"})):
        raise UserError(f"{path}: unknown key {unknown[0]}; the keys are variants and compare")
    named = tree.get("variants")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{path}: variants: {{NAME: [section.key=value, ...]}} wanted")
    variants = []
    for name, overrides in named.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == UNTRAINED:
            raise UserError(f"{path}: {name!r} cannot be the name of a variant: letters, digits, '.', '-' and '_'"
                            f" wanted, and not {UNTRAINED!r}, which every study has")  # fmt: skip
        overrides = [] if overrides is None else overrides
        if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
            raise UserError(f"{path}: {name}: a list of section.key=value wanted, such as [data.captions=shuffled]")
        variants.append(Variant(name, tuple(overrides)))
    pairs = tree.get("compare")
    if pairs is None:
        return Question("custom", tuple(variants), _against_untrained(variants) + _against_first(variants), {})
    known = {UNTRAINED, *named}
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or len(pair) != 2 or not known.issuperset(map(str, pair)) or pair[0] == pair[1]:
            raise UserError(f"{path}: compare: pairs of two of {', '.join(sorted(known))} wanted, found {pair}")
    return Question("custom", tuple(variants), tuple((one, other) for one, other in pairs), {})


def check_overrides(question: Question) -> None:
    """Raises UserError where a variant sets what a study sets itself."""
    for variant in question.variants:
        for override in variant.overrides:
            if (key := override.partition("=")[0].strip()) in _OURS:
                raise UserError(f"variant {variant.name}: {key} is set by the study; leave it out")


def _against_first(variants: Sequence[Variant]) -> tuple[tuple[str, str], ...]:
    return tuple((variant.name, variants[0].name) for variant in variants[1:])


def _against_untrained(variants: Sequence[Variant]) -> tuple[tuple[str, str], ...]:
    return tuple((variant.name, UNTRAINED) for variant in variants)

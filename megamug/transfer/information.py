"""How many nats features Z tell of a target T (classes, captions, other features): lower bounds on held-out pairs.

    classes     I(Z;T) >= H(T) - E[-log q(T|Z)]                    Barber and Agakov, "The IM algorithm", NIPS 2003
    anything    I(Z;T) >= log K - E[-log softmax_j f(z_i, t_j)[i]]     InfoNCE: van den Oord et al., arXiv 1807.03748

q and f are learned from one set and the expectations are taken over another, so each is a bound in expectation whatever
was learned (Poole et al., arXiv 1905.06922). q is a logistic regression, f(z, t) = g(z) . h(t) + u(t); of f a
bilinear form and one of small networks are learned, and the one that is better on a part of the pairs to learn from is
taken. The number is what q or f can use of what is there (V-information: Xu et al., arXiv 2002.10689).

Axes: n pairs to learn from, m held-out ones, h and w numbers of z and t, K pairs of a batch, r numbers of g and h.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamug.errors import UserError
from megamug.transfer import logistic, stored
from megamug.transfer.knn import check_sets
from megamug.transfer.stored import StoredFeatures

BATCHES = 8  # held-out batches at least, by whose spread the standard error is told
MOST_CANDIDATES = 512  # pairs of a batch, unless more are asked for
RANK, HIDDEN = 64, 256  # r; units of the hidden layers of g, h and u
HELD_OUT = 0.2  # of the pairs to learn from, for when to stop and which f to take
RATE, DECAY, STEPS = 2e-3, 1e-2, 3000  # of AdamW
LOOK, PATIENCE, ENOUGH = 25, 6, 1e-3  # steps between looks at the held-out part; looks without so many nats more
WORDS, RARE = 4096, 3  # of captions: the most frequent ones, of those in so many captions or more


@dataclass(frozen=True)
class Bound:
    """A lower bound of I(Z;T) in nats, its standard error, and what it could be `at_most` for the best of features."""

    nats: float
    standard_error: float
    at_most: float
    of: str  # barber_agakov | infonce
    details: dict[str, object]

    def figures(self) -> dict[str, object]:
        return {"nats": self.nats, "standard_error": self.standard_error, "at_most": self.at_most, "bound": self.of,
                **self.details}  # fmt: skip


def of_classes(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *,
    strengths: Sequence[float] = logistic.STRENGTHS, seed: int = 0,
) -> Bound:  # fmt: skip
    """Barber and Agakov's bound for classes: features [n, h], [m, h], labels int64 [n], [m].

    H(T) is that of the shares of the classes in `test`, which is below the true one by about (classes - 1) / 2m in the
    mean. Classes that are not learned from count as one class, of chance 1 / (n + 1). The regularisation is the one of
    least cross-entropy on a held-out part of `train`. The standard error is that of the mean of log q(t|z) / p(t).
    Raises UserError as `logistic.linear_probe` does.
    """
    check_sets(train, train_labels, test, test_labels)
    known = train_labels.unique()
    if len(known) < 2:
        raise UserError("the images to learn from are all of one class; there is nothing to tell apart")
    own = torch.searchsorted(known, train_labels)
    place = torch.searchsorted(known, test_labels).clamp(max=len(known) - 1)
    other = known[place] != test_labels
    strength = next(iter(strengths))
    if len(strengths) > 1:
        strength, _ = logistic.choose_strength(train, own, strengths, seed=seed, by="loss")
    probe = logistic.fit(train, own, strength, len(known))
    unknown = 1 / (len(train) + 1)
    chances = probe.logits(test).log_softmax(dim=1).gather(1, place[:, None])[:, 0] + math.log1p(-unknown)
    chances = chances.masked_fill(other, math.log(unknown))
    place = place.masked_fill(other, len(known))
    shares = place.bincount(minlength=len(known) + 1).double() / len(place)
    gained = chances - shares.log()[place]  # its mean is H(T) less the cross-entropy
    details = {
        "pairs": len(test), "classes": len(known), "cross_entropy": -chances.mean().item(), "strength": strength,
        "converged": probe.converged, "of_classes_not_learned": int(other.sum()),
    }  # fmt: skip
    entropy = float(torch.special.entr(shares).sum())
    return Bound(gained.mean().item(), _standard_error(gained), entropy, "barber_agakov", details)


def of_pairs(
    train: Tensor, train_targets: Tensor, test: Tensor, test_targets: Tensor, *, candidates: int | None = None,
    seed: int = 0, groups: Sequence[object] | None = None,
) -> Bound:  # fmt: skip
    """InfoNCE between features [n, h], [m, h] and targets [n, w], [m, w] of the same pairs, each pair drawn alone.

    `candidates`: K; the bound is never above log K. None: as many as leave 8 batches of `test`, at most 512. `groups`:
    of each pair to learn from, something that related ones share (several pictures of one thing): they are all in the
    part on which f is chosen, or none, since that part must be as new to f as `test` is. None: each is alone. Held-out
    pairs are put into batches by `seed`; what is left of them is not counted. The standard error is that of the mean of
    the batches. Raises UserError: too few pairs.
    """
    device = train.device
    sets = train, train_targets, test, test_targets
    train, train_targets, test, test_targets = (x.to(device).float() for x in sets)
    size = candidates or min(MOST_CANDIDATES, len(test) // BATCHES)
    groups = range(len(train)) if groups is None else groups
    names = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    count = round(len(names) * HELD_OUT)
    if size < 2 or len(test) < 2 * size or count < 2:
        raise UserError(f"{len(train)} pairs to learn from and {len(test)} held out are too few for an InfoNCE bound"
                        f" of {max(size, 2)} candidates: 10, and two batches of candidates, are wanted at least")
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(len(names), generator=generator)[torch.tensor([names[group] for group in groups])]
    learned, stopping = (place >= count).nonzero()[:, 0], (place < count).nonzero()[:, 0]
    stopping = stopping[torch.randperm(len(stopping), generator=generator)]
    scale, scale_targets = _standard(train[learned]), _standard(train_targets[learned])
    z, t = scale(train), scale_targets(train_targets)
    found = {}
    for name, hidden in (("bilinear", 0), ("networks", HIDDEN)):
        critic = Critic(z.shape[1], t.shape[1], hidden, generator).to(device)
        gain, steps = _learn(critic, (z[learned], t[learned]), (z[stopping], t[stopping]), size, generator)
        found[name] = gain, steps, critic
    name = max(found, key=lambda one: found[one][0])
    order = torch.randperm(len(test), generator=generator)
    with torch.no_grad():
        gains = _gains(found[name][2], scale(test)[order], scale_targets(test_targets)[order], size)
    details = {
        "pairs": len(gains) * size, "candidates": size, "batches": len(gains), "critic": name,
        "steps": found[name][1], "held_out": {one: gain for one, (gain, *_) in found.items()},
    }  # fmt: skip
    return Bound(gains.mean().item(), _standard_error(gains), math.log(size), "infonce", details)


class Critic(nn.Module):
    """f(z, t) = g(z) . h(t) + u(t): linear maps, or networks of one hidden layer beside them."""

    def __init__(self, width: int, target_width: int, hidden: int, generator: torch.Generator):
        super().__init__()
        self.g, self.h = _Map(width, RANK, hidden, generator), _Map(target_width, RANK, hidden, generator)
        self.u = _Map(target_width, 1, hidden, generator)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """z [k, h], t [K, w] -> scores [k, K]."""
        return self.g(z) @ self.h(t).T / math.sqrt(RANK) + self.u(t).T


class _Map(nn.Module):
    def __init__(self, width: int, out: int, hidden: int, generator: torch.Generator):
        super().__init__()
        self.linear = _drawn(width, out, generator)
        self.network = nn.Sequential(
            _drawn(width, hidden, generator), nn.GELU(), _drawn(hidden, out, generator)
        ) if hidden else None  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.network is None else self.linear(x) + self.network(x)


def _drawn(width: int, out: int, generator: torch.Generator) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, width, out)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(out, width, generator=generator) / math.sqrt(width))
        linear.bias.zero_()
    return linear


def _learn(critic: Critic, pairs: tuple, stopping: tuple, size: int, generator: torch.Generator) -> tuple[float, int]:
    """Maximises InfoNCE on `pairs` by AdamW until it no longer grows on `stopping`; leaves the best weights in
    `critic`. Returns (nats on `stopping`, steps there)."""
    z, t = pairs
    batch, held = min(size, len(z)), min(size, len(stopping[0]))
    optimizer = torch.optim.AdamW(critic.parameters(), lr=RATE, weight_decay=DECAY)
    best, kept, at, mark, order = -math.inf, None, 0, (-math.inf, 0), torch.empty(0, dtype=torch.int64)
    for step in range(1, STEPS + 1):
        if len(order) < batch:
            order = torch.randperm(len(z), generator=generator)
        rows, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        F.cross_entropy(critic(z[rows], t[rows]), torch.arange(batch, device=z.device)).backward()
        optimizer.step()
        if step % LOOK == 0:
            with torch.no_grad():
                gain = _gains(critic, *stopping, held).mean().item()
            if gain > best:
                best, kept, at = gain, copy.deepcopy(critic.state_dict()), step
            if gain > mark[0] + ENOUGH:
                mark = gain, step
            elif step - mark[1] >= PATIENCE * LOOK:
                break
    critic.load_state_dict(kept)
    return best, at


def _gains(critic: Critic, z: Tensor, t: Tensor, size: int) -> Tensor:
    """log K - cross-entropy of each whole batch of `size` pairs, float64."""
    gains = []
    for first in range(0, len(z) - size + 1, size):
        scores = critic(z[first : first + size], t[first : first + size]).double()
        gains.append(math.log(size) - F.cross_entropy(scores, torch.arange(size, device=z.device)))
    return torch.stack(gains)


def _standard(x: Tensor):
    """What standardises numbers like `x` [n, w]; a constant stays 0."""
    mean, deviation = x.mean(0), x.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    return lambda other: (other - mean) / deviation


def _standard_error(values: Tensor) -> float:
    return (values.double().std() / math.sqrt(len(values))).item()


def bags(train: Sequence[str], test: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Captions as bags of words, float32 [n, w], [m, w]: 1 where the word is in the caption. Words are runs of letters
    and digits, without regard to case: those of three captions of `train` or more, the 4,096 most frequent ones.

    A bag is a function of its caption that `test` has no part in: what features tell of it, they tell of the caption.
    Raises UserError where no word is that frequent.
    """
    found = [[set(re.findall(r"\w+", caption.casefold())) for caption in captions] for captions in (train, test)]
    counts = Counter(word for words in found[0] for word in words)
    frequent = sorted((word for word, count in counts.items() if count >= RARE), key=lambda w: (-counts[w], w))[:WORDS]
    if not frequent:
        raise UserError(f"of {len(train)} captions to learn from no word is in {RARE} or more: more are needed")
    place = {word: column for column, word in enumerate(frequent)}
    tensors = []
    for captions in found:
        bag = torch.zeros(len(captions), len(place))
        for row, words in enumerate(captions):
            bag[row, [place[word] for word in words if word in place]] = 1
        tensors.append(bag)
    return tensors[0], tensors[1]


# ------------------------------------------------------------------------------------------ files of features

ABOUT = ("labels", "captions")


def targets(train: StoredFeatures, test: StoredFeatures) -> list[str]:
    """Of `ABOUT`, what both files have."""
    rows = [stored.rows_of(features) for features in (train, test)]
    captions = all(row is not None and any(row.captions) for row in rows)
    labels = all((features.labels >= 0).any() for features in (train, test))
    return ["labels"] * labels + ["captions"] * captions


def about(
    target: str, train: StoredFeatures, test: StoredFeatures, name: str, *, candidates: int | None = None,
    strengths: Sequence[float] = logistic.STRENGTHS, seed: int = 0, device: torch.device | str = "cpu",
) -> Bound:  # fmt: skip
    """What the features `name` tell of the labels, or of the captions, of their images; images without are left out."""
    if target == "labels":
        sets = (x.to(device) for x in (*train.labelled(name), *test.labelled(name)))
        return of_classes(*sets, strengths=strengths, seed=seed)
    features, captions = [], []
    for one in (train, test):
        rows = stored.rows_of(one)
        kept = [row for row, caption in enumerate(rows.captions if rows else []) if caption.strip()]
        if not kept:
            raise UserError(f"{one.path} has no captions beside it: extract features of shards that have some")
        features.append(one.named(name)[kept].to(device))
        captions.append([rows.captions[row] for row in kept])
    words = bags(*captions)
    pairs = features[0], words[0], features[1], words[1]
    return of_pairs(*pairs, candidates=candidates, seed=seed, groups=captions[0])


def about_features(
    others: tuple[StoredFeatures, StoredFeatures], train: StoredFeatures, test: StoredFeatures, name: str, *,
    candidates: int | None = None, seed: int = 0, device: torch.device | str = "cpu",
) -> Bound:  # fmt: skip
    """What the features `name` tell of those in `others` (of that name, or the only ones there) of the same images."""
    pairs = []
    for own, other in zip((train, test), others, strict=True):
        theirs = name if name in other.tensors else next(iter(other.tensors))
        if theirs != name and len(other.tensors) > 1:
            raise UserError(f"{other.path} has {', '.join(other.tensors)}, and none of them is called {name}")
        rows, places = _matched(own, other)
        pairs += [own.named(name)[rows].to(device), other.tensors[theirs][places]]
    return of_pairs(*pairs, candidates=candidates, seed=seed)


def _matched(own: StoredFeatures, other: StoredFeatures) -> tuple[list[int], list[int]]:
    """Rows of both that are of one image: by shard and key where both say them, else by their order."""
    mine, theirs = stored.rows_of(own), stored.rows_of(other)
    if mine is None or theirs is None or mine.keys == theirs.keys:
        if len(own) != len(other):
            raise UserError(f"{own.path} has {len(own)} rows and {other.path} has {len(other)}, and one of them does"
                            " not say of which images: features of the same images in the same order are wanted")
        return [*range(len(own))], [*range(len(own))]
    place = {key: row for row, key in enumerate(theirs.keys)}
    if len(place) < len(theirs.keys):
        raise UserError(f"{other.path} has rows of one shard and key twice, so they cannot be matched with {own.path}")
    both = [(row, place[key]) for row, key in enumerate(mine.keys) if key in place]
    if not both:
        raise UserError(f"{own.path} and {other.path} have no image in common (by shard and key)")
    return [row for row, _ in both], [row for _, row in both]

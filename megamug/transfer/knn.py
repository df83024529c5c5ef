"""k-nearest-neighbour classification of features, as DINO evaluates (Caron et al., arXiv 2104.14294, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from megamug.errors import UserError

KS, TEMPERATURE = (10, 20, 100, 200), 0.07  # of the paper
ROWS = 1024  # of the test set at a time


def knn(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> dict[int, dict[str, float]]:  # fmt: skip
    """{k: {"top1", "top5"}}: shares of the test rows whose class is the likeliest, or among the five likeliest.

    Each of the k train rows of largest cosine similarity s votes for its class with weight exp(s / temperature). Of
    classes with equal votes the smaller number comes first, of rows equally near the earlier one; a class without a
    vote is never among the five.

    Args:
        train, test: [n, h], [m, h] of floating-point numbers; labels: int64 [n], [m].

    One pass over the similarities serves all `ks`. Raises UserError: a k above n, nothing in a set.
    """
    check_sets(train, train_labels, test, test_labels)
    if not ks or min(ks) < 1 or max(ks) > len(train):
        raise UserError(f"k: {', '.join(map(str, ks))}; between 1 and the {len(train)} images to learn from wanted")
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    train, largest = F.normalize(train, dim=1), max(ks)
    right = {k: [0, 0] for k in ks}
    for rows, labels in zip(test.split(ROWS), test_labels.split(ROWS), strict=True):
        similar = F.normalize(rows, dim=1) @ train.T
        near, who = similar.sort(dim=1, descending=True, stable=True)
        near, voters = near[:, :largest], train_labels[who[:, :largest]]
        weights = ((near - near[:, :1]) / temperature).exp()  # shares of the votes do not depend on the largest
        for k in ks:
            votes = weights.new_zeros(len(rows), classes).scatter_add_(1, voters[:, :k], weights[:, :k])
            best, order = votes.sort(dim=1, descending=True, stable=True)
            hit = (order[:, :5] == labels[:, None]) & (best[:, :5] > 0)
            right[k][0] += int(hit[:, :1].sum())
            right[k][1] += int(hit.sum())
    return {k: {"top1": one / len(test), "top5": five / len(test)} for k, (one, five) in right.items()}


def check_sets(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    """Raises UserError where features and labels cannot be those of one question."""
    for what, features, labels in (("to learn from", train, train_labels), ("to be measured on", test, test_labels)):
        if not len(features) or len(features) != len(labels):
            raise UserError(f"{len(features)} features and {len(labels)} labels {what}; one of each an image wanted")
    if train.shape[1] != test.shape[1]:
        raise UserError(f"features of {train.shape[1]} numbers to learn from and of {test.shape[1]} to be measured on:"
                        " extract both with one encoder")  # fmt: skip

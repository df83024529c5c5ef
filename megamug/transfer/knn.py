"""k-nearest-neighbour classification of features, as DINO evaluates (Caron et al., arXiv 2104.14294, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from megamug.errors import UserError

KS, TEMPERATURE = (10, 20, 100, 200), 0.07  # of the paper
ROWS, NUMBERS = 1024, 1 << 27  # of the test set, and of similarities, at a time


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
    step = max(1, min(ROWS, NUMBERS // len(train)))
    for rows, labels in zip(test.split(step), test_labels.split(step), strict=True):
        near, who = _nearest(F.normalize(rows, dim=1) @ train.T, largest)
        voters = train_labels[who]
        weights = ((near - near[:, :1]) / temperature).exp()  # shares of the votes do not depend on the largest
        for k in ks:
            votes = weights.new_zeros(len(rows), classes).scatter_add_(1, voters[:, :k], weights[:, :k])
            best, order = votes.sort(dim=1, descending=True, stable=True)
            hit = (order[:, :5] == labels[:, None]) & (best[:, :5] > 0)
            right[k][0] += int(hit[:, :1].sum())
            right[k][1] += int(hit.sum())
    return {k: {"top1": one / len(test), "top5": five / len(test)} for k, (one, five) in right.items()}


def _nearest(similar: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(values, columns) of the `count` largest of each row, largest first, of equals the earlier column first."""
    values, columns = similar.topk(count, dim=1)
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    # Of several columns that are the last one's equals `topk` takes any: those rows are sorted whole.
    tied = (similar >= values[:, -1:]).sum(dim=1) > count
    if tied.any():
        whole, order = similar[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = whole[:, :count], order[:, :count]
    return values, columns


def check_sets(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    """Raises UserError where features and labels cannot be those of one question."""
    for what, features, labels in (("to learn from", train, train_labels), ("to be measured on", test, test_labels)):
        if not len(features) or len(features) != len(labels):
            raise UserError(f"{len(features)} features and {len(labels)} labels {what}; one of each an image wanted")
    if train.shape[1] != test.shape[1]:
        raise UserError(f"features of {train.shape[1]} numbers to learn from and of {test.shape[1]} to be measured on:"
                        " extract both with one encoder")  # fmt: skip

"""The fast linear probe: L2-regularised multinomial logistic regression on features, by L-BFGS.

What is minimised is scikit-learn's objective, divided by C n: mean cross-entropy + |W|^2 / (2 C n), the bias without
regularisation. Features are standardised by the mean and deviation of those that are learned from, as the BatchNorm
without affine before MAE's linear probe does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megamug.errors import UserError
from megamug.transfer.knn import check_sets

STRENGTHS = tuple(10.0**k for k in range(-4, 3))  # values of C that are tried
HELD_OUT = 0.2  # of the images to learn from, for choosing C
TOLERANCE = 1e-6  # largest number of the scaled gradient where it ends: the loss is then right to 1e-8 or so
STEPS, HISTORY = 1000, 20


@dataclass
class Probe:
    """Logits of features x [b, h]: ((x - mean) / deviation) @ weight.T + bias."""

    weight: Tensor  # [classes, h]
    bias: Tensor  # [classes]
    mean: Tensor  # [h]
    deviation: Tensor  # [h]
    loss: float  # what was minimised, at the end
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        x = (features.to(self.weight) - self.mean) / self.deviation
        return F.linear(x, self.weight, self.bias)

    def measure(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        """{"top1", "top5", "loss"}: shares of right answers, mean cross-entropy in nat."""
        logits = self.logits(features)
        five = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        return {
            "top1": five[:, 0].double().mean().item(), "top5": five.any(1).double().mean().item(),
            "loss": F.cross_entropy(logits, labels).item(),
        }  # fmt: skip


class _Problem:
    """The images to learn from, in coordinates in which the minimum is well conditioned, shared by all C.

    A rotation of the features to their principal directions, z = x Q, changes no |W|^2, and so no minimum. There the
    Hessian is nearly diagonal: about p (1 - p) times the variance along each direction, plus 1 / (C n). Parameters are
    scaled by its root. L-BFGS, which starts from the identity, then takes a third of the steps or fewer: an encoder's
    features are strongly correlated.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, standardise: bool, dtype: torch.dtype):
        x = features.to(dtype)
        self.labels, self.classes = labels, classes
        self.mean = x.mean(0) if standardise else x.new_zeros(x.shape[1])
        deviation = x.std(0, correction=0) if standardise else torch.ones_like(self.mean)
        self.deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))  # a constant tells nothing
        x = (x - self.mean) / self.deviation
        self.variances, self.directions = torch.linalg.eigh(x.T @ x / len(x))
        self.z = x @ self.directions

    def minimum(self, strength: float, start: Probe | None) -> Probe:
        penalty = 1 / (2 * strength * len(self.z))
        uncertain = (1 - 1 / self.classes) / self.classes  # p (1 - p) where nothing is known
        scale = (uncertain * self.variances.clamp(min=0) + 2 * penalty).rsqrt()
        if start is None:
            weight, bias = self.z.new_zeros(self.classes, len(scale)), self.z.new_zeros(self.classes)
        else:
            weight, bias = start.weight.to(self.z) @ self.directions, start.bias.to(self.z)
        u, v = weight / scale, bias * uncertain**0.5
        optimizer = torch.optim.LBFGS(
            [u, v], max_iter=STEPS, max_eval=2 * STEPS, history_size=HISTORY, line_search_fn="strong_wolfe",
            tolerance_grad=TOLERANCE, tolerance_change=0,
        )  # fmt: skip
        images = torch.arange(len(self.z), device=self.z.device)

        def closure() -> Tensor:
            """The loss; sets its gradient. Classes lie in rows: both products then read z as it lies."""
            weight = u * scale
            logits = torch.addmm((v * uncertain**-0.5).unsqueeze(1), weight, self.z.T)  # [classes, n]
            normaliser = logits.logsumexp(0)
            loss = (normaliser - logits[self.labels, images]).mean() + penalty * weight.square().sum()
            shares = (logits - normaliser).exp_()
            shares[self.labels, images] -= 1
            shares /= len(self.z)
            u.grad = (shares @ self.z + 2 * penalty * weight) * scale
            v.grad = shares.sum(1) * uncertain**-0.5
            return loss

        optimizer.step(closure)
        loss = float(closure())
        largest = max(float(p.grad.abs().max()) for p in (u, v))
        weight, bias = (u * scale) @ self.directions.T, v * uncertain**-0.5
        return Probe(weight, bias, self.mean, self.deviation, loss, largest <= 10 * TOLERANCE)


def fit(
    features: Tensor, labels: Tensor, strength: float, classes: int | None = None, *, standardise: bool = True,
    start: Probe | None = None, dtype: torch.dtype = torch.float64,
) -> Probe:  # fmt: skip
    """The minimum for C = `strength`, found by L-BFGS (strong Wolfe) from `start` or from zero.

    Args:
        features: [n, h]; labels: int64 [n] in 0..classes - 1.
        start: a probe of the same features, whose minimum is near.
    """
    classes = classes or max(2, int(labels.max()) + 1)
    return _Problem(features, labels, classes, standardise, dtype).minimum(strength, start)


def choose_strength(
    features: Tensor, labels: Tensor, strengths: Sequence[float] = STRENGTHS, *, seed: int = 0,
    held_out: float = HELD_OUT, standardise: bool = True, by: str = "top1",
) -> tuple[float, dict[float, float]]:  # fmt: skip
    """(the C that is best on a held-out part, top-1 there by C). Of equals the smaller, which is regularised more.
    `by="loss"`: the C of least cross-entropy, and the cross-entropies.

    The part is a share `held_out` of the images, drawn by `seed`. Raises UserError: too few images to hold some out.
    """
    count = round(len(features) * held_out)
    if not 0 < count < len(features):
        raise UserError(f"{len(features)} images are too few to choose a strength on {held_out:.0%} of them; give one")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
    out, kept = order[:count], order[count:]
    classes, found, probe = int(labels.max()) + 1, {}, None
    learned = _Problem(features[kept], labels[kept], classes, standardise, torch.float64)
    for strength in sorted(strengths):  # each minimum is near the one before
        probe = learned.minimum(strength, probe)
        found[strength] = probe.measure(features[out], labels[out])[by]
    sign = -1 if by == "loss" else 1
    return max(found, key=lambda strength: (sign * found[strength], -strength)), found


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, strengths: Sequence[float] = STRENGTHS,
    seed: int = 0, standardise: bool = True,
) -> dict[str, object]:  # fmt: skip
    """Chooses C on a held-out part of `train`, fits on all of it, measures on `test`: {"top1", "top5", "loss",
    "strength", "held_out": top-1 by C, "train_top1", "converged"}. A class that is not learned from is never right.

    Raises UserError: sets that do not go together, fewer than two classes.
    """
    check_sets(train, train_labels, test, test_labels)
    if len(train_labels.unique()) < 2:
        raise UserError("the images to learn from are all of one class; there is nothing to tell apart")
    if not strengths or min(strengths) <= 0:
        raise UserError(f"strength: {', '.join(map(str, strengths))}; numbers above 0 wanted")
    strength, held_out = next(iter(strengths)), {}
    if len(strengths) > 1:
        strength, held_out = choose_strength(train, train_labels, strengths, seed=seed, standardise=standardise)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    probe = fit(train, train_labels, strength, classes, standardise=standardise)
    return {
        **probe.measure(test, test_labels), "strength": strength, "held_out": held_out,
        "train_top1": probe.measure(train, train_labels)["top1"], "converged": probe.converged,
    }  # fmt: skip

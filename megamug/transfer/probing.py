"""Probes of stored features: each method on each feature."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megamug.errors import UserError
from megamug.transfer import information, knn, logistic
from megamug.transfer.stored import StoredFeatures


def probe(
    train: StoredFeatures, test: StoredFeatures, methods: Sequence[str], features: Sequence[str] | None = None,
    ks: Sequence[int] | None = None, temperature: float = knn.TEMPERATURE,
    strengths: Sequence[float] = logistic.STRENGTHS, seed: int = 0, device: torch.device | str = "cpu",
) -> dict[str, dict]:  # fmt: skip
    """{feature: {"knn": what `knn.knn` finds, "linear": what `logistic.linear_probe` finds}}.

    Args:
        methods: of "knn" and "linear". features: default: all that `train` has. ks: default: those of `knn.KS` that
            `train` has so many labelled rows for.

    Raises UserError: features that were extracted in two ways, none of that name, none with a label.
    """
    _check_alike(train, test)
    results: dict[str, dict] = {}
    for name in features or train.tensors:
        sets = tuple(tensor.to(device) for tensor in (*train.labelled(name), *test.labelled(name)))
        found = results[name] = {}
        if "knn" in methods:
            wanted = ks or [k for k in knn.KS if k <= len(sets[0])] or [len(sets[0])]
            found["knn"] = knn.knn(*sets, wanted, temperature)
        if "linear" in methods:
            found["linear"] = logistic.linear_probe(*sets, strengths=strengths, seed=seed)
    return results


def bounds(
    train: StoredFeatures, test: StoredFeatures, features: Sequence[str] | None = None,
    about: Sequence[str] | None = None, others: tuple[StoredFeatures, StoredFeatures] | None = None,
    candidates: int | None = None, strengths: Sequence[float] = logistic.STRENGTHS, seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, dict]]:  # fmt: skip
    """{feature: {"labels" | "captions" | "paired": figures of an `information.Bound`}}.

    Args:
        about: of "labels" and "captions"; default: those that both files have, none where there are `others`.
        others: features of the same images, to learn from and held out, of which is told as well.

    Raises UserError: features that were extracted in two ways, nothing to be told of; as `information` does.
    """
    _check_alike(train, test)
    if about is None:
        about = [] if others else information.targets(train, test)
        if not about and not others:
            raise UserError(f"{train.path} and {test.path} do not both have labels, or captions, to be told of; name"
                            " other features of the same images with --paired")
    results: dict[str, dict] = {}
    more = {"candidates": candidates, "seed": seed, "device": device}
    for name in features or train.tensors:
        found = {one: information.about(one, train, test, name, strengths=strengths, **more) for one in about}
        if others:
            found["paired"] = information.about_features(others, train, test, name, **more)
        results[name] = {one: bound.figures() for one, bound in found.items()}
    return results


def _check_alike(train: StoredFeatures, test: StoredFeatures) -> None:
    if train.settings and test.settings and (other := _differing(train.settings, test.settings)):
        raise UserError(f"{test.path} was extracted otherwise than {train.path} (other {', '.join(other)}); extract"
                        " both alike")  # fmt: skip


def _differing(one: dict, other: dict) -> list[str]:
    return [key for key in ("encoder", "image_size", "share", "dtype") if one.get(key) != other.get(key)]

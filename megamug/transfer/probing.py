"""Probes of stored features: each method on each feature."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megamug.errors import UserError
from megamug.transfer import knn, logistic
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
    if train.settings and test.settings and (other := _differing(train.settings, test.settings)):
        raise UserError(f"{test.path} was extracted otherwise than {train.path} (other {', '.join(other)}); extract"
                        " both alike")  # fmt: skip
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


def _differing(one: dict, other: dict) -> list[str]:
    return [key for key in ("encoder", "image_size", "share", "dtype") if one.get(key) != other.get(key)]

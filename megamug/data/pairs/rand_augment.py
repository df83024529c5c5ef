"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) as timm computes it, as a pure function of (seed, epoch, index).

timm draws from the generators of `random` and `numpy.random` that all threads of a process share. So its file of these
operations is loaded once more, for megamug alone, with generators of each thread in their place, seeded for each image:
nobody else's draws come between, and nobody else's are changed. (It also does without torchvision, which `import timm`
wants and which goes with one build of torch alone.)
"""

from __future__ import annotations

import importlib.util
import random
import re
import threading
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megamug.data.random import random_words
from megamug.errors import UserError

if TYPE_CHECKING:
    import torch

POLICY = re.compile(r"rand(-(m|n|mmax)\d+|-(p|mstd)\d+(\.\d+)?|-inc[01])*")
_PLACE = Path("data", "auto_augment.py")  # in timm
_TRANSLATION = 0.45  # of the image's side at most, as timm's own pipeline has it


class RandAugment:
    """uint8 images [n, 3, S, S] -> the same, each through the operations that were drawn for it."""

    def __init__(self, policy: str, seed: int, size: int, mean: Sequence[float], threads: int):
        """`policy` in timm's words, such as rand-m9-mstd0.5-inc1. `mean`: of red, green, blue in 0..1, the colour of
        what comes in from outside. Raises UserError: no policy, or no timm."""
        self.seed, self._drawn = seed, threading.local()
        self._transform = _transform(policy, size, mean, self._drawn)
        self._pool = ThreadPoolExecutor(threads, "megamug-augment")

    def __call__(self, pixels: torch.Tensor, epochs: np.ndarray, indices: np.ndarray) -> torch.Tensor:
        import torch

        images = pixels.cpu().numpy().transpose(0, 2, 3, 1)
        words = random_words(self.seed, "rand augment", epochs, indices, 4)
        found = np.stack(list(self._pool.map(self._augmented, images, words)))
        return torch.from_numpy(np.ascontiguousarray(found.transpose(0, 3, 1, 2))).to(pixels.device)

    def _augmented(self, image: np.ndarray, words: np.ndarray) -> np.ndarray:
        """[S, S, 3] -> [S, S, 3]; `words`: 128 random bits."""
        from PIL import Image

        self._drawn.random, self._drawn.numpy = generators(words)
        return np.asarray(self._transform(Image.fromarray(np.ascontiguousarray(image))))


def generators(words: np.ndarray) -> tuple[random.Random, np.random.RandomState]:
    """What `random` and `numpy.random` are for an image, from its uint32 words [4]."""
    return random.Random(words.tobytes()), np.random.RandomState(words)


def check(policy: str) -> None:
    """Raises UserError where `policy` is none, or timm is not installed."""
    _transform(policy, 224, (0.5, 0.5, 0.5), threading.local())


class _OfThread:
    """The functions of this thread's generator of a name."""

    def __init__(self, drawn: threading.local, name: str):
        self._drawn, self._name = drawn, name

    def __getattr__(self, function: str) -> Callable:
        return getattr(getattr(self._drawn, self._name), function)


def _transform(policy: str, size: int, mean: Sequence[float], drawn: threading.local) -> Callable:
    if not POLICY.fullmatch(policy):
        raise UserError(f"classifier.rand_augment({policy}) is no policy of RandAugment; write it as timm does: rand,"
                        " then -m (magnitude), -n (operations), -p (chance of each), -mstd, -mmax or -inc, each with a"
                        " number; MAE's is rand-m9-mstd0.5-inc1")
    found = importlib.util.find_spec("timm")
    if found is None:
        raise UserError(f"classifier.rand_augment({policy}) is computed by timm, which is not installed; run:"
                        " pip install timm (or pip install -e '.[eval]' in the checkout), or set"
                        " classifier.rand_augment=null")  # fmt: skip
    path = Path(found.submodule_search_locations[0]) / _PLACE
    spec = importlib.util.spec_from_file_location("megamug_auto_augment", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make, _ = module.rand_augment_transform, (module.random, module.np)
    except (OSError, ImportError, AttributeError) as error:
        raise UserError(f"classifier.rand_augment({policy}): {path} is not what megamug knows of timm ({error}); run:"
                        " pip install 'timm>=1.0'") from None  # fmt: skip
    module.random = _OfThread(drawn, "random")
    module.np = types.SimpleNamespace(**{**vars(np), "random": _OfThread(drawn, "numpy")})
    # As timm's `create_transform` and MAE's `build_transform` call it.
    return make(policy, {
        "translate_const": int(size * _TRANSLATION), "img_mean": tuple(min(255, round(255 * m)) for m in mean),
        "interpolation": module.Image.Resampling.BICUBIC,
    })  # fmt: skip

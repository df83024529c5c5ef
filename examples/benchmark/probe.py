"""The linear probe's search for C against scikit-learn's LogisticRegression: processor time, and the losses reached.

    python examples/benchmark/probe.py [--images 10000] [--width 768] [--classes 9 100] [--tolerance 1e-6]

Features are drawn with the spectrum of an encoder's (standard deviations fall as a power of their rank; classes differ
by less than a deviation), standardised, in float64. Both go through the same values of C from the smallest, each from
the minimum before (`warm_start`), on the same four fifths of the images. One thread each (OMP_NUM_THREADS=1) gives
processor times that other work on the machine disturbs least.
"""

from __future__ import annotations

import time

import torch
from torch.nn.functional import cross_entropy

from megamug.command_line.arguments import COUNT, Parser, Range, number
from megamug.command_line.tool import run_tool
from megamug.errors import UserError
from megamug.transfer import logistic


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--images", type=COUNT, default=10_000)
    parser.add_argument("--width", type=COUNT, default=768)
    parser.add_argument("--classes", type=COUNT, nargs="+", default=[9, 100])
    parser.add_argument("--tolerance", type=number(float, Range(0, open_low=True)), default=1e-6,
                        help="scikit-learn's tol (default %(default)s)")  # fmt: skip
    options = parser.parse_args()
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise UserError("scikit-learn is not installed here; pip install scikit-learn") from None
    logistic.fit(*drawn(50, 4, 2), 1.0)  # what is loaded at first use
    for classes in options.classes:
        features, labels = drawn(options.images, options.width, classes)
        started = time.process_time()
        problem = logistic._Problem(features, labels, classes, True, torch.float64)
        probes, probe = {}, None
        for strength in logistic.STRENGTHS:
            probe = probes[strength] = problem.minimum(strength, probe)
        ours = time.process_time() - started
        started = time.process_time()
        x = ((features.double() - probe.mean) / probe.deviation).numpy()
        model, models = LogisticRegression(tol=options.tolerance, max_iter=10_000, warm_start=True), {}
        for strength in logistic.STRENGTHS:
            model.set_params(C=strength).fit(x, labels.numpy())
            models[strength] = model.coef_.copy(), model.intercept_.copy()
        theirs = time.process_time() - started
        print(f"{len(features)} images x {options.width}, {classes} classes: megamug {ours:.1f} s, scikit-learn"
              f" {theirs:.1f} s, {theirs / ours:.2f} times", flush=True)  # fmt: skip
        for strength, (weight, bias) in models.items():
            weight, bias = torch.from_numpy(weight), torch.from_numpy(bias)
            loss = cross_entropy(torch.from_numpy(x) @ weight.T + bias, labels)
            loss = float(loss + weight.square().sum() / (2 * strength * len(x)))
            mine = probes[strength].loss
            print(f"  C {strength:<8g}loss {mine:.9f}, scikit-learn's {loss - mine:+.1e}", flush=True)


def drawn(images: int, width: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four fifths of so many features, float32 [n, width], and labels [n]."""
    generator = torch.Generator().manual_seed(0)
    deviations = torch.arange(1, width + 1).double() ** -0.7
    directions, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    labels = torch.randint(0, classes, (images * 4 // 5,), generator=generator)
    centres = 0.2 * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    return ((noise + centres[labels]) * deviations @ directions.T).float(), labels


if __name__ == "__main__":
    run_tool(main)

"""Which values the options of writing may have, on the command line and in Python."""

from __future__ import annotations

from collections.abc import Callable

from megamug.errors import UserError


def flag(name: str) -> str:
    """The option of the command line: `--top-p`."""
    return "--" + name.replace("_", "-")


def check(kind: str, values: dict[str, float | None], called: Callable[[str], str] = flag) -> None:
    """Raises UserError for a value (None: not given) out of its range; `called` gives an option's name in the message.
    `kind`: of the model."""
    positive, count = (lambda x: 0 < x < float("inf"), "above 0"), (lambda x: x >= 1, "at least 1")
    ranges = {
        "mask_ratio": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
        "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
        "temperature": positive if kind == "mug" else (lambda x: 0 <= x < float("inf"), "at least 0"),
        "max_images": (lambda x: x >= 0, "at least 0"),
        "max_tokens": count, "guidance": positive, "contrastive": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
        "contrastive_top_k": count, "samples": count, "seed": (lambda x: 0 <= x < 2**32, "at least 0 and below 2**32"),
    }  # fmt: skip
    for name, value in values.items():
        allowed, wanted = ranges[name]
        if value is not None and not allowed(value):
            raise UserError(f"{called(name)} is {value:g}; it must be {wanted}")

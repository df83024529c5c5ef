"""What all command lines share: a parser whose complaints are sentences, and types of values that say what they allow.

    parser = Parser(description=__doc__)
    parser.add_argument("--workers", type=COUNT)
    parser.add_argument("--device", type=device, default="cpu")
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megamug.durable import folder_problem
from megamug.errors import UserError

DEFAULTS = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}


@dataclass(frozen=True)
class Range:
    """Allowed numbers: [low, high], or without its ends where they are open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        return above and (x < self.high if self.open_high else x <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {f'below {self.high:g}' if self.open_high else f'at most {self.high:.16g}'}"


class Parser(argparse.ArgumentParser):
    """Errors are a `UserError` of one sentence, not a usage text; options are not abbreviated; `~` in a `Path` is the
    home folder, as it is to a shell that sees it without quotes."""

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **{**DEFAULTS, **settings})
        self.register("type", Path, any_path)  # what argparse calls in place of Path itself

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def number(kind: type, allowed: Range) -> Callable[[str], float]:
    """A `type` for argparse: a finite number of `kind` (int or float) in the range `allowed`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{wanted} wanted, found {text!r}") from None
        if value not in allowed or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} must be {allowed}")
        return value

    return parse


COUNT, FROM_ZERO = number(int, Range(1)), number(int, Range(0))


def expand_home(text: str) -> str:
    """A path with the `~` or `~user` at its start written out.

    Raises UserError where there is no such user, and no file of that name either: a folder `~user` would be made here.
    """
    expanded = os.path.expanduser(text)
    if expanded[:1] == "~" and not os.path.lexists(expanded):
        user = text.partition("/")[0]
        raise UserError(f"{text}: {user} is the home folder of no user here; write ./{text} for a name in this folder")
    return expanded


def any_path(text: str) -> Path:
    """A `type` for argparse, which `Parser` takes `Path` for: see `expand_home`."""
    try:
        return Path(expand_home(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output_folder(text: str) -> Path:
    """A `type` for argparse: a folder that is there or can be made, and written into."""
    path = any_path(text)
    if problem := folder_problem(path):
        raise argparse.ArgumentTypeError(f"{problem}; name another folder")
    return path


def output_file(text: str) -> Path:
    """A `type` for argparse: a file that can be written, in a folder that is there or can be made."""
    path = any_path(text)
    problem = f"{path} is a folder" if path.is_dir() else folder_problem(path.parent)
    if problem:
        raise argparse.ArgumentTypeError(f"{problem}; name another file")
    return path


def new_file(text: str) -> Path:
    """A `type` for argparse: a file that can be written when the work is done, in a folder that is there."""
    path = any_path(text)
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not a file in a folder that exists; name one")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} is not writable by this user; name another file")
    return path


def device(text: str) -> str:
    """A `type` for argparse: `cpu`, `cuda` or `cuda:N` where torch sees that GPU. Touches none."""
    if text == "cpu":
        return text
    match = re.fullmatch(r"cuda(?::(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; give cpu, cuda or cuda:N")
    import torch

    gpus = torch.cuda.device_count()
    if int(match[1] or 0) >= gpus:
        seen = f"{gpus} GPUs" if gpus else "no GPU"
        raise argparse.ArgumentTypeError(f"{text}: torch sees {seen} on this machine; give cpu, or see megamug doctor")
    return text


def typed_command() -> str:
    """The command line of this process, as one can type it again."""
    program = Path(sys.argv[0])
    ours = program.name == "megamug" or program.parts[-2:] == ("megamug", "__main__.py")
    return shlex.join([*(["megamug"] if ours else ["python", sys.argv[0]]), *sys.argv[1:]])

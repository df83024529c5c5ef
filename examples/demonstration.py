"""What the demos share: commands of the project, shown and run, and the number format for this machine."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def show(words: list[str]) -> None:
    """The command line `python WORDS`, as one would type it in the demo's folder."""
    shown = [os.path.relpath(w, ROOT) if w.startswith(str(ROOT)) else w for w in words]
    print("\n$ python " + " ".join(f'"{w}"' if " " in w else w for w in shown), flush=True)


def run(*arguments: str | Path) -> None:
    """One command of the project, shown and run in the demo's folder; its failure ends the demo."""
    words = [str(a) for a in arguments]
    show(words)
    code = subprocess.run([sys.executable, *words], check=False).returncode
    if code:
        raise SystemExit(code)


def look(*arguments: str | Path, quiet: bool = True) -> None:
    """`python -m megamug` of a command, shown and run in this process: its imports would take longer than it does.
    `quiet`: what it prints on stdout is in files, too, and is left out.
    """
    from megamug.cli import main

    words = [str(a) for a in arguments]
    show(["-m", "megamug", *words])
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        code = main(words)
    if code:
        raise SystemExit(code)


def precision() -> str:
    """bf16 where this machine multiplies it faster than fp32 (a GPU, AVX-512 BF16 or AMX), else fp32."""
    import torch

    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"

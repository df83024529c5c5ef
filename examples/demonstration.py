"""What the demos share: commands of the project, shown and run, and the number format for this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str | Path, quiet: bool = False) -> None:
    """One command of the project, shown and run in the demo's folder; its failure ends the demo.

    `quiet`: what it prints is in files, too, and is not shown.
    """
    words = [str(a) for a in arguments]
    shown = [os.path.relpath(w, ROOT) if w.startswith(str(ROOT)) else w for w in words]
    print("\n$ python " + " ".join(f'"{w}"' if " " in w else w for w in shown), flush=True)
    stdout = subprocess.DEVNULL if quiet else None
    code = subprocess.run([sys.executable, *words], check=False, stdout=stdout).returncode
    if code:
        raise SystemExit(code)


def precision() -> str:
    """bf16 where this machine multiplies it faster than fp32 (a GPU, AVX-512 BF16 or AMX), else fp32."""
    import torch

    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"

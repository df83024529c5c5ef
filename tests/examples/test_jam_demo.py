"""`make demo-jam` from nothing to the document, small: every command of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from megamug.data.demo.documents import instruction_document
from megamug.data.demo.scenes import render
from megamug.data.random import uniform
from tests.distributed.launch import environment

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_runs_to_the_document(tmp_path):
    words = [sys.executable, str(ROOT / "examples/jam/demo.py"), "--folder", str(tmp_path), "--quick"]
    result = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    rows = re.findall(r"^  (parent: \w+|JAM-\w+, \w+)((?: +\d+\.\d\d){3})$", result.stdout, flags=re.MULTILINE)
    assert [name for name, _ in rows] == [
        "parent: text", "parent: image_text", "JAM-Uniform, fused", "JAM-Uniform, trained", "JAM-Width, fused",
        "JAM-Width, trained", "JAM-Cross, fused", "JAM-Cross, trained",
    ]  # fmt: skip
    page = Path(re.search(r"Read\s+(\S+)", result.stdout)[1])
    assert "draw this" in page.read_text()  # a model of two steps may end before it draws
    table = json.loads((tmp_path / "perplexities.json").read_text())
    assert all(figure > 1 for row in table.values() for figure in row.values())
    followed = json.loads((tmp_path / "followed.json").read_text())
    assert len(followed) == 4 and all(0 <= share <= 1 for share in followed.values())
    assert len(json.loads((tmp_path / "judged/document.json").read_text())["documents"]) == 3
    assert "UserWarning" not in result.stderr  # of packages that are optional here


def test_what_follows_an_instruction(tmp_path, monkeypatch):
    """Texts and pictures as asked are right; each change of one of them is found where it is, and nowhere else."""
    monkeypatch.syspath_prepend(str(ROOT / "examples/jam"))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import demo

    layout, choices = uniform(3, "layout", 0, np.arange(1), 48)[0], uniform(3, "choices", 0, np.arange(1), 32)[0]
    segments, scenes = instruction_document(layout, choices, tidy=True)
    for name, scene in zip(("one.png", "two.png"), scenes, strict=True):
        Image.fromarray(render(scene, layout, np.zeros((7, 7)), 32)).save(tmp_path / name)
    prompt, first, then = (segment["text"] for segment in segments if "text" in segment)

    def verdict(*parts: str) -> list[bool]:
        written = [{"image": part} if part.endswith(".png") else {"text": part} for part in parts]
        return demo.follows({"segments": written}, prompt, first, then, tmp_path)

    whole = f"{prompt} {first}"
    assert verdict(whole, "one.png", then, "two.png") == [True, True, True, True]
    assert verdict(prompt, "one.png", then, "two.png") == [False, True, True, True]
    assert verdict(whole, "one.png", first, "two.png") == [True, False, True, True]
    assert verdict(whole, "two.png", then, "two.png") == [True, True, False, True]
    assert verdict(whole, "one.png", then, "one.png") == [True, True, True, False]
    assert verdict(whole) == [True, False, False, False]

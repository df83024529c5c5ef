"""`make demo-jam` from nothing to the document, small: every command of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

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

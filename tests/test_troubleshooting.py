"""Every message of docs/troubleshooting.md is one that the program can say; links of the how-tos lead somewhere."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = ["launching", "layouts", "precision", "troubleshooting"]


def text_of(node: ast.AST) -> str | None:
    """A string of the source, with … for each value that is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-.\d]*[sdrfg]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


@cache
def sentences() -> list[str]:
    """Every string of the package."""
    found = []
    for path in sorted((ROOT / "megamug").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = text_of(node)
            if text and len(text) > 10:
                found.append(re.sub("…+", "…", text))
    return found


def messages() -> list[str]:
    """First column of the tables, below the table of exit codes."""
    return re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)


def is_said(message: str) -> bool:
    return any(message in sentence for sentence in sentences())


def test_there_are_messages_and_an_invented_one_is_found_out():
    assert len(messages()) > 50
    assert not is_said("the flux capacitor is not charged")


@pytest.mark.parametrize("message", messages())
def test_a_message_is_one_that_the_program_says(message):
    assert is_said(message), f"nothing in megamug/ says: {message}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (DOCS / f"{page}.md").read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
        assert (DOCS / link).exists(), f"docs/{page}.md links {link}"
    for named in re.findall(r"examples/[\w/]+\.(?:yaml|sh)|tools/\w+\.py", text):
        assert (ROOT / named).exists(), f"docs/{page}.md names {named}"
    assert page == "launching" or f"({page}.md)" in (DOCS / "launching.md").read_text()


def test_keys_that_the_pages_name_exist():
    from megamug.configuration.reading import keys

    sections = {key.partition(".")[0] for key in keys() if "." in key}
    for page in PAGES:
        text = (DOCS / f"{page}.md").read_text()
        for section, key in re.findall(r"`(\w+)\.(\w+)(?==|`)", text):
            assert section not in sections or f"{section}.{key}" in keys(), f"docs/{page}.md: {section}.{key}"

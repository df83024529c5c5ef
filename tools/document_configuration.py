"""Writes docs/configuration.md from the configuration dataclasses and the comments beside their keys.

    python tools/document_configuration.py [--check]
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from megamug.command_line.arguments import Parser  # noqa: E402
from megamug.command_line.tool import run_tool  # noqa: E402
from megamug.configuration.presets import BY_KIND, DEFAULT, PRESETS, TOWERS  # noqa: E402
from megamug.configuration.sections import Config  # noqa: E402

HEAD = """# Configuration

<!-- Written by `python tools/document_configuration.py` from megamug/configuration/sections.py: edit there. -->

```
megamug train CONFIG.yaml [section.key=value ...]
```

The YAML file holds the sections below; an override wins over the file, and the last override of a key wins. Reading is
strict: an unknown key, a key given twice, or a value of another type ends with a sentence and exit code 2 before any
process group exists. `null` stands for "not set". What comes out is written to `RUN/config.yaml`.
"""


def document() -> str:
    """The Markdown text."""
    default = Config()
    text = HEAD + _table("Top level", Config, default, "")
    for entry in fields(Config):
        section = getattr(default, entry.name)
        if is_dataclass(section):
            text += _table(f"`{entry.name}`", type(section), section, f"{entry.name}.")
    return text + _presets()


def _table(title: str, kind: type, default: object, prefix: str) -> str:
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(kind), re.MULTILINE))
    rows = [f"\n## {title}\n\n{inspect.cleandoc(kind.__doc__)}\n\n"]
    rows.append("| key | type | default | meaning |\n|---|---|---|---|\n")
    for entry in fields(kind):
        value = getattr(default, entry.name)
        if is_dataclass(value):
            continue
        assert entry.name in comments, f"{kind.__name__}.{entry.name} has no comment that says what it means"
        assert entry.default is not MISSING or entry.default_factory is not MISSING
        shown = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
        cells = (f"`{prefix}{entry.name}`", f"`{entry.type}`", f"`{shown}`", comments[entry.name])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(rows).replace("None", "null").replace("Sources", "str \\| list[dict]")


def _presets() -> str:
    """The sizes that each preset fills in."""
    text = "\n## Presets\n\n`model.preset` fills the keys left at `null`; what it is by default:"
    text += "".join(f" `{preset}` for `{kind}`," for kind, preset in DEFAULT.items())[:-1] + ".\n"
    text += "\n### `kind: mug`: section `model`\n\n" + _sizes(PRESETS)
    text += "\n### `kind: classifier` and `segmenter`: section `model`\n\n"
    text += "The same names, and only the sizes of the encoder.\n"
    text += "\n### `kind: decoder_lm`: section `lm`\n\n" + _sizes(TOWERS)
    text += "\n### `kind: jam_cross`: sections `text_tower` and `image_tower`\n\n| preset | towers |\n|---|---|\n"
    for name, sections in BY_KIND["jam_cross"].items():
        towers = [next(n for n, sizes in TOWERS.items() if sizes == tower) for tower in sections.values()]
        text += f"| `{name}` | " + ", ".join(f"`{tower}`" for tower in towers) + " |\n"
    return text


def _sizes(presets: dict[str, dict]) -> str:
    rows = ["| key | " + " | ".join(presets) + f" |\n|---|{'---|' * len(presets)}\n"]
    for name in next(iter(presets.values())):
        shown = (preset[name] for preset in presets.values())
        cells = (str(x).lower() if isinstance(x, bool) else str(x) for x in shown)
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |\n")
    return "".join(rows)


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is out of date")
    options = parser.parse_args(argv)
    page, text = ROOT / "docs" / "configuration.md", document()
    if options.check:
        return int(not page.is_file() or page.read_text(encoding="utf-8") != text)
    page.parent.mkdir(exist_ok=True)
    page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_tool(lambda: sys.exit(main(sys.argv[1:])))

"""Real drawings with captions and labels: shards of emoji in two styles, from three npm packages.

    npm pack emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    python examples/transfer/emoji.py FOLDER_OF_THE_PACKED_TGZ emoji/

Writes {train,heldout}-{noto,fluent}.tar: KEY.png or KEY.webp, and KEY.json with caption (English name and tags) and
label (the group, 0..8). Skin tones are left out. One emoji in six is held out, in both styles, by the SHA-256 of its
code. Licences: Noto images Apache-2.0, Fluent images MIT, names MIT.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megamug.command_line.arguments import Parser, output_folder  # noqa: E402
from megamug.command_line.tool import run_tool  # noqa: E402
from megamug.data.shards.tar_writer import write_members  # noqa: E402
from megamug.errors import UserError  # noqa: E402

SKIN_TONES = 2  # the group of parts that other emoji are made of
STYLES = {  # archive, folder in it, ending of the images
    "noto": ("emoji-datasource-google-*.tgz", "/img/google/64/", "png"),
    "fluent": ("lobehub-fluent-emoji-3d-*.tgz", "/assets/", "webp"),
}


def opened(folder: Path, pattern: str) -> tarfile.TarFile:
    """The newest archive of that name. Raises UserError where there is none."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"{folder} has no {pattern}; get it by the first command of `{Path(__file__).name} --help`")
    return tarfile.open(found[-1])


def code_of(hexcode: str) -> str:
    """Files and names differ in whether they write the variation selector."""
    return hexcode.lower().replace("-fe0f", "")


def pictures(folder: Path, pattern: str, inside: str) -> dict[str, bytes]:
    with opened(folder, pattern) as archive:
        members = [m for m in archive if m.isfile() and inside in m.name]
        return {code_of(Path(m.name).stem): archive.extractfile(m).read() for m in members}


def described(folder: Path) -> dict[str, dict]:
    """{code: what stands in its .json}"""
    with opened(folder, "emojibase-data-*.tgz") as archive:
        entries = json.load(archive.extractfile("package/en/data.json"))
        names = json.load(archive.extractfile("package/meta/groups.json"))["groups"]
    groups = [int(group) for group in sorted(names, key=int) if int(group) != SKIN_TONES]
    found = {}
    for entry in entries:
        if entry.get("group") in groups:
            tags = [tag for tag in entry.get("tags", []) if tag not in entry["label"]]
            caption = entry["label"] + (f": {', '.join(tags)}" if tags else "")
            label, group = groups.index(entry["group"]), names[str(entry["group"])]
            found[code_of(entry["hexcode"])] = {"caption": caption, "label": label, "group": group}
    return found


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="FOLDER", type=Path)
    parser.add_argument("output", metavar="OUTPUT", type=output_folder)
    options = parser.parse_args()
    texts = described(options.source)
    for style, (pattern, inside, ending) in STYLES.items():
        images = pictures(options.source, pattern, inside)
        sets: dict[str, list[tuple[str, bytes]]] = {"train": [], "heldout": []}
        for code in sorted(texts.keys() & images.keys()):
            chosen = "heldout" if hashlib.sha256(code.encode()).digest()[0] % 6 == 0 else "train"
            text = json.dumps(texts[code], ensure_ascii=False).encode()
            sets[chosen] += [(f"{code}-{style}.{ending}", images[code]), (f"{code}-{style}.json", text)]
        options.output.mkdir(parents=True, exist_ok=True)
        for name, members in sets.items():
            write_members(options.output / f"{name}-{style}.tar", members)
            print(f"{options.output / f'{name}-{style}.tar'}: {len(members) // 2:,} drawings")


if __name__ == "__main__":
    run_tool(main)

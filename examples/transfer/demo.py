"""What an encoder learns from pixels, from captions, and from both: real drawings, probed on classes it was never told.

    python examples/transfer/demo.py [--folder demo-real] [--data FOLDER] [--seeds 3] [section.key=value ...]

`make demo-real` runs it. FOLDER holds train-*.tar and heldout-*.tar of images with `caption` and `label`, which
examples/transfer/emoji.py makes (default: $MEGAMUG_EMOJI, else ../shared/data/emoji beside the repository). It is one
`megamug study`: for each seed three encoders, held against one another and against none by k-NN and a linear probe;
and pictures of what the encoder takes for alike.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from demonstration import ROOT, look, precision, run  # noqa: E402

from megamug.command_line.arguments import COUNT, Parser, output_folder  # noqa: E402
from megamug.command_line.tool import run_tool  # noqa: E402
from megamug.configuration.reading import load_config  # noqa: E402
from megamug.errors import UserError  # noqa: E402

CONFIG = ROOT / "examples" / "transfer" / "demo.yaml"
VARIANTS = ROOT / "examples" / "transfer" / "studies" / "objectives.yaml"
SHOWN = 8  # held-out drawings with their neighbours


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--folder", type=output_folder, default=ROOT / "demo-real")
    parser.add_argument("--data", type=Path, default=os.environ.get("MEGAMUG_EMOJI"), metavar="FOLDER")
    parser.add_argument("--seeds", type=COUNT, default=3, help="trainings of each kind (default %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to demo.yaml")
    options = parser.parse_args()
    load_config(CONFIG, options.overrides)  # a mistake in them is told before anything is made
    source = Path(options.data or ROOT.parent / "shared" / "data" / "emoji").resolve()
    shards = {split: sorted(source.glob(f"{split}-*.tar")) for split in ("train", "heldout")}
    if not all(shards.values()):
        raise UserError(
            f"{source} has no train-*.tar and heldout-*.tar: make them with examples/transfer/emoji.py, whose --help"
            " says from what, and name their folder by --data or MEGAMUG_EMOJI"
        )
    started, folder = time.monotonic(), options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    for split, paths in shards.items():  # an index lies beside its shard: links, where the shards may not be written to
        (folder / "data" / split).mkdir(parents=True, exist_ok=True)
        for path in paths:
            link = folder / "data" / split / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(path)
    run("-m", "megamug", "data", "index", "data/train", "data/heldout")
    if not Path("tokenizer.model").exists():
        run("-m", "megamug", "data", "tokenizer", "data/train", "--output", "tokenizer.model", "--vocab-size", "1000")
    # whole drawings are seen: their rim belongs to them
    look("study", "custom", CONFIG, "--variants", VARIANTS, "--data", "data/train", "--test", "data/heldout",
         "--output", "study", "--seeds", str(options.seeds), "--features", "mean", "--view", "1", "--keep-features",
         f"precision.dtype={precision()}", *options.overrides, quiet=False)  # fmt: skip
    look("evaluate", "study/runs/both-seed1", "--task", "reconstruction", "--data", "data/heldout", "--samples", "64")
    neighbours(folder / "neighbours.png")
    reconstruction = next((folder / "study/runs/both-seed1/evaluate").glob("step-*/*.png"))
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Look at")
    for picture in (folder / "study/report.png", folder / "neighbours.png", reconstruction):
        print(f"  {picture}")


def neighbours(path: Path) -> None:
    """Held-out drawings, and which training drawings lie nearest by the untrained and by the trained encoder."""
    import io

    import numpy as np
    from PIL import Image
    from torch.nn.functional import normalize

    from megamug.data.dali import opaque
    from megamug.data.shards.sources import resolve_sources
    from megamug.telemetry.pictures import PictureRow, save_grid
    from megamug.transfer import stored

    def drawing(split: str, row: int):
        shard, place = sources[split].locate(row)
        with Image.open(io.BytesIO(opaque(shard.image_bytes(place)))) as picture:
            return np.array(picture.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC))

    sources = {split: resolve_sources(f"data/{split}")[0] for split in ("train", "heldout")}
    columns, near, features = ["held out"], [], "study/features"
    for name in ("untrained", "both"):
        train, test = (stored.read(f"{features}/{name}-seed1-{split}.safetensors") for split in ("train", "test"))
        if (len(train), len(test)) != tuple(map(len, sources.values())):
            raise UserError("some drawings were left out, so rows are not drawings: index data/ again, see above")
        rows = [len(test) * i // SHOWN for i in range(SHOWN)]
        similar = normalize(test.tensors["mean"][rows]) @ normalize(train.tensors["mean"]).T
        near.append(similar.topk(3).indices.tolist())
        columns += [f"{name}: {place}" for place in ("nearest", "second", "third")]
    lines = Path(f"{features}/both-seed1-test.jsonl").read_text().splitlines()
    captions = [json.loads(line)["caption"] for line in lines]
    pictures = [
        PictureRow([drawing("heldout", row), *(drawing("train", other) for found in near for other in found[i])],
                   [captions[row]])
        for i, row in enumerate(rows)
    ]  # fmt: skip
    save_grid(pictures, columns, path)


if __name__ == "__main__":
    run_tool(main)

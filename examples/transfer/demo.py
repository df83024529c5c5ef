"""What an encoder learns from pixels, from captions, and from both: real drawings, probed on classes it was never told.

    python examples/transfer/demo.py [--folder demo-real] [--data FOLDER] [--seeds 3] [section.key=value ...]

`make demo-real` runs it. FOLDER holds train-*.tar and heldout-*.tar of images with `caption` and `label`, which
examples/transfer/emoji.py makes (default: $MEGAMUG_EMOJI, else ../shared/data/emoji beside the repository). For each
seed three encoders are trained: on the pixels of hidden patches, on captions, on both. Their features and those of the
untrained encoder go through k-NN and a linear probe; at its end it says which differences are more than chance.
"""

from __future__ import annotations

import json
import math
import os
import statistics
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
OBJECTIVES = {
    "pixels": ["model.caption_loss_weight=0"], "captions": ["model.image_loss_weight=0"], "both": [],
}  # fmt: skip
UNTRAINED = "untrained"
FEATURE, NEIGHBOURS = "mean", 20
SHOWN = 8  # held-out drawings with their neighbours
CERTAIN = 2.0  # standard errors


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
    dtype = precision()
    figures: dict[str, list[dict]] = {}
    for seed in range(1, options.seeds + 1):
        for name, keys in OBJECTIVES.items():
            look("train", CONFIG, f"run_dir={name}-{seed}", f"seed={seed}", f"precision.dtype={dtype}", *keys,
                 *options.overrides, quiet=False)  # fmt: skip
            figures.setdefault(name, []).append(probed(f"{name}-{seed}", name, seed))
        figures.setdefault(UNTRAINED, []).append(probed(f"both-{seed}", UNTRAINED, seed, "--untrained"))
    look("evaluate", "both-1", "--task", "reconstruction", "--data", "data/heldout", "--samples", "64")
    neighbours(folder / "neighbours.png")
    report(folder, figures, time.monotonic() - started)


def probed(run_dir: str, name: str, seed: int, *words: str) -> dict:
    """Extracts features of both sets and returns what the probes find."""
    files = {split: f"features/{name}-{seed}-{split}.safetensors" for split in ("train", "heldout")}
    for split, file in files.items():
        # whole drawings are seen: their rim belongs to them
        look("features", run_dir, "--data", f"data/{split}", "--output", file, "--share", "1", *words)
    output = f"features/{name}-{seed}.json"
    look("probe", files["train"], "--test", files["heldout"], "--features", FEATURE, "--k", str(NEIGHBOURS),
         "--output", output)  # fmt: skip
    found = json.loads(Path(output).read_text())["results"][FEATURE]
    return {"linear": found["linear"]["top1"], "knn": found["knn"][str(NEIGHBOURS)]["top1"]}


def spread(values: list[float]) -> tuple[float, float]:
    """(mean, standard error of the mean); the latter is infinite for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.mean(values), error


def verdict(one: list[float], other: list[float]) -> str:
    """Whether `one` is better or worse than `other` by more than chance, else how many seeds would tell."""
    (a, error_a), (b, error_b) = spread(one), spread(other)
    error = math.hypot(error_a, error_b)
    words = f"{100 * (a - b):+.1f} points, standard error {100 * error:.1f}"
    if not math.isfinite(error):
        return f"{100 * (a - b):+.1f} points; one seed does not tell how much of that is chance"
    if abs(a - b) > CERTAIN * error:
        return f"{words}: {'better' if a > b else 'worse'}"
    if a == b:
        return f"{words}: no difference"
    seeds = math.ceil(len(one) * (CERTAIN * error / (a - b)) ** 2)
    return f"{words}: not told from chance; a difference of this size would take about {seeds} seeds"


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
    columns, near = ["held out"], []
    for name in (UNTRAINED, "both"):
        train, test = (stored.read(f"features/{name}-1-{split}.safetensors") for split in ("train", "heldout"))
        if (len(train), len(test)) != tuple(map(len, sources.values())):
            raise UserError("some drawings were left out, so rows are not drawings: index data/ again, see above")
        rows = [len(test) * i // SHOWN for i in range(SHOWN)]
        similar = normalize(test.tensors[FEATURE][rows]) @ normalize(train.tensors[FEATURE]).T
        near.append(similar.topk(3).indices.tolist())
        columns += [f"{name}: {place}" for place in ("nearest", "second", "third")]
    captions = [json.loads(line)["caption"] for line in Path("features/both-1-heldout.jsonl").read_text().splitlines()]
    pictures = [
        PictureRow([drawing("heldout", row), *(drawing("train", other) for found in near for other in found[i])],
                   [captions[row]])
        for i, row in enumerate(rows)
    ]  # fmt: skip
    save_grid(pictures, columns, path)


def report(folder: Path, figures: dict[str, list[dict]], seconds: float) -> None:
    """The table, which differences are more than chance, and where the pictures are."""
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    count = len(next(iter(figures.values())))
    print(f"\nDone in {seconds / 60:.1f} minutes. Classes of drawings that no encoder saw, right answers in %, mean and"
          f" standard error over {count} seeds:\n")  # fmt: skip
    print(f"  {'learned from':<14}{'linear probe':>18}{f'k-NN, k {NEIGHBOURS}':>18}")
    for name in (UNTRAINED, *OBJECTIVES):
        cells = []
        for method in ("linear", "knn"):
            mean, error = spread([found[method] for found in figures[name]])
            cells.append(f"{100 * mean:.1f}" + (f" +- {100 * error:.1f}" if math.isfinite(error) else ""))
        print(f"  {name:<14}{cells[0]:>18}{cells[1]:>18}")
    print("\nBy the linear probe:")
    pairs = [(name, UNTRAINED) for name in OBJECTIVES] + [("both", "pixels"), ("both", "captions")]
    for one, other in pairs:
        told = verdict(*([found["linear"] for found in figures[name]] for name in (one, other)))
        print(f"  {f'{one} against {other}':<28}{told}")
    reconstruction = next((folder / "both-1" / "evaluate").glob("step-*/*.png"))
    print(f"\nLook at  {folder / 'neighbours.png'}\n         {reconstruction}")


if __name__ == "__main__":
    run_tool(main)

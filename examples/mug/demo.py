"""MUG from nothing: makes images and captions, trains on them, repaints and captions images it never saw.

    python examples/mug/demo.py [--folder demo] [--train 20000] [--heldout 512] [section.key=value ...]

`make demo` runs it. Everything is written below the folder; started again, it goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from demonstration import ROOT, precision, run  # noqa: E402

from megamug.command_line.arguments import COUNT, Parser, output_folder  # noqa: E402
from megamug.command_line.tool import run_tool  # noqa: E402
from megamug.configuration.reading import load_config  # noqa: E402


def figures(folder: Path, task: str) -> dict:
    """The newest figures that `megamug evaluate` wrote."""
    return json.loads(sorted((folder / "run" / "evaluate").glob(f"step-*/{task}.json"))[-1].read_text())


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--folder", type=output_folder, default=ROOT / "demo")
    parser.add_argument("--train", type=COUNT, default=20000, help="scenes to train on")
    parser.add_argument("--heldout", type=COUNT, default=512, help="scenes to look at afterwards")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to examples/mug/demo.yaml")
    options = parser.parse_args()
    tools, config = ROOT / "tools", ROOT / "examples" / "mug" / "demo.yaml"
    load_config(config, options.overrides)  # a mistake in them is told before minutes of rendering
    started, folder = time.monotonic(), options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    run(tools / "make_demo_data.py", "data", "--train", str(options.train), "--heldout", str(options.heldout))
    if not Path("tokenizer.model").exists():
        run(tools / "train_tokenizer.py", "data/train", "--output", "tokenizer.model", "--vocab-size", "384")
    dtype = precision()
    print("\nbf16: this machine has products for it" if dtype == "bf16" else "\nfp32: this CPU has no bf16 products",
          flush=True)  # fmt: skip
    run("-m", "megamug", "train", config, f"precision.dtype={dtype}", *options.overrides)
    for task in ("reconstruction", "captioning"):
        run("-m", "megamug", "evaluate", "run", "--task", task)
    report(folder, time.monotonic() - started)


def report(folder: Path, seconds: float) -> None:
    """The figures, what they mean, and where the pictures are."""
    pixels, captions = figures(folder, "reconstruction"), figures(folder, "captioning")
    masked, whole = captions["masked"], captions["all_visible"]
    share = 1 - pixels["masked_patches"] / pixels["patches"]
    print(f"\nDone in {seconds / 60:.1f} minutes. On {pixels['samples']} images that the model never saw:\n")
    rows = [
        ("painted from a quarter of the patches", f"{pixels['ratio']:.2f}",
         "pixel error on hidden patches, times that of painting them in the visible patches' mean colour"),
        ("captions exactly right", f"{whole['exact_match']:.0%}", "all patches visible, greedy"),
        ("", f"{masked['exact_match']:.0%}", f"{share:.0%} of the patches visible"),
        ("caption loss", f"{whole['caption_loss']:.2f}", "nat a token with the right image"),
        ("", f"{whole['caption_loss_other_image']:.2f}", "with another image: the caption is read from the image"),
    ]
    for what, figure, meaning in rows:
        print(f"  {what:<38} {figure:>6}  {meaning}")
    print(f"\nLook at  {folder / pixels['pictures'][0]}\n         (original | visible | reconstruction, with "
          "true and written captions)")


if __name__ == "__main__":
    run_tool(main)

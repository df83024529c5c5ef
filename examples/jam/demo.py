"""JAM from nothing: an image tokenizer, two parents, three fusions of them, and documents of text and images.

    python examples/jam/demo.py [--folder demo-jam] [--quick]

`make demo-jam` runs it. A parent that has read text alone and one that has read image-caption pairs are fused in three
ways; each fusion is trained on both kinds of data, and JAM-Cross is taught to answer with text and pictures in turn.
Everything is written below the folder; started again, it goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from demonstration import ROOT, look, precision, run  # noqa: E402

from megamug.command_line.arguments import Parser, output_folder  # noqa: E402
from megamug.command_line.tool import run_tool  # noqa: E402

TOOLS, CONFIG = ROOT / "tools", ROOT / "examples" / "jam" / "demo.yaml"
PERPLEXITIES = ("text", "caption_given_image", "image_given_caption")
SETS = {"pairs": "pairs", "text": "documents/text", "instructions": "documents/instructions"}
SAMPLING = {"max_images": 2, "temperature": 0.7, "top_p": 0.9, "guidance": 2.0}  # of what the instructed model writes
RIGHT = ("the scene is told", "the scene, changed, is told", "the scene is drawn", "the scene, changed, is drawn")
PROMPTS = (
    "draw this: a large red circle left of a small blue ring. then turn the blue ring green.",
    "draw this: there is a small yellow cross under a large purple ring. then turn the purple ring into a circle.",
    "draw this: a small green cross above a small orange circle. then turn the green cross blue.",
    "draw this: there is a large blue circle to the right of a large red cross. then turn the blue circle into a ring.",
)


@dataclass(frozen=True)
class Amounts:
    """How much of everything. The defaults end within 15 minutes on two cores."""

    pairs: int = 8000
    texts: int = 12000
    instructions: int = 8000
    heldout: int = 256
    tokenizer_steps: int = 1800
    text_steps: int = 500
    image_steps: int = 1400
    fused_steps: int = 450
    instruction_steps: int = 1500
    judged: int = 64  # held-out instructions that are written out


QUICK = Amounts(96, 96, 24, 8, 2, 2, 2, 2, 2, 3)  # to see that everything runs; it learns nothing


def train(folder: str, steps: int, *overrides: str) -> None:
    run("-m", "megamug", "train", CONFIG, f"run_dir={folder}", f"train.steps={steps}",
        f"precision.dtype={precision()}", f"optimizer.warmup_steps={steps // 10}", *overrides)  # fmt: skip


def perplexities(folder: str) -> dict[str, float]:
    """On the held-out texts and pairs, by the newest checkpoint of a run; measured once."""
    if not list(Path(folder, "evaluate").glob("step-*/perplexity.json")):
        look("evaluate", folder, "--task", "perplexity", "--data", "documents/text_heldout",
             "documents/pairs_heldout")  # fmt: skip
    newest = max(Path(folder, "evaluate").glob("step-*/perplexity.json"))
    figures = json.loads(newest.read_text())["modalities"]
    return {name: figures[name]["perplexity"] for name in PERPLEXITIES}


def make_data(amounts: Amounts) -> None:
    """Shards, text tokenizer, image tokenizer, vocabulary, tokenised documents."""
    run(TOOLS / "make_demo_data.py", "data/pairs", "--train", str(amounts.pairs), "--heldout", str(amounts.heldout),
        "--tidy", "--size", "32")  # fmt: skip
    run(TOOLS / "make_demo_documents.py", "data/documents", "--text", str(amounts.texts), "--instructions",
        str(amounts.instructions), "--heldout", str(amounts.heldout), "--tidy", "--size", "32")  # fmt: skip
    if not Path("tokenizer.model").exists():
        shards = [f"data/{name}/train" for name in SETS.values()]
        run(TOOLS / "train_tokenizer.py", *shards, "--output", "tokenizer.model", "--vocab-size", "384")
    run(TOOLS / "train_image_tokenizer.py", "data/pairs/train", "--validation", "data/pairs/heldout",
        "--output", "image_tokenizer", "--steps", str(amounts.tokenizer_steps), "--quantise-from",
        str(amounts.tokenizer_steps // 3), "--dtype", precision(), *IMAGE_TOKENIZER)  # fmt: skip
    if not Path("vocabulary").exists():
        run(TOOLS / "make_vocabulary.py", "--text", "tokenizer.model", "--image-tokenizer", "image_tokenizer",
            "--sentinels", "32", "--output", "vocabulary")  # fmt: skip
    for kind, folder in SETS.items():
        for split in ("train", "heldout"):
            run(TOOLS / "tokenize_documents.py", f"data/{folder}/{split}", "--vocabulary", "vocabulary", "--output",
                f"documents/{kind}_{split}")  # fmt: skip


IMAGE_TOKENIZER = (
    "--image-size", "32", "--f", "16", "--codes", "128", "--code-width", "32", "--channels", "8",
    "--multipliers", "1", "2", "4", "8", "8", "--residual-blocks", "1", "--latent-channels", "64", "--norm-groups", "4",
    "--no-middle-attention", "--batch-size", "16", "--learning-rate", "1e-3", "--warmup-steps", "20",
    "--ema-decay", "0.95", "--no-flip", "--smallest-crop", "1", "--log-every", "200",
)  # fmt: skip


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--folder", type=output_folder, default=ROOT / "demo-jam")
    parser.add_argument("--quick", action="store_true", help="see that everything runs, and learn nothing")
    options = parser.parse_args()
    amounts = QUICK if options.quick else Amounts()
    started, folder = time.monotonic(), options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    make_data(amounts)

    train("parents/text", amounts.text_steps, "data.train=documents/text_train")
    train("parents/image_text", amounts.image_steps, "data.train=documents/pairs_train")
    table = {f"parent: {name}": perplexities(f"parents/{name}") for name in ("text", "image_text")}

    both = "data.train=[{path: documents/text_train, weight: 1}, {path: documents/pairs_train, weight: 1}]"
    for kind in ("uniform", "width", "cross"):
        start, trained = f"fused/{kind}", f"continued/{kind}"
        if not Path(start).exists():
            run(TOOLS / "fuse_towers.py", "parents/text", "parents/image_text", "--kind", kind, "--output", start)
        table[f"JAM-{kind.title()}, fused"] = perplexities(start)
        train_fused(start, trained, amounts.fused_steps, both)
        table[f"JAM-{kind.title()}, trained"] = perplexities(trained)

    mixed = (
        "data.train=[{path: documents/instructions_train, weight: 3}, {path: documents/pairs_train, weight: 1}, "
        "{path: documents/text_train, weight: 1}]"
    )
    train_fused("continued/cross", "instructed", amounts.instruction_steps, mixed, "data.loss_on=response",
                "optimizer.learning_rate=1.5e-3")  # fmt: skip
    options = [word for name, value in SAMPLING.items() for word in (f"--{name.replace('_', '-')}", f"{value:g}")]
    look("generate", "instructed", "--prompt", *PROMPTS, *options, "--output", "document")
    followed = judge(amounts.judged)
    report(folder, table, followed, time.monotonic() - started)


def judge(count: int) -> dict[str, float]:
    """Of held-out instructions the shares whose texts and pictures are exactly those asked for (see `RIGHT`)."""
    from megamug.data.documents.reading import open_shard, read_documents
    from megamug.generation.documents import generate_documents

    shards = [open_shard(path) for path in sorted(Path("data/documents/instructions/heldout").glob("*.tar"))]
    asked = [document for shard in shards for document in read_documents(shard.path, shard.samples, [])][:count]
    texts = [[segment.text for segment in document.segments if segment.text] for document in asked]
    print(f"\n{len(texts)} held-out instructions are written out into {Path('judged').absolute()}", flush=True)
    with contextlib.redirect_stderr(io.StringIO()):  # the names of a hundred pictures
        written = generate_documents("instructed", [text[0] for text in texts], output="judged", **SAMPLING)
    verdicts = [follows(document, *text, Path("judged"))
                for document, text in zip(written["documents"], texts, strict=True)]  # fmt: skip
    return {name: sum(column) / len(verdicts) for name, column in zip(RIGHT, zip(*verdicts, strict=True), strict=True)}


def follows(document: dict, prompt: str, first: str, then: str, folder: Path) -> list[bool]:
    """Which of `RIGHT` hold for an entry of document.json whose pictures are in `folder`; `first` and `then` are the
    texts asked for, "first, CAPTION." and "then, CAPTION."."""
    import numpy as np
    from PIL import Image

    from megamug.data.demo.scenes import read_tidy

    segments = document["segments"]
    said = [segment["text"] for segment in segments if "text" in segment]
    pictures = [Image.open(folder / segment["image"]) for segment in segments if "image" in segment]
    scenes = [read_tidy(np.asarray(picture)) for picture in pictures]
    shown = [scene and scene.caption() for scene in scenes]
    captions = [text.partition(", ")[2].removesuffix(".") for text in (first, then)]
    told = [said[:1] == [f"{prompt} {first}"], said[1:2] == [then]]
    return [*told, *(shown[step : step + 1] == [caption] for step, caption in enumerate(captions))]


def train_fused(start: str, folder: str, steps: int, *overrides: str) -> None:
    """Goes on from the weights of `start`, with its sizes."""
    run("-m", "megamug", "train", Path(start) / "config.yaml", f"run_dir={folder}", f"model.initial={start}",
        f"train.steps={steps}", "optimizer.learning_rate=1e-3", f"optimizer.warmup_steps={steps // 10}",
        *overrides)  # fmt: skip


def report(folder: Path, table: dict[str, dict[str, float]], followed: dict[str, float], seconds: float) -> None:
    """Perplexities of parents and fusions, how instructions are followed, and where the document is."""
    (folder / "perplexities.json").write_text(json.dumps(table, indent=1) + "\n")
    (folder / "followed.json").write_text(json.dumps(followed, indent=1) + "\n")
    print(f"\nDone in {seconds / 60:.1f} minutes. Perplexity a token on held-out documents (lower is better):\n")
    titles = [name.replace("_", " ") for name in PERPLEXITIES]
    print(f"  {'':<24}" + "".join(f"{title:>22}" for title in titles))
    for name, figures in table.items():
        print(f"  {name:<24}" + "".join(f"{figures[key]:>22.2f}" for key in PERPLEXITIES))
    print("\nOf instructions that it never saw, the instructed JAM-Cross follows (exactly, in every word or thing):\n")
    for name, share in followed.items():
        print(f"  {name:<32}{share:>6.0%}")
    print(f"\nRead  {folder / 'document' / 'document.html'}\n      (written by the instructed JAM-Cross, text and "
          "pictures in turn)")


if __name__ == "__main__":
    run_tool(main)

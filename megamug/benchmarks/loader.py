"""megamug benchmark loader [--data PATH] [--workers 2] [--batch 64] [--batches 16] [--repeats 5] ...

Images/s of the whole path of image-caption pairs (order, bytes, decoding, random crop, flip, tokens, batch) against a
PyTorch DataLoader with Pillow and one with webdataset and its decoder: the same shards, the same distribution of crops,
the same number of decoding threads and worker processes, tensors of the same shapes. The contestants take turns of
`--batches` batches and are halted in between, so that none works ahead in another's time; files come from the page
cache. With a GPU the loader decodes there (`mixed`), and all batches end up there.

--data: shards as data.train takes them (without an index they are indexed in a temporary folder), or what
megamug data shards takes (a folder of images and captions, a .tsv). Default: $MEGAMUG_PHOTOS, else the folder
../shared/data/photos beside the repository.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch

from megamug.benchmarks import _contest, _loader_peers, _profile, _report
from megamug.command_line.arguments import COUNT, expand_home
from megamug.data.pairs.text import Tokenizer, iterate_captions, train_tokenizer
from megamug.data.shards.index_file import find_index
from megamug.data.shards.indexing import index_paths
from megamug.data.shards.packing import make_shards
from megamug.data.shards.sources import find_shards, resolve_sources
from megamug.errors import UserError

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "photos"
PEERS = ("pillow", "webdataset")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = _report.parser("loader", __doc__)
    parser.add_argument("--data", type=expand_home, default=os.environ.get("MEGAMUG_PHOTOS") or str(PHOTOS),
                        metavar="PATH")  # fmt: skip
    parser.add_argument("--tokenizer", type=expand_home, metavar="FILE", help="default: one made of the captions")
    parser.add_argument("--image-size", type=COUNT, default=224)
    parser.add_argument("--caption-length", type=COUNT, default=64)
    parser.add_argument("--workers", type=COUNT, default=2, help="decoding threads, and worker processes (default 2)")
    parser.add_argument("--batch", type=COUNT, default=64)
    parser.add_argument("--batches", type=COUNT, default=16, help="of a turn (default 16)")
    parser.add_argument("--repeats", type=COUNT, default=5, help="turns of each (default 5)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="megamug-loader-") as temporary:
        data, tokenizer = options.data, options.tokenizer
        shards = prepared(data, Path(temporary))
        sources = resolve_sources(shards, captions=True)
        if tokenizer is None:
            tokenizer = str(Path(temporary, "tokenizer.model"))
            train_tokenizer(iterate_captions(sources), tokenizer, 1000)
        Tokenizer(tokenizer)  # a wrong one is told here
        report = _report.Report("loader", options)
        samples = [record for source in sources for shard in source.shards for record in shard.samples]
        size = statistics.mean(int(record["image_size"]) for record in samples)
        pixels = statistics.mean(int(record["width"]) * int(record["height"]) for record in samples)
        report.say(f"# {len(samples)} images, {size / 1e3:.0f} kB and {pixels / 1e6:.2f} Mpixel on average")
        race(report, argparse.Namespace(**{**vars(options), "shards": shards, "tokenizer": tokenizer}))
        report.finish()


def prepared(data: str, temporary: Path) -> str:
    """Indexed shards of what `--data` names: as they are, or linked, or made, in `temporary`."""
    path = Path(data)
    if not path.exists():
        raise UserError(f"--data: there is nothing at {data}; name shards or a folder of images, or set MEGAMUG_PHOTOS")
    if path.suffix == ".tsv" or path.is_dir() and not any(path.glob("*.tar")):
        made, _ = make_shards(path, temporary / "shards", prefix="benchmark", shard_size=1000, overwrite=False)
        index_paths(made)
        return str(temporary / "shards")
    shards = find_shards(data)
    if all(find_index(shard) for shard in shards):
        return data
    (temporary / "shards").mkdir()
    for shard in shards:
        (temporary / "shards" / shard.name).symlink_to(shard.resolve())
    index_paths([temporary / "shards"])  # the index lies beside the link
    return str(temporary / "shards")


def race(report: _report.Report, options: argparse.Namespace) -> None:
    """Turns of all contestants; figures and ratios go to the report."""
    names = _contest.that_can_run(report, ["megamug", *options.peers])
    images = options.batch * options.batches
    with _contest.contestants(__name__, names, "uint8", options) as workers:
        turns, found = _contest.take_turns(workers, options.repeats), None
        if report.options.profile:
            found = workers["megamug"].profile(report.options.profile, "loader", ranges="loader: ")
        memory = {name: worker.close() for name, worker in workers.items()}
    for name in names:
        seconds = [turn.seconds for turn in turns[name]]
        ratios = _contest.versus(turns["megamug"], turns[name], name != "megamug")
        rate, spread = images / statistics.median(seconds), _contest.spread(seconds)
        report.add(
            name, images_per_second=rate, spread=spread, peak_gib=memory[name], **ratios,
            profile=found if name == "megamug" else None,
        )  # fmt: skip
        told = ""
        if ratios:
            low, high = ratios["megamug_times_low"], ratios["megamug_times_high"]
            told = f"  megamug / it: {ratios['megamug_times']:.2f} ({low:.2f} to {high:.2f})"
        report.say(f"  {name:<11}{rate:9.0f} images/s (spread {spread:.0%})  peak {memory[name]:.2f} GiB{told}")
    if found:
        report.say(_profile.table(found))


def build_megamug(options: argparse.Namespace, _: str):
    """(a turn of `batches` batches, no FLOPs) of the loader that training uses."""
    from megamug.data.pairs.loader import PairLoader

    loader = PairLoader(
        resolve_sources(options.shards, captions=True), tokenizer=Tokenizer(options.tokenizer),
        image_size=options.image_size, caption_length=options.caption_length, global_batch_size=options.batch,
        micro_batch_size=options.batch, seed=0, threads=options.workers,
        device=torch.device("cuda", 0) if torch.cuda.is_available() else "cpu",
    )  # fmt: skip

    def batches():
        for batch in loader:
            (pairs,) = batch.micro_batches
            yield pairs.images, pairs.tokens

    return _loader_peers.taking(batches(), options), 0.0


def build_pillow(options: argparse.Namespace, _: str):
    """(a turn, no FLOPs) of a PyTorch DataLoader with Pillow."""
    return _loader_peers.taking(_loader_peers.pillow(options), options), 0.0


def build_webdataset(options: argparse.Namespace, _: str):
    """(a turn, no FLOPs) of webdataset and its decoder."""
    return _loader_peers.taking(_loader_peers.webdataset(options), options), 0.0

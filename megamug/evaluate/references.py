"""Captions of held-out images out of COCO's lists, and captions as COCO's server takes them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megamug.command_line.console import counted
from megamug.data.shards.captions import CaptionedImage, read_coco_captions
from megamug.data.shards.sources import Source
from megamug.data.shards.tar_members import scan
from megamug.errors import UserError, printable


@dataclass
class References:
    """The images of a list, by the samples that they are."""

    path: Path
    images: dict[tuple[Path, str], CaptionedImage]  # by shard and key
    samples: int  # of the data
    listed: int  # images with captions in the list

    def of(self, place: tuple[Path, str]) -> CaptionedImage | None:
        return self.images.get(place)

    def figures(self) -> dict:
        return {"file": str(self.path), "samples": self.samples, "matched": len(self.images), "listed": self.listed}


def match(path: Path, sources: list[Source]) -> References:
    """Finds the samples of `sources` in a list as COCO's `captions_val2014.json`; tells how many it does not find.

    A sample is the image whose `file_name` is the file it was packed from, or ends like it (`megamug data shards` keeps
    the name); of other shards, the one whose `file_name` without extension is the sample's key, with its folders or
    without. Where the list has no `images`, keys of other shards are compared with `image_id`, as numbers where both
    are. Raises `UserError`: no list, no sample in it, two samples of one image, a name of two images.
    """
    listed = [image for image in read_coco_captions(path, "--references") if image.captions]
    by_name: dict[str, CaptionedImage | None] = {}  # None: of two images
    for image in listed:
        for name in _names(image):
            by_name[name] = None if name in by_name else image
    found: dict[tuple[Path, str], CaptionedImage] = {}
    owner: dict[int | str, str] = {}
    samples = 0
    for source in sources:
        for shard, count in zip(source.shards, source.counts(), strict=True):
            packed_from = {pair.key: pair.image.source for pair in scan(shard.path).pairs}
            samples += count
            for key in (shard.key(i) for i in range(count)):
                names = _sample_names(key, packed_from.get(key))
                name = next((name for name in names if name in by_name), None)
                if name is None:
                    continue
                image, here = by_name[name], f"{shard.path.name}: {key}"
                if image is None:
                    raise UserError(f"--references {path}: two images are called {name.partition(':')[2]}, and sample"
                                    f" {here} may be either; name them with their folders")  # fmt: skip
                if image.id in owner:
                    raise UserError(f"--references {path}: samples {owner[image.id]} and {here} are both image"
                                    f" {image.id}; measure them apart")  # fmt: skip
                owner[image.id] = here
                found[shard.path, key] = image
    if not found:
        raise UserError(f"--references {path}: none of {counted(samples, 'sample')} of the data is in this list of"
                        f" {counted(len(listed), 'image')}; give the list of the same images")  # fmt: skip
    told = References(path, found, samples, len(listed))
    if samples > len(found):
        print(printable(f"{path}: {counted(samples - len(found), 'sample')} of {samples:,} in the data not listed;"
                        " captions written of them are compared with nothing"), file=sys.stderr)  # fmt: skip
    if len(listed) > len(found):
        print(printable(f"{path}: {counted(len(listed) - len(found), 'image')} of {len(listed):,} not in the data"),
              file=sys.stderr)  # fmt: skip
    return told


def _names(image: CaptionedImage) -> set[str]:
    """What a sample of this image may be called: its file with and without folders, that without extension, its id."""
    if image.file is None:
        return {f"id:{_number(image.id)}"}
    file = PurePosixPath(image.file)
    return {f"file:{file}", f"base:{file.name}", f"key:{file.with_suffix('')}", f"stem:{file.stem}"}


def _sample_names(key: str, source: str | None) -> list[str]:
    """Names of a sample, the surest first. A key beside the name of a file is a running number."""
    if source is not None:
        return [f"file:{source}", f"base:{PurePosixPath(source).name}"]
    return [f"key:{key}", f"stem:{PurePosixPath(key).name}", f"id:{_number(key)}"]


def _number(id: int | str) -> str:
    text = str(id)
    return str(int(text)) if text.isascii() and text.isdigit() else text

"""Small shards made on the spot."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from megamug.data.shards.indexing import index_paths


@pytest.fixture(autouse=True)
def _own_index_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MEGAMUG_INDEX_DIRECTORY", str(tmp_path_factory.mktemp("indexes")))


def picture(seed=0, width=40, height=30):
    """A smooth picture, so that JPEG keeps it."""
    cells = np.random.RandomState(seed).randint(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image=None, format="JPEG", **options):
    buffer = io.BytesIO()
    (image or picture()).save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path, members):
    """`members`: list of (name, bytes) or ready `TarInfo`s."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def good_members(count, start=0, width=40, height=30):
    members = []
    for i in range(start, start + count):
        members.append((f"{i:04d}.jpg", encoded(picture(i, width, height), quality=95)))
        members.append((f"{i:04d}.txt", f"picture number {i}".encode()))
    return members


@pytest.fixture
def helpers():
    class Helpers:
        pass

    for function in (picture, encoded, write_tar, good_members):
        setattr(Helpers, function.__name__, staticmethod(function))
    return Helpers


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory):
    """Two indexed shards of 13 and 7 pictures of different sizes."""
    folder = tmp_path_factory.mktemp("shards")
    write_tar(folder / "a-0.tar", good_members(13))
    write_tar(folder / "a-1.tar", good_members(7, start=13, width=60, height=64))
    index_paths([folder], processes=1)
    return folder


@pytest.fixture(scope="session")
def tokenizer(shard_folder, tmp_path_factory):
    from megamug.data.pairs.text import Tokenizer, iterate_captions, train_tokenizer
    from megamug.data.shards.sources import resolve_sources

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(iterate_captions(resolve_sources(str(shard_folder))), path, 300)
    return Tokenizer(path)

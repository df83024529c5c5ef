"""What was indexed is what is read: damaged indexes, shards that change, and files that are cut off while in use.

Without the checksums a flipped bit gave another caption; with a memory map a file that was cut off ended the process.
"""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from megamug.data.shards.index_file import MAGIC, SAMPLE, find_index, read_header, write_index
from megamug.data.shards.reading import Shard
from megamug.data.shards.sources import resolve_sources
from megamug.data.shards.verify import index_shard
from megamug.errors import UserError
from tests.distributed.launch import python_path


@pytest.fixture
def shard(helpers, tmp_path):
    path = helpers.write_tar(tmp_path / "x.tar", helpers.good_members(6, width=120, height=90))
    index_shard(path)
    return path


def overwrite(path, offset, data, keep_time):
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (0 if keep_time else 1_000_000)))


def test_any_bit_of_an_index_is_under_a_checksum(shard):
    index = find_index(shard)
    whole = index.read_bytes()
    random = np.random.RandomState(0)
    places = [0, 15, 16, 23, 24, 55, 60, len(whole) - 1, *random.randint(0, len(whole), 60)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.randint(8)
        index.write_bytes(damaged)
        with pytest.raises(UserError, match="broken index"):
            Shard(shard)
    index.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="broken index"):
        Shard(shard)
    assert index_shard(shard).action == "indexed" and index.read_bytes() == whole


def test_an_index_of_another_version_is_named(shard):
    index = find_index(shard)
    header, offset = read_header(index)
    body = index.read_bytes()[offset:]
    header.version = 99
    write_index(index, header, np.frombuffer(body[: 6 * SAMPLE.itemsize], SAMPLE), body[6 * SAMPLE.itemsize :])
    with pytest.raises(UserError, match=r"of version 99, and this program reads version 4\); run: megamug data index"):
        Shard(shard)
    index.write_bytes(MAGIC[:-2] + b"02" + bytes(200))  # an index of the version before
    with pytest.raises(UserError, match=r"of version 2, and this program reads version 4"):
        Shard(shard)
    assert index_shard(shard).action == "indexed"


def test_a_bit_that_flips_in_use_is_an_error_of_its_sample(shard):
    opened = Shard(shard)
    assert opened.caption(2) == "picture number 2"
    _, records_at = read_header(opened.index_file)
    place = records_at + 2 * SAMPLE.itemsize + SAMPLE.fields["caption_offset"][1]
    overwrite(opened.index_file, place, b"\xff", keep_time=True)
    with pytest.raises(OSError, match=r"sample 2: the record does not agree with its checksum"):
        opened.caption(2)
    assert opened.caption(3) == "picture number 3"


def test_an_index_that_is_cut_off_in_use_is_a_sentence_and_no_signal(shard):
    """A memory map of it ended the process with SIGBUS."""
    program = f"""
import os
from megamug.data.shards.reading import Shard
shard = Shard({str(shard)!r})
shard.caption(0)
os.truncate(shard.index_file, 0)
for i in range(6):
    try:
        shard.read(i)
    except OSError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": python_path()},
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout.count(f"0 of {SAMPLE.itemsize} bytes of the record; was the index changed?") == 6


def test_another_index_in_the_place_of_one_in_use(shard, helpers):
    opened = Shard(shard)
    opened.caption(0)
    opened.close()
    os.utime(shard, ns=(1, 1))
    assert index_shard(shard).action == "unchanged"  # written anew, with the same records
    assert opened.caption(5) == "picture number 5"
    opened.close()
    helpers.write_tar(shard, helpers.good_members(6, start=6))
    index_shard(shard)
    with pytest.raises(OSError, match="replaced by that of another shard while it is in use"):
        opened.caption(0)


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_picture_overwritten_by_another_of_its_size(shard, keep_time):
    """Another time is noticed by itself; with `verify` the bytes are, whatever the time says."""
    opened, verified = Shard(shard), Shard(shard, verify=True)
    first, second = opened.samples[2], opened.samples[3]
    data = opened.image_bytes(3)[: int(first["image_size"])].ljust(int(first["image_size"]), b"\0")
    overwrite(shard, int(first["image_offset"]), data, keep_time)
    for one in [verified] if keep_time else [opened, verified]:
        for read in (one.image_bytes, one.caption):
            with pytest.raises(OSError, match="sample 2 is not what was indexed"):
                read(2)
        assert len(one.image_bytes(3)) == int(second["image_size"])


def test_a_copied_shard_needs_no_new_index(shard, tmp_path):
    """`cp -r` gives another time; hashes decide, and the samples are then compared as they are read."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (shard, find_index(shard)):
        shutil.copyfile(path, copy / path.name)
    os.utime(copy / "x.tar", ns=(5, 5))
    (source,) = resolve_sources(str(copy))
    (original,) = resolve_sources(str(shard))
    assert source.fingerprint() == original.fingerprint()
    assert [source.shards[0].caption(i) for i in range(6)] == [f"picture number {i}" for i in range(6)]
    size = (copy / "x.tar").stat().st_size
    overwrite(copy / "x.tar", size - 600, b"\1", keep_time=False)  # behind the last member
    with pytest.raises(UserError, match="stale index: the shard was changed since"):
        resolve_sources(str(copy))


def test_of_two_indexes_the_one_that_fits_is_taken(shard, monkeypatch):
    """Copied files are newer than what they are copies of."""
    beside = find_index(shard)
    older = beside.read_bytes()
    os.utime(shard, ns=(7, 7))
    monkeypatch.setattr("megamug.data.shards.index_file.os.access", lambda *_: False)
    assert index_shard(shard).action == "unchanged"
    elsewhere = find_index(shard)
    assert elsewhere != beside
    beside.write_bytes(older)  # the newest file, but not of this time
    assert find_index(shard) == elsewhere

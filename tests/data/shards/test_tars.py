"""Tars as users have them: joined, compressed, with dots and control characters in their names, and pictures that cost
more than they are worth."""

import gzip
import json
import struct
import zlib

import pytest

from megamug.data.shards.indexing import check_usable, index_paths, summary, write_quarantine
from megamug.data.shards.packing import make_shards
from megamug.data.shards.reading import Shard
from megamug.data.shards.sources import expand, find_shards, resolve_sources
from megamug.data.shards.verify import DEFAULT_LIMITS, Limits, Rejected, check_header, index_shard
from megamug.errors import UserError, printable
from tests.data.shards.test_reading import jpeg_claiming


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, raw_bytes, interlace=0):
    """A grey PNG whose compressed data inflate to `raw_bytes`."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlace)
    deflate = zlib.compressobj(9)
    data = b"".join(deflate.compress(bytes(1 << 20)) for _ in range(raw_bytes >> 20))
    data += deflate.compress(bytes(raw_bytes & ((1 << 20) - 1))) + deflate.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_tars_one_behind_another_are_read_to_the_end(helpers, tmp_path):
    """The pairs behind the first end mark were gone, with exit code 0."""
    parts = [helpers.write_tar(tmp_path / f"{n}.part", helpers.good_members(2, start=n)) for n in (0, 2, 3)]
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    report = index_shard(path)
    shard = Shard(path)
    assert [shard.key(i) for i in range(len(shard))] == ["0000", "0001", "0002", "0003", "0004"]
    assert [shard.caption(i) for i in range(5)] == [f"picture number {i}" for i in range(5)]
    assert {(e["member"], e["reason"]) for e in report.quarantine} == {
        (f"0003.{kind}", "duplicate key: the first one is used") for kind in ("jpg", "txt")
    }


def test_what_is_no_tar_behind_the_end_mark_is_told(helpers, tmp_path):
    path = helpers.write_tar(tmp_path / "x.tar", helpers.good_members(2))
    end = path.stat().st_size
    with open(path, "ab") as file:
        file.write(bytes(1024) + b"left over" * 200)
    report = index_shard(path)
    assert report.samples == 2
    (entry,) = report.quarantine
    assert f"from byte {end + 1024}, is no tar and is not used" in entry["reason"]


def test_documents_read_on_too(helpers, tmp_path):
    from megamug.data.documents.reading import open_shard

    path = tmp_path / "x.tar"
    parts = [helpers.write_tar(tmp_path / f"{n}.part", [(f"{n}.txt", b"text")]) for n in range(2)]
    path.write_bytes(b"".join(part.read_bytes() for part in parts) + b"left over")
    shard = open_shard(path)
    assert shard.count == 2 and "is no tar" in shard.quarantine[0]["reason"]


def test_names_with_dots_are_quarantined_and_not_passed_over(helpers, tmp_path):
    members = []
    for i in range(60):
        members += [(f"img_{i}.{i}.jpg", helpers.encoded()), (f"img_{i}.{i}.txt", b"a caption")]
    members += [(f"k.{'x' * 60}{i}", b"") for i in range(300)] + [("._k.jpg", b"macOS")]
    path = helpers.write_tar(tmp_path / "x.tar", members)
    reports = index_paths([path], processes=1)
    assert reports[0].samples == 0 and len(reports[0].quarantine) == 120
    assert "'7.jpg' of the key 'img_7'; give it a name with one dot" in reports[0].quarantine[14]["reason"]
    text = summary(reports)
    assert len(text.splitlines()) <= 23 and len(text) < 6000 and "more kinds" in text
    with pytest.raises(UserError, match="not one usable sample in 1 shard"):
        check_usable(reports)


def test_more_pictures_of_one_key_are_another_kind(helpers, tmp_path):
    jpeg = helpers.encoded()
    path = helpers.write_tar(tmp_path / "x.tar", [("k.depth.png", b"x"), ("k.jpg", jpeg), ("k.txt", b"c")])
    report = index_shard(path)
    assert report.samples == 1 and report.quarantine == [] and report.ignored == {"depth.png": 1}


def test_control_characters_reach_neither_terminal_nor_quarantine(helpers, tmp_path):
    name = "\x1b[2J\nerror: gone\u2028.jpg"
    folder = tmp_path / "a\x1b[31m"
    folder.mkdir()
    path = helpers.write_tar(folder / "x.tar", [(name, helpers.encoded()), ("b.jpg", b"\x1b[2J"), ("b.txt", b"c")])
    reports = index_paths([path], processes=1)
    write_quarantine(tmp_path / "q.jsonl", reports)
    entries = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    for text in [*summary(reports).splitlines(), *(value for entry in entries for value in entry.values())]:
        assert text.isprintable()
    assert "\\x1b[2J\\nerror: gone\\u2028.jpg" in entries[0]["member"]
    assert str(UserError(f"{folder}: no")) == f"{tmp_path}/a\\x1b[31m: no"
    assert printable("b\udcff ü\u3000") == "b\\udcff ü\u3000"


@pytest.mark.parametrize(("name", "said"), [("x.tar", "gzip"), ("x.tar.gz", "gunzip .*x.tar.gz"), ("x.tgz", "gunzip")])
def test_compressed_tars_get_a_sentence(helpers, tmp_path, name, said):
    plain = helpers.write_tar(tmp_path / "plain", helpers.good_members(1))
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / name).write_bytes(gzip.compress(plain.read_bytes()))
    if name == "x.tar":
        assert f"compressed by {said}" in index_shard(folder / name).quarantine[0]["reason"]
        return
    for call in (find_shards, lambda path: index_paths([path]), lambda path: resolve_sources(str(path / name))):
        with pytest.raises(UserError, match=said):
            call(folder)
    helpers.write_tar(folder / "x.tar", helpers.good_members(1))  # decompressed, and the other one kept
    assert find_shards(folder) == [folder / "x.tar"]


def test_braces_lists_and_home(helpers, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a-000", "a-001", "a-002", "b"):
        helpers.write_tar(tmp_path / f"{name}.tar", helpers.good_members(1))
    index_paths([tmp_path], processes=1)
    (source,) = resolve_sources("~/a-{000..002}.tar::~/b.tar")
    assert [shard.path.name for shard in source.shards] == ["a-000.tar", "a-001.tar", "a-002.tar", "b.tar"]
    assert expand("x{8..10}{p,q}::y") == ["x8p", "x8q", "x9p", "x9q", "x10p", "x10q", "y"]
    assert expand("{0..10}")[-2:] == ["9", "10"] and expand("{2..00}") == ["02", "01", "00"]
    (tmp_path / "{1..2}.tar").touch()
    assert find_shards(tmp_path / "{1..2}.tar") == [tmp_path / "{1..2}.tar"]  # a name as it is written
    for value, said in [("~/a-{000..003}.tar", "a-003.tar: no such file"), ("a::", "empty part"),
                        ("x{0..9999999}", "more than 1,000,000"), ("{0..999}{0..999}{0..9}", "more than")]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            resolve_sources(value)


def test_a_table_of_a_spreadsheet(helpers, tmp_path):
    """Its mark lost the first row; captions with other separators than line breaks refused the table."""
    (tmp_path / "a.jpg").write_bytes(helpers.encoded())
    (tmp_path / "b.jpg").write_bytes(helpers.encoded())
    text = "\ufeffa.jpg\tone\u2028two\x0cthree\u0085four\r\nb.jpg\tfive\r\n"
    (tmp_path / "t.tsv").write_bytes(text.encode())
    shards, skipped = make_shards(tmp_path / "t.tsv", tmp_path / "out")
    index_paths(shards, processes=1)
    assert [Shard(shards[0]).caption(i) for i in range(2)] == ["one two three four", "five"] and skipped == []
    (tmp_path / "t.tsv").write_bytes("a.jpg\tone\u2028two\nb.jpg five\n".encode())
    with pytest.raises(UserError, match="line 2: not `path<TAB>caption`"):
        make_shards(tmp_path / "t.tsv", tmp_path / "other")


def test_the_quarantine_names_the_file_that_the_user_has(helpers, tmp_path):
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for name, data in [("a.jpg", helpers.encoded()), ("sub/broken.jpg", b"<html>")]:
        (tmp_path / "photos" / name).write_bytes(data)
        (tmp_path / "photos" / name).with_suffix(".txt").write_text("a caption")
    shards, _ = make_shards(tmp_path / "photos", tmp_path / "out")
    reports = index_paths(shards, processes=1)
    assert "000000001.jpg (made of sub/broken.jpg): not a JPEG" in summary(reports)
    assert reports[0].quarantine[0]["source"] == "sub/broken.jpg"
    assert Shard(shards[0]).header.quarantine == reports[0].quarantine


def test_pictures_that_cost_more_than_they_are_worth(helpers, tmp_path):
    small = helpers.encoded(helpers.picture(0, 64, 64), quality=20)
    bad = {
        "claims.jpg": (jpeg_claiming(small, 8000, 8000), "8000 x 8000 pixels in"),
        "flat.png": (png(4000, 4000, 4000 * 4001), "4000 x 4000 pixels in"),
        "inflates.png": (png(100, 100, 1 << 26), "inflate to more than the 10,100 bytes of 100 x 100 pixels"),
    }
    members = [m for name, (data, _) in bad.items() for m in ((name, data), (name[:-3] + "txt", b"c"))]
    path = helpers.write_tar(tmp_path / "x.tar", members + helpers.good_members(1))
    report = index_shard(path)
    assert report.samples == 1
    reasons = {entry["member"]: entry["reason"] for entry in report.quarantine}
    assert set(reasons) == set(bad) and all(bad[name][1] in reasons[name] for name in bad)
    assert "more than the limit of 1,000" in reasons["claims.jpg"]
    assert index_shard(path, Limits(pixels_per_byte=10**6)).samples == 3  # an option of the indexer


def test_sound_pictures_are_within_the_limits(helpers):
    assert check_header(png(1000, 1000, 1000 * 1001), DEFAULT_LIMITS) == (1000, 1000)  # a blank page
    assert check_header(png(33, 21, 800, interlace=1), DEFAULT_LIMITS) == (33, 21)
    with pytest.raises(Rejected, match=r"more than the 7[0-9]{2} bytes of 33 x 21 pixels"):
        check_header(png(33, 21, 1 << 24, interlace=1), DEFAULT_LIMITS)

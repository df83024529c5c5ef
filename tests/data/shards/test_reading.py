"""Hostile and stale data: each ends in a quarantine entry with its reason, or in a sentence."""

import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from megamug.data.shards.index_file import SUFFIX, find_index
from megamug.data.shards.indexing import index_paths, summary, write_quarantine
from megamug.data.shards.reading import Shard
from megamug.data.shards.sources import resolve_sources
from megamug.data.shards.verify import Limits, index_shard
from megamug.errors import UserError


def png_claiming(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def jpeg_claiming(data, width, height):
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def hostile(name, helpers):
    """(members beside three good pairs, what the reason must say, member that it must name)"""
    jpeg, text = helpers.encoded(quality=90), b"a caption"
    large = helpers.encoded(helpers.picture(0, 200, 150), quality=95)
    png = helpers.encoded(format="PNG")
    link = tarfile.TarInfo("bad.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("bad.jpg")
    hard.type, hard.linkname = tarfile.LNKTYPE, "0000.jpg"
    sized = {"big": b"x" * 10_000_000, "latin1": "café".encode("latin-1")}
    return {
        "html": ([("bad.jpg", b"<html>404</html>" * 20), ("bad.txt", text)], "not a JPEG, PNG or WebP", "bad.jpg"),
        "empty image": ([("bad.jpg", b""), ("bad.txt", text)], "empty file", "bad.jpg"),
        "half JPEG": ([("bad.jpg", large[: len(large) // 2]), ("bad.txt", text)], "does not decode", "bad.jpg"),
        "cut tail": ([("bad.jpg", jpeg[:-12]), ("bad.txt", text)], "does not decode", "bad.jpg"),
        "half PNG": ([("bad.png", png[: len(png) // 2]), ("bad.txt", text)], "does not decode", "bad.png"),
        "bomb PNG": ([("bad.png", png_claiming(50_000, 50_000)), ("bad.txt", text)], "pixels", "bad.png"),
        "big PNG": ([("bad.png", png_claiming(9_000, 9_000)), ("bad.txt", text)], "9000 x 9000 pixels", "bad.png"),
        "bomb JPEG": ([("bad.jpg", jpeg_claiming(jpeg, 50_000, 50_000)), ("bad.txt", text)], "pixels", "bad.jpg"),
        "no caption": ([("bad.jpg", jpeg)], "no caption", "bad.jpg"),
        "no image": ([("bad.txt", text)], "without a usable image", "bad.txt"),
        "duplicate": ([("0001.jpg", jpeg), ("0001.txt", text)], "duplicate key", "0001.jpg"),
        "not UTF-8": ([("bad.jpg", jpeg), ("bad.txt", sized["latin1"])], "not UTF-8", "bad.txt"),
        "10 MB caption": ([("bad.jpg", jpeg), ("bad.txt", sized["big"])], "10,000,000 bytes", "bad.txt"),
        "10 MB JSON": (
            [("bad.jpg", jpeg), ("bad.json", json.dumps({"caption": "x" * 10**7}).encode())], "limit", "bad.json"),
        "long caption in JSON": (
            [("bad.jpg", jpeg), ("bad.json", b'{"caption": "%s"}' % (b"x" * 20000))], "20,000 bytes", "bad.json"),
        "empty caption": ([("bad.jpg", jpeg), ("bad.txt", b" \n")], "caption is empty", "bad.txt"),
        "JSON without caption": ([("bad.jpg", jpeg), ("bad.json", b'{"text": "x"}')], "'caption'", "bad.json"),
        "bad JSON": ([("bad.jpg", jpeg), ("bad.json", b"{'caption'")], "bad caption", "bad.json"),
        "deep JSON": ([("bad.jpg", jpeg), ("bad.json", b"[" * 200_000)], "nested", "bad.json"),
        "lone surrogate": ([("bad.jpg", jpeg), ("bad.json", b'{"caption": "\\ud800"}')], "not UTF-8", "bad.json"),
        "outside": ([("../bad.jpg", jpeg), ("../bad.txt", text)], "unsafe name", "../bad.jpg"),
        "absolute": ([("/tmp/bad.jpg", jpeg), ("/tmp/bad.txt", text)], "unsafe name", "/tmp/bad.jpg"),
        "symbolic link": ([link, ("bad.txt", text)], "a link", "bad.jpg"),
        "hard link": ([hard, ("bad.txt", text)], "a link", "bad.jpg"),
        "animated": (
            [("bad.webp", helpers.encoded(format="WEBP", save_all=True, append_images=[helpers.picture(5)])),
             ("bad.txt", text)], "animated", "bad.webp"),
    }[name]  # fmt: skip


CASES = [
    "html", "empty image", "half JPEG", "cut tail", "half PNG", "bomb PNG", "big PNG", "bomb JPEG", "no caption",
    "no image", "duplicate", "not UTF-8", "10 MB caption", "10 MB JSON", "long caption in JSON", "empty caption",
    "JSON without caption", "bad JSON", "deep JSON", "lone surrogate", "outside", "absolute", "symbolic link",
    "hard link", "animated",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_hostile_member_is_quarantined(name, helpers, tmp_path):
    members, reason, member = hostile(name, helpers)
    path = helpers.write_tar(tmp_path / "x.tar", helpers.good_members(2) + members + helpers.good_members(1, start=2))
    report = index_shard(path)
    shard = Shard(path)
    assert [shard.key(i) for i in range(len(shard))] == ["0000", "0001", "0002"]  # the good ones stay
    assert [shard.caption(i) for i in range(3)] == [f"picture number {i}" for i in range(3)]
    reasons = {entry["member"]: entry["reason"] for entry in report.quarantine}
    assert reason in reasons[member]
    assert {entry["key"] for entry in report.quarantine} <= {"bad", "../bad", "/tmp/bad", "0001"}
    assert shard.header.quarantine == report.quarantine
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tar", "x.tar" + SUFFIX]  # nothing was extracted


@pytest.mark.parametrize(
    ("extension", "mode", "options"),
    [
        ("jpg", "CMYK", {"format": "JPEG"}), ("jpg", "L", {"format": "JPEG"}), ("png", "RGBA", {"format": "PNG"}),
        ("png", "P", {"format": "PNG"}), ("webp", "RGB", {"format": "WEBP"}),
        ("jpeg", "RGB", {"format": "JPEG", "progressive": True}),
    ],
)  # fmt: skip
def test_other_kinds_of_images_are_decoded_right(extension, mode, options, helpers, tmp_path):
    data = helpers.encoded(helpers.picture(3).convert(mode), **options)
    path = helpers.write_tar(tmp_path / "x.tar", [("k." + extension, data), ("k.txt", b"c")])
    assert index_shard(path).quarantine == []
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert abs(pixels_of(path) - want).mean() < 1.5


def pixels_of(path):
    import torch

    from megamug.data.dali import CropDecoder

    shard = Shard(path)
    width, height = int(shard.samples["width"][0]), int(shard.samples["height"][0])
    # the decoder's own size: a square region of a picture that is not square is resized, so take strips of side 30
    decoder = CropDecoder(30, 1, 1, torch.device("cpu"))
    assert (width, height) == (40, 30)
    left = decoder([shard.image_bytes(0)], np.array([[0, 0, 30, 30]]), np.zeros(1, bool))[0]
    right = decoder([shard.image_bytes(0)], np.array([[0, 10, 30, 30]]), np.zeros(1, bool))[0]
    return np.concatenate([left[:, :, :10], right], axis=2).transpose(1, 2, 0).astype(int)


def test_16_bit_png_is_scaled_to_8_bits(helpers, tmp_path):
    grey = np.asarray(helpers.picture(3).convert("L"))
    data = helpers.encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
    path = helpers.write_tar(tmp_path / "x.tar", [("k.png", data), ("k.txt", b"c")])
    assert index_shard(path).quarantine == []
    assert abs(pixels_of(path) - grey[..., None].astype(int)).max() <= 1


def test_exif_orientation_is_applied(helpers, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # turned by 90 degrees
    path = helpers.write_tar(tmp_path / "x.tar", [("k.jpg", helpers.encoded(exif=exif)), ("k.txt", b"c")])
    index_shard(path)
    record = Shard(path).samples[0]
    assert (record["width"], record["height"]) == (30, 40)


@pytest.mark.parametrize("cut", ["inside a member", "between members", "no end mark"])
def test_truncated_tar(cut, helpers, tmp_path):
    path = helpers.write_tar(tmp_path / "x.tar", helpers.good_members(4))
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    at = {"inside a member": members[6].offset_data + 20, "between members": members[4].offset,
          "no end mark": members[-1].offset_data + 512}[cut]  # fmt: skip
    data = path.read_bytes()
    path.write_bytes(data[:at])
    report = index_shard(path)
    assert report.samples == {"inside a member": 3, "between members": 2, "no end mark": 4}[cut]
    assert any("truncated" in entry["reason"] for entry in report.quarantine)


def test_damaged_header_in_the_middle_is_told(helpers, tmp_path):
    path = helpers.write_tar(tmp_path / "x.tar", helpers.good_members(4))
    with tarfile.open(path) as tar:
        at = tar.getmembers()[4].offset
    data = bytearray(path.read_bytes())
    data[at : at + 300] = b"\xff" * 300
    path.write_bytes(data)
    report = index_shard(path)
    assert report.samples == 2 and any("header" in entry["reason"] for entry in report.quarantine)


@pytest.mark.parametrize("data", [b"", b"this is no tar file" * 100])
def test_not_a_tar(data, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    report = index_shard(path)
    assert report.samples == 0 and report.quarantine
    with pytest.raises(UserError, match="no usable sample"):
        resolve_sources(str(path))


def test_json_captions_and_names_in_folders(helpers, tmp_path):
    jpeg = helpers.encoded()
    members = [
        ("a/k.jpg", jpeg), ("a/k.json", '{"caption": "Grüße,\\n  Welt"}'.encode()), ("b/k.JPG", jpeg),
        ("b/k.txt", "\ufeffé ".encode()), ("b/k.json", b'{"caption": "the text wins"}'), ("b/k.cls", b"3"),
    ]  # fmt: skip
    path = helpers.write_tar(tmp_path / "x.tar", members)
    report = index_shard(path)
    shard = Shard(path)
    assert [(shard.key(i), shard.caption(i)) for i in range(2)] == [("a/k", "Grüße, Welt"), ("b/k", "é")]
    assert report.ignored == {} and report.quarantine == [] and [shard.label(i) for i in range(2)] == [-1, 3]


def test_index_is_repeatable_and_stale_ones_are_found(helpers, tmp_path):
    path = helpers.write_tar(tmp_path / "x.tar", helpers.good_members(3))
    with pytest.raises(UserError, match=r"no index.*megamug data index"):
        resolve_sources(str(path))
    assert index_shard(path).action == "indexed"
    first = find_index(path).read_bytes()
    assert index_shard(path).action == "up to date"
    os.utime(path, ns=(1, 1))  # another time, the same contents
    assert len(resolve_sources(str(path))[0]) == 3
    assert index_shard(path).action == "unchanged"
    assert len(resolve_sources(str(path))[0]) == 3
    assert index_shard(path, Limits(pixels=100)).action == "indexed"  # other limits
    assert len(Shard(path)) == 0
    helpers.write_tar(path, helpers.good_members(4))  # other contents
    with pytest.raises(UserError, match=r"stale index.*megamug data index"):
        resolve_sources(str(path))
    assert index_shard(path).action == "indexed" and len(Shard(path)) == 4
    index = find_index(path)
    assert index.read_bytes() != first
    for damaged in (index.read_bytes()[:-200], b"x" * 300, b"", index.read_bytes()[:40]):
        index.write_bytes(damaged)
        with pytest.raises(UserError, match="broken index"):
            resolve_sources(str(path))
    index_shard(path)
    assert len(resolve_sources(str(path))[0]) == 4


def test_an_index_that_is_another_when_the_shard_is_opened_is_told(helpers, tmp_path):
    path = helpers.write_tar(tmp_path / "x.tar", helpers.good_members(3))
    index_shard(path)
    shard, other = Shard(path), Shard(path)
    find_index(path).unlink()
    index_shard(path)  # written anew, the same
    assert shard.image_bytes(0)
    index_shard(path, Limits(pixels=100))
    with pytest.raises(OSError, match="replaced by that of another shard while it is in use"):
        other.open()
    shard.close()


def test_read_only_folder_has_its_index_elsewhere(helpers, tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    folder.mkdir()
    path = helpers.write_tar(folder / "x.tar", helpers.good_members(2))
    monkeypatch.setattr("megamug.data.shards.index_file.os.access", lambda *_: False)  # root may write everywhere
    index_paths([folder], processes=1)
    assert [p.name for p in folder.iterdir()] == ["x.tar"]
    assert str(find_index(path)).startswith(os.environ["MEGAMUG_INDEX_DIRECTORY"])
    assert len(resolve_sources(str(folder))[0]) == 2


def test_parallel_over_shards_equals_one_process(helpers, tmp_path):
    for number in range(3):
        helpers.write_tar(tmp_path / f"x-{number}.tar", helpers.good_members(3 + number))
    index_paths([tmp_path], processes=1)
    indexes = {p.name: p.read_bytes() for p in tmp_path.glob("*" + SUFFIX)}
    for p in tmp_path.glob("*" + SUFFIX):
        p.unlink()
    reports = index_paths([str(tmp_path / "*.tar"), tmp_path / "x-1.tar"], processes=2)
    assert [r.samples for r in reports] == [3, 4, 5]
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*" + SUFFIX)} == indexes


def test_summary_and_quarantine_file(helpers, tmp_path):
    path = helpers.write_tar(tmp_path / "x.tar", [*helpers.good_members(1), ("bad.jpg", b"<html>"), ("bad.txt", b"c")])
    reports = index_paths([path], processes=1)
    text = summary(reports)
    assert text.startswith("1 shard (1 indexed): 1 sample, 1 quarantined") and "bad.jpg: not a JPEG" in text
    write_quarantine(tmp_path / "q.jsonl", reports)
    entry = json.loads((tmp_path / "q.jsonl").read_text())
    assert entry["shard"] == str(path) and entry["member"] == "bad.jpg"


def test_dali_absent_is_told(monkeypatch, tmp_path, helpers):
    path = helpers.write_tar(tmp_path / "x.tar", helpers.good_members(1))
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="pip install nvidia-dali-cuda130"):
        index_paths([path])

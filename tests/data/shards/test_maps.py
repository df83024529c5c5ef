"""Maps of classes in shards: what is kept, what is quarantined and why, and packing of folders as ADE20K has them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from megamug import cli
from megamug.data.shards.annotations import Limits
from megamug.data.shards.indexing import summary
from megamug.data.shards.maps import decode_map
from megamug.data.shards.reading import Shard
from megamug.data.shards.sources import check_maps, resolve_sources
from megamug.data.shards.verify import index_shard
from megamug.errors import UserError

VALUES = np.random.RandomState(0).randint(0, 9, (30, 40)).astype(np.uint8)


def png(values=VALUES, mode=None, **options) -> bytes:
    image = Image.fromarray(values)
    buffer = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def palette(values=VALUES, **options) -> bytes:
    indexed = Image.new("P", values.shape[::-1])
    indexed.putdata(values.ravel().tolist())
    indexed.putpalette([7 * (i + 1) % 256 for i in range(768)])  # colours that are not the indices
    buffer = io.BytesIO()
    indexed.save(buffer, "PNG", **options)
    return buffer.getvalue()


BAD = {
    "none": (None, "no map (.seg.png) of this key"),
    "other size": (png(VALUES[:, :39]), "the map is of 39 x 30 pixels, and its image of 40 x 30"),
    "colours": (png(mode="RGB"), "the map is a PNG of colours of 8 bits; grey of 8 bits or a palette is wanted"),
    "16 bits": (png(VALUES.astype(np.uint16)), "a PNG of grey of 16 bits"),
    "1 bit": (png(VALUES > 4), "a PNG of grey of 1 bits"),
    "a JPEG": (b"\xff\xd8\xff\xe0" + bytes(60), "the map is no PNG; it begins with"),
    "cut off": (png()[:-60], "the map does not decode"),
    "empty": (b"", "empty file"),
}


def shard(helpers, path, maps: dict[str, bytes | None]):
    members = []
    for number, (key, data) in enumerate(maps.items()):
        members.append((f"{key}.jpg", helpers.encoded(helpers.picture(number))))
        members += [] if data is None else [(f"{key}.seg.png", data)]
    return helpers.write_tar(path, members)


def test_maps_are_kept_with_their_values(helpers, tmp_path):
    wide = VALUES.copy()
    wide[0] = 255
    wide[1] = 150
    maps = {"a": png(), "b": palette(), "c": png(wide), "d": palette(VALUES, bits=4)}
    path = shard(helpers, tmp_path / "x.tar", maps)
    report = index_shard(path, Limits(maps=True))
    assert (report.samples, report.mapped, report.map_values, report.quarantine) == (4, 4, 151, [])
    assert "maps: 4 samples of values up to 150, 255 not counted" in summary([report])
    opened = Shard(path, verify=True)
    for i, expected in enumerate((VALUES, VALUES, wide, VALUES)):
        _, _, record = opened.read(i, caption=False)
        assert (opened.map(record) == expected).all()
    (source,) = resolve_sources(str(path))
    source.check_maps()
    assert source.map_values == 151


def test_a_bad_map_costs_the_map_or_with_maps_the_sample(helpers, tmp_path):
    maps = {"good": png(), **{key.replace(" ", "_"): data for key, (data, _) in BAD.items()}}
    path = shard(helpers, tmp_path / "x.tar", maps)
    report = index_shard(path)
    assert (report.samples, report.mapped, report.quarantine) == (len(maps), 1, [])
    assert "8 samples without a usable map (none.jpg: no map (.seg.png)" in summary([report])
    with pytest.raises(UserError, match=r"8 of 9 samples without a usable map \(none.jpg: no map.*--maps` leaves out"):
        check_maps(resolve_sources(str(path)))
    opened = Shard(path)
    with pytest.raises(ValueError, match="a sample has no map"):
        opened.map(opened.record(1))
    report = index_shard(path, Limits(maps=True))
    assert (report.action, report.samples, report.mapped) == ("indexed", 1, 1)
    reasons = {entry["key"].replace("_", " "): (entry["member"], entry["reason"]) for entry in report.quarantine}
    assert reasons.keys() == BAD.keys()
    for key, (_, expected) in BAD.items():
        member, reason = reasons[key]
        assert expected in reason and member.endswith(".jpg" if key == "none" else ".seg.png"), (key, reason)


def test_a_map_is_part_of_what_is_compared(helpers, tmp_path):
    path = shard(helpers, tmp_path / "x.tar", {"a": png()})
    index_shard(path)
    data = bytearray(path.read_bytes())
    place = data.index(b"IDAT", data.index(b"a.seg.png")) + 20
    data[place] ^= 1
    stat = path.stat()
    path.write_bytes(data)
    import os

    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(OSError, match="sample 0 is not what was indexed"):
        Shard(path, verify=True).read(0, caption=False)


def test_only_a_map_of_the_right_size_is_decoded():
    bomb = png(np.zeros((4000, 4000), np.uint8))
    with pytest.raises(ValueError, match="of 4000 x 4000 pixels"):
        decode_map(bomb, (30, 40))


def test_a_map_without_an_image_and_a_second_one_are_told(helpers, tmp_path):
    members = [("a.jpg", helpers.encoded()), ("a.seg.png", png()), ("a.seg.png", png()), ("b.seg.png", png())]
    report = index_shard(helpers.write_tar(tmp_path / "x.tar", members))
    assert [entry["reason"] for entry in report.quarantine] == [
        "duplicate key: the first one is used", "a map without a usable image of this key",
    ]  # fmt: skip


def test_folders_of_images_and_maps_are_packed(helpers, tmp_path, capsys):
    for n, name in enumerate(("a/one", "a/two", "b/three", "b/four")):
        image = tmp_path / "images" / f"{name}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(helpers.encoded(helpers.picture(n)))
        if n != 1:
            own = tmp_path / "annotations" / f"{name}.png"
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_bytes(png(VALUES if n != 2 else VALUES[:10]))
    words = ["data", "shards", str(tmp_path / "images"), "--maps", str(tmp_path / "annotations")]
    assert cli.main([*words, "--output", str(tmp_path / "shards")]) == 0
    told = capsys.readouterr().out
    assert f"left out: {tmp_path}/images/a/two.jpg: no map {tmp_path}/annotations/a/two.png" in told
    assert "made of b/three.jpg" in told and "the map is of 40 x 10 pixels, and its image of 40 x 30" in told
    (source,) = resolve_sources(str(tmp_path / "shards"))
    source.check_maps()
    assert len(source) == 2 and source.map_values == 9
    assert cli.main(["data", "shards", str(tmp_path / "images"), "--maps", str(tmp_path / "nowhere"), "--output",
                     str(tmp_path / "other")]) == 2  # fmt: skip
    assert "no such folder; give the one that holds" in capsys.readouterr().err

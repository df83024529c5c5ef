import tarfile

import pytest

from megamug.data.shards.indexing import index_paths
from megamug.data.shards.packing import make_shards
from megamug.data.shards.reading import Shard
from megamug.errors import UserError


@pytest.fixture
def folder(helpers, tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    for name, caption, extension in [("a.jpg", "first", ".txt"), ("sub/b.JPEG", '{"caption": "second"}', ".json")]:
        (source / name).write_bytes(helpers.encoded())
        (source / name).with_suffix(extension).write_text(caption)
    (source / "c.png").write_bytes(helpers.encoded(format="PNG"))
    (source / "c.txt").write_text("third")
    (source / "alone.jpg").write_bytes(helpers.encoded())
    (source / "broken.jpg").write_bytes(helpers.encoded())
    (source / "broken.txt").write_bytes(b"\xff\xfe\xff")
    return source


def captions(shards):
    index_paths(shards, processes=1)
    return [Shard(path).caption(i) for path in shards for i in range(len(Shard(path)))]


def test_folder(folder, tmp_path):
    shards, skipped = make_shards(folder, tmp_path / "out", shard_size=2)
    assert [p.name for p in shards] == ["shard-000000.tar", "shard-000001.tar"]
    assert captions(shards) == ["first", "third", "second"]
    assert sorted((path.name, reason[:12]) for path, reason in skipped) == [
        ("alone.jpg", "no .txt or ."), ("broken.jpg", "'utf-8' code")]  # fmt: skip
    with tarfile.open(shards[0]) as tar:
        assert tar.getnames() == ["000000000.jpg", "000000000.txt", "000000001.png", "000000001.txt"]
    assert tar and Shard(shards[0]).image_bytes(0) == (folder / "a.jpg").read_bytes()


def test_nothing_is_overwritten_silently(folder, tmp_path):
    make_shards(folder, tmp_path / "out", shard_size=1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="is there already"):
        make_shards(folder, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    index_paths([tmp_path / "out"], processes=1)
    shards, _ = make_shards(folder, tmp_path / "out", overwrite=True)
    assert sorted((tmp_path / "out").glob("*.tar")) == shards
    assert captions(shards) == ["first", "third", "second"]


def test_table(folder, tmp_path):
    table = folder / "table.tsv"
    table.write_text("a.jpg\tfrom the table\n\nsub/b.JPEG\tzwei\tDrei\ngone.jpg\tx\n")
    shards, skipped = make_shards(table, tmp_path / "out", prefix="t")
    assert captions(shards) == ["from the table", "zwei Drei"]
    assert [path.name for path, _ in skipped] == ["gone.jpg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("a.jpg no tab\n", "line 1: not `path<TAB>caption`"), ("a.gif\tx\n", "line 1: a.gif is not a"), ("", "no image")],
)
def test_bad_tables(folder, tmp_path, text, message):
    (folder / "table.tsv").write_text(text)
    with pytest.raises(UserError, match=message):
        make_shards(folder / "table.tsv", tmp_path / "out")
    with pytest.raises(UserError, match="neither a folder"):
        make_shards(folder / "none", tmp_path / "out")
    with pytest.raises(UserError, match="plain name"):
        make_shards(folder, tmp_path / "out", prefix="../x")


def test_captions_keep_their_lines(helpers, tmp_path):
    """Packed as one line, `data.caption_lines` has nothing left to choose from."""
    (tmp_path / "source").mkdir()
    for name, caption in (("a.txt", "one\n\n  two  words\n"), ("b.json", '{"caption": ["three", "four\\nfive"]}')):
        (tmp_path / "source" / name).write_text(caption)
        (tmp_path / "source" / name).with_suffix(".jpg").write_bytes(helpers.encoded())
    shards, _ = make_shards(tmp_path / "source", tmp_path / "out")
    index_paths(shards, processes=1)
    shard = Shard(shards[0])
    assert [shard.caption(0, "first"), shard.caption(0, "random", 0.6), shard.caption(0)] == [
        "one", "two words", "one two words"]  # fmt: skip
    assert [shard.caption(1, "first"), shard.caption(1, "random", 0.6)] == ["three", "four five"]

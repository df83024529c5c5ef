import pytest

from megamug.data.shards.sources import resolve_sources
from megamug.errors import UserError


def test_folder_glob_file_and_lists(shard_folder):
    for value in (str(shard_folder), str(shard_folder / "a-*.tar"), [str(shard_folder)]):
        (source,) = resolve_sources(value)
        assert len(source) == 20 and [len(s) for s in source.shards] == [13, 7] and source.weight is None
    shard, place = source.locate(13)
    assert (shard.path.name, place, shard.caption(place)) == ("a-1.tar", 0, "picture number 13")
    first, second = resolve_sources([
        {"path": str(shard_folder / "a-0.tar"), "weight": 0.75}, {"path": str(shard_folder / "a-1.tar"), "weight": 1}
    ])  # fmt: skip
    assert (first.weight, second.weight) == (0.75, 1.0) and first.fingerprint() != second.fingerprint()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere", "nowhere: no such file or folder"), ("nowhere/*.tar", "no file matches"), ([], "empty list"),
        ([{"path": "x", "wieght": 1}], "unknown key 'wieght'"), ([{"weight": 1}], "names no data set"),
        ([{"path": "x", "weight": -1}], "be a number above 0"), ([{"path": "x", "weight": "1"}], "be a number above 0"),
        (["x", {"path": "y", "weight": 1}], "x has no weight"), (None, "names no data set"), (3, "names no data set"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(value, message):
    with pytest.raises(UserError, match=message):
        resolve_sources(value)


def test_a_folder_without_shards(tmp_path):
    with pytest.raises(UserError, match=r"no \.tar shards"):
        resolve_sources(str(tmp_path))


def test_a_compressed_tar_is_told(tmp_path):
    """By its own name, and where a glob or a folder has it among others."""
    (tmp_path / "a.tar.gz").write_bytes(b"")
    for value in (tmp_path / "a.tar.gz", tmp_path / "*.gz", tmp_path):
        with pytest.raises(UserError, match=r"a\.tar\.gz: a compressed tar; .*decompress it first: gunzip"):
            resolve_sources(str(value))


def test_a_link_that_leads_nowhere_is_told_not_passed_over(tmp_path):
    (tmp_path / "a.tar").symlink_to(tmp_path / "gone.tar")
    for value in (tmp_path, tmp_path / "*.tar"):
        with pytest.raises(UserError, match=r"a\.tar is a link to .*gone\.tar, which does not exist; restore that"):
            resolve_sources(str(value))

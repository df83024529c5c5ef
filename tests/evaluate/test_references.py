"""Samples found in COCO's lists by file, by key or by number, and captions that COCO's own tools read."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest

from megamug import cli, evaluate
from megamug.data.shards.indexing import index_paths
from megamug.data.shards.packing import make_shards
from megamug.data.shards.sources import resolve_sources
from megamug.data.shards.tar_writer import write_members
from megamug.errors import UserError
from megamug.evaluate.caption_figures import caption_figures
from megamug.evaluate.references import match
from tests.evaluate.tiny_run import make_data, make_run, tiny_config

FILES = [f"val/COCO_val2014_{id:012d}.png" for id in (42, 7, 391895, 100)]
CAPTIONS = {42: ["a red square", "a  square\n"], 7: ["a green disc"], 391895: ["one blue dot", "a dot", "dot", " "]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    make_data(folder)
    make_run(tiny_config(folder, folder / "run"))
    (folder / "photos" / "val").mkdir(parents=True)
    rng = np.random.default_rng(0)
    from PIL import Image

    for file in FILES:
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / "photos" / file)
    (folder / "captions.json").write_text(json.dumps(coco([(id, FILES[i]) for i, id in enumerate((42, 7, 391895))])))
    return folder


def coco(images) -> dict:
    texts = [(id, text) for id, own in CAPTIONS.items() for text in own]
    return {
        "info": {}, "images": [{"id": id, "file_name": name} for id, name in images],
        "annotations": [{"id": n, "image_id": id, "caption": text} for n, (id, text) in enumerate(texts)],
    }  # fmt: skip


def shards(folder, capsys, *more) -> str:
    """Of the photos, packed with the list; its text."""
    assert cli.main(["data", "shards", str(folder / "photos"), "--output", str(folder / "shards"), "--overwrite",
                     "--captions", str(folder / "captions.json"), *more]) == 0  # fmt: skip
    return capsys.readouterr().out


def test_a_list_is_a_source_of_captions_and_all_are_kept(folder, capsys):
    told = shards(folder, capsys)
    assert "COCO_val2014_000000000100.png: no caption in" in told and "1 image left out" in told
    (source,) = resolve_sources(str(folder / "shards"), captions=True)
    kept = [shard.captions_aside(i) for shard, i in map(source.locate, range(len(source)))]
    assert sorted(kept) == sorted([["a red square", "a square"], ["a green disc"], ["one blue dot", "a dot", "dot"]])
    (shard,) = source.shards
    number = kept.index(["one blue dot", "a dot", "dot"])
    assert [shard.caption(number, how, 0.99) for how in ("first", "random", "join")] == [
        "one blue dot", "dot", "one blue dot a dot dot"
    ]  # fmt: skip
    shard.close()


def test_captions_beside_a_written_set_in_cocos_format(folder, tmp_path, capsys):
    """Each image's captions from the list; what COCO's tool reads back is what was written, and the figures are those
    of these captions."""
    shards(folder, capsys)
    with pytest.raises(UserError, match="is for --task captioning"):
        evaluate.run_task(folder / "run", "reconstruction", references=folder / "captions.json")
    words = ["evaluate", folder / "run", "--task", "captioning", "--data", folder / "shards", "--references",
             folder / "captions.json", "--output", tmp_path, "--json"]  # fmt: skip
    assert cli.main(list(map(str, words))) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["compared"]["samples"] == 3 and figures["compared"]["references"] == 6
    results = [json.loads(line) for line in open(tmp_path / "captioning.jsonl", encoding="utf-8")]
    assert {r["image_id"]: r["references"] for r in results} == {
        42: ["a red square", "a square"], 7: CAPTIONS[7], 391895: ["one blue dot", "a dot", "dot"]
    }  # fmt: skip
    for view in ("masked", "all_visible"):
        want = caption_figures([r[view]["caption"] for r in results], [r["references"] for r in results])
        assert figures[view]["text"] == want
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        read = COCO(folder / "captions.json").loadRes(str(tmp_path / "captioning.coco.json"))
    assert {row["image_id"]: row["caption"] for row in read.anns.values()} == {
        r["image_id"]: r["all_visible"]["caption"] for r in results
    }
    # the same captions in the shards themselves: the same figures, and no ids
    own = evaluate.run_task(folder / "run", "captioning", data=str(folder / "shards"), output=tmp_path / "own")
    assert own["all_visible"]["text"] == figures["all_visible"]["text"] and "coco_results" not in own["compared"]


@pytest.mark.parametrize(("keys", "images", "found"), [
    (["val/COCO_val2014_000000000042", "x"], [(42, FILES[0]), (7, FILES[1]), (391895, FILES[2])], {0: 42}),
    (["COCO_val2014_000000000042", "000000007"], [(42, FILES[0]), (7, FILES[1]), (391895, FILES[2])], {0: 42}),
    (["000000042", "391895"], None, {0: 42, 1: 391895}),
])  # fmt: skip
def test_keys_of_other_shards(folder, tmp_path, keys, images, found, capsys):
    """A running number is an id only where the list names no files."""
    picture = (folder / "photos" / FILES[0]).read_bytes()
    members = [part for key in keys for part in ((f"{key}.png", picture), (f"{key}.txt", b"x"))]
    write_members(tmp_path / "a.tar", members)
    index_paths([tmp_path / "a.tar"], processes=1)
    value = coco(images or [])
    if images is None:
        del value["images"]
    (tmp_path / "list.json").write_text(json.dumps(value))
    got = match(tmp_path / "list.json", resolve_sources(str(tmp_path)))
    assert {key: image.id for (_, key), image in got.images.items()} == {keys[i]: id for i, id in found.items()}
    said = capsys.readouterr().err
    assert ("1 sample of 2 in the data not listed" in said) == (len(found) == 1)
    assert f"{3 - len(found)} image" in said and "of 3 not in the data" in said


def test_what_cannot_be_matched_is_told(folder, tmp_path, capsys):
    shards(folder, capsys)
    sources = resolve_sources(str(folder / "shards"), captions=True)

    def refused(value, match_):
        (tmp_path / "list.json").write_text(value if isinstance(value, str) else json.dumps(value))
        with pytest.raises(UserError, match=match_):
            match(tmp_path / "list.json", sources)

    refused("{", "cannot be read as JSON")
    refused([], "not a list of captions as COCO writes it")
    refused({"images": []}, "KeyError: 'annotations'")
    refused(coco([(42, "a.jpg")]), "an annotation of image 7")
    refused(coco([(42, "a.jpg"), (7, "a.jpg"), (391895, "c.jpg")]), "two images of the same id or file_name")
    refused(coco([(42, "a.jpg"), (7, "b.jpg"), (391895, "c.jpg")]), "none of 3 samples of the data is in this list")
    name = FILES[0].removeprefix("val/")
    refused(coco([(42, f"x/{name}"), (7, f"y/{name}"), (391895, "c.jpg")]), f"two images are called {name}")
    twice = resolve_sources([str(folder / "shards"), str(folder / "again")]) if make_shards(
        folder / "photos", folder / "again", captions=folder / "captions.json"
    ) and index_paths([folder / "again"], processes=1) else None  # fmt: skip
    with pytest.raises(UserError, match="are both image"):
        match(folder / "captions.json", twice)
    with pytest.raises(UserError, match="--captions is for a folder of images"):
        make_shards(tmp_path / "t.tsv", tmp_path / "out", captions=folder / "captions.json")
    del (value := coco([]))["images"]
    (tmp_path / "list.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="nothing says which image a caption is of"):
        make_shards(folder / "photos", tmp_path / "out", captions=tmp_path / "list.json")

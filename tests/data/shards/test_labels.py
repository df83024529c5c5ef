"""Images without captions, and labels: what an index keeps, what it refuses, and how classes are numbered."""

import json
import os
import tarfile
from pathlib import Path

import pytest

from megamug.data.shards.annotations import Limits
from megamug.data.shards.index_file import SAMPLE, find_index, read_header
from megamug.data.shards.indexing import index_paths, summary
from megamug.data.shards.labels import class_number, classes_bytes, label_value, read_classes, read_label_list
from megamug.data.shards.packing import make_shards
from megamug.data.shards.reading import Shard
from megamug.data.shards.sources import WithoutCaptions, check_labels, resolve_sources
from megamug.data.shards.verify import index_shard
from megamug.errors import UserError


def tar(helpers, path, samples):
    """`samples`: key -> {extension: text} beside an image."""
    members = []
    for number, (key, beside) in enumerate(samples.items()):
        members.append((f"{key}.jpg", helpers.encoded(helpers.picture(number))))
        members += [(f"{key}.{extension}", text.encode()) for extension, text in beside.items()]
    path.parent.mkdir(exist_ok=True)
    return helpers.write_tar(path, members)


def named(name):
    return {"json": json.dumps({"label": name})}


def held(shard):
    """Key -> label."""
    return {shard.key(i): shard.label(i) for i in range(len(shard))}


# ------------------------------------------------------------------------------------------- images alone


def test_a_shard_without_captions_holds_images_alone(helpers, tmp_path):
    samples = {"a": {}, "b": {"json": '{"url": "x"}'}, "c": {"json": '{"caption": null}'}}
    path = tar(helpers, tmp_path / "x.tar", samples)
    report = index_shard(path)
    assert (report.samples, report.captioned, report.quarantine) == (3, 0, [])
    shard = Shard(path, verify=True)
    assert [shard.key(i) for i in range(3)] == ["a", "b", "c"] and shard.caption_aside(1) == ""
    assert shard.image_bytes(1) == helpers.encoded(helpers.picture(1))
    with pytest.raises(ValueError, match="sample 1 has no caption"):
        shard.caption(1)
    assert "3 images without a caption: used where captions are not needed" in summary([report])


def test_a_lost_caption_is_quarantined_unless_images_alone_are_asked_for(helpers, tmp_path):
    samples = {"a": {}, "b": {"txt": "one"}, "c": {"json": '{"x": 1}'}, "d": {"txt": "two"}}
    path = tar(helpers, tmp_path / "x.tar", samples)
    report = index_shard(path)
    assert {entry["key"]: entry["reason"][:24] for entry in report.quarantine} == {
        "a": "no caption (.txt or .jso", "c": "bad caption: the JSON ha"}  # fmt: skip
    assert "1 image without a caption among captioned ones: quarantined; --images-alone keeps" in summary([report])
    report = index_shard(path, Limits(images_alone=True))
    shard = Shard(path)
    assert report.action == "indexed" and report.quarantine == [] and report.captioned == 2
    assert [shard.key(i) for i in range(4)] == ["b", "d", "a", "c"]  # those with a caption first
    assert [len(source) for c in (False, True) for source in resolve_sources(str(path), captions=c)] == [4, 2]


def test_a_damaged_json_is_no_sign_of_images_alone(helpers, tmp_path):
    path = tar(helpers, tmp_path / "x.tar", {"a": {}, "b": {"json": "{'caption'"}})
    report = index_shard(path)
    assert report.samples == 0 and len(report.quarantine) == 2


def test_captions_that_cannot_be_read_are_no_sign_of_images_alone(helpers, tmp_path):
    link = tarfile.TarInfo("a.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "b.txt"
    images = [(f"{key}.jpg", helpers.encoded()) for key in "ab"]
    report = index_shard(helpers.write_tar(tmp_path / "x.tar", [*images, link]))
    reasons = [entry["reason"][:10] for entry in report.quarantine]
    assert report.samples == 0 and reasons == ["a link, de", "no caption", "no caption"]
    cut = helpers.write_tar(tmp_path / "y.tar", [*images, ("b.txt", b"x" * 600)])
    cut.write_bytes(cut.read_bytes()[: cut.read_bytes().index(b"x" * 600) + 100])
    report = index_shard(cut)
    assert report.samples == 0 and any("truncated" in entry["reason"] for entry in report.quarantine)
    report = index_shard(helpers.write_tar(tmp_path / "z.tar", [*images, ("README.txt", b"about the set")]))
    assert report.samples == 2 and report.quarantine[0]["member"] == "README.txt"


def test_captions_that_are_wanted_and_absent(helpers, tmp_path):
    tar(helpers, tmp_path / "0.tar", {"a": {}, "b": {}})
    index_paths([tmp_path], processes=1)
    with pytest.raises(WithoutCaptions, match="none of 2 samples has a caption"):
        resolve_sources(str(tmp_path), captions=True)
    tar(helpers, tmp_path / "1.tar", {"c": {"txt": "one"}})
    index_paths([tmp_path], processes=1)
    (source,) = resolve_sources(str(tmp_path), captions=True)
    assert (len(source), source.without_caption(), source.counts()) == (1, 2, [0, 1])
    shard, place = source.locate(0)
    assert shard.key(place) == "c"
    assert source.fingerprint() != resolve_sources(str(tmp_path))[0].fingerprint()


# ------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("data", "is_json", "value"),
    [(b"3", False, 3), (b" 12\n", False, 12), (b"-1", False, -1), (b"3.0", False, "3.0"), (b"dog", False, "dog"),
     (b'{"label": 4}', True, 4), (b'{"label": "dog"}', True, "dog"), (b'{"label": null}', True, None),
     (b'{"class": 4}', True, None), (b"[1]", True, None)],
)  # fmt: skip
def test_what_a_member_says(data, is_json, value):
    assert label_value(data, is_json) == value


@pytest.mark.parametrize(
    ("value", "names", "reason"),
    [(-1, None, "negative"), (2**31, None, "above 2,147,483,646"), (2, ["a", "b"], "none of the 2 classes"),
     ("dog", None, "is not an integer, and there is no classes.txt"), ("dog", ["cat"], "not in classes.txt"),
     ("a", ["a", "a"], "stands more than once")],
)  # fmt: skip
def test_no_class(value, names, reason):
    with pytest.raises(ValueError, match=reason):
        class_number(value, names)


BAD = {
    "negative": ({"cls": "-2"}, "the label -2 is negative", "k.cls"),
    "words": ({"cls": "cat 2"}, "is not an integer", "k.cls"),
    "empty": ({"cls": ""}, "empty file", "k.cls"),
    "long": ({"cls": "1" * 2000}, "2,000 bytes", "k.cls"),
    "fraction": ({"json": '{"label": 1.5}'}, "the label 1.5 is not an integer", "k.json"),
    "truth": ({"json": '{"label": true}'}, "the label true is not an integer", "k.json"),
    "list": ({"json": '{"label": [1, 2]}'}, "is not an integer", "k.json"),
    "broken": ({"json": '{"label"', "txt": "x"}, "the JSON cannot be read", "k.json"),
    "missing": ({}, "no label (.cls, or `label` in .json)", "k.jpg"),
    "large": ({"cls": "99999999999"}, "above 2,147,483,646", "k.cls"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_bad_label_is_quarantined_where_labels_are_asked_for_and_else_told(name, helpers, tmp_path):
    beside, reason, member = BAD[name]
    caption = {} if "json" in beside else {"txt": "a caption"}
    path = tar(helpers, tmp_path / "x.tar", {"a": {"txt": "x", "cls": "7"}, "k": beside | caption})
    report = index_shard(path, Limits(labels=True, images_alone=True))
    (entry,) = report.quarantine
    assert reason in entry["reason"] and entry["member"] == member
    assert held(Shard(path)) == {"a": 7} and (report.labelled, report.classes) == (1, 8)
    report = index_shard(path, Limits(images_alone=True))
    assert report.quarantine == [] and held(Shard(path)) == {"a": 7, "k": -1}
    assert reason in report.unlabelled and "--labels quarantines" in summary([report]).replace("\n", " ")
    with pytest.raises(UserError, match="1 of 2 samples without a usable label"):
        check_labels(resolve_sources(str(path)))


def test_a_cls_wins_over_a_json_and_a_caption_needs_no_label(helpers, tmp_path):
    path = tar(helpers, tmp_path / "x.tar", {
        "a": {"cls": "1", "json": '{"caption": "x", "label": 2}'}, "b": {"txt": "y", "json": '{"label": 2}'},
        "c": {"json": '{"caption": "z", "label": 0}'}, "d": {"txt": "w"},
    })  # fmt: skip
    report = index_shard(path)
    shard = Shard(path, verify=True)
    assert held(shard) == {"a": 1, "b": 2, "c": 0, "d": -1}
    assert [shard.caption(i) for i in range(4)] == ["x", "y", "z", "w"]
    assert (report.labelled, report.classes, report.quarantine) == (3, 3, [])
    plain = tar(helpers, tmp_path / "plain" / "x.tar", {"a": {"txt": "x"}})
    assert "label" not in summary([index_shard(plain)])  # who has no labels hears nothing of them


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_label_that_changed_in_the_shard_is_noticed(keep_time, helpers, tmp_path):
    path = tar(helpers, tmp_path / "x.tar", {"a": {"cls": "1"}, "b": {"cls": "2"}})
    index_shard(path)
    plain, verified = Shard(path), Shard(path, verify=True)
    assert verified.read(0, caption=False)[2]["label"] == 1
    stat, offset = path.stat(), int(plain.record(0)["label_offset"])
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"2")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (0 if keep_time else 1_000_000)))
    with pytest.raises(OSError, match="sample 0 is not what was indexed"):
        verified.read(0, caption=False)
    if not keep_time:
        with pytest.raises(OSError, match="sample 0 is not what was indexed"):
            plain.read(0, caption=False)
    assert verified.read(1, caption=False)[2]["label"] == 2


def test_a_flipped_label_in_the_index_is_noticed(helpers, tmp_path):
    path = tar(helpers, tmp_path / "x.tar", {"a": {"cls": "1"}})
    index_shard(path)
    _, records_at = read_header(find_index(path))
    shard = Shard(path)
    assert shard.label(0) == 1
    with open(find_index(path), "r+b") as file:
        file.seek(records_at + SAMPLE.fields["label"][1])
        file.write(b"\2")
    with pytest.raises(OSError, match="does not agree with its checksum"):
        shard.label(0)


# ------------------------------------------------------------------------------------------- names


def test_names_are_numbered_alike_in_the_sets_of_one_call(helpers, tmp_path):
    train = tar(helpers, tmp_path / "train" / "x.tar", {"a": named("dog"), "b": named("cat")})
    other = tar(helpers, tmp_path / "heldout" / "x.tar", {"c": named("emu"), "d": named("dog")})
    report = index_paths([train], processes=1)[0]
    assert "--labels" in summary([report]) and "no classes.txt" in report.unlabelled and held(Shard(train))["a"] == -1
    index_paths([train.parent, other.parent], limits=Limits(labels=True), processes=1)
    assert held(Shard(train)) == {"a": 1, "b": 0} and held(Shard(other)) == {"c": 2, "d": 1}
    sources = resolve_sources([str(train), str(other)])
    check_labels(sources)
    assert sources[0].class_names() == ["cat", "dog", "emu"] and sources[1].classes == 3
    (other.parent / "classes.txt").write_text("dog\ncat\nemu\n")
    with pytest.raises(UserError, match="indexed with other names of classes than classes.txt"):
        check_labels(sources)
    assert index_shard(other, Limits(labels=True)).action == "indexed" and held(Shard(other)) == {"c": 2, "d": 0}
    with pytest.raises(UserError, match="have different classes.txt"):
        check_labels(resolve_sources([str(train), str(other)]))


def test_a_set_without_names_gets_those_of_the_others(helpers, tmp_path):
    train = tar(helpers, tmp_path / "train" / "x.tar", {"a": named("dog")})
    other = tar(helpers, tmp_path / "heldout" / "x.tar", {"c": named("emu"), "d": named("dog")})
    (train.parent / "classes.txt").write_text("ant\ndog\n\n")
    reports = index_paths([train, other], limits=Limits(labels=True), processes=1)
    assert read_classes(other.parent) == ["ant", "dog"]
    assert held(Shard(other)) == {"d": 1} and "not in classes.txt" in reports[1].quarantine[0]["reason"]


def test_names_and_numbers_together(helpers, tmp_path):
    path = tar(helpers, tmp_path / "x.tar", {"a": named("dog"), "b": {"cls": "3"}})
    with pytest.raises(UserError, match=r"some labels are names, and others numbers \(3\)"):
        index_paths([path], limits=Limits(labels=True), processes=1)
    assert not (tmp_path / "classes.txt").exists()


def test_a_list_of_names_that_is_none(tmp_path):
    for text, said in (("", "line 1: empty"), ("a\n\nb\n", "line 2: empty")):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(UserError, match=said):
            read_classes(tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        read_classes(tmp_path)


# ------------------------------------------------------------------------------------------- packing


@pytest.fixture
def tree(helpers, tmp_path):
    """root/CLASS/image as torchvision's ImageFolder has it, without captions."""
    root = tmp_path / "tree"
    for number, name in enumerate(("b owl/0.jpg", "b owl/deep/1.png", "a/0.jpg", "c/x.jpeg", "loose.jpg")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if name.endswith("png") else "JPEG"
        (root / name).write_bytes(helpers.encoded(helpers.picture(number), format=kind))
    return root


def labels_of(shards):
    """The image's own file -> label, out of the packed tars and their indexes."""
    found = {}
    for path in shards:
        shard = Shard(path)
        with tarfile.open(path) as packed:
            names = {m.name.split(".")[0]: m.pax_headers["MEGAMUG.source"] for m in packed if m.pax_headers}
        found |= {names[key]: label for key, label in held(shard).items()}
    return found


def test_folders_of_classes(tree, tmp_path):
    shards, skipped = make_shards(tree, tmp_path / "out", labels="folders", shard_size=3)
    assert [(path.name, reason) for path, reason in skipped] == [("loose.jpg", "in no folder of a class")]
    index_paths(shards, processes=1)
    assert labels_of(shards) == {"a/0.jpg": 0, "b owl/0.jpg": 1, "b owl/deep/1.png": 1, "c/x.jpeg": 2}
    (source,) = resolve_sources(str(tmp_path / "out"))
    assert source.class_names() == ["a", "b owl", "c"] and source.classes == 3 and len(source) == 4
    check_labels([source])


def test_folders_are_numbered_as_torchvision_does(tree, tmp_path):
    datasets = pytest.importorskip("torchvision.datasets", exc_type=ImportError)
    shards, _ = make_shards(tree, tmp_path / "out", labels="folders")
    index_paths(shards, processes=1)
    theirs = datasets.ImageFolder(str(tree))
    assert labels_of(shards) == {Path(path).relative_to(tree).as_posix(): label for path, label in theirs.samples}
    assert theirs.classes == resolve_sources(str(tmp_path / "out"))[0].class_names()


def test_a_folder_without_an_image_is_no_class(tree, tmp_path):
    (tree / "bb").mkdir()
    with pytest.raises(UserError, match="bb: no image in there"):
        make_shards(tree, tmp_path / "out", labels="folders")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "x.jpg").write_bytes((tree / "loose.jpg").read_bytes())
    with pytest.raises(UserError, match="each folder is a class"):
        make_shards(tmp_path / "flat", tmp_path / "out", labels="folders")
    assert not (tmp_path / "out").exists()


def test_a_flat_folder_and_captions_for_some(tree, tmp_path):
    shards, skipped = make_shards(tree, tmp_path / "out")
    reports = index_paths(shards, processes=1)
    assert (reports[0].samples, reports[0].captioned, skipped) == (5, 0, [])
    with tarfile.open(shards[0]) as packed:
        assert packed.getnames() == [f"{n:09d}.{e}" for n, e in enumerate(("jpg", "jpg", "jpg", "png", "jpeg"))]
    (tree / "a" / "0.txt").write_text("an ant")
    shards, skipped = make_shards(tree, tmp_path / "some")
    assert len(skipped) == 4 and index_paths(shards, processes=1)[0].samples == 1
    shards, skipped = make_shards(tree, tmp_path / "all", images_alone=True)
    report = index_paths(shards, limits=Limits(images_alone=True), processes=1)[0]
    assert (report.samples, report.captioned, skipped) == (5, 1, [])


def test_a_list_as_coco_and_inaturalist_write_it(tree, tmp_path):
    value = {
        "images": [{"id": 10, "file_name": "a/0.jpg"}, {"id": 11, "file_name": "c/x.jpeg"},
                   {"id": 12, "file_name": "b owl/0.jpg"}, {"id": 13, "file_name": "gone.jpg"}],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 5, "name": "aeroplane"}],
        "annotations": [{"image_id": 10, "category_id": 90}, {"image_id": 10, "category_id": 90},
                        {"image_id": 11, "category_id": 5}, {"image_id": 12, "category_id": 5},
                        {"image_id": 12, "category_id": 90}, {"image_id": 13, "category_id": 5}],
    }  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps(value))
    shards, skipped = make_shards(tree, tmp_path / "out", labels=str(tmp_path / "list.json"))
    index_paths(shards, processes=1)
    assert labels_of(shards) == {"a/0.jpg": 1, "c/x.jpeg": 0}
    assert resolve_sources(str(tmp_path / "out"))[0].class_names() == ["aeroplane", "toothbrush"]
    reasons = {path.relative_to(tree).as_posix(): reason for path, reason in skipped}
    assert reasons["b owl/0.jpg"] == "2 categories, so no one class" and "no such image" in reasons["gone.jpg"]
    assert reasons["loose.jpg"].startswith("no label in ") and len(reasons) == 4
    for broken, said in (
        ({**value, "annotations": [{"image_id": 10, "category_id": 6}]}, "category 6"),
        ({**value, "categories": value["categories"] * 2}, "of the same id"), ({"images": []}, "KeyError"),
        ([], "TypeError"),
    ):  # fmt: skip
        (tmp_path / "list.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=said):
            read_label_list(tmp_path / "list.json", [])


@pytest.mark.parametrize(
    ("text", "numbers", "names"),
    [("/a/0.jpg 7\nb owl/0.jpg 0\n\n", {"a/0.jpg": 7, "b owl/0.jpg": 0}, None),
     ("a/0.jpg zoo\n./c/x.jpeg airfield\n", {"a/0.jpg": 1, "c/x.jpeg": 0}, ["airfield", "zoo"])],
)  # fmt: skip
def test_a_list_of_lines_as_places365_writes_it(text, numbers, names, tree, tmp_path):
    (tmp_path / "list.txt").write_text(text)
    shards, _ = make_shards(tree, tmp_path / "out", labels=str(tmp_path / "list.txt"))
    index_paths(shards, processes=1)
    assert labels_of(shards) == numbers
    assert resolve_sources(str(tmp_path / "out"))[0].class_names() == names


@pytest.mark.parametrize(
    ("text", "said"),
    [("a/0.jpg\n", "line 1: not `path label`"), ("a 1\na 2\n", "line 2: a has the label 1 further up"),
     ("a 1\nb x\n", "some labels are numbers, and 'x' is none"), ("\n", "no line"), ("a -1\n", "negative")],
)  # fmt: skip
def test_bad_lists_of_lines(text, said, tree, tmp_path):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=said):
        make_shards(tree, tmp_path / "out", labels=str(tmp_path / "list.txt"))
    with pytest.raises(UserError, match="cannot be read"):
        make_shards(tree, tmp_path / "out", labels=str(tmp_path / "absent.json"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", " ant", "ant ", "an\tt", "an\nt"])
def test_a_name_that_does_not_fit_into_a_line(name):
    assert classes_bytes(["b owl", "ant"]) == b"b owl\nant\n"
    with pytest.raises(UserError, match=r"the class .* does not fit into a line of classes\.txt; rename it"):
        classes_bytes(["owl", name])


def test_other_classes_are_not_overwritten_silently(tree, tmp_path):
    make_shards(tree, tmp_path / "out", labels="folders")
    (tree / "a").rename(tree / "z")
    with pytest.raises(UserError, match="names other classes"):
        make_shards(tree, tmp_path / "out", labels="folders", prefix="more")
    shards, _ = make_shards(tree, tmp_path / "out", labels="folders", overwrite=True)
    index_paths(shards, processes=1)
    assert labels_of(shards)["z/0.jpg"] == 2 and read_classes(tmp_path / "out") == ["b owl", "c", "z"]

"""Documents in shards -> tokenised documents."""

import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import megamug.data.documents.tokenizer as document_tokenizer
from megamug.data.documents.indexed import IMAGE, RESPONSE, DocumentSet
from megamug.data.documents.reading import Picture
from megamug.data.shards.indexing import index_paths
from megamug.data.shards.sources import resolve_sources
from megamug.errors import UserError
from megamug.models.image_tokenizer.encoder import ImageEncoder
from megamug.models.image_tokenizer.model import from_bytes
from megamug.models.image_tokenizer.vocabulary import load_image_tokenizer, make_vocabulary
from tests.data.language import tiny_image_tokenizer, tiny_vocabulary
from tests.distributed.launch import python_path

tokenize_documents = functools.partial(document_tokenizer.tokenize_documents, open_encoder=ImageEncoder)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tiny_vocabulary(tmp_path_factory.mktemp("vocabulary"))


def instruction(number, helpers):
    """One interleaved document of three segments, its image 40 x 30 pixels."""
    segments = [
        {"text": "draw  two\ntriangles", "role": "prompt"}, {"text": f"look {number}", "role": "response"},
        {"image": "0.jpg", "role": "response"},
    ]  # fmt: skip
    key = f"{number:04d}"
    return [
        (f"{key}.json", json.dumps({"segments": segments}).encode()),
        (f"{key}.0.jpg", helpers.encoded(helpers.picture(number), quality=95)),
    ]


def read(folder, vocabulary):
    """[(text with marks, modes of the segments)] of all documents."""
    documents = DocumentSet(folder, vocabulary)
    found = []
    for n in range(len(documents)):
        tokens, _ = documents.document(n)
        images = vocabulary.is_image(tokens)
        text = " ".join("I" if image else vocabulary.name(t) for t, image in zip(tokens.tolist(), images, strict=True))
        found.append((text, documents.modes[slice(*documents.first_segments[n : n + 2])].tolist()))
    return found


def test_pairs_in_both_orders(vocabulary, shard_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(document_tokenizer, "CHUNK", 6)
    report = tokenize_documents([shard_folder], vocabulary.folder, tmp_path / "out", workers=1)
    made = report.header
    assert (made.documents, made.images, made.text_segments, made.responses, made.quarantined) == (20, 20, 20, 0, 0)
    documents = DocumentSet(tmp_path / "out", vocabulary)
    firsts = documents.modes[documents.first_segments[:-1]]
    assert 4 < (firsts == IMAGE).sum() < 16
    for n in range(20):
        tokens, modes = documents.document(n)
        assert tokens[0] == vocabulary.bos_id and tokens[-1] == vocabulary.eos_id
        assert (tokens == vocabulary.break_id).sum() == 1 and vocabulary.is_image(tokens).sum() == 16
        assert vocabulary.decode_text(tokens) == f"picture number {n}"
    for order, first in (("caption_first", 0), ("image_first", IMAGE)):
        tokenize_documents([shard_folder], vocabulary.folder, tmp_path / order, workers=1, pair_order=order)
        documents_ = DocumentSet(tmp_path / order, vocabulary)
        assert (documents_.modes[documents_.first_segments[:-1]] == first).all()
    again = tokenize_documents([shard_folder], vocabulary.folder, tmp_path / "out", workers=1)
    assert again.action == "up to date" and again.header == made
    assert not (tmp_path / "out" / "parts").exists()


def test_captions_of_several_lines(vocabulary, helpers, tmp_path, monkeypatch):
    """`--caption-lines`: all of them, the first, or one by (seed, sample), whatever the chunks."""
    members = []
    for n in range(24):
        caption = ("c.json", b'{"caption": ["two triangles", "a red circle"]}') if n % 2 else (
            "c.txt", b"two triangles\na red circle\n")  # fmt: skip
        members += [(f"{n:03d}.jpg", helpers.encoded(helpers.picture(n))), (f"{n:03d}{caption[0][1:]}", caption[1])]
    helpers.write_tar(tmp_path / "s.tar", members)
    index_paths([tmp_path / "s.tar"], processes=1)

    def texts(name, **options):
        tokenize_documents([tmp_path / "s.tar"], vocabulary.folder, tmp_path / name, workers=1, **options)
        documents = DocumentSet(tmp_path / name, vocabulary)
        return [vocabulary.decode_text(documents.document(n)[0]) for n in range(len(documents))]

    assert texts("default") == texts("join", caption_lines="join") == ["two triangles a red circle"] * 24
    assert texts("first", caption_lines="first") == ["two triangles"] * 24
    drawn = texts("random", caption_lines="random")
    assert set(drawn) == {"two triangles", "a red circle"} and 4 < drawn.count("two triangles") < 20
    monkeypatch.setattr(document_tokenizer, "CHUNK", 5)
    assert texts("chunks", caption_lines="random") == drawn
    assert texts("seed", caption_lines="random", seed=2) != drawn
    with pytest.raises(UserError, match="with other caption_lines"):
        texts("chunks", caption_lines="first")
    with pytest.raises(UserError, match="--caption-lines is 'last'; it is one of join, first, random"):
        texts("last", caption_lines="last")


def test_an_interrupted_call_from_before_there_were_caption_lines_goes_on(vocabulary, texts, tmp_path):
    made = tokenize_documents(texts, vocabulary.folder, tmp_path / "out", workers=1)
    request = json.loads((tmp_path / "out" / "request.json").read_text())
    del request["caption_lines"]
    (tmp_path / "out" / "request.json").write_text(json.dumps(request))
    again = tokenize_documents(texts, vocabulary.folder, tmp_path / "out", workers=1)
    assert again.action == "up to date" and again.header == made.header


def test_images_are_the_tokenizers_codes(vocabulary, shard_folder, tmp_path):
    tokenize_documents([shard_folder], vocabulary.folder, tmp_path / "out", workers=1, pair_order="image_first")
    documents = DocumentSet(tmp_path / "out", vocabulary)
    shard, _ = resolve_sources(str(shard_folder))[0].locate(3)
    image = Image.open(io.BytesIO(shard.image_bytes(3))).convert("RGB")
    left, top = (image.width - 30) // 2, (image.height - 30) // 2
    square = image.crop((left, top, left + 30, top + 30)).resize((32, 32), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)[None]
    expected = vocabulary.image_ids(load_image_tokenizer(vocabulary).encode(from_bytes(pixels)).numpy()).ravel()
    tokens, _ = documents.document(3)
    assert (tokens[1:17] == expected).mean() > 0.8  # another resampling than DALI's; untrained codes are close together


def test_interleaved_documents_with_roles_and_text_alone(vocabulary, helpers, tmp_path):
    members = instruction(7, helpers)
    members += [("a.json", b'{"text": "two triangles"}'), ("b.txt", "\ufefftwo  triangles\n\tand so on\n".encode())]
    helpers.write_tar(tmp_path / "d.tar", members)
    report = tokenize_documents([tmp_path / "d.tar"], vocabulary.folder, tmp_path / "out", workers=1)
    assert (report.header.documents, report.header.images, report.header.responses) == (3, 1, 2)
    first, second, third = read(tmp_path / "out", vocabulary)
    assert first[1] == [0, RESPONSE, IMAGE | RESPONSE] and second[1] == third[1] == [0]
    assert second[0].startswith("<bos>") and second[0].endswith("<eos>") and "<break>" not in second[0]
    assert first[0].count("<break>") == 1 and first[0].endswith("<break> " + "I " * 16 + "<eos>")
    texts = [vocabulary.decode_text(DocumentSet(tmp_path / "out", vocabulary).document(n)[0]) for n in range(3)]
    # White space is part of a document; a segment begins a word.
    assert texts == ["draw  two\ntriangles look 7", "two triangles", "two  triangles\n\tand so on\n"]


def test_what_is_broken_is_quarantined_with_its_reason(vocabulary, helpers, tmp_path):
    good, broken = instruction(1, helpers), instruction(2, helpers)
    cut = [broken[0], (broken[1][0], broken[1][1][: len(broken[1][1]) * 3 // 4])]
    members = [*good, *cut]

    def document(key, value):
        members.append((f"{key}.json", value if isinstance(value, bytes) else json.dumps(value).encode()))

    document("c", b'{"segments": [')
    document("d", {"segments": [{"image": "0.jpg"}]})
    document("e", {"segments": [{"text": "x", "role": "system"}]})
    document("f", {"segments": [{"text": " "}]})
    document("g", {"caption": "two"})
    document("h", {"segments": []})
    document("i", {"segments": [{"text": "x", "image": "0.jpg"}]})
    members += [("j.txt", b"\xff\xfe"), ("k.jpg", good[1][1]), ("k.txt", b"two"), ("l.bin", b"?")]
    members += [("m.json", b'{"segments": [{"image": "0.png"}]}'), ("m.0.png", b"no image")]
    helpers.write_tar(tmp_path / "d.tar", members)
    report = tokenize_documents([tmp_path / "d.tar"], vocabulary.folder, tmp_path / "out", workers=1)
    reasons = {entry["key"]: entry["reason"] for entry in report.quarantine}
    wanted = {
        "0002": "does not decode", "c": "not JSON", "d": "has no such member", "e": "prompt or response",
        "f": "text is empty", "g": "neither a list", "h": "not a list", "i": "exactly one", "j": "not UTF-8",
        "k": "megamug data index", "l": "no .json", "m": "not a JPEG, PNG",
    }  # fmt: skip
    assert set(reasons) == set(wanted) and all(wanted[key] in reasons[key] for key in wanted), reasons
    assert report.header.documents == 1 and report.header.quarantined == len(wanted)
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == report.quarantine


def test_images_without_a_caption_make_no_document(vocabulary, helpers, tmp_path):
    alone = helpers.write_tar(tmp_path / "0.tar", [(f"{n}.jpg", helpers.encoded(helpers.picture(n))) for n in range(3)])
    index_paths([alone], processes=1)
    with pytest.raises(UserError, match="no sample with a caption in 1 shard"):
        tokenize_documents([alone], vocabulary.folder, tmp_path / "out", workers=1)
    helpers.write_tar(tmp_path / "1.tar", helpers.good_members(2))
    index_paths([tmp_path], processes=1)
    report = tokenize_documents([alone, tmp_path / "1.tar"], vocabulary.folder, tmp_path / "out", workers=1)
    assert report.header.documents == 2
    (entry,) = report.quarantine
    assert entry["reason"] == "3 images without a caption: no document is made of an image alone"


def test_mistakes_are_told(vocabulary, helpers, shard_folder, tmp_path):
    tokenize_documents([shard_folder], vocabulary.folder, tmp_path / "out", workers=1)
    with pytest.raises(UserError, match="tokenised with other seed"):
        tokenize_documents([shard_folder], vocabulary.folder, tmp_path / "out", workers=1, seed=2)
    other = tiny_vocabulary(tmp_path, sentinels=3)
    with pytest.raises(UserError, match=f"other vocabulary .{vocabulary.fingerprint()[:12]}, asked"):
        tokenize_documents([shard_folder], other.folder, tmp_path / "out", workers=1)
    tokenize_documents([shard_folder], other.folder, tmp_path / "out", workers=1, overwrite=True)
    assert len(DocumentSet(tmp_path / "out", other)) == 20
    text_alone = make_vocabulary(tmp_path / "t.model", None, 3, tmp_path / "text")
    with pytest.raises(UserError, match="not one document in 2 shards.*vocabulary is of text alone"):
        tokenize_documents([shard_folder], text_alone.folder, tmp_path / "none", workers=1)
    with pytest.raises(UserError, match="is no folder of tokenised documents"):
        tokenize_documents([shard_folder], vocabulary.folder, shard_folder, workers=1)
    larger = tmp_path / "larger"
    larger.mkdir()
    (larger / "v").mkdir()
    tiny_image_tokenizer(larger / "vq", image_size=64)
    made = make_vocabulary(tmp_path / "t.model", larger / "vq", 3, larger / "v")
    assert made.image_tokens == 64
    with pytest.raises(UserError, match="tokenised with another vocabulary"):
        DocumentSet(tmp_path / "out", made)


@pytest.fixture
def texts(helpers, tmp_path):
    """150 documents of text in two shards, one of them broken."""
    members = [(f"{n:04d}.txt", f"look at {n} triangles".encode()) for n in range(150)]
    members[7] = ("0007.txt", b"\xff")
    return [helpers.write_tar(tmp_path / f"{i}.tar", members[i * 90 : (i + 1) * 90]) for i in range(2)]


def assert_the_same(found, wanted):
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in wanted.iterdir())
    for name in ("documents.bin", "documents.idx", "documents.json", "quarantine.jsonl"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes()


def test_killed_and_continued_with_other_workers_the_result_is_the_same(vocabulary, texts, tmp_path, monkeypatch):
    code = (
        "import sys, megamug.data.documents.tokenizer as t\n"
        "import megamug.models.image_tokenizer.encoder as e\nt.CHUNK = 1\n"
        f"t.tokenize_documents({list(map(str, texts))!r}, {str(vocabulary.folder)!r}, sys.argv[1], e.ImageEncoder,"
        " workers=1)"
    )
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(killed)], start_new_session=True, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and len(list(killed.glob("parts/*.npz"))) < 40:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and 40 <= len(list(killed.glob("parts/*.npz"))) < 150
    monkeypatch.setattr(document_tokenizer, "CHUNK", 1)
    tokenize_documents(texts, vocabulary.folder, tmp_path / "whole", workers=1)
    report = tokenize_documents(texts, vocabulary.folder, killed, workers=2)
    assert report.header.documents == 149 and report.header.quarantined == 1
    assert_the_same(killed, tmp_path / "whole")


@pytest.mark.parametrize("before", [True, False])
def test_dying_at_every_rename_loses_and_doubles_nothing(vocabulary, texts, tmp_path, monkeypatch, before):
    """A call dies before or behind its n-th rename: of the request, of each part, and of what is joined."""

    class Died(BaseException):
        pass

    monkeypatch.setattr(document_tokenizer, "CHUNK", 60)
    tokenize_documents(texts, vocabulary.folder, tmp_path / "whole", workers=1)
    replace, left = os.replace, 0

    def dying(source, target):
        nonlocal left
        left -= 1
        if left == 0 and before:
            raise Died
        replace(source, target)
        if left == 0:
            raise Died

    monkeypatch.setattr(os, "replace", dying)
    for parts_there in (False, True):
        output = tmp_path / f"dying-{parts_there}"
        for rename in range(1, 12):
            left = rename
            try:
                tokenize_documents(texts, vocabulary.folder, output, workers=1)
            except Died:
                if not parts_there:  # the next call meets what this one left, and nothing else
                    left = 0
                    tokenize_documents(texts, vocabulary.folder, output, workers=1)
                    assert_the_same(output, tmp_path / "whole")
                    shutil.rmtree(output)
            else:
                break
        assert rename > (4 if parts_there else 7)  # request, 3 parts, .bin, .idx, quarantine, documents.json
        assert_the_same(output, tmp_path / "whole")


def test_megatron_reads_it(vocabulary, shard_folder, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenize_documents([shard_folder], vocabulary.folder, tmp_path / "out", workers=1)
    theirs, ours = IndexedDataset(str(tmp_path / "out" / "documents"), multimodal=True), DocumentSet(
        tmp_path / "out", vocabulary
    )
    assert len(theirs) == 40 and theirs.document_indices.tolist() == list(range(0, 41, 2))
    for n in range(20):
        segments, modes = theirs[2 * n : 2 * n + 2]
        assert (np.concatenate(segments) == ours.document(n)[0]).all() and sorted(modes.tolist()) == [0, IMAGE]


def test_transparent_pictures_have_the_background_of_the_image_tokenizer(vocabulary):
    """As in its training; the ids of a clear picture are those of a plain one of that colour."""
    encode = ImageEncoder(vocabulary, batch=3)
    made = []
    for picture in (Image.new("RGBA", (20, 20), (0, 0, 0, 0)), Image.new("RGB", (20, 20), "white"),
                    Image.new("RGB", (20, 20), "black")):  # fmt: skip
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        made.append(Picture("x.png", buffer.getvalue(), 20, 20))
    clear, white, black = encode(made)
    assert (clear == white).all() and (white != black).any()

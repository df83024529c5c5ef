"""One vocabulary for text and images."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from megamug.commands.vocabulary import main as command
from megamug.data.documents.cm3 import restore
from megamug.data.documents.indexed import DocumentSet
from megamug.data.documents.packing import RowMaker
from megamug.data.documents.vocabulary import Vocabulary
from megamug.data.pairs.text import train_tokenizer
from megamug.data.text.tokenizer import Tokenizer
from megamug.errors import UserError
from megamug.models.image_tokenizer.vocabulary import load_image_tokenizer, make_vocabulary
from tests.data.language import TEXTS, some_documents, tiny_image_tokenizer, write_set
from tests.data.text.foreign import TEXTS as FOREIGN_TEXTS
from tests.data.text.foreign import llama_sentencepiece, tokenizer_json


@pytest.fixture
def parts(tmp_path):
    """(text model, image tokenizer folder)."""
    train_tokenizer(TEXTS, tmp_path / "t.model", 300)
    return tmp_path / "t.model", tiny_image_tokenizer(tmp_path / "vq")


def test_ids_follow_one_another_without_a_gap(parts, tmp_path):
    v = make_vocabulary(*parts, 5, tmp_path / "v")
    assert v.first_code == v.text_pieces and v.codes == 16 and v.image_tokens == 16 and v.image_grid == (4, 4)
    ids = [v.first_code + v.codes, *range(v.break_id + 1, v.size)]
    assert ids == [v.break_id, v.eoss_id, v.mask_id, *v.sentinels] and len(v.sentinels) == 5
    assert v.padded_size % 128 == 0 and 0 <= v.padded_size - v.size < 128
    assert (v.pad_id, v.bos_id, v.eos_id) == (0, 1, 2)
    assert [v.name(i) for i in (0, 1, 2, v.first_code, v.break_id, v.mask_id, v.sentinels[4], v.size)] == [
        "<pad>", "<bos>", "<eos>", "<image 0>", "<break>", "<mask>", "<sentinel 4>", f"<unused {v.size}>"]  # fmt: skip


def test_text_and_images_go_there_and_back(parts, tmp_path):
    v = make_vocabulary(*parts, 5, tmp_path / "v")
    text = v.encode_text("a red square")
    assert max(text) < v.text_pieces and v.decode_text([v.bos_id, *text, v.break_id, v.first_code]) == "a red square"
    codes = np.arange(16).reshape(4, 4)
    ids = v.image_ids(codes).ravel()
    assert v.is_image(ids).all() and not v.is_image(np.array([*text, v.break_id, *v.sentinels])).any()
    assert (v.image_codes(ids) == codes).all()
    assert load_image_tokenizer(v).config.codes == 16


def test_a_vocabulary_is_made_once_and_loads_as_it_was(parts, tmp_path):
    v = make_vocabulary(*parts, 5, tmp_path / "v")
    again = make_vocabulary(*parts, 5, tmp_path / "v")
    assert Vocabulary.load(tmp_path / "v").fingerprint() == again.fingerprint() == v.fingerprint()
    with pytest.raises(UserError, match="holds another vocabulary"):
        make_vocabulary(*parts, 6, tmp_path / "v")
    other = make_vocabulary(*parts, 6, tmp_path / "v", overwrite=True)
    assert other.fingerprint() != v.fingerprint() and len(other.sentinels) == 6
    text_alone = make_vocabulary(parts[0], None, 6, tmp_path / "v", overwrite=True)
    assert text_alone.codes == text_alone.image_tokens == 0 and not (tmp_path / "v" / "image_tokenizer").exists()
    with pytest.raises(UserError, match="text alone"):
        load_image_tokenizer(text_alone)


def test_mistakes_are_told(parts, tmp_path):
    v = make_vocabulary(*parts, 5, tmp_path / "v")
    for codes in ([16], [-1]):
        with pytest.raises(UserError, match="outside the codebook of 16"):
            v.image_ids(np.array(codes))
    with pytest.raises(UserError, match="an image has 16"):
        v.image_codes(np.arange(15) + v.first_code)
    with pytest.raises(UserError, match="is no image code"):
        v.image_codes(np.arange(16) + v.first_code + 1)
    with pytest.raises(UserError, match="at least 1"):
        make_vocabulary(*parts, 0, tmp_path / "w")
    with pytest.raises(UserError, match="is a file"):
        Vocabulary.load(parts[0])
    with pytest.raises(UserError, match=r"vocabulary.json is missing"):
        Vocabulary.load(tmp_path)
    shutil.rmtree(tmp_path / "v" / "image_tokenizer")
    tiny_image_tokenizer(tmp_path / "v" / "image_tokenizer", seed=1)
    with pytest.raises(UserError, match="its fingerprint is"):
        load_image_tokenizer(v)
    train_tokenizer(["quite another text"], tmp_path / "v" / "text.model", 290, overwrite=True)
    with pytest.raises(UserError, match="another model"):
        Vocabulary.load(tmp_path / "v")
    (tmp_path / "v" / "vocabulary.json").write_text(json.dumps({"text_pieces": 3}))
    with pytest.raises(UserError, match="not a vocabulary"):
        Vocabulary.load(tmp_path / "v")


def test_a_vocabulary_of_a_tokenizer_trained_here_keeps_its_fingerprint(parts, tmp_path):
    """Documents and checkpoints of earlier versions name it."""
    v = make_vocabulary(*parts, 5, tmp_path / "v")
    written = json.loads((tmp_path / "v" / "vocabulary.json").read_text())
    assert set(written) == {"text_pieces", "text_sha256", "codes", "image_grid", "image_size", "image_tokenizer",
                            "sentinels", "version"}  # fmt: skip
    assert written["text_sha256"] == hashlib.sha256(parts[0].read_bytes()).hexdigest()
    assert v.fingerprint() == hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("kind", ["llama", "bpe", "bpe_llama3", "unigram", "wordpiece"])
def test_ids_of_a_foreign_tokenizer_stay_and_ours_lie_behind(parts, tmp_path, kind):
    path = llama_sentencepiece(tmp_path) if kind == "llama" else tokenizer_json(kind, tmp_path / "t.json")
    own = Tokenizer(path)
    v = make_vocabulary(path, parts[1], 5, tmp_path / "v")
    path.unlink()
    again = Vocabulary.load(tmp_path / "v")
    assert again.fingerprint() == v.fingerprint() and (again.bos_id, again.eos_id) == (own.bos_id, own.eos_id)
    ids = own.encode(FOREIGN_TEXTS[0])
    assert again.encode_text(FOREIGN_TEXTS[0]) == ids and again.first_code == own.pieces
    framed = [v.bos_id, *ids, v.break_id, v.first_code, *v.sentinels, v.pad_id, v.eos_id]
    assert v.decode_text(framed) == own.decode(ids)
    assert v.size == own.pieces + 16 + 3 + 5 + (own.marks.pad is None)
    assert v.pad_id == (v.size - 1 if own.marks.pad is None else own.marks.pad) and v.name(v.pad_id) == "<pad>"
    assert v.name(v.eos_id) == ("<bos>" if v.eos_id == v.bos_id else "<eos>")
    hidden = v.without_text(np.array(framed))
    assert hidden.tolist() == [v.bos_id, *[v.mask_id] * len(ids), *framed[1 + len(ids) :]]
    assert Vocabulary.load(shutil.copytree(tmp_path / "v", tmp_path / "moved")).fingerprint() == v.fingerprint()


def test_marks_that_the_user_names_and_files_that_were_changed(parts, tmp_path, capsys):
    path = tokenizer_json("bpe_llama3", tmp_path / "t.json")
    command([f"--text={path}", "--end", "<|eot_id|>", "--pad", "<|end_of_text|>", f"--output={tmp_path / 'v'}"])
    assert "begin 0, end 2, padding 1; fingerprint" in capsys.readouterr().out
    v = Vocabulary.load(tmp_path / "v")
    assert (v.bos_id, v.eos_id, v.pad_id) == (0, 2, 1)
    with pytest.raises(UserError, match="holds another vocabulary"):
        make_vocabulary(path, None, 512, tmp_path / "v")  # the file's own end
    with pytest.raises(UserError, match="has no token '<stop>' to end a text"):
        command([f"--text={path}", "--end", "<stop>", f"--output={tmp_path / 'w'}"])
    spec = tmp_path / "v" / "vocabulary.json"
    before = json.loads(spec.read_text())
    for change, said in (({"begin": 900}, "a mark 900"), ({"pad": 900}, "a mark 900"), ({"end": 1}, "another model"),
                         ({"text_file": "../t"}, "text_file '../t'")):  # fmt: skip
        spec.write_text(json.dumps(before | change))
        with pytest.raises(UserError, match=said):
            Vocabulary.load(tmp_path / "v")
    spec.write_text(json.dumps(before))
    (tmp_path / "v" / "text.json").unlink()
    with pytest.raises(UserError, match="text.json is missing"):
        Vocabulary.load(tmp_path / "v")
    train_tokenizer(TEXTS, tmp_path / "own.model", 300)
    make_vocabulary(tmp_path / "own.model", None, 5, tmp_path / "v", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "v").iterdir()) == ["text.model", "vocabulary.json"]


@pytest.mark.parametrize("kind", ["bpe", "llama"])  # one mark for begin and end; no padding
def test_documents_of_a_foreign_vocabulary_are_packed_and_masked(parts, tmp_path, kind):
    path = llama_sentencepiece(tmp_path) if kind == "llama" else tokenizer_json(kind, tmp_path / "t.json")
    v = make_vocabulary(path, parts[1], 8, tmp_path / "v")
    documents = DocumentSet(write_set(tmp_path / "set", v, some_documents(v, 60)), v)
    maker = RowMaker(documents, v, context_length=63, cm3_spans=1.0, loss_on="all", seed=1)
    rows = maker.make(np.arange(len(maker)), np.zeros(len(maker), np.int64))
    seen = 0
    for tokens, segments, loss in zip(rows.tokens, rows.segments, rows.loss, strict=True):
        pieces = int(segments.max())
        assert (tokens[segments == pieces] == v.pad_id).all() and not loss[segments == pieces].any()
        for piece in range(pieces):
            document = restore(tokens[segments == piece], v)
            assert document[0] == v.bos_id and document[-1] == v.eos_id and v.eos_id not in document[1:-1]
            assert v.pad_id not in document
            seen += 1
    assert seen == 60 and (rows.tokens == v.pad_id).any() and np.isin(rows.tokens, v.sentinels).any()

"""One vocabulary for text and images."""

import json
import shutil

import numpy as np
import pytest

from megamug.data.documents.vocabulary import Vocabulary
from megamug.data.pairs.text import train_tokenizer
from megamug.errors import UserError
from megamug.models.image_tokenizer.vocabulary import load_image_tokenizer, make_vocabulary
from tests.data.language import TEXTS, tiny_image_tokenizer


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

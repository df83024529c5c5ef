"""Tokenizers of others: ids and texts as their own libraries make them, and which tokens frame a text."""

from __future__ import annotations

import json

import pytest

from megamug.data.pairs.text import train_tokenizer
from megamug.data.text.tokenizer import Tokenizer
from megamug.data.text.tokenizer_json import TokenizerJson
from megamug.errors import UserError
from tests.data.text.foreign import TEXTS, edited, llama_sentencepiece, strings, tokenizer_json

COUNT = 10_000
# Begin, end and padding of each; None: an id behind the tokenizer's.
JSON = {"bpe": (0, 0, None), "bpe_llama3": (0, 1, None), "wordpiece": (2, 3, 0), "unigram": (1, 2, None)}


def test_sentencepiece_with_the_ids_of_llama_is_the_library_s(tmp_path):
    import sentencepiece

    path = llama_sentencepiece(tmp_path)
    library, own = sentencepiece.SentencePieceProcessor(str(path)), Tokenizer(path)
    assert (own.bos_id, own.eos_id, own.pad_id) == (1, 2, own.pieces) and own.vocab_size == own.pieces + 1
    byte_tokens = 0
    for text in strings(COUNT):
        ids = library.EncodeAsIds(text)
        assert own.encode(text) == ids, text
        assert own.decode([own.bos_id, *ids, own.eos_id, own.pad_id]) == library.DecodeIds(ids)
        byte_tokens += sum(library.IsByte(i) for i in ids)
    assert byte_tokens > COUNT  # bytes stand in for what has no piece


@pytest.mark.parametrize("kind", JSON)
def test_a_tokenizer_json_is_the_library_s(tmp_path, kind):
    import tokenizers

    path = tokenizer_json(kind, tmp_path / "tokenizer.json")
    library, own = tokenizers.Tokenizer.from_file(str(path)), Tokenizer(path)
    library.no_truncation()
    library.no_padding()
    bos, eos, pad = JSON[kind]
    assert (own.bos_id, own.eos_id, own.marks.pad) == (bos, eos, pad) and own.pieces == library.get_vocab_size()
    assert own.pad_id == (own.pieces if pad is None else pad)
    longest = 0
    for text in strings(COUNT):
        ids = library.encode(text, add_special_tokens=False).ids
        assert own.encode(text) == ids, text
        assert own.decode([bos, *ids, eos, own.pad_id]) == library.decode(ids)
        longest = max(longest, len(ids))
    assert longest > 50  # the file says that texts are cut behind 5


@pytest.mark.parametrize("kind", JSON)
def test_a_text_that_spells_a_mark_holds_none(tmp_path, kind, monkeypatch):
    own = Tokenizer(tokenizer_json(kind, tmp_path / "tokenizer.json"))
    if kind != "unigram":  # whose special tokens are pieces as well
        monkeypatch.delattr(TokenizerJson, "_in_parts")
    for token in own._model.special:
        for text in (token, f"a {token} circle", f"{token}{token} red", "two triangles", f"x{token}" * 3000):
            ids = own.encode(text)
            assert own._model._never.isdisjoint(ids) and ids == own.encode(text)
            if kind.startswith("bpe"):
                assert own.decode(ids) == text
    sentencepiece = Tokenizer(llama_sentencepiece(tmp_path / "sp"))
    assert not {1, 2} & set(sentencepiece.encode("a </s> red <s> circle"))


@pytest.mark.parametrize("kind", JSON)
def test_captions_are_framed_by_the_file_s_tokens(tmp_path, kind):
    own = Tokenizer(tokenizer_json(kind, tmp_path / "tokenizer.json"))
    ids = own.encode(TEXTS[0])
    rows = own.encode_batch([TEXTS[0], TEXTS[0]], len(ids) + 2).tolist()
    assert rows[0] == [own.bos_id, *ids, own.eos_id, own.pad_id]
    assert own.encode_batch([TEXTS[0]], 4).tolist() == [[own.bos_id, *ids[:4]]]  # cut: no end
    assert own.decode(rows[0]) == own.decode(rows[0][1:]) == own.decode(ids)


def test_files_beside_say_what_tokens_are_for(tmp_path):
    path = tokenizer_json("bpe_llama3", tmp_path / "tokenizer.json")
    plain = Tokenizer(path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1], "bos_token_id": 1}))
    own = Tokenizer(tmp_path)  # a folder
    assert (own.bos_id, own.eos_id) == (0, 2)  # the post-processor's begin comes first
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(
        {"eos_token": {"content": "<|end_of_text|>"}, "pad_token": "<|eot_id|>", "bos_token": None}
    ))  # fmt: skip
    own = Tokenizer(tmp_path)
    assert (own.bos_id, own.eos_id, own.pad_id) == (0, 1, 2) and own.vocab_size == own.pieces
    assert own.sha256 != plain.sha256  # padding is another: captions are other rows
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|end_of_text|>"}))
    own = Tokenizer(tmp_path)  # padding that is the end: a loss without it would never teach to end
    assert (own.eos_id, own.pad_id, own.marks.pad) == (1, own.pieces, None) and own.sha256 == plain.sha256
    own = Tokenizer(tmp_path, named={"eos": "<|eot_id|>", "bos": "<|end_of_text|>"})
    assert (own.bos_id, own.eos_id) == (1, 2)


def test_a_padding_of_its_own_is_kept_apart_in_sentencepiece(tmp_path):
    path = llama_sentencepiece(tmp_path)
    alone = Tokenizer(path)
    for name in ("<unk>", "</s>", "[PAD]"):  # what fine-tunes of LLaMA name
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": name}))
        own = Tokenizer(path)
        assert own.pad_id == own.pieces and own.sha256 == alone.sha256


@pytest.mark.parametrize("kind, ids, said", [
    ("char", dict(pad_id=-1, bos_id=1, eos_id=-1, unk_id=0), "which token is to end a text it does not tell"),
    ("char", dict(pad_id=0, bos_id=-1, eos_id=1, unk_id=2), "which token is to begin a text it does not tell"),
])  # fmt: skip
def test_sentencepiece_without_begin_or_end_asks_for_a_name(tmp_path, kind, ids, said):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["a b c d"] * 9), model_prefix=str(tmp_path / "t"), vocab_size=8, minloglevel=2,
        model_type=kind, **ids,
    )  # fmt: skip
    with pytest.raises(UserError, match=said):
        Tokenizer(tmp_path / "t.model")
    role, token = ("eos", "b") if ids["eos_id"] < 0 else ("bos", "<pad>")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({f"{role}_token": token}))
    own = Tokenizer(tmp_path / "t.model")
    number = own.token(token)
    assert number is not None and (own.eos_id if role == "eos" else own.bos_id) == number
    assert Tokenizer(tmp_path / "t.model", named={role: token}).sha256 == own.sha256


def test_wrong_files_are_told(tmp_path):
    good = tokenizer_json("wordpiece", tmp_path / "good" / "tokenizer.json")
    wrong = tmp_path / "tokenizer.json"

    def refused(text: str, said: str, **options) -> None:
        wrong.write_text(text)
        with pytest.raises(UserError, match=said):
            Tokenizer(wrong, **options)

    tree = json.loads(good.read_text())
    refused("{", "is no JSON")
    refused("[1]", "holds no model")
    refused('{"a": 0, "b": 1}', "holds no model")  # a vocab.json
    refused(json.dumps(tree | {"version": "2.0"}), "version '2.0', this program reads 1.0")
    refused(json.dumps(tree | {"model": {"type": "None such"}}), "the package tokenizers does not read it")
    shifted = [tree["added_tokens"][0] | {"id": 900}, *tree["added_tokens"][1:]]
    refused(json.dumps(tree | {"added_tokens": shifted}), r"says that '\[PAD\]' is 900, and .* makes it 0: ids would")
    bare = [entry for entry in tree["added_tokens"] if entry["content"] != "[SEP]"]
    refused(json.dumps(tree | {"added_tokens": bare, "post_processor": None}), r"is to end a text .*\[PAD\], \[UNK\]")
    refused(json.dumps(tree), "has no token 'NONE' to end a text", named={"eos": "NONE"})
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    refused(json.dumps(tree), "tokenizer_config.json says eos_token '</s>', and tokenizer.json has no such token")
    (tmp_path / "tokenizer_config.json").write_text("{")
    refused(json.dumps(tree), "tokenizer_config.json, which lies beside a tokenizer, is no JSON")
    (tmp_path / "t.model").write_text("IQ== 0\nIg== 1\n")  # LLaMA 3's own
    with pytest.raises(UserError, match="not a SentencePiece model .*give its tokenizer.json"):
        Tokenizer(tmp_path / "t.model")
    with pytest.raises(UserError, match="a folder without tokenizer.json or tokenizer.model"):
        Tokenizer((tmp_path / "empty").mkdir() or tmp_path / "empty")
    assert edited(good, truncation=None) and Tokenizer(good).pieces


def test_tokenizers_trained_here_are_what_they_were(tmp_path):
    """Their identity is the hash of their bytes, whatever lies beside them."""
    import hashlib

    train_tokenizer(TEXTS, tmp_path / "t.model", 400)
    (tmp_path / "config.json").write_text('{"bos_token_id": 7, "eos_token_id": 8}')
    own = Tokenizer(tmp_path / "t.model")
    assert (own.pad_id, own.bos_id, own.eos_id) == (0, 1, 2) and own.vocab_size == own.pieces
    assert own.sha256 == hashlib.sha256((tmp_path / "t.model").read_bytes()).hexdigest()

import pytest

from megamug.data.pairs.text import BOS, EOS, PAD, Tokenizer, iterate_captions, train_tokenizer
from megamug.data.shards.sources import resolve_sources
from megamug.errors import UserError


def test_batch_layout(tokenizer):
    tokens = tokenizer.encode_batch(["picture number 3", "picture number 12 picture number 12"], 6)
    assert tokens.shape == (2, 7) and tokens[:, 0].tolist() == [BOS, BOS]
    short = tokenizer.encode("picture number 3")
    assert tokens[0].tolist() == ([BOS, *short, EOS] + [PAD] * 7)[:7]
    long = tokenizer.encode("picture number 12 picture number 12")
    assert len(long) > 6 and tokens[1].tolist() == [BOS, *long[:6]]  # cut: no end
    exact = tokenizer.encode_batch(["picture number 3"], len(short) + 1)
    assert exact[0].tolist() == [BOS, *short, EOS]
    assert tokenizer.encode_batch([], 6).shape == (0, 7)


@pytest.mark.parametrize("text", ["picture number 7", "Grüße, 世界 🎈", "tab\tand {brackets}"])
def test_decoding_gives_the_caption_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert 3 not in ids  # bytes stand in: nothing is unknown
    assert tokenizer.decode([BOS, *ids, EOS, 200, 201]) == " ".join(text.split())


def test_training_is_deterministic_and_keeps_what_is_there(shard_folder, tmp_path):
    sources = resolve_sources(str(shard_folder))
    one, two = tmp_path / "1.model", tmp_path / "2.model"
    size = train_tokenizer(iterate_captions(sources), one, 300)
    assert size == Tokenizer(one).vocab_size <= 300
    train_tokenizer(iterate_captions(sources), two, 300)
    assert one.read_bytes() == two.read_bytes()
    train_tokenizer(iterate_captions(sources), one, 300)  # the same again is no harm
    with pytest.raises(UserError, match="differs"):
        train_tokenizer(["quite other words"] * 9, one, 280)
    assert one.read_bytes() == two.read_bytes()
    train_tokenizer(["quite other words"] * 9, one, 280, overwrite=True)
    assert one.read_bytes() != two.read_bytes()


def test_captions_are_taken_evenly(shard_folder):
    sources = resolve_sources([str(shard_folder / "a-0.tar"), str(shard_folder / "a-1.tar")])
    assert list(iterate_captions(sources)) == [f"picture number {i}" for i in range(20)]
    assert list(iterate_captions(sources, limit=7)) == [f"picture number {i}" for i in range(0, 20, 3)]


def test_bad_tokenizers_are_told(tmp_path):
    with pytest.raises(UserError, match=r"no such tokenizer.*megamug data tokenizer"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "x.model")
    with pytest.raises(UserError, match="--vocab-size is 100"):
        train_tokenizer(["a"], tmp_path / "y.model", 100)
    with pytest.raises(UserError, match="cannot train"):
        train_tokenizer([], tmp_path / "y.model", 300)
    import sentencepiece

    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["a b c d"] * 9), model_prefix=str(tmp_path / "other"), vocab_size=8, minloglevel=2,
        model_type="char",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"have the ids \(-1, 1, 2, 0\)"):
        Tokenizer(tmp_path / "other.model")

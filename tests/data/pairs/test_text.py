import hypothesis
import pytest
from hypothesis import given, settings

from megamug.data.pairs.text import BOS, EOS, LONGEST, PAD, Tokenizer, _pieces, iterate_captions, train_tokenizer
from megamug.data.shards.sources import resolve_sources
from megamug.errors import UserError


@pytest.fixture(scope="module")
def any_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "t.model"
    train_tokenizer(["picture number 7 of a red circle", "two lines\nof text"] * 5, path, 300)
    return Tokenizer(path)


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


@pytest.mark.parametrize("text", [
    "picture number 7", "Grüße, 世界 🎈", "tab\tand {brackets}", "def f(x):\n    return x\n", "  two  spaces ", "ﬁne ½",
    "\u2581 stands for itself \u2581\u2581", "\u200b", "\x00\r\u2028", "",
])  # fmt: skip
def test_decoding_gives_the_text_back_to_the_byte(tokenizer, text):
    ids = tokenizer.encode(text)
    assert 3 not in ids  # bytes stand in: nothing is unknown
    assert tokenizer.decode([BOS, *ids, EOS, 200, 201]) == text


@settings(max_examples=200, deadline=None)
@given(text=hypothesis.strategies.text(max_size=40).filter(lambda text: text.isprintable() or "\n" in text))
def test_decoding_gives_any_text_back(any_tokenizer, text):
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


def test_a_text_of_any_length_is_trained_on(tmp_path):
    """SentencePiece passes over what is longer than its limit: words that stand there alone would have no piece."""
    long = "wordless " + "zyzzyva " * (LONGEST // 4) + "x" * (LONGEST + 5)
    train_tokenizer([long], tmp_path / "t.model", 300)
    assert len(Tokenizer(tmp_path / "t.model").encode("zyzzyva")) == 1
    assert "".join(_pieces([long, "short", "é" * LONGEST])) == long + "short" + "é" * LONGEST
    assert max(len(piece.encode()) for piece in _pieces([long, "é" * LONGEST])) <= LONGEST


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

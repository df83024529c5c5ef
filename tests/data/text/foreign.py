"""Tokenizers as others publish them: trained here, by the libraries themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

TEXTS = [
    "a red circle left of a blue square", "two triangles, one above the other", "first draw, then look",
    "def f(x):\n    return x + 1  # twice", "Grüße aus Köln, 世界 你好", "it's what they've said: 3.14 or 1,000",
]  # fmt: skip
PARTS = [
    *TEXTS, " ", "  ", "\n", "\t", "\r\n", "\n\n", "🎈", "👩‍🚀", "🇩🇪", "世界", "日本語", "한국어", "Ελληνικά", "עברית",
    "ñ", "n\u0303", "ﬁ", "½", "\u2581", "\u200b", "\u00a0", "\x00", "\x01", "\x1b[0m", "\x7f", "\ufeff", "\u2028",
    "{", "}", "==", "!=", "<|", "|>", "##", "0", "42", "'s", "'re", "A", "Zebra", "__init__",
    "http://a.b/c?d=e", "…", "“", "”", "-", "\\",
]  # fmt: skip


def strings(count: int, seed: int = 0) -> list[str]:
    """Texts of words, code, emoji, scripts, control characters, blanks and newlines in front, inside and behind."""
    random = np.random.RandomState(seed)
    made = []
    for _ in range(count):
        parts = [PARTS[i] for i in random.randint(len(PARTS), size=random.randint(0, 9))]
        made.append((" " * random.randint(3) if random.rand() < 0.3 else "") + random.choice(["", " "]).join(parts))
    return made


def llama_sentencepiece(folder: Path, vocab_size: int = 400) -> Path:
    """A SentencePiece model with LLaMA's ids: no padding, unknown 0, begin 1, end 2, bytes."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS * 9), model_prefix=str(folder / "tokenizer"), vocab_size=vocab_size,
        model_type="bpe", byte_fallback=True, pad_id=-1, unk_id=0, bos_id=1, eos_id=2, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


def tokenizer_json(kind: str, path: Path) -> Path:
    """`bpe` as GPT-2's, `bpe_llama3`, `wordpiece` as BERT's, `unigram` as T5's."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    path.parent.mkdir(parents=True, exist_ok=True)
    if kind.startswith("bpe"):
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>"] if kind == "bpe" else ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
        made.train_from_iterator(TEXTS * 9, trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ))  # fmt: skip
        if kind == "bpe_llama3":
            made.post_processor = processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
            )
    elif kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        made.train_from_iterator(TEXTS * 9, trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False,
        ))  # fmt: skip
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        made.train_from_iterator(TEXTS * 9, trainers.UnigramTrainer(
            vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False,
        ))  # fmt: skip
    made.enable_truncation(5)  # a length that someone trained with, as published files have it
    made.enable_padding(length=5)
    made.save(str(path))
    return path


def edited(path: Path, **changes: object) -> Path:
    """A `tokenizer.json` with other values at its top."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path

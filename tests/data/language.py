"""Small vocabularies and tokenised documents for tests of language models' data."""

import numpy as np

from megamug.data.documents.indexed import NAME, DocumentsHeader, Part, content_sha256, join_parts, write_header
from megamug.data.documents.tokenizer import assemble
from megamug.data.pairs.text import train_tokenizer
from megamug.models.image_tokenizer.vocabulary import make_vocabulary

TEXTS = ["a red circle left of a blue square", "two triangles", "first draw, then look"] * 3


def tiny_image_tokenizer(folder, codes=16, image_size=32, seed=0):
    """An untrained image tokenizer: 8 x 8 pixels a code. Returns the folder."""
    import torch

    from megamug.models.image_tokenizer.model import ImageTokenizer, ImageTokenizerConfig

    torch.manual_seed(seed)
    ImageTokenizer(ImageTokenizerConfig(
        image_size=image_size, channels=8, channel_multipliers=(1, 1, 1, 1), residual_blocks=1,
        attention_resolutions=(), latent_channels=8, code_width=4, codes=codes, norm_groups=4,
    )).save(folder)  # fmt: skip
    return folder


def tiny_vocabulary(folder, sentinels=8, **image_tokenizer):
    """Text pieces, 16 codes, 16 of them an image."""
    train_tokenizer(TEXTS, folder / "t.model", 300)
    tiny_image_tokenizer(folder / "vq", **image_tokenizer)
    return make_vocabulary(folder / "t.model", folder / "vq", sentinels, folder / "vocabulary")


def image(vocabulary, first=0):
    """Ids of some image."""
    return vocabulary.image_ids((np.arange(vocabulary.image_tokens) + first) % vocabulary.codes)


def write_set(folder, vocabulary, documents):
    """A folder of tokenised documents. `documents`: lists of (ids, is image, is response)."""
    folder.mkdir()
    part = Part(vocabulary.size)
    tokens = images = 0
    for document in documents:
        ids, is_image, is_response = zip(*document, strict=True)
        segments, modes = assemble([np.asarray(i) for i in ids], list(is_image), list(is_response), vocabulary)
        part.add(segments, modes)
        tokens, images = tokens + sum(map(len, segments)), images + sum(is_image)
    part.write(folder / "part.npz", {})
    join_parts([folder / "part.npz"], folder, vocabulary.size)
    total = sum(map(len, documents))
    write_header(folder, DocumentsHeader(
        vocabulary=vocabulary.fingerprint(), vocabulary_folder=str(vocabulary.folder), documents=len(documents),
        text_segments=total - images, images=images, responses=0, tokens=tokens, quarantined=0,
        bytes=(folder / f"{NAME}.bin").stat().st_size, sha256=content_sha256(folder),
    ))  # fmt: skip
    return folder


def some_documents(vocabulary, count, seed=0, longest=30):
    """Documents of text of 1 to `longest` tokens, about half with an image before or behind it."""
    random = np.random.RandomState(seed)
    made = []
    for i in range(count):
        text = (random.randint(260, vocabulary.text_pieces, random.randint(1, longest + 1)), False, False)
        picture = (image(vocabulary, i), True, False)
        made.append([[text], [text, picture], [picture, text], [text]][random.randint(4)])
    return made

"""The image tokenizer of a vocabulary: copied into its folder when that is made, opened by what reads images."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from megamug.data.documents.vocabulary import (
    FILE,
    IMAGE_TOKENIZER,
    TEXT_FILES,
    Vocabulary,
    VocabularySpec,
)
from megamug.data.pairs.text import Tokenizer
from megamug.durable import fsync_folder, write_atomically
from megamug.errors import UserError
from megamug.models.image_tokenizer.model import ImageTokenizer


def load_image_tokenizer(vocabulary: Vocabulary, device: str = "cpu") -> ImageTokenizer:
    """The image tokenizer in a vocabulary's folder. Raises `UserError` where there is none, or another's."""
    folder = vocabulary.folder
    if not vocabulary.codes:
        raise UserError(f"{folder}: a vocabulary of text alone; make one with --image-tokenizer FOLDER")
    tokenizer = ImageTokenizer.load(folder / IMAGE_TOKENIZER, device)
    if tokenizer.fingerprint() != vocabulary.spec.image_tokenizer:
        raise UserError(
            f"{folder / IMAGE_TOKENIZER}: its fingerprint is {tokenizer.fingerprint()[:12]}, the vocabulary "
            f"was made of {vocabulary.spec.image_tokenizer[:12]}; restore it, or make the vocabulary again"
        )
    return tokenizer


def make_vocabulary(
    text: str | Path,
    image_tokenizer: str | Path | None,
    sentinels: int,
    output: str | Path,
    *,
    overwrite: bool = False,
    named: Mapping[str, str] | None = None,
) -> Vocabulary:
    """Write a vocabulary folder and open it: `text` a tokenizer, `image_tokenizer` a folder or None, `named` tokens by
    role (`megamug.data.text.tokenizer`).

    The JSON comes last, so a folder that holds one is complete. Raises `UserError`: files missing, fewer than one
    sentinel, an image tokenizer with a codebook that its codes leave, another vocabulary in `output`.
    """
    if sentinels < 1:
        raise UserError(f"--sentinels is {sentinels}; masked spans need at least 1")
    tokenizer, output = Tokenizer(text, named=named), Path(output)
    codes, grid, size, fingerprint = 0, (0, 0), 0, ""
    if image_tokenizer is not None:
        codes, grid, size, fingerprint = _examine(Path(image_tokenizer))
    spec = VocabularySpec(
        tokenizer.pieces, tokenizer.sha256, codes, grid, size, fingerprint, sentinels,
        text_file=TEXT_FILES[tokenizer.name], begin=tokenizer.bos_id, end=tokenizer.eos_id, pad=tokenizer.pad_id,
    )  # fmt: skip
    if tokenizer.marks.pad is None:
        spec = replace(spec, pad=spec.size - 1)
    if (output / FILE).is_file() and not overwrite:
        old = Vocabulary.load(output)
        if old.spec != spec:
            raise UserError(
                f"{output} holds another vocabulary (fingerprint {old.fingerprint()[:12]}); tokenised documents and "
                "checkpoints depend on it: give another --output, or --overwrite"
            )
        return old
    if output.is_file():
        raise UserError(f"{output} is a file; give a folder")
    output.mkdir(parents=True, exist_ok=True)
    (output / FILE).unlink(missing_ok=True)
    for name in TEXT_FILES.values():
        if name != spec.text_file:
            (output / name).unlink(missing_ok=True)
    write_atomically(output / spec.text_file, tokenizer.data)
    target = output / IMAGE_TOKENIZER
    if target.exists() and (image_tokenizer is None or target.resolve() != Path(image_tokenizer).resolve()):
        shutil.rmtree(target)
    if image_tokenizer is not None and not target.exists():
        _copy_folder(Path(image_tokenizer), target)
    write_atomically(output / FILE, (json.dumps(spec.record(), indent=1) + "\n").encode())
    return Vocabulary.load(output)


def _examine(folder: Path) -> tuple[int, tuple[int, int], int, str]:
    """(codes, grid, image size, fingerprint) of an image tokenizer, the grid as one grey image gives it."""
    tokenizer = ImageTokenizer.load(folder, "cpu")
    size = int(tokenizer.config.image_size)
    with torch.no_grad():
        codes = tokenizer.encode(torch.zeros(1, 3, size, size))
    if int(codes.min()) < 0 or int(codes.max()) >= tokenizer.config.codes:
        raise UserError(f"{folder}: its codes leave the codebook of {tokenizer.config.codes}; the folder is damaged")
    return int(tokenizer.config.codes), (int(codes.shape[1]), int(codes.shape[2])), size, tokenizer.fingerprint()


def _copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a folder beside the target, make them durable, rename."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file():
            write_atomically(aside / path.name, path.read_bytes())
    os.replace(aside, target)
    fsync_folder(target.parent)

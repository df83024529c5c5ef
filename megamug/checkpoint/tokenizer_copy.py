"""The tokenizer in the run folder: a file, with those beside it that say what its tokens are for, or a vocabulary with
its image tokenizer; of what gives classes their names. Evaluation and generation read this copy, so that a run
folder can be moved, and its tokenizer's original be changed."""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path

from megamug.configuration.presets import FINE_TUNED
from megamug.configuration.sections import Config
from megamug.data.documents import vocabulary
from megamug.data.shards.labels import CLASSES, classes_bytes, read_classes
from megamug.data.shards.sources import resolve_sources
from megamug.data.text.sentencepiece_model import SentencePieceModel
from megamug.data.text.tokenizer import files_beside, tokenizer_file
from megamug.data.text.tokenizer_json import TokenizerJson
from megamug.durable import fsync_folder, write_atomically

FILE, FILES, FOLDER = "tokenizer.model", "tokenizer", "vocabulary"


def keep(config: Config) -> None:
    """Copies `data.tokenizer` into the run folder, whole or not at all, unless it is there; of what gives classes
    their names. One process calls it."""
    if config.model.kind in FINE_TUNED:
        names = resolve_sources(config.data.train)[0].class_names()
        if names is not None:
            write_atomically(Path(config.run_dir, CLASSES), classes_bytes(names))
    run, source = Path(config.run_dir), config.data.tokenizer
    if source is None:
        return
    source = Path(source)
    if (source / vocabulary.FILE).is_file():
        names = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
        _keep_folder({str(name): source / name for name in names}, run / FOLDER)
        return
    source = tokenizer_file(source)
    beside = files_beside(source)
    if beside or source.suffix == ".json":
        own_name = TokenizerJson.name if source.suffix == ".json" else SentencePieceModel.name
        _keep_folder({own_name: source} | {path.name: path for path in beside}, run / FILES)
        (run / FILE).unlink(missing_ok=True)
        return
    if not (run / FILE).is_file() or not filecmp.cmp(source, run / FILE, shallow=False):
        write_atomically(run / FILE, source.read_bytes())
    if (run / FILES).exists():
        shutil.rmtree(run / FILES)


def kept(run_dir: Path) -> Path | None:
    """The copy in a run folder; None where there is none (runs of earlier versions, converted weights)."""
    return next((path for path in (run_dir / FOLDER, run_dir / FILES, run_dir / FILE) if path.exists()), None)


def kept_classes(run_dir: Path) -> list[str] | None:
    """The names of the classes that a run was trained on; None where they had none. Raises UserError."""
    return read_classes(run_dir)


def _keep_folder(files: dict[str, Path], target: Path) -> None:
    """`files` by their names in `target`, and no others."""
    there = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    if there == set(files) and all(filecmp.cmp(path, target / name, shallow=False) for name, path in files.items()):
        return
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for name, path in files.items():
            write_atomically(aside / name, path.read_bytes())
        if target.exists():
            shutil.rmtree(target)
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    fsync_folder(target.parent)

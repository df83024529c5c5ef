"""The tokenizer in the run folder: a SentencePiece model, or a vocabulary with its image tokenizer; of a classifier the
names of its classes. Evaluation and generation read this copy, so that a run folder can be moved, and its tokenizer's
original be changed."""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path

from megamug.configuration.sections import Config
from megamug.data.shards.labels import CLASSES, classes_bytes, read_classes
from megamug.data.shards.sources import resolve_sources
from megamug.durable import fsync_folder, write_atomically

FILE, FOLDER = "tokenizer.model", "vocabulary"


def keep(config: Config) -> None:
    """Copies `data.tokenizer` into the run folder, whole or not at all, unless it is there; of a classifier the names
    of its classes. One process calls it."""
    if config.model.kind == "classifier":
        names = resolve_sources(config.data.train)[0].class_names()
        if names is not None:
            write_atomically(Path(config.run_dir, CLASSES), classes_bytes(names))
    run, source = Path(config.run_dir), config.data.tokenizer
    if source is None:
        return
    source = Path(source)
    if source.is_dir():
        _keep_folder(source, run / FOLDER)
    elif not (run / FILE).is_file() or not filecmp.cmp(source, run / FILE, shallow=False):
        write_atomically(run / FILE, source.read_bytes())


def kept(run_dir: Path) -> Path | None:
    """The copy in a run folder; None where there is none (runs of earlier versions, converted weights)."""
    return next((path for path in (run_dir / FOLDER, run_dir / FILE) if path.exists()), None)


def kept_classes(run_dir: Path) -> list[str] | None:
    """The names of the classes that a run was trained on; None where they had none. Raises UserError."""
    return read_classes(run_dir)


def _keep_folder(source: Path, target: Path) -> None:
    names = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    if target.is_dir() and not any(filecmp.cmpfiles(source, target, [str(name) for name in names], shallow=False)[1:]):
        return
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for name in names:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(aside / name, (source / name).read_bytes())
        if target.exists():
            shutil.rmtree(target)
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    fsync_folder(target.parent)

"""Which checkpoint a run goes on from, decided before any process group exists.

Process 0 reads every byte of the newest checkpoint; the others believe its `state.json` only as far as the manifest
does. What a checkpoint says is used for nothing before that.
"""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import asdict
from pathlib import Path

from megamug.checkpoint.store import STATE, CheckpointStore, CompleteCheckpoint
from megamug.configuration.reading import absolute, load_config, resolve, save_config
from megamug.configuration.sections import Config
from megamug.durable import replace_text, write_atomically
from megamug.errors import UserError

logger = logging.getLogger(__name__)

_WENT_BACK = "checkpoint.go_back_to"


def choose(config: Config, task, store: CheckpointStore, first: bool) -> CompleteCheckpoint | None:
    """What process 0 (`first`) loads, None for a new run; on the others only a hint that there is something.

    Raises UserError where a checkpoint is of other data, another tokenizer or arithmetic, or holds weights alone, and
    where `checkpoint.go_back_to` names none. (That the model is the same is checked with the configuration.)
    """
    back = None  # where to go back to, once all is checked
    if first:
        store.recover()
        back = _to_go_back_to(store, config.checkpoint.go_back_to)
        found = store.newest_complete() if back is None else CompleteCheckpoint(back, store.path(back), _WENT_BACK)
    else:
        found = next((CompleteCheckpoint(step, store.path(step), "") for step in store.steps()
                      if store.read_verified(step, STATE) is not None), None)  # fmt: skip
    if found is None:
        return None
    written = store.read_verified(found.step, STATE)
    if written is None:  # process 0 is just removing it, or setting it aside
        return found
    contents = read_contents(written, found.path)
    if contents.get("weights_only"):
        run = store.root.parent
        raise UserError(
            f"run_dir: {run} holds weights alone (converted or fused), which no training can go on from; set run_dir to"
            f" a new folder and model.initial={run}"
        )
    newest = first or config.checkpoint.go_back_to is None  # else process 0 may go on from an earlier one
    if newest and isinstance(contents.get("step"), int) and contents["step"] > config.train.steps:
        raise UserError(
            f"train.steps is {config.train.steps}, but {store.root.parent} holds a checkpoint of step"
            f" {contents['step']}; set train.steps to {contents['step']} or more to go on with it, or run_dir to a new"
            " folder"
        )
    task.check_resumable(contents)
    if back is not None:
        _go_back(store, back)
    return found


def read_contents(written: bytes, path: Path) -> dict:
    """`state.json` as a dictionary. Raises UserError where it is none: the manifest has its hash, so it was made so."""
    try:
        contents = json.loads(written)
    except ValueError as error:
        raise UserError(f"{path / STATE}: not JSON ({error}); this checkpoint was not made by megamug") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path / STATE}: a mapping wanted; this checkpoint was not made by megamug")
    return contents


def _marker(store: CheckpointStore, step: int) -> Path:
    """There once the run went back to `step`."""
    return store.root / f"went-back-to-step-{step:08d}"


def _to_go_back_to(store: CheckpointStore, step: int | None) -> int | None:
    """`step` (`checkpoint.go_back_to`), if the run has not gone back to it yet. Raises UserError where there is no
    complete checkpoint of it."""
    if step is None:
        return None
    if (marker := _marker(store, step)).exists():
        logger.info("checkpoint.go_back_to=%d: was done before, the run goes on from its newest checkpoint; remove %s"
                    " to do it again", step, marker)  # fmt: skip
        return None
    problems = store.verify(store.path(step))
    if problems:
        sound = [str(s) for s in store.steps() if not store.verify(store.path(s), hashes=False)]
        raise UserError(f"checkpoint.go_back_to({step}): {store.path(step)} is no complete checkpoint ({problems[0]});"
                        f" there are those of steps {', '.join(sound) or 'none'}")  # fmt: skip
    return step


def _go_back(store: CheckpointStore, step: int) -> None:
    """Sets later checkpoints aside, once: started again with the same key, the run goes on from what it made since."""
    for later in (s for s in store.steps() if s > step):
        target = store.set_aside(later)
        logger.warning("checkpoint.go_back_to=%d: %s is set aside as %s", step, store.path(later).name, target.name)
    replace_text(_marker(store, step), "")


def keep_history(config: Config, step: int) -> None:
    """Writes RUN/config.yaml. What it held before stays as `config-step-N.yaml`, and each key that changed is said."""
    path = Path(config.run_dir, "config.yaml")
    if path.is_file() and (changed := _changes(path, config)):
        names = (f"config-step-{step:08d}{'' if number == 1 else f'-{number}'}.yaml" for number in itertools.count(1))
        kept = next(other for name in names if not (other := path.with_name(name)).exists())
        write_atomically(kept, path.read_bytes())
        logger.info("the configuration changed after step %d: %s (as it was: %s)", step, changed, kept.name)
    save_config(config)


def _changes(path: Path, config: Config) -> str:
    """What differs between the file `path` and `config`, old -> new; "" for nothing."""
    try:
        before, now = (_flat(absolute(c)) for c in (resolve(load_config(path)), config))
    except UserError as error:  # half a file, or keys of another version: it is replaced, and kept
        return f"it could not be read ({error})"
    return "; ".join(f"{key} {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key])


def _flat(config: Config) -> dict[str, object]:
    tree = asdict(config)
    return {
        (f"{section}.{key}" if isinstance(values, dict) else section): value
        for section, values in tree.items()
        for key, value in (values.items() if isinstance(values, dict) else [(section, values)])
    }

"""The configuration that a checkpoint was written with, kept in its `state.json`, where the manifest covers it.

RUN/config.yaml is in no manifest, and people edit it (a vocabulary that moved, data that did). Half of it is valid YAML
and a configuration of another model. So whoever reads a run compares the two: what changes the function that the
weights compute must agree, nothing may have got lost, and other differences are told.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from megamug.configuration.ranges import get
from megamug.configuration.reading import keys, load_config, resolve
from megamug.configuration.sections import Config
from megamug.configuration.validate import function, model_identity
from megamug.errors import UserError

KEY = "configuration"  # of state.json
# Sections of which every key is kept, but paths and what belongs to a machine: two runs of equal content in two places
# leave equal bytes.
SECTIONS = ("model", "lm", "text_tower", "image_tower", "fusion", "classifier", "segmenter", "data")
ELSEWHERE = {
    "model.initial", "data.train", "data.validation", "data.tokenizer", "data.global_batch_size",
    "data.micro_batch_size", "data.validation_samples", "data.threads", "data.prefetch", "data.max_failure_rate",
}  # fmt: skip
# What a reader goes by and a run may change on its way.
TOLD = (
    "seed", "data.context_length", "data.caption_length", "data.cm3_spans", "data.hidden_text", "data.loss_on",
    "data.separate_documents", "model.mask_ratio", "model.text_mask_ratio", "model.image_loss_weight",
    "model.caption_loss_weight",
)  # fmt: skip


def recorded(config: Config) -> dict[str, object]:
    """The entry of state.json: what a reader of the run goes by, `section.key` and value."""
    kept = [key for key in keys() if key.partition(".")[0] in SECTIONS and key not in ELSEWHERE]
    return {key: get(config, key) for key in ("seed", *kept, "precision.dtype")}


def read(run: Path, folder: Path, state: dict) -> tuple[Config, list[str]]:
    """The resolved configuration of the run folder `run` as its checkpoint `folder` knows it, and remarks, a sentence
    each. `state` is that checkpoint's. Raises UserError: no config.yaml, a damaged one, one of another model."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path} is missing: a checkpoint is read where it lies, in its run folder")
    config = resolve(load_config(path))
    return config, check(config, path, folder, state)


def check(config: Config, path: Path, folder: Path, state: dict) -> list[str]:
    """Remarks on how `config`, the resolved content of the file `path`, differs from what the checkpoint `folder` was
    written with. Raises UserError where it would be another model, or lacks keys that it had."""
    then = state.get(KEY)
    if then is None:
        return [f"{folder} is of an earlier version, which kept no configuration in it: {path} is taken as it stands"]
    known = keys()
    if not isinstance(then, dict):
        raise UserError(f"{folder}: its state.json says {KEY} {then!r:.60}, no mapping; take another checkpoint")
    then = {key: value for key, value in then.items() if key in known}
    lost = [key for key in then if key not in _keys_in(path)]
    if lost:
        raise UserError(f"{path} is cut short: {lost[0]} and {len(lost) - 1} more keys that {folder.name} was written"
                        " with are not in it; put the whole file back")  # fmt: skip
    try:
        before = resolve(load_config(None, [f"{key}={json.dumps(value)}" for key, value in then.items()]))
    except UserError as error:
        raise UserError(f"{folder}: its state.json is not what megamug writes ({error}); take another one") from None
    one, other = identity(before), identity(config)
    changed = [key for key in one if key in other and one[key] != other[key]]
    if changed:
        said = "; ".join(f"{key} was {one[key]} and is {other[key]}" for key in changed[:3])
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(f"{path} is not the configuration of {folder.name}: {said}{more}; put the file back as it was")
    differences = [key for key in TOLD if key in then and get(before, key) != get(config, key)]
    if not differences:
        return []
    said = "; ".join(f"{key} was {get(before, key)} and is {get(config, key)}" for key in differences)
    return [f"{path} was changed since {folder.name} was written: {said}"]


def identity(config: Config) -> dict[str, object]:
    """What the parameters compute."""
    return model_identity(config) | function(config)


def other_function(trained: Config, config: Config) -> list[str]:
    """A remark where weights trained under `trained` compute something else under `config`, of equal sizes."""
    sizes, one, other = model_identity(trained), identity(trained), identity(config)
    changed = [key for key in one if key not in sizes and key in other and one[key] != other[key]]
    said = "; ".join(f"{key} was {one[key]} and is {other[key]} here" for key in changed)
    return [f"the weights were trained for another function: {said}"] if changed else []


def _keys_in(path: Path) -> set[str]:
    """Every `section.key` that the file holds; `load_config` has read it before."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    inner = {f"{name}.{key}" for name, section in tree.items() if isinstance(section, dict) for key in section}
    return inner | {name for name, value in tree.items() if not isinstance(value, dict)}

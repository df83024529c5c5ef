"""How a configuration is read, completed by its preset and written.

`megamug train CONFIG.yaml section.key=value ...`: the YAML file holds the sections of `sections`, overrides win over it
(the last one of a key wins), and what comes out is written to `RUN/config.yaml`.

Reading is strict: a key that is unknown or given twice, a value of another type, and a number that YAML 1.1 reads as
another one than a person does (`010` is 8, `1:30` is 90) are a `UserError`.
Whether the values make sense together is the business of `validate`.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path

import yaml

from megamug.command_line.arguments import expand_home
from megamug.configuration import presets
from megamug.configuration.sections import Config, TowerConfig
from megamug.durable import replace_text
from megamug.errors import UserError


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of YAML file `path` (None: the defaults) with `section.key=value` overrides; not yet resolved.

    Raises UserError: file missing or not YAML, unknown or repeated key, value of another type.
    """
    config = Config()
    if path is not None:
        tree = read_yaml(Path(path))
        try:
            _fill(config, tree)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    for override in overrides:
        try:
            _apply(config, override)
        except UserError as error:
            raise UserError(f"override {override}: {error}") from None
    return config


def resolve(config: Config) -> Config:
    """A copy in which the preset has filled every size of its kind left at None, and `model.preset` is named.

    Raises UserError for an unknown kind or preset, and for a preset of another kind.
    """
    config = copy.deepcopy(config)
    model = config.model
    if model.kind not in presets.BY_KIND:
        raise UserError(
            f"model.kind: {model.kind!r} is none of {', '.join(presets.BY_KIND)};"
            f" set model.kind={nearest(model.kind, presets.BY_KIND)}"
        )
    own = presets.BY_KIND[model.kind]
    if model.preset is None:
        model.preset = presets.DEFAULT[model.kind]
    if model.preset not in own:
        others = [kind for kind, names in presets.BY_KIND.items() if model.preset in names]
        if others:
            raise UserError(
                f"model.preset: {model.preset} is of kind {others[0]} and model.kind is {model.kind};"
                f" set model.preset={presets.DEFAULT[model.kind]} (of {', '.join(own)}) or model.kind={others[0]}"
            )
        raise UserError(
            f"model.preset: there is no preset {model.preset!r}; the nearest is"
            f" {nearest(model.preset, own)!r} (of {', '.join(own)})"
        )
    for section, sizes in own[model.preset].items():
        for name, size in sizes.items():
            if getattr(getattr(config, section), name) is None:
                setattr(getattr(config, section), name, size)
    for tower in towers(config).values():
        if tower.query_groups is None:
            tower.query_groups = tower.heads
    return config


def towers(config: Config) -> dict[str, TowerConfig]:
    """The towers of this kind of model by the name of their section; none for those of images."""
    names = {"decoder_lm": ("lm",), "jam_cross": ("text_tower", "image_tower")}.get(config.model.kind, ())
    return {name: getattr(config, name) for name in names}


def to_yaml(config: Config) -> str:
    """YAML text that `load_config` reads back as an equal configuration."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def save_config(config: Config) -> Path:
    """Write RUN/config.yaml whole or not at all, with `absolute` paths; returns its path. One process of a run calls
    it."""
    path = Path(config.run_dir, "config.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, to_yaml(absolute(config)))
    return path


def absolute(config: Config) -> Config:
    """A copy whose paths of data, tokenizer and initial weights hold from any folder; `run_dir` stays as it is."""
    config = copy.deepcopy(config)
    for section, key in (("data", "train"), ("data", "validation"), ("data", "tokenizer"), ("model", "initial")):
        value = getattr(getattr(config, section), key)
        if isinstance(value, list):
            value = [{**entry, "path": _absolute(entry["path"])} for entry in value]
        setattr(getattr(config, section), key, _absolute(value) if isinstance(value, str) else value)
    return config


def _absolute(path: str) -> str:
    return "::".join(os.path.abspath(expand_home(part)) for part in path.split("::"))  # `::` joins several


def check_own_folder(path: Path, config: Config, overrides: Iterable[str]) -> None:
    """Raises UserError where `path` is the config.yaml of a run that lies elsewhere than its `run_dir` says: the run
    was moved, or another folder is meant by the same words here. It would begin anew at the old place."""
    here = path.absolute().parent
    if path.name != "config.yaml" or not (here / "checkpoints").is_dir():
        return
    if any(override.partition("=")[0].strip() == "run_dir" for override in overrides):
        return
    if os.path.realpath(config.run_dir) != os.path.realpath(here):
        raise UserError(f"{path} is of the run in {here}, but its run_dir is {config.run_dir}; to go on with that run"
                        f" set run_dir={here}, to begin another one set run_dir to a new folder")


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` that looks most like `name`."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def keys() -> dict[str, object]:
    """Every key as `section.key` (or `key` at the top level), in order, with its type."""
    found: dict[str, object] = {}
    for name, kind in typing.get_type_hints(Config).items():
        if is_dataclass(kind):
            found.update({f"{name}.{key}": hint for key, hint in typing.get_type_hints(kind).items()})
        else:
            found[name] = kind
    return found


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML forbids and PyYAML lets pass (the last one would win), and
    numbers that YAML 1.1 takes for octal or counts in sixties, or whose digits it lets `_` divide."""

    def number(self, node: yaml.ScalarNode) -> int | float:
        value = self.standard[node.tag](self, node)
        if _NUMBER.fullmatch(node.value):
            return value
        problem = f"{node.value} is {value} to YAML; write {value}, or \"{node.value}\" in quotes where text is meant"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    standard = {
        "tag:yaml.org,2002:int": yaml.SafeLoader.construct_yaml_int,
        "tag:yaml.org,2002:float": yaml.SafeLoader.construct_yaml_float,
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key_node.value in seen and key_node.value != "<<":
                problem = f"key {key_node.value!r} is given twice, first on line {seen[key_node.value]}; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen[key_node.value] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


for _tag in _StrictLoader.standard:
    _StrictLoader.add_constructor(_tag, _StrictLoader.number)

# What YAML 1.1 and a person read alike; hexadecimal and binary numbers say themselves what they are.
_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+|0b[01]+|([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
                     r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN)")  # fmt: skip
# Of text that stands for a number: `1e-3` is text to YAML 1.1.
_DECIMAL = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


def read_yaml(path: Path) -> dict:
    """The mapping at the top of a file, read strictly. Raises UserError: no file, no YAML, no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"configuration file {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); is it a YAML file?") from None
    except OSError as error:
        raise UserError(f"configuration file {path} cannot be read: {error.strerror}") from None
    tree = _parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: sections such as `model:` wanted at the top level, found {_describe(tree)}")
    return tree


def _parse_yaml(text: str, where: str) -> object:
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # odd characters; an impossible date; deep nesting
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _fill(config: Config, tree: dict) -> None:
    """Set what the mapping `tree` holds."""
    known = keys()
    for name, value in tree.items():
        if not is_dataclass(getattr(config, str(name), None)):
            _set(config, str(name), value, known)
        elif isinstance(value, dict):
            for key, item in value.items():
                _set(config, f"{name}.{key}", item, known)
        elif value is not None:  # a section whose keys are all commented out is None
            raise UserError(f"{name}: a section with keys wanted, such as {_example(name)}; found {_describe(value)}")


def _apply(config: Config, override: str) -> None:
    """Set the one key of `section.key=value`. The value is YAML; a text key takes `*.tar` or `2024` as it stands."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name:
        raise UserError("section.key=value wanted, such as train.steps=100")
    known = keys()
    if is_dataclass(getattr(config, name, None)):
        raise UserError(f"{name} is a section; set one of its keys, such as {_example(name)}")
    text = text.strip()
    as_it_stands = name in known and str in _alternatives(known[name]) and text not in ("", "~", "null")
    _set(config, name, text if as_it_stands and text[0] not in "[{'\"" else _parse_yaml(text, name), known)


def _set(config: Config, name: str, value: object, known: dict[str, object]) -> None:
    if name not in known:
        raise UserError(f"unknown key {name}; the nearest is {_nearest_key(name, known)}")
    section, _, key = name.rpartition(".")
    value = _coerce(value, known[name], name)
    if name in _PATHS and value is not None:
        try:
            value = expand_home(value)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    setattr(getattr(config, section) if section else config, key, value)


def _nearest_key(name: str, known: Iterable[str]) -> str:
    """The same key in another section where there is one, else the key, or the section, spelled most like it."""
    known = list(known)
    moved = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    if moved:
        return moved[0]
    return nearest(name, known if "." in name else known + [key.partition(".")[0] for key in known])


def _coerce(value: object, kind: object, name: str) -> object:
    """`value` as type `kind`: whole numbers pass for decimals, and so does text like 1e-3, which YAML reads as text."""
    for option in _alternatives(kind):
        if option is type(None) and value is None:
            return None
        if option is bool and isinstance(value, bool) or option is str and isinstance(value, str):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and (number := _as_float(value)) is not None:
            return number
        if typing.get_origin(option) is list and isinstance(value, list):
            (item,) = typing.get_args(option)
            if item is dict:
                return [_source(entry, f"{name}[{position}]") for position, entry in enumerate(value)]
            return [_coerce(entry, item, f"{name}[{position}]") for position, entry in enumerate(value)]
    wanted = " or ".join(_KIND_NAMES[option] for option in _alternatives(kind))
    quotes = ""
    if str in _alternatives(kind) and value is not None and not isinstance(value, list | dict):
        quotes = "; YAML takes words such as yes, no, on and off, numbers and dates for that: put text in quotes"
    raise UserError(f"{name}: {wanted} wanted, found {_describe(value)}{quotes}")


def _as_float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not _DECIMAL.fullmatch(value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _source(entry: object, name: str) -> dict:
    """One entry of a list of data sets: a path, or a path with its weight."""
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict) or "path" not in entry:
        raise UserError(f"{name}: {{path: FOLDER_OR_GLOB, weight: NUMBER}} wanted, found {_describe(entry)}")
    for key in entry:
        if key not in ("path", "weight"):
            raise UserError(f"{name}: unknown key {key}; the nearest is {nearest(str(key), ('path', 'weight'))}")
    kinds = {"path": str, "weight": float}
    return {key: _coerce(value, kinds[key], f"{name}.{key}") for key, value in entry.items()}


_PATHS = ("run_dir", "data.tokenizer", "model.initial")  # those of data are globs, see `data.shards.sources.expand`
_KIND_NAMES = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null",
    list[int]: "a list of whole numbers", list[float]: "a list of numbers", list[str]: "a list of names",
    list[dict]: "a list of {path, weight}",
}  # fmt: skip


def _alternatives(kind: object) -> tuple:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _example(section: str) -> str:
    return next(key for key in keys() if key.startswith(f"{section}."))


_shortened = reprlib.Repr()  # a few aliases in a YAML file make a value whose whole text fills the memory
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 60


def _describe(value: object) -> str:
    if value is None:
        return "nothing (null)"
    text = _shortened.repr(value)
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list",
            dict: "a mapping"}.get(type(value), type(value).__name__)  # fmt: skip
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"

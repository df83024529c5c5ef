"""Running a format's table: a foreign checkpoint into a megamug run, and a megamug checkpoint into a foreign folder.

Tensors are made one at a time, as they are written; what a conversion holds in memory is bounded by a small multiple of
the largest parameter. Keys that one side has and the other does not know end the conversion unless they are allowed.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megamug.checkpoint import configured, tokenizer_copy
from megamug.checkpoint.converted import check_vocabulary, vocabulary_rows
from megamug.checkpoint.tensors import LazyTensor, TensorReader, write_run
from megamug.configuration import validate, validate_lm
from megamug.configuration.ranges import check_values
from megamug.configuration.reading import load_config, resolve
from megamug.configuration.sections import Config
from megamug.convert.described import check as check_described
from megamug.convert.formats import Format, View, VocabularyRows
from megamug.convert.language import growth
from megamug.convert.language.growth import MEAN_ROWS, NewRows
from megamug.convert.safetensors_out import write_folder, write_pth
from megamug.convert.source import ForeignTensors
from megamug.convert.table import Row
from megamug.convert.vision import classifier
from megamug.data.documents.vocabulary import Vocabulary
from megamug.errors import UserError

SHARD_BYTES = 5 << 30
# Stored tables are sines and cosines of another library's rounding; a learned table is further away by far.
POSITION_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
COARSE_TOLERANCE = 1e-2  # of 16-bit tables


def to_megamug(
    form: Format, source: str | Path, run_dir: str | Path, overrides: Iterable[str] = (), allow: Iterable[str] = (),
    vocabulary: str | Path | None = None, new_rows: NewRows = MEAN_ROWS,
) -> list[str]:
    """Writes the run folder `run_dir` with the weights of the foreign checkpoint `source`; returns remarks, a sentence
    each. The configuration is what the checkpoint tells, then `overrides` (`section.key=value`). `vocabulary`: the
    folder that is to be a language model's, whose tables get `new_rows` for ids that they lack.

    Raises UserError: unknown or missing keys that `allow` (names or patterns) does not name, shapes or positions that
    differ, a model that megamug does not have, a damaged or hostile file, a `run_dir` that holds a run.
    """
    view, overrides, allow = View(ForeignTensors(source), form.canonical), list(overrides), list(allow)
    opened = _given(vocabulary, overrides, form)
    with _about(source):
        config = configure(form, view, overrides, allow)
        found = form.vocabulary(view)
        rows, fixed = form.rows(config, found), form.fixed(config)
        if opened is None:
            view.remarks += _vocabulary_fits(config, sum(found))
        else:
            size, remarks = growth.rows_in(opened, found, view.config)
            view.remarks += remarks + growth.remark(*found, size, new_rows)
    wanted = dict.fromkeys([name for row in rows for name in row.theirs] + list(fixed))
    missing = [name for name in wanted if name not in view]
    unknown = [name for name in view.actual if name not in wanted and not re.search(form.ignored, name)]
    apart = [name for name in unknown if form.apart and name.startswith(form.apart[0])]
    unknown = [name for name in unknown if name not in set(apart)]
    shapes = _new_parameters(form, config, {row.ours for row in rows})
    _refuse(missing + list(shapes), unknown, allow, f"{source} as {form.name}")
    for row in rows:
        if set(row.theirs) & set(missing):
            shapes[row.ours] = row.shape
    remarks = view.remarks + _remark("drawn anew (missing in the source)", list(shapes)) + _remark("left out", unknown)
    remarks += _remark(f"left out ({form.apart[1]})", apart) if apart else []
    remarks += compare_fixed(view, fixed, allow)
    tensors = [_drawn(name, shape, config) for name, shape in shapes.items()]
    for row in rows:
        if row.ours in shapes:
            continue
        for name, shape in row.their_shapes().items():
            if view.shape(name) != shape:
                raise UserError(
                    f"{source}: {name} is {list(view.shape(name))} where the configuration wants {list(shape)}; "
                    f"correct the sizes with --config section.key=value"
                )
        tensors.append(_turned(row, view))
    if any(view.dtype(name) == torch.float16 for name in view.actual):
        remarks.append("float16 became float32: megamug computes in fp32 or bf16")
    identity = None
    if opened is not None:
        fit = partial(growth.fitted, old=found[0], size=size, new=new_rows)
        tensors = [fit(tensor) if tensor.name in growth.TABLES else tensor for tensor in tensors]
        identity = {"data.tokenizer": opened.fingerprint(), "precision.dtype": config.precision.dtype}
        found = (size,)
    write_run(run_dir, config, tensors, identity, origin={"format": form.name, "vocabulary": found})
    if opened is not None:
        tokenizer_copy.keep(replace(config, run_dir=str(run_dir)))
    return remarks


def _given(vocabulary: str | Path | None, overrides: list[str], form: Format) -> Vocabulary | None:
    """The vocabulary folder that the user gives, opened and written into `overrides`."""
    if vocabulary is None:
        return None
    if form.kind != "decoder_lm":
        raise UserError(f"--vocabulary is for language models, and {form.name} is of kind {form.kind}; leave it out")
    if any(override.partition("=")[0].strip() == "data.tokenizer" for override in overrides):
        raise UserError("--vocabulary and --config data.tokenizer=... say the same thing; leave out one of them")
    overrides.append(f"data.tokenizer={Path(vocabulary).resolve()}")
    return Vocabulary.load(vocabulary)


def from_megamug(
    form: Format,
    source: str | Path,
    output: str | Path,
    allow: Iterable[str] = (),
    max_shard_bytes: int = SHARD_BYTES,
    pth: bool = False,
) -> list[str]:
    """Writes the folder `output` (safetensors, its index where there are several, config.json where the format has one)
    from a megamug run or checkpoint folder of any layout; returns remarks. `pth`: instead model.pth, {"model":
    tensors}. Raises UserError as `to_megamug` does."""
    reader = TensorReader(source)
    config, changes = read_configuration(reader)
    config.run_dir = str(reader.folder.parent.parent)
    changes += [remark] if (remark := reader.take_averages()) else []
    if config.model.kind == "classifier" and form.of_classifiers is not None:
        form, reader = form.of_classifiers, classifier.plain(reader, config)
    if config.model.kind != form.kind:
        raise UserError(f"{source} is a model of kind {config.model.kind}; {form.name} is one of kind {form.kind}")
    vocabulary = _vocabulary(reader, config)
    with _about(source):
        rows = form.rows(config, vocabulary)
    wanted = {row.ours for row in rows}
    missing = [row.ours for row in rows if row.ours not in reader]
    outside = [name for name in reader.names if not name.startswith(form.parts)]
    unknown = [name for name in reader.names if name not in wanted and name.startswith(form.parts)]
    _refuse(missing, unknown, allow, f"{source} to {form.name}")
    remarks = changes + _remark(f"left out ({form.name} has no place for them)", outside)
    remarks += _remark("left out", unknown + missing)
    tensors = []
    for row in rows:
        if row.ours in missing:
            continue
        assert reader.shape(row.ours) == row.shape, (row.ours, reader.shape(row.ours), row.shape)
        for name, shape in row.their_shapes().items():
            tensors.append(LazyTensor(
                form.spelled(name), shape, reader.dtype(row.ours),
                lambda row=row, name=name: row.to_theirs(reader.read(row.ours))[name],
            ))  # fmt: skip
    for name, make in form.fixed(config).items():
        dtype = tensors[0].dtype
        tensors.append(LazyTensor(
            form.spelled(name), tuple(make().shape), dtype, lambda make=make, dtype=dtype: make().to(dtype)
        ))  # fmt: skip
    files = form.files(config, vocabulary)
    write_pth(output, tensors, files) if pth else write_folder(output, tensors, max_shard_bytes, files)
    return remarks


@contextmanager
def _about(source: str | Path) -> Iterator[None]:
    """What a format says of a checkpoint is told with its path."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def config_of(reader: TensorReader) -> Config:
    """The resolved configuration of the run that a checkpoint lies in."""
    return read_configuration(reader)[0]


def read_configuration(reader: TensorReader) -> tuple[Config, list[str]]:
    """That, and remarks on how it differs from what the checkpoint was written with. Raises UserError where it is that
    of another model, see `megamug.checkpoint.configured`."""
    return configured.read(reader.folder.parent.parent, reader.folder, reader.state())


def _vocabulary(reader: TensorReader, config: Config) -> VocabularyRows:
    """Rows of the vocabulary without padding: of the model it was converted from, or of its vocabulary folder."""
    if config.model.kind in ("mug", "classifier"):
        return ()
    state = reader.state()
    if vocabulary_rows(state):
        known = state["origin"]["vocabulary"]
        return tuple(known) if isinstance(known, list) else (int(known),)
    return (Vocabulary.load(config.data.tokenizer).size,)


def _vocabulary_fits(config: Config, rows: int) -> list[str]:
    """A remark, if there is one, on the vocabulary folder that the user says is the model's; raises UserError where it
    cannot be."""
    if config.model.kind == "mug" or config.data.tokenizer is None:
        return []
    remark = check_vocabulary(rows, Vocabulary.load(config.data.tokenizer).size, config.data.tokenizer)
    return [] if remark is None else [remark]


def _new_parameters(form: Format, config: Config, covered: set[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of MUG's decoders that the configuration has and the format does not."""
    model = config.model
    wanted = {"image_decoder.": model.image_loss_weight > 0, "text_decoder.": model.caption_loss_weight > 0}
    wanted = {part for part, used in wanted.items() if used and not any(name.startswith(part) for name in covered)}
    if model.kind != "mug" or not wanted:
        return {}
    from megamug.checkpoint.state import entries_of
    from megamug.distributed import cpu_backend, setup
    from megamug.generation.loading import one_process
    from megamug.models.tasks import make_task

    config = one_process(copy.deepcopy(config))
    cpu_backend.apply()
    task = make_task(config)
    world = setup.start(config.parallel, config.seed, task.plan.vocabulary_stages)
    try:
        task.join(world)
        entries = entries_of(task.build(world, initialised=False))
    finally:
        setup.stop()
    return {e.key: tuple(e.global_shape) for e in entries if e.key.startswith(tuple(wanted))}


def configure(form: Format, view: View, overrides: list[str], allow: list[str]) -> Config:
    """The resolved configuration that a foreign checkpoint tells, then `overrides`. Raises UserError, see `Format`."""
    given = {override.partition("=")[0].strip() for override in overrides}
    try:
        if form.described is not None:
            if not view.config:
                raise UserError("there is no config.json beside the tensors; copy the whole folder")
            view.remarks += check_described(view.config, form.described, form.name, allow)
        settings = form.settings(view)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError) as error:  # of another type than it should be
        raise UserError(f"its config.json is not what the library writes ({error}); copy the whole folder") from None
    settings["precision.dtype"] = (
        "bf16" if all(view.dtype(name) == torch.bfloat16 for name in view.actual) else "fp32"
    )
    told = []
    for key, value in settings.items():
        if key in given:
            continue  # what the user says wins; a value that shapes contradict is found out by them
        value = value() if callable(value) else value
        told.append(f"{key}={json.dumps(value)}" if not isinstance(value, str) else f"{key}={value}")
    config = load_config(None, told + overrides)
    form.complete(config, view)
    config = resolve(config)
    check_values(config)
    (validate.widths if config.model.kind == "mug" else validate_lm.widths)(config)
    return config


def _allowed(name: str, allow: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in allow)


def _refuse(missing: list[str], unknown: list[str], allow: Iterable[str], where: str) -> None:
    allow = list(allow)
    parts = []
    for what, names in (("missing", missing), ("unknown", unknown)):
        names = [name for name in names if not _allowed(name, allow)]
        if names:
            parts.append(f"{len(names)} {what} keys: {', '.join(names)}")
    if parts:
        raise UserError(f"{where}: {'; '.join(parts)}; name them after --allow-missing to go on without them")


def _remark(what: str, names: list[str]) -> list[str]:
    return [f"{what}: {len(names)} tensors, {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"] if names else []


def compare_fixed(view: View, fixed: dict, allow: Iterable[str]) -> list[str]:
    """Stored position tables against ours. Rows that the stored table lacks in front (class token) must be zero."""
    remarks = []
    for name, make in fixed.items():
        if name not in view:
            continue
        found, expected = view.read(name), make()
        lacking = expected.shape[1] - found.shape[1]
        comparable = found.dim() == 3 and found.shape[2] == expected.shape[2] and lacking >= 0
        comparable = comparable and not expected[:, :lacking].any()
        if comparable:
            distance = float((found.double() - expected[:, lacking:].double()).abs().max())
            if distance <= POSITION_TOLERANCE.get(found.dtype, COARSE_TOLERANCE):
                if distance > 0:
                    remarks.append(f"{name}: differs by up to {distance:.1g} from the sin-cos positions used instead")
                continue
            said = f"differs by up to {distance:.2g} from"
        else:
            said = f"has the shape {list(found.shape)}, not the {list(expected.shape)} of"
        if not _allowed(name, list(allow)):
            raise UserError(
                f"{view.source.path}: {name} {said} MAE's fixed sin-cos positions: it was learned. megamug's positions "
                f"are fixed, so the model would not be the same; --allow-missing {name} converts it without them"
            )
        remarks.append(f"{name} {said} the sin-cos positions used instead: outputs differ from the source's")
    return remarks


def _turned(row: Row, view: View) -> LazyTensor:
    dtype = view.dtype(row.theirs[0])
    for name in row.theirs[1:]:
        dtype = torch.promote_types(dtype, view.dtype(name))
    dtype = torch.float32 if dtype == torch.float16 else dtype
    if not dtype.is_floating_point:
        raise UserError(f"{view.source.path}: {row.theirs[0]} is of type {dtype}, and weights are of floating point:"
                        " quantised files do not convert")  # fmt: skip

    def read() -> Tensor:
        return row.piece.join(*(view.read(name) for name in row.theirs)).to(dtype)

    return LazyTensor(row.ours, row.shape, dtype, read)


def _drawn(name: str, shape: tuple[int, ...], config: Config) -> LazyTensor:
    """As a new run would draw it."""
    from megamug.models.init import draw

    std = config.lm.init_std if config.model.kind == "decoder_lm" else None
    return LazyTensor(name, shape, torch.float32, lambda: draw(name, shape, config.seed, std))


def image_tokenizer_to_megamug(
    layout: str, source: str | Path, output: str | Path, overrides: Iterable[str] = (), allow: Iterable[str] = ()
) -> list[str]:
    """Writes the image tokenizer folder `output` from another project's file. `allow`: unknown keys of its config.json
    to go on with. `overrides`: image_size=PIXELS, which
    parameters do not tell (needed), normalise_codes=BOOL, norm_groups=NUMBER. Raises UserError."""
    from megamug.convert.image_tokenizer import find_layout, import_image_tokenizer

    given = dict(override.partition("=")[::2] for override in overrides)
    options = {}
    for key, value in given.items():
        if key == "normalise_codes" and value in ("true", "false"):
            options[key] = value == "true"
        elif key in ("image_size", "norm_groups") and value.isdecimal() and int(value):
            options[key] = int(value)
        else:
            raise UserError(
                f"--config {key}={value}: of an image tokenizer image_size=PIXELS, normalise_codes=true|false and "
                "norm_groups=NUMBER can be said"
            )
    if "image_size" not in options:
        raise UserError(f"{source}: the side of the images is not in the file; say it: --config image_size=PIXELS")
    if Path(output).exists():
        raise UserError(f"{output} exists; choose another folder, or remove it")
    with _about(source):
        found, _ = find_layout(ForeignTensors(source).names)
    if found != layout:
        raise UserError(f"{source} is laid out as {found}, not {layout}: --from vq_{found}")
    tokenizer = import_image_tokenizer(source, output, **options, allow=allow)
    return [f"{tokenizer.config.codes} codes, {tokenizer.config.grid} x {tokenizer.config.grid} of an image"]


def image_tokenizer_from_megamug(
    layout: str, source: str | Path, output: str | Path, max_shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Writes the folder `output` in a layout of another project from an image tokenizer folder. Raises UserError."""
    from megamug.convert.image_tokenizer import foreign_config, to_foreign
    from megamug.models.image_tokenizer.model import ImageTokenizer

    tokenizer = ImageTokenizer.load(source)
    foreign = to_foreign(tokenizer.config, dict(tokenizer.state_dict()), layout)
    tensors = [LazyTensor(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in foreign.items()]
    write_folder(output, tensors, max_shard_bytes, {"config.json": foreign_config(tokenizer.config, layout)})
    return ["the codes became unit vectors, as which they are used"] if tokenizer.config.normalise_codes else []

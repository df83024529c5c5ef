"""Running a format's table: a foreign checkpoint into a megamug run, and a megamug checkpoint into a foreign folder.

Tensors are made one at a time, as they are written; what a conversion holds in memory is bounded by a small multiple of
the largest parameter. Keys that one side has and the other does not know end the conversion unless they are allowed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from megamug.checkpoint.tensors import LazyTensor, TensorReader, write_run
from megamug.config import Config, load_config, resolve
from megamug.convert.formats import Format, View
from megamug.convert.safetensors_out import write_folder
from megamug.convert.source import ForeignTensors
from megamug.convert.table import Row
from megamug.errors import UserError

SHARD_BYTES = 5 << 30
# Stored tables are sines and cosines of another library's rounding; a learned table is further away by far.
POSITION_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
COARSE_TOLERANCE = 1e-2  # of 16-bit tables


def to_megamug(
    form: Format, source: str | Path, run_dir: str | Path, overrides: Iterable[str] = (), allow: Iterable[str] = ()
) -> list[str]:
    """Writes the run folder `run_dir` with the weights of the foreign checkpoint `source`; returns remarks, a sentence
    each. The configuration is what the checkpoint tells, then `overrides` (`section.key=value`).

    Raises UserError: unknown or missing keys that `allow` (names or patterns) does not name, shapes or positions that
    differ, a model that megamug does not have, a damaged or hostile file, a `run_dir` that holds a run.
    """
    view, overrides = View(ForeignTensors(source), form.canonical), list(overrides)
    config = _configure(form, view, overrides)
    rows, fixed = form.rows(config), form.fixed(config)
    wanted = [name for row in rows for name in row.theirs] + list(fixed)
    missing = [name for name in wanted if name not in view]
    unknown = [name for name in view.actual if name not in set(wanted)]
    _refuse(missing, unknown, allow, f"{source} as {form.name}")
    remarks = _remark("drawn anew (missing in the source)", [r.ours for r in rows if set(r.theirs) & set(missing)])
    remarks += _remark("left out", unknown)
    remarks += _compare_fixed(view, fixed, allow)
    tensors = []
    for row in rows:
        if set(row.theirs) & set(missing):
            tensors.append(_drawn(row, config))
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
    write_run(run_dir, config, tensors)
    return remarks


def from_megamug(
    form: Format,
    source: str | Path,
    output: str | Path,
    allow: Iterable[str] = (),
    max_shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes the folder `output` (safetensors, its index where there are several, config.json where the format has one)
    from a megamug run or checkpoint folder of any layout; returns remarks. Raises UserError as `to_megamug` does."""
    reader = TensorReader(source)
    config = config_of(reader)
    if config.model.kind != form.kind:
        raise UserError(f"{source} is a model of kind {config.model.kind}; {form.name} is one of kind {form.kind}")
    rows = form.rows(config)
    wanted = {row.ours for row in rows}
    missing = [row.ours for row in rows if row.ours not in reader]
    outside = [name for name in reader.names if not name.startswith(form.parts)]
    unknown = [name for name in reader.names if name not in wanted and name.startswith(form.parts)]
    _refuse(missing, unknown, allow, f"{source} to {form.name}")
    remarks = _remark(f"left out ({form.name} has no place for them)", outside) + _remark("left out", unknown + missing)
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
    write_folder(output, tensors, max_shard_bytes, form.files(config))
    return remarks


def config_of(reader: TensorReader) -> Config:
    """The resolved configuration of the run that a checkpoint lies in."""
    path = reader.folder.parent.parent / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path} is missing: a checkpoint is converted where it lies, in its run folder")
    return resolve(load_config(path))


def _configure(form: Format, view: View, overrides: list[str]) -> Config:
    given = {override.partition("=")[0].strip() for override in overrides}
    settings = form.settings(view)
    settings["precision.dtype"] = (
        "bf16" if all(view.dtype(name) == torch.bfloat16 for name in view.actual) else "fp32"
    )
    told = []
    for key, value in settings.items():
        if key in given:
            continue  # what the user says wins; a value that shapes contradict is found out by them
        value = value() if callable(value) else value
        told.append(f"{key}={json.dumps(value)}" if not isinstance(value, str) else f"{key}={value}")
    return resolve(load_config(None, told + overrides))


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


def _compare_fixed(view: View, fixed: dict, allow: Iterable[str]) -> list[str]:
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

    def read() -> Tensor:
        return row.piece.join(*(view.read(name) for name in row.theirs)).to(dtype)

    return LazyTensor(row.ours, row.shape, dtype, read)


def _drawn(row: Row, config: Config) -> LazyTensor:
    from megamug.models.init import draw

    return LazyTensor(row.ours, row.shape, torch.float32, lambda: draw(row.ours, row.shape, config.seed))

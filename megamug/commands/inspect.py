"""Says what is in a checkpoint: a run folder, one of its checkpoints, or another library's files.

    megamug inspect runs/mug [--tensors] [--norms] [--json]
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from megamug.checkpoint import configured
from megamug.checkpoint.store import STEP_FOLDER, CheckpointStore
from megamug.checkpoint.tensors import TensorReader
from megamug.command_line.arguments import Parser
from megamug.configuration.reading import load_config, resolve, towers
from megamug.convert.shown import shown
from megamug.convert.source import ForeignTensors
from megamug.errors import UserError


def main(argv: list[str], prog: str | None = None) -> int:
    parser = Parser(prog, description=__doc__.split("\n")[0])
    parser.add_argument(
        "path", type=Path, help="a run folder, a checkpoint step-XXXXXXXX, a .safetensors or .pth file, a folder"
    )
    parser.add_argument("--tensors", action="store_true", help="a line for each tensor")
    parser.add_argument("--norms", action="store_true", help="their Euclidean norms as well (reads every tensor)")
    parser.add_argument("--json", action="store_true", help="all of it as JSON")
    options = parser.parse_args(argv)
    try:
        report = inspect(options.path, options.norms)
    except UserError as error:  # it may quote what a file holds
        raise UserError(shown(str(error))) from None
    print(json.dumps(report, indent=1) if options.json else as_text(report, options.tensors or options.norms))
    return 0 if report.get("complete", True) and report.get("readable", True) else 1


def inspect(path: Path, norms: bool = False) -> dict:
    """What is in `path`; only what is sound of a damaged checkpoint. Raises UserError where there is no checkpoint."""
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        return _run(path, norms)
    if STEP_FOLDER.fullmatch(path.name) and path.is_dir():
        return _checkpoint(path, norms)
    source = ForeignTensors(path)
    return {
        "path": str(path), "kind": "foreign", "model_type": (source.config or {}).get("model_type"),
        "remarks": source.remarks, "tensors": _tensors(source, source.names, norms),
    }  # fmt: skip


def _run(path: Path, norms: bool) -> dict:
    """The newest complete checkpoint, and a line on each of the others."""
    store, newest = CheckpointStore(path, keep=0), None
    problems = {}
    for step in sorted((int(STEP_FOLDER.fullmatch(p.name)[1]) for p in store.root.glob("step-*")
                        if STEP_FOLDER.fullmatch(p.name)), reverse=True):  # fmt: skip
        problems[store.path(step).name] = store.verify(store.path(step))
        if not problems[store.path(step).name] and newest is None:
            newest = store.path(step)
    if not problems:
        raise UserError(f"{path} has no checkpoint yet; train first: megamug train {path / 'config.yaml'}")
    report = _checkpoint(newest, norms) if newest else {"path": str(path), "kind": "megamug", "complete": False}
    return report | {"checkpoints": {name: found or "complete" for name, found in problems.items()}}


def _checkpoint(path: Path, norms: bool) -> dict:
    problems = CheckpointStore(path.parent.parent, keep=0).verify(path)
    if problems:
        return {"path": str(path), "kind": "megamug", "complete": False, "problems": problems}
    reader = TensorReader(path)
    state, manifest = reader.state(), json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    report = {
        "path": str(path), "kind": "megamug", "complete": True, "step": reader.step, "megamug": manifest.get("megamug"),
        "bytes": sum(entry["size"] for entry in manifest["files"].values()),
        "optimizer": sorted({name.split(".")[1] for name in reader.optimizer_names}),
        "identity": state.get("identity"), "origin": state.get("origin") or None,
        "layout": state.get("layout"),  # checkpoints of megamug before it was recorded, and weights alone, have none
    }  # fmt: skip
    cursor = state.get("cursor") or {}
    report["samples_seen"] = cursor.get("samples")  # pairs of images and captions, or rows of tokens
    config_path = path.parent.parent / "config.yaml"
    report["configuration"] = "not recorded" if state.get(configured.KEY) is None else "as in config.yaml"
    if config_path.is_file():
        config = resolve(load_config(config_path))
        try:
            changes = configured.check(config, config_path, path, state)
        except UserError as error:
            changes, report["readable"] = [str(error)], False
        if changes and state.get(configured.KEY) is not None:
            report["configuration"] = changes[0]
        report["model"] = config.model.kind
        if towers(config) and report["samples_seen"] is not None:
            report["tokens_seen"] = report["samples_seen"] * config.data.context_length
    return report | {"tensors": _tensors(reader, reader.names, norms)}


def _tensors(source, names: list[str], norms: bool) -> dict[str, dict]:
    found = {}
    for name in names:
        found[name] = {"shape": list(source.shape(name)), "dtype": str(source.dtype(name)).removeprefix("torch.")}
        if norms:
            tensor = source.read(name).double()
            found[name] |= {"norm": float(tensor.norm()), "finite": bool(torch.isfinite(tensor).all())}
    return found


def as_text(report: dict, each: bool) -> str:
    tensors = report.get("tensors", {})
    lines = [f"{report['path']}: {describe(report)}"]
    lines += [f"  {told}" for told in report.get("problems", []) + report.get("remarks", [])]
    for name, state in report.get("checkpoints", {}).items():
        lines.append(f"  {name}: {state if isinstance(state, str) else '; '.join(state)}")
    parts: dict[str, list[int]] = {}
    for name, entry in tensors.items():
        count, values = parts.setdefault(name.split(".")[0], [0, 0])
        parts[name.split(".")[0]] = [count + 1, values + math.prod(entry["shape"])]
    total = sum(values for _, values in parts.values())
    if tensors:
        dtypes = ", ".join(sorted({entry["dtype"] for entry in tensors.values()}))
        lines.append(f"  {len(tensors)} tensors, {total:,} values, {dtypes}")
        lines += [f"    {part}: {count} tensors, {values:,} values" for part, (count, values) in parts.items()]
    if each:
        for name, entry in tensors.items():
            norm = f"  norm {entry['norm']:.6g}{'' if entry['finite'] else ' NOT FINITE'}" if "norm" in entry else ""
            lines.append(f"  {name}  {entry['shape']}  {entry['dtype']}{norm}")
    return "\n".join(shown(line) for line in lines)


def describe(report: dict) -> str:
    if report["kind"] == "foreign":
        return f"tensors of another library ({report['model_type'] or 'no config.json'})"
    if not report["complete"]:
        return "no complete checkpoint of megamug"
    seen = report["samples_seen"]
    parts = [
        f"complete checkpoint of step {report['step']}",
        f"{report.get('model', 'no config.yaml')}",
        "no samples seen" if seen is None else f"{seen:,} samples seen",
        f"{report['bytes']:,} bytes",
    ]
    if report.get("tokens_seen") is not None:
        parts.insert(3, f"{report['tokens_seen']:,} tokens")
    layout = ", ".join(f"{key} {value}" for key, value in (report["layout"] or {}).items())
    parts.append(f"layout: {layout or 'not recorded'}")
    parts.append(f"optimizer state: {', '.join(report['optimizer']) or 'none'}")
    parts.append(f"configuration: {report['configuration']}")
    if report["origin"]:
        parts.append(f"converted from {report['origin'].get('format', report['origin'])}")
    return "; ".join(parts)

"""Index many shards: in parallel, in a repeatable order, saying what was quarantined and why."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from megamug.command_line.console import counted
from megamug.data.dali import load_dali
from megamug.data.shards.annotations import DEFAULT_LIMITS, NO_CAPTION, Limits, number_names
from megamug.data.shards.labels import NO_LABEL
from megamug.data.shards.maps import NO_MAP
from megamug.data.shards.sources import compressed, find_shards
from megamug.data.shards.tar_members import described
from megamug.data.shards.verify import ShardReport, index_shard
from megamug.data.tooling import Progress, default_processes, parallel_map
from megamug.durable import write_atomically
from megamug.errors import UserError, printable

_KINDS = 10  # of other members that are told apart


def index_paths(
    paths: list[str | Path], *, limits: Limits = DEFAULT_LIMITS, processes: int | None = None
) -> list[ShardReport]:
    """Index every shard that `paths` (folders, globs, tar files) name; those that are up to date cost a stat. With
    `limits.labels`, names of classes are numbered before (`classes.txt`).

    Idempotent, and safe to repeat after an interruption. Reports come in the order of the shards. Raises `UserError`.
    """
    load_dali()  # its absence is told once, not by each process
    shards = list(dict.fromkeys(shard for path in paths for shard in find_shards(path)))
    for shard in shards:
        if problem := compressed(shard):
            raise UserError(problem)
        if shard.suffix != ".tar":
            raise UserError(f"{shard}: not a .tar shard; megamug data shards packs images and captions into shards")
    if limits.labels:
        number_names(shards, limits)
    progress = Progress("shards", len(shards))
    reports = {}
    work = functools.partial(index_shard, limits=limits)
    for shard, report in parallel_map(work, shards, processes or default_processes()):
        reports[shard] = report
        progress.update(note=f"{sum(len(r.quarantine) for r in reports.values())} quarantined")
    return [reports[shard] for shard in shards]


def write_quarantine(path: Path, reports: list[ShardReport]) -> None:
    """The quarantine list as JSON lines: shard, key, member, reason, and where it is known the member's own file."""
    entries = [{"shard": printable(report.shard), **entry} for report in reports for entry in report.quarantine]
    write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in entries).encode())


def check_usable(reports: list[ShardReport]) -> None:
    """Raises `UserError` where not one sample can be used: nothing was gained, and training would say so later."""
    if not any(report.samples for report in reports):
        raise UserError(f"not one usable sample in {len(reports)} shard{'s' * (len(reports) != 1)}: the reasons stand"
                        " above, mend them and index again")  # fmt: skip


def summary(reports: list[ShardReport], shown: int = 20) -> str:
    """What a person wants to know: counts, the first `shown` quarantined members, what was left out."""
    samples = sum(report.samples for report in reports)
    quarantine = [(report.shard, entry) for report in reports for entry in report.quarantine]
    actions = [report.action for report in reports]
    counts = ", ".join(f"{actions.count(action)} {action}" for action in dict.fromkeys(actions))
    total = f"{counted(len(reports), 'shard')} ({counts}): {counted(samples, 'sample')}"
    lines = [f"{total}, {len(quarantine):,} quarantined"]
    lines += _of_captions(reports) + _of_labels(reports) + _of_maps(reports)
    for shard, entry in quarantine[:shown]:
        lines.append(f"  {printable(shard)}: {described(entry)}")
    if len(quarantine) > shown:
        lines.append(f"  and {len(quarantine) - shown:,} more; --quarantine FILE writes them all")
    ignored: dict[str, int] = {}
    for report in reports:
        for extension, count in report.ignored.items():
            ignored[extension] = ignored.get(extension, 0) + count
    if ignored:
        most = sorted(ignored.items(), key=lambda kind: (-kind[1], kind[0]))
        kinds = ", ".join(f"{count:,} .{printable(extension)[:40]}" for extension, count in most[:_KINDS])
        if len(most) > _KINDS:
            kinds += f", {sum(count for _, count in most[_KINDS:]):,} of {len(most) - _KINDS:,} more kinds"
        lines.append(f"  members of other kinds, not used: {kinds}")
    return "\n".join(lines)


def _of_captions(reports: list[ShardReport]) -> list[str]:
    """What to know where images have no caption: those that are used so, and those that are quarantined for it."""
    alone = sum(report.samples - report.captioned for report in reports)
    lost = sum(entry["reason"] == NO_CAPTION for report in reports for entry in report.quarantine)
    lines = []
    if alone:
        lines.append(f"  {counted(alone, 'image')} without a caption: used where captions are not needed")
    if lost:
        lines.append(f"  {counted(lost, 'image')} without a caption among captioned ones: quarantined; --images-alone"
                     " keeps such images")  # fmt: skip
    return lines


def _of_labels(reports: list[ShardReport]) -> list[str]:
    """How many have a class, and why the others have none."""
    labelled, last = sum(report.labelled for report in reports), max(report.classes for report in reports) - 1
    reason = next((report.unlabelled for report in reports if report.unlabelled), "")
    return _having("label", reports, labelled, f"of classes 0 to {last}", reason, NO_LABEL)


def _of_maps(reports: list[ShardReport]) -> list[str]:
    """How many have a map of classes, and why the others have none."""
    mapped, last = sum(report.mapped for report in reports), max(report.map_values for report in reports) - 1
    reason = next((report.unmapped for report in reports if report.unmapped), "")
    return _having("map", reports, mapped, f"of values up to {last}, 255 not counted", reason, NO_MAP)


def _having(what: str, reports: list[ShardReport], having: int, told: str, reason: str, absent: str) -> list[str]:
    """How many samples are `having` a label or map, and why the first of the others has none; nothing where that is
    that none is there (`absent`)."""
    samples = sum(report.samples for report in reports)
    if not having and (not reason or reason.endswith(absent)):
        return []
    lines = [f"  {what}s: {counted(having, 'sample')} {told}"] if having else []
    if having < samples:
        lines.append(f"  {counted(samples - having, 'sample')} without a usable {what} ({reason}); --{what}s"
                     " quarantines what has none")  # fmt: skip
    return lines

"""What a study has found so far: a table for people, the same as JSON, a plot."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

from megamug.durable import replace_text, write_atomically
from megamug.transfer.study.folder import Study
from megamug.transfer.study.questions import UNTRAINED
from megamug.transfer.study.statistics import CERTAIN, difference, spread

TITLES = {"linear": "linear probe", "knn": "k-NN"}


def figures(study: Study) -> dict:
    """Means, standard errors and differences of the cells that are done, and the names of those that are not. Shares
    of right answers, between 0 and 1; a standard error that one seed does not give is null."""
    values: dict[str, dict[str, list[float]]] = {}
    missing = []
    for cell in [*study.controls(), *study.cells()]:
        results = study.result(cell)
        if results is None:
            missing.append(cell.name)
            continue
        for method, feature in study.measure.columns():
            found = values.setdefault(cell.variant, {}).setdefault(f"{method} {feature}", [])
            found.append(study.value(results, method, feature))
    names = [name for name in (UNTRAINED, *(v.name for v in study.question.variants)) if name in values]
    rows = []
    for name in names:
        columns = {}
        for column, found in values[name].items():
            mean, error = spread(found)
            columns[column] = {"mean": mean, "error": _finite(error), "values": found}
        rows.append({"variant": name, "seeds": len(found), "columns": columns})
    differences = []
    for one, other in study.question.pairs:
        if one not in values or other not in values:
            continue
        columns = {}
        for column, found in values[one].items():
            told = difference(found, values[other][column])
            columns[column] = {"value": told.value, "error": _finite(told.error), "told": told.told,
                               "seeds_needed": told.seeds, "words": told.words()}  # fmt: skip
        differences.append({"one": one, "other": other, "columns": columns})
    return {"study": study.question.name, "seeds": study.seeds, "cells": len(study.cells()), "missing": missing,
            "k": study.measure.k, "rows": rows, "differences": differences,
            "variants": {v.name: list(v.overrides) for v in study.question.variants}}  # fmt: skip


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def text(study: Study, found: dict) -> str:
    """Markdown."""
    columns = [f"{method} {feature}" for method, feature in study.measure.columns()]
    titles = [_title(study, method, feature) for method, feature in study.measure.columns()]
    lines = [f"# {study.question.name}: {study.folder.name}", ""]
    if found["missing"]:
        lines += [f"Not all is there. Missing: {', '.join(found['missing'])}.", ""]
    lines += [
        f"Right answers in %, mean +- standard error over seeds ({study.seeds} wanted).", "",
        _row("variant", "seeds", *titles), _row(*["---"] * (2 + len(columns))),
    ]  # fmt: skip
    for row in found["rows"]:
        cells = (_points(row["columns"][column]["mean"], row["columns"][column]["error"]) for column in columns)
        lines.append(_row(row["variant"], row["seeds"], *cells))
    if found["differences"]:
        lines += ["", f"Differences in points +- standard error; told where more than {CERTAIN:g} standard errors, else"
                  " with the number of seeds that would tell one of this size.", "",
                  _row("difference", *titles), _row(*["---"] * (1 + len(columns)))]  # fmt: skip
        for pair in found["differences"]:
            lines.append(_row(f"{pair['one']} - {pair['other']}", *(_told(pair["columns"][c]) for c in columns)))
    if not study.controlled:
        lines += ["", "No untrained control: the runs start from the weights of model.initial."]
    lines += ["", "| variant | over the configuration |", "| --- | --- |"]
    lines += [_row(name, " ".join(f"`{o}`" for o in changes) or "-") for name, changes in found["variants"].items()]
    return "\n".join(lines) + "\n"


def _title(study: Study, method: str, feature: str) -> str:
    title = TITLES[method] + (f" (k {study.measure.k})" if method == "knn" else "")
    return f"{title}, {feature.replace('_', ' ')}"


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _points(mean: float, error: float | None) -> str:
    return f"{100 * mean:.1f}" + ("" if error is None else f" +- {100 * error:.1f}")


def _told(found: dict) -> str:
    value = f"{100 * found['value']:+.1f}" + ("" if found["error"] is None else f" +- {100 * found['error']:.1f}")
    if found["told"]:
        return f"{value} {'better' if found['value'] > 0 else 'worse'}"
    if found["error"] is None:
        return f"{value} (one seed)"
    return f"{value} (chance; {found['seeds_needed']} seeds)" if found["seeds_needed"] else f"{value} (none)"


def write(study: Study, plot: bool) -> str:
    """Writes report.md, report.json and, with `plot`, report.png; returns the text."""
    found = figures(study)
    told = text(study, found)
    replace_text(study.folder / "report.json", json.dumps(found, indent=1) + "\n")
    replace_text(study.folder / "report.md", told)
    if plot and found["rows"]:
        _plot(study, found, study.folder / "report.png")
    return told


def _plot(study: Study, found: dict, path: Path) -> None:
    """A panel for each figure: variants side by side, or along the question's axis; the control as a line."""
    from matplotlib.figure import Figure

    columns, rows = study.measure.columns(), {row["variant"]: row["columns"] for row in found["rows"]}
    curves = study.question.curves or {"": [(i, v.name) for i, v in enumerate(study.question.variants)]}
    figure = Figure(figsize=(4.2 * len(columns), 4.2), layout="constrained")
    for panel, (method, feature) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        column = f"{method} {feature}"
        for name, points in curves.items():
            shown = [(x, rows[variant][column]) for x, variant in points if variant in rows]
            panel.errorbar(
                [x for x, _ in shown], [100 * value["mean"] for _, value in shown],
                [100 * (value["error"] or 0) for _, value in shown], label=name or None, capsize=3, marker="o",
                linestyle="-" if name else "none",
            )  # fmt: skip
        if UNTRAINED in rows:
            panel.axhline(100 * rows[UNTRAINED][column]["mean"], color="0.5", linestyle="--", label=UNTRAINED)
        if study.question.curves:
            panel.set_xscale("log")
            panel.set_xlabel(study.question.axis)
        else:
            names = [variant for _, variant in curves[""]]
            panel.set_xticks(range(len(names)), names, rotation=40, ha="right")
        panel.set_title(_title(study, method, feature))
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    figure.axes[0].set_ylabel("right answers, % (bars: standard error)")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    write_atomically(path, file.getvalue())

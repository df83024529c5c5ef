"""Questions with several answers, of which a language model finds one likelier than the others.

    megamug evaluate RUN --task choices --suite hellaswag --data hellaswag_val.jsonl
    megamug evaluate RUN --task choices --suite lm-eval:arc_easy,piqa

The first reads the file that a suite is published as (`suites`); the second lets the `lm-eval` package fetch and pose
its own tasks, with the run behind its `LM` interface (`harness`). Both ask for the same likelihoods.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from megamug.durable import write_atomically
from megamug.errors import UserError
from megamug.evaluate.choices.suites import SUITES, Question, read_questions

LM_EVAL = "lm-eval:"


def check(suite: str | None, data: object) -> tuple[list[Question], int]:
    """(questions of the files `data`, 0 of lm-eval's) of a `--suite`, read and checked, and how many lines were left
    out as they have no answer. Raises `UserError`."""
    names = f"one of {', '.join(SUITES)}, or {LM_EVAL}TASK[,TASK]"
    if suite is None:
        raise UserError(f"--task choices wants --suite: {names}")
    paths = [Path(path) for path in paths_of(data)]
    if suite.startswith(LM_EVAL):
        from megamug.evaluate.choices.harness import check_tasks

        check_tasks(tasks_of(suite), paths)
        return [], 0
    if suite not in SUITES:
        raise UserError(f"--suite {suite}: there is no such suite; give {names}")
    if not paths:
        raise UserError(f"--suite {suite} wants the file it is published as: --data FILE ({SUITES[suite].files})")
    return read_questions(suite, paths)


def tasks_of(suite: str) -> list[str]:
    """The tasks that `lm-eval:TASK,TASK` names."""
    return [name for name in suite.removeprefix(LM_EVAL).split(",") if name]


def paths_of(data: object) -> list[str]:
    """`data` of a task: None, one path or several."""
    return [] if data is None else [str(path) for path in ([data] if isinstance(data, (str, Path)) else data)]


def run_suite(run, suite: str, data: object, questions: list[Question], samples: int | None, folder: Path) -> dict:
    """Figures of a `--suite` that `check` has read, see `measure` and `harness.measure`."""
    if suite.startswith(LM_EVAL):
        from megamug.evaluate.choices import harness

        folders = [Path(path) for path in paths_of(data)]
        return {"suite": suite, **harness.measure(run, tasks_of(suite), folders, samples)}
    return measure(run, suite, questions, samples, folder)


def measure(run, suite: str, questions: list[Question], samples: int | None, folder: Path) -> dict:
    """Shares of the questions whose answer is found likeliest, and every question's likelihoods in `choices.jsonl`.

    `accuracy`: by the sum of log p over the tokens of a choice; `accuracy_normalised`: by that sum divided by the
    number of characters of the choice (lm-eval's `acc_norm`). With standard errors over questions, and `chance`.
    At most `samples` questions, spread evenly over all in their order.
    """
    from megamug.evaluate.choices.likelihood import encode_pair, log_likelihoods

    count = len(questions) if samples is None else min(samples, len(questions))
    chosen = [questions[i] for i in np.arange(count) * len(questions) // count]
    vocabulary = run.task.vocabulary
    pairs = [encode_pair(vocabulary, *pair) for question in chosen for pair in question.pairs]
    scores, cut = log_likelihoods(run, pairs)
    results, first = [], 0
    for question in chosen:
        found = [score for score, _ in scores[first : first + len(question.pairs)]]
        first += len(question.pairs)
        lengths = [max(1, len(text)) for text in question.texts]
        results.append({
            "question": question.name, "answer": question.answer, "log_likelihoods": found,
            "choice": int(np.argmax(found)),
            "choice_normalised": int(np.argmax([x / n for x, n in zip(found, lengths, strict=True)])),
        })  # fmt: skip
    figures = {"suite": suite, "samples": count, "questions": len(questions), "cut": cut,
               "chance": float(np.mean([1 / len(question.pairs) for question in chosen]))}  # fmt: skip
    for name, key in (("accuracy", "choice"), ("accuracy_normalised", "choice_normalised")):
        figures[name], figures[f"{name}_error"] = share([result[key] == result["answer"] for result in results])
    if run.world.is_first:
        lines = "".join(json.dumps(result) + "\n" for result in results)
        write_atomically(folder / "choices.jsonl", lines.encode())
    return {**figures, "results": str(folder / "choices.jsonl")}


def share(right: list[bool]) -> tuple[float, float | None]:
    """The mean, and its standard error: sample standard deviation / sqrt(n); None for one question."""
    n, mean = len(right), float(np.mean(right))
    return mean, math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None


def table(figures: dict) -> list[str]:
    """What a person reads of `measure` or `harness.measure`, a line each."""
    cut = [f"  {figures['cut']:,} texts with more context than the run reads: its beginning was cut off"]
    if "tasks" in figures:
        return [
            f"lm-eval {figures['lm_eval']}, step {figures['step']}",
            *(f"  {task:<28}{name:<18}{value:>10.4f}{'' if error is None else f' +- {error:.4f}'}"
              for task, rows in figures["tasks"].items() for name, (value, error) in rows.items()),
            *(cut if figures["cut"] else []),
        ]  # fmt: skip
    rows = [("accuracy", "likeliest choice"), ("accuracy_normalised", "  a character of it")]
    error = {name: figures[f"{name}_error"] for name, _ in rows}
    lines = [
        f"{figures['suite']}: {figures['samples']:,} of {figures['questions']:,} questions, step {figures['step']}",
        *(f"  {title:<24}{figures[name]:>9.2%}{'' if error[name] is None else f' +- {error[name]:.2%}'}"
          for name, title in rows),
        f"  {'chance':<24}{figures['chance']:>9.2%}",
    ]  # fmt: skip
    lines += cut if figures["cut"] else []
    if figures["unanswered"]:
        lines.append(f"  {figures['unanswered']:,} lines without an answer were left out")
    return lines

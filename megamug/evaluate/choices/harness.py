"""A run behind the `LM` interface of the lm-eval package (EleutherAI's Language Model Evaluation Harness).

All of lm-eval's tasks that ask for likelihoods or for greedy text can be put to a run: `megamug evaluate RUN --task
choices --suite lm-eval:TASK,TASK`, or in Python `lm_eval.simple_evaluate(MegamugLM(run), tasks=[...])`. Every text
stands behind `<bos>`. Under tensor parallelism all ranks pose the same tasks in the same order.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from megamug.errors import UserError
from megamug.evaluate.choices.likelihood import encode_pair, log_likelihoods
from megamug.generation.decoding import Sampling, write_documents

os.environ.setdefault("TQDM_DISABLE", "1")  # its bars are drawn over what megamug tells
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no forks of a process that holds a model

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(f"lm-eval cannot be imported ({error}); pip install 'lm-eval>=0.4.9', or ask a suite from its file:"
                    " --suite hellaswag --data FILE") from error  # fmt: skip

WRITTEN = 256  # tokens of an answer at most, where a task names no limit; half of the context where that is less
AT_ONCE = 16  # answers written in one batch
OPTIONS = ("until", "max_gen_toks", "max_tokens", "do_sample", "temperature", "top_p")  # of writing


class MegamugLM(LM):
    """A language model's run, as `load_run` gives it."""

    def __init__(self, run) -> None:
        super().__init__()
        self.run, self.vocabulary = run, run.task.vocabulary
        self.context = run.config.data.context_length
        self.cut = 0  # contexts whose beginning did not fit

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): sum of log p in nat, and whether greedy decoding would write it."""
        pairs = [encode_pair(self.vocabulary, *request.args) for request in requests]
        found, cut = log_likelihoods(self.run, pairs)
        self.cut += cut
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, each token once, in disjoint windows of the context length."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = self.vocabulary.encode_text(request.args[0])
            windows = get_rolling_token_windows(ids, self.vocabulary.bos_id, self.context, 1)
            for context, following in map(make_disjoint_window, windows):
                # the first window's context is <bos>, which log_likelihoods puts before every one
                pairs.append((tuple(context[context[:1] == [self.vocabulary.bos_id]:]), tuple(following)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, log_likelihoods(self.run, pairs)[0], strict=True):
            sums[owner] += score
        return sums

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Texts written greedily (or drawn, where the task says so) behind each context, up to a stop word."""
        asked = [request.args for request in requests]
        for _, options in asked:
            self._check(options)
        texts = []
        for first in range(0, len(asked), AT_ONCE):
            texts += self._written(asked[first : first + AT_ONCE], first)
        return texts

    def _check(self, options: dict) -> None:
        """Raises `UserError` for what a task asks of writing and a run does not do."""
        unknown = [name for name, value in options.items() if name not in OPTIONS and value not in (None, False, 0, 1)]
        if unknown:
            raise UserError(f"the task wants texts written with {unknown[0]}={options[unknown[0]]}; a run knows"
                            f" {', '.join(OPTIONS)}")  # fmt: skip
        if (most := self._most(options)) >= self.context:
            raise UserError(f"the task wants {most} tokens written, which leaves nothing of the {self.context} that the"
                            " run reads (data.context_length) for its question")  # fmt: skip

    def _most(self, options: dict) -> int:
        return int(options.get("max_gen_toks", options.get("max_tokens", min(WRITTEN, self.context // 2))))

    def _written(self, requests: list[tuple[str, dict]], first: int) -> list[str]:
        """Of requests number `first` and those behind it; what is drawn depends on the number."""
        vocabulary = self.vocabulary
        starts, limits, samplings = [], [], set()
        for context, options in requests:
            most = self._most(options)
            ids = vocabulary.encode_text(context.rstrip())
            room = self.context - 1 - most
            self.cut += len(ids) > room
            starts.append([vocabulary.bos_id, *ids[max(0, len(ids) - room) :]])
            limits.append(len(starts[-1]) + most)
            drawn = options.get("do_sample", options.get("temperature", 0) > 0)
            samplings.add((float(options.get("temperature", 1.0)) if drawn else 0.0, float(options.get("top_p", 1.0))))
        if len(samplings) > 1:
            return [text for i, request in enumerate(requests) for text in self._written([request], first + i)]
        [(temperature, top_p)] = samplings
        sampling = Sampling(temperature, top_p, seed=self.run.config.seed)
        rows = write_documents(
            self.run.model, vocabulary, starts, sampling, limits=limits, max_images=0,
            samples=range(first, first + len(starts)),
        )  # fmt: skip
        return [
            until(vocabulary.decode_text(row.tokens)[len(vocabulary.decode_text(row.tokens[: row.prompt])) :], options)
            for row, (_, options) in zip(rows, requests, strict=True)
        ]

    @property
    def tokenizer_name(self) -> str:
        return self.vocabulary.fingerprint()

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        raise UserError("a run has no chat template; pose lm-eval's tasks without one")


def until(text: str, options: dict) -> str:
    """What stands before the first stop word of a task's `until`."""
    words = options.get("until") or []
    for word in [words] if isinstance(words, str) else words:
        text = text.split(word)[0] if word else text
    return text


def check_tasks(tasks: list[str], folders: list[Path]) -> None:
    """Raises `UserError` where lm-eval knows one of the tasks neither itself nor from the YAML files in `folders`."""
    if not tasks:
        raise UserError("--suite lm-eval: names no task; as --suite lm-eval:arc_easy,piqa")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--data: {folder} is no folder; with lm-eval's tasks it is one of their YAML files")
    known = _manager(tuple(folders), tuple(tasks))
    for name in tasks:
        if not known.match_tasks([name]):
            raise UserError(f"--suite lm-eval:{name}: lm-eval {lm_eval.__version__} knows no such task; the list:"
                            " lm-eval ls tasks; your own: --data FOLDER of YAML files")  # fmt: skip


@functools.cache
def _manager(folders: tuple[Path, ...], tasks: tuple[str, ...]) -> TaskManager:
    """lm-eval's list of tasks. Its own thousands, which take seconds, are read only where `folders` do not hold all
    that are asked for."""
    if folders:
        own = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
        if all(own.match_tasks([name]) for name in tasks):
            return own
    return TaskManager(include_path=[str(folder) for folder in folders] or None)


def measure(run, tasks: list[str], folders: list[Path], samples: int | None) -> dict:
    """lm-eval's own figures, by task: metric -> (value, standard error or None)."""
    model = MegamugLM(run)
    try:
        found = lm_eval.simple_evaluate(
            model, tasks=tasks, task_manager=_manager(tuple(folders), tuple(tasks)), limit=samples, log_samples=False,
            bootstrap_iters=1000,  # of figures whose error has no formula
            random_seed=run.config.seed, numpy_random_seed=run.config.seed, torch_random_seed=None,
            fewshot_random_seed=run.config.seed,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:
        raise UserError(f"lm-eval could not get the data of {', '.join(tasks)} ({error}); without a network ask a suite"
                        " from its file: --suite hellaswag --data FILE") from error  # fmt: skip
    return {"lm_eval": lm_eval.__version__, "cut": model.cut, "tasks": {
        task: _metrics(row) for task, row in found["results"].items()
    }}  # fmt: skip


def _metrics(row: dict) -> dict[str, tuple[float, float | None]]:
    """`{"acc,none": 0.3, "acc_stderr,none": 0.1}` -> `{"acc": (0.3, 0.1)}`; a filter's name is kept where it is one."""
    found = {}
    for key, value in row.items():
        name, comma, kept = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = row.get(f"{name}_stderr,{kept}")
        found[name if kept == "none" else key] = (value, error if isinstance(error, float) else None)
    return found

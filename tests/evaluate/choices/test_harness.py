"""lm-eval's own figures of a run equal those of its transformers adapter on the same weights."""

import json

import pytest
import torch

from megamug import cli
from megamug.convert.conversion import from_megamug, to_megamug
from megamug.convert.registry import FORMATS
from megamug.models.image_tokenizer.vocabulary import make_vocabulary
from tests.data.text.foreign import TEXTS

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `dev`)")
pytest.importorskip("transformers", reason="transformers is not installed (extra `dev`)")

TASKS = {
    "told": {
        "output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_target": "{{label}}",
        "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolled": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{query}} {{choices[0]}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "written": {
        "output_type": "generate_until", "doc_to_text": "{{query}}", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run made of a LLaMA, and tasks of a file. (folder, model, tokenizer): the run's way back, so that both have the
    rows of marks that the run's vocabulary adds and the likelihoods are over the same tokens."""
    import transformers

    from tests.convert.language.test_growth import published

    folder = tmp_path_factory.mktemp("harness")
    form, _, tokenizer = published("llama, tokenizer.json", folder)
    tokenizer.add_bos_token = True
    make_vocabulary(folder / "model", None, 4, folder / "v")
    to_megamug(FORMATS[form], folder / "model", folder / "run", vocabulary=folder / "v")
    from_megamug(FORMATS[form], folder / "run", folder / "back")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "back").eval()
    words = [word for text in TEXTS for word in text.split()]
    rows = [{"query": " ".join(words[i : i + 3]), "choices": [" ".join(words[j : j + 1 + j % 3]) for j in
             (i + 3, (i * 7) % 30, (i * 5 + 2) % 30)], "label": i % 3} for i in range(24)]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps({
            "task": name, "dataset_path": "json", "test_split": "test", "num_fewshot": 0,
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, **task,
        }))  # fmt: skip
    return folder, model, tokenizer


def theirs(model, tokenizer, **options):
    """lm-eval's own adapter. Where whole texts are rolled over it begins each with <bos> by itself."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=128, **options)


def test_figures_equal_those_of_the_transformers_adapter(made, capsys, monkeypatch, tmp_path):
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder, model, tokenizer = made
    manager, expected = TaskManager(include_path=str(folder / "tasks"), include_defaults=False), {}
    for tasks, begin in ((["told", "written"], True), (["rolled"], False)):
        adapter = theirs(model, tokenizer, add_bos_token=begin)
        expected |= lm_eval.simple_evaluate(adapter, tasks=tasks, task_manager=manager, bootstrap_iters=0)["results"]
    capsys.readouterr()
    suite = f"lm-eval:{','.join(TASKS)}"
    assert cli.main(["evaluate", str(folder / "run"), "--task", "choices", "--suite", suite, "--data",
                     str(folder / "tasks"), "--json"]) == 0  # fmt: skip
    captured = capsys.readouterr()
    figures = json.loads(captured.out)["tasks"]
    assert set(figures) == set(TASKS)
    for task, metrics in (("told", ("acc", "acc_norm")), ("rolled", ("word_perplexity", "bits_per_byte")),
                          ("written", ("exact_match",))):  # fmt: skip
        for metric in metrics:
            key = metric if task != "written" else next(k for k in figures[task] if k.startswith(metric))
            value = next(v for k, v in expected[task].items() if k.startswith(f"{metric},"))
            assert figures[task][key][0] == pytest.approx(value, rel=1e-4), (task, metric)
    assert 0 < figures["told"]["acc"][0] < 1
    # bars, where another test imported tqdm before
    told = [line for line in captured.err.splitlines() if line.strip() and "it/s]" not in line]
    assert all(line.startswith(("lm-eval", "  ", "figures:")) for line in told), told


def test_texts_and_likelihoods_equal_those_of_the_transformers_adapter(made):
    """Request by request, where a figure could hide a difference."""
    from lm_eval.api.instance import Instance

    from megamug.evaluate.choices.harness import MegamugLM
    from megamug.generation.loading import load_run

    folder, model, tokenizer = made
    adapter, rolling = (theirs(model, tokenizer, add_bos_token=begin) for begin in (True, False))

    def requests(kind, arguments):
        return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]

    asked = requests("loglikelihood", [("a red circle", " left of"), ("", "two"), ("世界 ", "🎈")])
    whole = requests("loglikelihood_rolling", [("a red circle left of a blue square " * 12,), ("two",)])
    texts = requests("generate_until", [("a red circle", {"until": ["a"], "max_gen_toks": 20}),
                                        ("two triangles, one", {"until": [], "max_gen_toks": 20})])  # fmt: skip
    with load_run(folder / "run") as run:
        ours = MegamugLM(run)
        for mine, other in zip(ours.loglikelihood(asked), adapter.loglikelihood(asked), strict=True):
            assert mine[0] == pytest.approx(other[0], rel=1e-5) and mine[1] == bool(other[1])
        assert ours.loglikelihood_rolling(whole) == pytest.approx(rolling.loglikelihood_rolling(whole), rel=1e-5)
        assert ours.generate_until(texts) == adapter.generate_until(texts)


def test_what_a_task_asks_of_writing_is_done_or_refused(made):
    """lm-eval's adapter of transformers would hand on what it does not know itself; nothing is passed over here."""
    from lm_eval.api.instance import Instance

    from megamug.errors import UserError
    from megamug.evaluate.choices.harness import MegamugLM
    from megamug.generation.loading import load_run

    def asked(**options):
        return [Instance("generate_until", {}, ("a red circle " * 30, {"until": [], **options}), 0)]

    with load_run(made[0] / "run") as run:
        model = MegamugLM(run)
        with pytest.raises(UserError, match="with num_beams=4; a run knows until, max_gen_toks"):
            model.generate_until(asked(num_beams=4))
        with pytest.raises(UserError, match=r"wants 128 tokens written, which leaves nothing of the 128"):
            model.generate_until(asked(max_gen_toks=128))
        assert model.cut == 0 and len(model.generate_until(asked(num_beams=1))) == 1 and model.cut == 1
        with torch.no_grad():
            next(run.model.parameters()).fill_(float("nan"))
        with pytest.raises(UserError, match="the likelihoods of 1 of 1 texts are not finite; name another"):
            model.loglikelihood([Instance("loglikelihood", {}, ("a", " red"), 0)])


def test_mistakes(made, capsys, monkeypatch):
    from megamug.evaluate.choices import harness

    folder, *_ = made
    manager = harness.TaskManager  # its own thousands of tasks take seconds to list
    monkeypatch.setattr(harness, "TaskManager", lambda **options: manager(**options | {"include_defaults": False}))
    command = ["evaluate", str(folder / "run"), "--task", "choices", "--suite"]
    for suite, data, said in (("lm-eval:", [], "names no task"), ("lm-eval:absent_task", [], "knows no such task"),
                              ("lm-eval:told", ["--data", str(folder / "rows.jsonl")], "is no folder")):  # fmt: skip
        assert cli.main([*command, suite, *data]) == 2
        assert said in capsys.readouterr().err

"""T1, T2, T8, T9 and T12: stopped, moved to other layouts, hung; and what a start refuses or says."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from megamug.configuration.reading import load_config
from megamug.data.pairs.loader import order_of
from megamug.data.pairs.text import train_tokenizer
from megamug.data.shards.sources import resolve_sources
from tests.reliability.conftest import traces
from tests.reliability.order_storm import storm
from tests.reliability.recipe import STEPS
from tests.training.runs import checkpoints, consumed, fingerprint, metrics

LAST = f"step-{STEPS:08d}"


def samples(ids: Path) -> dict[int, list[tuple[int, int]]]:
    """step -> sorted (epoch, sample) of all ranks."""
    found: dict[int, list] = {}
    for file in ids.glob("rank-*.jsonl"):
        for step, pairs in consumed(ids, int(file.stem[5:])).items():
            found.setdefault(step, []).extend(pairs)
    return {step: sorted(pairs) for step, pairs in found.items()}


def order(recipe: Path, steps: int) -> dict[int, list[tuple[int, int]]]:
    """The one global order, by step."""
    config = load_config(recipe)
    batch = config.data.global_batch_size
    _, epochs, indices = order_of(resolve_sources(config.data.train), config.seed).slice(0, steps * batch)
    pairs = list(zip(epochs.tolist(), indices.tolist(), strict=True))
    return {step: sorted(pairs[(step - 1) * batch : step * batch]) for step in range(1, steps + 1)}


@pytest.mark.parametrize("step", [2, 5], ids=["in warm-up", "between epochs"])
def test_t1_a_run_of_two_ranks_that_was_cut_ends_with_the_same_bits_and_samples(
    runs, recipe, undisturbed, tmp_path, step
):
    """T8 as well: SIGTERM to one rank in the middle of a step stops both after that step, with one checkpoint."""
    run = tmp_path / "run"
    stopped = runs.logged(run, tmp_path / "first", 2, "checkpoint.every=0", stop_step=step, stop_rank=1)
    assert [code for code, _ in stopped] == [3, 3], stopped
    assert checkpoints(run) == [step]
    results = runs.logged(run, tmp_path / "second", 2)
    assert [code for code, _ in results] == [0, 0], results
    assert fingerprint(run / "checkpoints" / LAST) == undisturbed
    first, second = samples(tmp_path / "first"), samples(tmp_path / "second")
    assert sorted(first) == list(range(1, step + 1)) and sorted(second) == list(range(step + 1, STEPS + 1))
    assert first | second == order(recipe, STEPS)


@pytest.mark.parametrize("at", ["begin", "shards", "commit"])
def test_t8_sigterm_to_one_rank_in_a_save_and_again_while_it_stops(runs, undisturbed, tmp_path, at):
    """The save of step 6 is finished; the run stops after step 7 at the latest, all ranks alike."""
    run, rank = tmp_path / "run", 0 if at in ("begin", "commit") else 1
    moments = [(6, at), (7, "shards"), (7, "written")]
    faults = [{"kind": "terminate", "rank": rank, "step": step, "at": moment} for step, moment in moments]
    results = runs.ranks(run, 2, faults=faults)
    assert [code for code, _ in results] == [3, 3], results
    assert checkpoints(run) == [6, 7]
    assert all(output.count("stopped on request after step 7") == 1 for _, output in results[:1])
    assert "already stopping" in results[rank][1] and "Traceback" not in "".join(output for _, output in results)
    assert [code for code, _ in runs.ranks(run, 2)] == [0, 0]
    assert fingerprint(run / "checkpoints" / LAST) == undisturbed


def test_t2_a_checkpoint_of_one_layout_goes_on_under_any_other(runs, tmp_path):
    """tests/distributed/test_state.py holds that gathered tensors keep their bits; here the next losses follow."""
    saved = tmp_path / "saved"
    assert [code for code, _ in runs.ranks(saved, 2, "parallel.tensor=2", "train.steps=6")] == [0, 0]
    layouts = {
        "one": (1, []), "data": (2, []), "pipeline": (2, ["parallel.pipeline=2"]),
        "tensor x pipeline": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    }  # fmt: skip
    losses = {}
    for name, (processes, layout) in layouts.items():
        run = tmp_path / name
        shutil.copytree(saved, run)
        results = runs.ranks(run, processes, *layout, "train.steps=9", "checkpoint.every=0")
        assert [code for code, _ in results] == [0] * processes, results
        assert "resuming after step 6 " in results[0][1]
        losses[name] = [record["loss"] for record in metrics(run)[0] if record["step"] > 6]
        assert losses[name] == pytest.approx(losses["one"], rel=1e-5), name
    assert len(losses["one"]) == 3


def test_t9_a_stopped_rank_is_noticed_within_the_limit_and_the_others_print_their_stacks(runs, tmp_path):
    began = time.monotonic()
    faults = [{"kind": "pause", "rank": 1, "step": 5, "seconds": 14}]
    results = runs.ranks(tmp_path / "run", 2, "parallel.timeout_minutes=0.1", faults=faults)
    assert [code for code, _ in results] == [1, 1], results
    log = (tmp_path / "run" / "log" / "rank-0.log").read_text()
    assert "watchdog: no step was finished for" in log and "in totals" in log, log[-3000:]  # where it waited
    assert time.monotonic() - began < 60
    assert traces(results) == []


def test_t9_a_rank_that_never_arrives_ends_the_others_within_the_limit(runs, tmp_path):
    began = time.monotonic()
    results = runs.ranks(tmp_path / "run", 2, "parallel.timeout_minutes=0.1",
                         faults=[{"kind": "absent", "rank": 1, "step": 0}])  # fmt: skip
    assert [code for code, _ in results] == [1, 9], results
    assert time.monotonic() - began < 30
    log = (tmp_path / "run" / "log" / "rank-0.log").read_text()
    assert "watchdog: no step was finished for" in log and "in start" in log, log[-3000:]  # in setup.start


def test_t12_two_one_and_four_replicas_take_the_one_order_in_turn(runs, recipe, tmp_path):
    """The legs end in mid-epoch (an epoch has five steps): nothing twice, nothing missing."""
    run, found = tmp_path / "run", {}
    for leg, (processes, stop) in enumerate([(2, 3), (1, 7), (4, None)]):
        hooks = {} if stop is None else {"stop_step": stop}
        results = runs.logged(run, tmp_path / str(leg), processes, **hooks)
        assert {code for code, _ in results} == {0 if stop is None else 3}, results
        own = samples(tmp_path / str(leg))
        assert not own.keys() & found.keys()
        found |= own
    assert found == order(recipe, STEPS)


def test_t12_the_order_survives_faults_and_rescales():
    """A thousand here; docs/reliability.md has a million."""
    told = storm(1000)
    assert told["kills"] > 700 and told["rescales"] > 500 and told["samples"] > 5000


@pytest.mark.parametrize("kind", ["remove", "held_out"], ids=["shard gone", "unreadable on one rank"])
def test_a_failing_validation_takes_nothing_with_it(runs, recipe, tmp_path, kind):
    """Without intermediate checkpoints the last one is the whole run."""
    run, config = tmp_path / "run", load_config(recipe)
    held = tmp_path / "heldout"
    shutil.copytree(config.data.validation, held)
    faults = [{"kind": kind, "rank": 1, "step": 6, "path": str(next(held.glob("*.tar")))}]
    results = runs.ranks(run, 2, f"data.validation={held}", "checkpoint.every=0", "train.validate_every=4",
                         faults=faults)  # fmt: skip
    assert [code for code, _ in results] == [0, 0], results
    assert checkpoints(run) == [STEPS]
    assert "no validation after step 8: " in results[0][1] and "training goes on" in results[0][1]
    assert [record["step"] for record in metrics(run)[1]] == [4]
    assert "Traceback" not in "".join(output for _, output in results), results


def test_the_same_command_twice_in_one_run_folder(runs, tmp_path):
    run, first = tmp_path / "run", []
    faults = [{"kind": "sleep", "rank": 0, "step": 2, "seconds": 5}]
    thread = threading.Thread(target=lambda: first.extend(runs.ranks(run, 1, faults=faults)))
    thread.start()
    while not (run / "metrics.jsonl").exists():
        assert thread.is_alive(), first  # it ended before its first step
        time.sleep(0.05)
    holder = json.loads((run / "run.lock").read_text())
    [(code, output)] = runs.ranks(run, 1)
    thread.join()
    assert code == 2 and "is in use by another run" in output, output
    assert f"(process {holder['pid']} on {holder['host']})" in output and holder["pid"] != os.getpid()
    assert [code for code, _ in first] == [0] and not (run / "run.lock").exists()
    assert [record["step"] for record in metrics(run)[0]] == list(range(1, STEPS + 1))


def test_what_changed_is_refused_or_said(runs, tmp_path):
    run, short = tmp_path / "run", "train.steps=3"
    assert runs.ranks(run, 1, short)[0][0] == 0
    [(code, output)] = runs.ranks(run, 1, "train.steps=6", "model.norm_pix_loss=true")
    assert code == 2 and "model.norm_pix_loss was False and is now True" in output, output
    [(code, output)] = runs.ranks(run, 1, "train.steps=6", "data.flip=false")
    assert code == 0, output
    (line,) = [line for line in output.splitlines() if line.startswith("the configuration changed after step 3: ")]
    assert "train.steps 3 -> 6" in line and "data.flip True -> False" in line
    assert load_config(run / "config-step-00000003.yaml").data.flip
    assert not load_config(run / "config.yaml").data.flip


def test_a_tokenizer_that_is_replaced_in_mid_run_is_found_at_the_next_start(runs, recipe, tmp_path):
    run, own, other = tmp_path / "run", tmp_path / "own.model", tmp_path / "other.model"
    shutil.copy(load_config(recipe).data.tokenizer, own)
    train_tokenizer(["quite other words", "a circle"] * 9, other, 330)
    faults = [{"kind": "replace", "rank": 0, "step": 2, "path": str(own), "with": str(other)}]
    assert runs.ranks(run, 1, f"data.tokenizer={own}", "train.steps=3", faults=faults)[0][0] == 0
    [(code, output)] = runs.ranks(run, 1, f"data.tokenizer={own}", "train.steps=6")
    assert code == 2 and "data.tokenizer: " in output and "holds a run with" in output, output

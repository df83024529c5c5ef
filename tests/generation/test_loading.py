"""Reading a run back: the weights that were saved, by whatever layout, or a sentence."""

import json

import pytest
import torch

from megamug.checkpoint.store import CheckpointStore
from megamug.configuration.reading import load_config, save_config
from megamug.errors import UserError
from megamug.generation.loading import load_run
from tests.distributed.launch import ROOT, launch
from tests.evaluate.tiny_run import STEP, make_data, make_run, tiny_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = make_data(tmp_path_factory.mktemp("inference"))
    return folder / "run", make_run(tiny_config(folder, folder / "run"))


def test_the_saved_weights_come_back_to_the_bit(saved):
    run_dir, weights = saved
    with load_run(run_dir) as run:
        loaded = dict(run.model.named_parameters())
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)
        assert not run.model.training and run.step == STEP == int(run.checkpoint.name[5:])
    assert not torch.distributed.is_initialized()
    with load_run(run_dir, STEP) as run:
        assert run.step == STEP


def test_a_run_of_two_tensor_parallel_stages_is_read_by_one_process(saved, tmp_path):
    from tests.distributed.cases.layout_worker import tiny

    options = {"parallel": {"tensor": 2, "sequence": True}, "model": {"caption_loss_weight": 0.0}}
    config = tiny(options)
    config.run_dir = str(tmp_path / "run")
    config.parallel.recompute, config.precision.layers = "full", "te"  # of the training machine, not of this one
    save_config(config)
    store = CheckpointStore(config.run_dir, keep=0)
    folder = store.begin(0)
    worker = str(ROOT / "tests" / "distributed" / "cases" / "layout_worker.py")
    results = launch([worker, json.dumps({**options, "steps": 0, "save": str(folder / "model")})], processes=2)
    assert [code for code, _ in results] == [0, 0], results
    (folder / "state.json").write_text(json.dumps({"step": 0, "identity": {"data.tokenizer": None}}))
    store.commit(0)
    with load_run(config.run_dir) as run:
        (fresh,) = run.task.build(run.world)  # initialisation does not know the layout
        expected = dict(fresh.named_parameters())
        for name, parameter in run.model.named_parameters():
            assert torch.equal(parameter, expected[name]), name


def test_what_cannot_be_read_is_told(saved, tmp_path, monkeypatch):
    run_dir, _ = saved

    def told(path, match, **options):
        with pytest.raises(UserError, match=match), load_run(path, **options):
            pass
        assert not torch.distributed.is_initialized()

    told(tmp_path, "not a run folder")
    told(run_dir, "no checkpoint of step 8", step=8)
    config = load_config(run_dir / "config.yaml")
    config.run_dir = str(tmp_path / "new")
    save_config(config)
    told(tmp_path / "new", "no complete checkpoint; train first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    told(run_dir, "without torchrun")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")

    state = run_dir / "checkpoints" / f"step-{STEP:08d}" / "state.json"
    before = state.read_text()
    state.write_text(before.replace("7", "8", 1))
    told(run_dir, "is damaged .*state.json", step=STEP)
    told(run_dir, "no complete checkpoint")
    state.write_text(before)


def test_another_tokenizer_is_refused(saved):
    from megamug.data.pairs.text import iterate_captions, train_tokenizer
    from megamug.data.shards.sources import resolve_sources

    run_dir, _ = saved
    path = run_dir.parent / "tokenizer.model"
    before = path.read_bytes()
    captions = iterate_captions(resolve_sources(str(run_dir.parent / "data" / "train")))
    train_tokenizer(captions, path, 300, overwrite=True)
    try:
        with pytest.raises(UserError, match="put the tokenizer of the run back"), load_run(run_dir):
            pass
    finally:
        path.write_bytes(before)

"""Fifty steps on real photographs at 224 pixels: cameras' JPEGs of many sizes, captions that people wrote.

The photographs are not part of the project: MEGAMUG_PHOTOS names a folder of shards, default ../shared/data/photos.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megamug import cli
from megamug.configuration.reading import to_yaml
from tests.distributed.launch import ROOT
from tests.evaluate.tiny_run import tiny_config
from tests.training.runs import checkpoints, consumed, hooked, metrics

STEPS, HALF, BATCH = 50, 25, 8
PHOTOS = Path(os.environ.get("MEGAMUG_PHOTOS") or ROOT.parent / "shared" / "data" / "photos")
SHARDS = sorted(PHOTOS.glob("*.tar"))

pytestmark = pytest.mark.skipif(not SHARDS, reason=f"no photographs: {PHOTOS} holds no shards; set MEGAMUG_PHOTOS")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """The shards by links, as their own folder is not written to; indexed; with a tokenizer of their captions."""
    from megamug.data.pairs.text import iterate_captions, train_tokenizer
    from megamug.data.shards.indexing import index_paths
    from megamug.data.shards.sources import resolve_sources

    folder = tmp_path_factory.mktemp("photos")
    (folder / "shards").mkdir()
    for shard in SHARDS:
        (folder / "shards" / shard.name).symlink_to(shard.resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGAMUG_INDEX_DIRECTORY", str(folder / "index"))
        reports = index_paths([folder / "shards"], processes=2)
    assert sum(report.samples for report in reports) >= BATCH * 2
    sources = resolve_sources(str(folder / "shards"))
    train_tokenizer(iterate_captions(sources), folder / "tokenizer.model", 700)
    return folder


def test_fifty_steps_on_photographs(photos, tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    config = tiny_config(photos, tmp_path / "run")
    config.model.__dict__.update(patch_size=16, width=64, ffn_width=128, text_width=64, norm_pix_loss=True)
    config.data.__dict__.update(
        train=str(photos / "shards"), validation=str(photos / "shards" / SHARDS[-1].name), image_size=224,
        caption_length=32, global_batch_size=BATCH, micro_batch_size=BATCH, validation_samples=BATCH, threads=2,
        crop_scale=[0.2, 1.0],
    )
    config.optimizer.__dict__.update(learning_rate=2e-3, warmup_steps=5)
    config.train.steps = STEPS
    config.log.__dict__.update(every=10, tensorboard=False)
    (tmp_path / "photos.yaml").write_text(to_yaml(config))
    command = ["train", str(tmp_path / "photos.yaml")]
    with hooked(ids=tmp_path / "ids", stop_step=HALF):
        assert cli.main(command) == 3
    assert checkpoints(tmp_path / "run") == [HALF]
    with hooked(ids=tmp_path / "ids"):
        assert cli.main(command) == 0

    assert list(consumed(tmp_path / "ids")) == list(range(1, STEPS + 1))  # nothing twice
    steps, (validation,) = metrics(tmp_path / "run")
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert not any(record["skipped"] or record["data_failures"] for record in steps)
    for name in ("image_loss", "caption_loss"):
        first, last = (sum(record[name] for record in part) / 10 for part in (steps[:10], steps[-10:]))
        assert last < first, f"{name} goes from {first} to {last}"
    assert steps[-1]["caption_loss"] < 0.9 * steps[0]["caption_loss"]
    assert validation["validation"]["samples"] == BATCH
    assert (tmp_path / "run" / "pictures" / f"step-{STEPS:08d}.png").is_file()

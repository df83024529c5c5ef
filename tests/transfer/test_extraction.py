"""Features of shards: those of each image alone, in the shards' order, whoever makes them, however often stopped."""

from __future__ import annotations

import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megamug import cli
from megamug.data.dali import CropDecoder
from megamug.data.pairs.images import centre_squares
from megamug.data.shards.indexing import index_paths
from megamug.data.shards.sources import resolve_sources
from megamug.durable import write_atomically
from megamug.errors import UserError
from megamug.transfer import extraction, stored
from megamug.transfer.encoder import load_encoder
from megamug.transfer.extraction import extract
from tests.data.conftest import write_tar
from tests.transfer.common import SIZE, photograph, write_encoder

COUNT = 23


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    folder.mkdir()
    for name, numbers in (("a", range(15)), ("b", range(15, COUNT))):
        members = []
        for i in numbers:
            members += [(f"{i:03d}.jpg", photograph(40 + i, 60 - i, seed=i)), (f"{i:03d}.txt", f"picture {i}".encode())]
            members += [(f"{i:03d}.cls", str(i % 4).encode())]
        write_tar(folder / f"{name}.tar", members)
    index_paths([folder])
    return folder


@pytest.fixture(scope="module")
def expected(run):
    """The mean features of each image alone."""
    encoder, rows = load_encoder(run), []
    decoder = CropDecoder(SIZE, 1, 1, torch.device("cpu"))
    for i in range(COUNT):
        square = centre_squares(np.array([40 + i]), np.array([60 - i]), 0.875)
        rows.append(encoder(decoder([photograph(40 + i, 60 - i, seed=i)], square, np.zeros(1, bool))).mean)
    return torch.cat(rows)


def features(run, shards, output, *words: str) -> int:
    return cli.main(["features", str(run), "--data", str(shards), "--output", str(output), "--batch", "4", *words])


def test_features_are_those_of_each_image_alone(run, shards, expected, tmp_path, capsys):
    assert features(run, shards, tmp_path / "f.safetensors", "--layers", "0", "-1") == 0
    err = capsys.readouterr().err
    assert "class_token, mean, layer_0, layer_2 of 23 images, 32 numbers each; 23 with a label" in err
    found = load_file(tmp_path / "f.safetensors")
    assert (found["mean"] - expected).abs().max() < 1e-5
    assert found["labels"].tolist() == [i % 4 for i in range(COUNT)]
    lines = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert lines[16] == {"shard": "b.tar", "key": "016", "label": 0, "caption": "picture 16"}
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob(".*"))
    assert features(run, shards, tmp_path / "f.npz") == 0
    arrays = np.load(tmp_path / "f.npz")
    assert np.array_equal(arrays["mean"], found["mean"].numpy())
    kept = {name: stored.texts(tmp_path / "f.npz", name) for name in ("keys", "captions")}
    assert kept["keys"] == [f"{line['shard']}: {line['key']}" for line in lines]
    assert kept["captions"] == [line["caption"] for line in lines]
    for name in ("f.safetensors", "f.npz"):
        kept = stored.read(tmp_path / name)
        assert torch.equal(kept.labelled("mean")[0], found["mean"]) and kept.settings["images"] == COUNT


def test_a_long_caption_costs_its_own_length(tmp_path):
    """And not that length for every row; texts of any script come back, empty ones too."""
    captions = ["a", "", "é\U0001f431\n" * 2000, "b"] * 50
    save_file({"rows": torch.arange(200), "mean": torch.ones(200, 2)}, tmp_path / "part.safetensors")
    stored.write(
        tmp_path / "f.npz", [tmp_path / "part.safetensors"], {"images": 200},
        lambda row: {"shard": "s.tar", "key": f"{row}", "label": None, "caption": captions[row]},
    )  # fmt: skip
    assert stored.texts(tmp_path / "f.npz", "captions") == captions
    assert stored.texts(tmp_path / "f.npz", "keys")[7] == "s.tar: 7"
    bytes_of_them = len("".join(captions).encode())
    assert bytes_of_them < (tmp_path / "f.npz").stat().st_size < bytes_of_them + 30_000
    assert set(stored.read(tmp_path / "f.npz").tensors) == {"mean"}
    arrays = dict(np.load(tmp_path / "f.npz"))  # no pickle is needed
    arrays["captions_starts"][3] = -1
    np.savez(tmp_path / "f.npz", **arrays)
    for name in ("captions", "titles"):
        with pytest.raises(UserError, match=f"has no {name} that can be read"):
            stored.texts(tmp_path / "f.npz", name)


def test_several_processes_share_the_images_and_a_stopped_run_goes_on(run, shards, expected, tmp_path, monkeypatch):
    encoder, output = load_encoder(run), tmp_path / "f.safetensors"
    sources = resolve_sources(str(shards))
    written: list[str] = []
    monkeypatch.setattr(extraction, "write_atomically", _counting(written, stop_at=2))
    with pytest.raises(KeyboardInterrupt):
        extract(encoder, sources, output, batch=3, chunk=5)
    assert len(written) == 2 and not output.exists()
    with pytest.raises(UserError, match="parts of another extraction .other share"):
        extract(encoder, sources, output, batch=3, chunk=5, share=1.0)
    monkeypatch.setattr(extraction, "write_atomically", _counting(written))
    others = resolve_sources(str(shards))  # as another process opens them
    other = threading.Thread(target=lambda: extract(load_encoder(run), others, output, chunk=5, rank=1, size=2))
    other.start()
    summary = extract(encoder, sources, output, batch=3, chunk=5, size=2)
    other.join()
    assert sorted(written) == [f"chunk-{n:06d}.safetensors" for n in range(5)]  # each once
    assert summary.images == COUNT and (load_file(output)["mean"] - expected).abs().max() < 1e-5


def test_more_processes_than_chunks_and_a_second_start(run, shards, tmp_path, monkeypatch, capsys):
    """Who comes when all is put together finds it done; parts that nobody describes are not believed."""
    sources, output = resolve_sources(str(shards)), tmp_path / "f.safetensors"
    (tmp_path / "f.safetensors.parts").mkdir()
    (tmp_path / "f.safetensors.parts" / "chunk-000000.safetensors").write_bytes(b"another's")
    assert extract(load_encoder(run), sources, output, size=4).images == COUNT
    before = output.read_bytes()
    for rank in (1, 3, 0):
        assert extract(load_encoder(run), sources, output, rank=rank, size=4) is None
    assert features(run, shards, output, "--batch", "9") == 0
    assert "holds these features already" in capsys.readouterr().err
    assert features(run, shards, output, "--share", "1") == 0 and output.read_bytes() != before
    output.with_suffix(".jsonl").unlink()
    assert features(run, shards, output, "--share", "1") == 0 and output.with_suffix(".jsonl").is_file()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "x")
    assert features(run, shards, output) == 2 and "RANK is 'x'" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["data.std=[0.5,0.5,0.5]", "model.heads=2", "data.background=[0,0,0]"])
def test_what_else_the_same_parameters_compute_with_is_another_encoder(run, tmp_path, key):
    from megamug.transfer.extraction import _fingerprint

    assert _fingerprint(load_encoder(write_encoder(tmp_path / "run", key))) != _fingerprint(load_encoder(run))


def test_transparency_is_over_the_background_of_the_run(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "a.tar", [("0.png", photograph(40, 40, mode="RGBA", kind="PNG")), ("0.cls", b"0")])
    index_paths([folder])
    run = write_encoder(tmp_path / "run", "data.background=[0,0,255]")
    assert features(run, folder, tmp_path / "f.npz") == 0
    encoder = load_encoder(run)
    expected = encoder(encoder.preprocess(photograph(40, 40, mode="RGBA", kind="PNG"))).mean
    white = load_encoder(write_encoder(tmp_path / "white"))
    other = white(white.preprocess(photograph(40, 40, mode="RGBA", kind="PNG"))).mean
    found = stored.read(tmp_path / "f.npz").tensors["mean"]
    assert (found - expected).norm() < 0.2 * (other - expected).norm()


def _counting(written: list[str], stop_at: int | None = None):
    def write(path, *parts):
        if len(written) == stop_at:
            raise KeyboardInterrupt
        written.append(path.name)
        write_atomically(path, *parts)

    return write


def test_an_image_that_is_damaged_meanwhile_is_left_out_and_told(run, shards, tmp_path, capsys, monkeypatch):
    shutil.copytree(shards, tmp_path / "copy")
    path, jpeg = tmp_path / "copy" / "a.tar", photograph(43, 57, seed=3)

    def opened_and_then_damaged(*words):
        sources = resolve_sources(*words)
        with open(path, "r+b") as file:
            file.seek(file.read().index(jpeg))
            file.write(bytes(len(jpeg)))
        return sources

    monkeypatch.setattr("megamug.data.shards.sources.resolve_sources", opened_and_then_damaged)
    assert features(run, tmp_path / "copy", tmp_path / "f.safetensors") == 0
    err = capsys.readouterr().err
    assert "22 images" in err and "left out: 1 image that did not decode" in err and "is not what was indexed" in err
    keys = [json.loads(line)["key"] for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert keys == [f"{i:03d}" for i in range(COUNT) if i != 3]


def test_mistakes_are_told_before_anything_is_written(run, shards, tmp_path, capsys):
    def refused(match: str, output="f.npz", data=shards, path=run, words=()):
        assert features(path, data, tmp_path / output, *words) == 2
        assert match in capsys.readouterr().err
        assert os.listdir(tmp_path) == []

    refused("a name that ends in .safetensors or .npz", output="f.pt")
    refused("/absent", data=tmp_path / "absent")
    refused("does not exist", path=tmp_path / "run")
    refused("no block 7; there are 0 to 2", words=["--layers", "7"])
    refused("multiple of the patch size", words=["--image-size", "33"])
    refused("must be above 0 and at most 1", words=["--share", "1.5"])
